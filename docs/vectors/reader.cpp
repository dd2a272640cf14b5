// Reads kvcluster's test vectors and verifies four operations by an implementation of its own. Copy what you need.
//
//     c++ -std=c++17 -O2 -ffp-contract=off -Wall -Wextra -Werror reader.cpp -o reader && ./reader FOLDER
//
// Similarity and merge must give every bit, attention must be within the stored bound. Exit status: 0 all hold,
// 1 some differ, 2 cannot run. For little-endian machines; compile without -ffast-math, it changes the bits.

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <functional>
#include <iterator>
#include <map>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

// ---- JSON, as far as it is used here: no escapes in strings ------------------------------------------------------

struct Json {  // true, false and null are read and forgotten
    double number = 0;
    std::string text;
    std::vector<Json> items;
    std::map<std::string, Json> members;

    const Json& operator[](const std::string& name) const {
        if (!members.count(name)) throw std::runtime_error("no \"" + name + "\" in the JSON");
        return members.at(name);
    }
};

class JsonParser {
    const char *at, *end;

    bool take(char wanted) {  // the next character that is not a space
        while (at < end && std::isspace(static_cast<unsigned char>(*at))) at++;
        if (at == end || *at != wanted) return false;
        at++;
        return true;
    }
    void expect(char wanted) {
        if (!take(wanted)) throw std::runtime_error(std::string("bad JSON, no ") + wanted);
    }
    std::string rest_of_string() {
        std::string text;
        while (at < end && *at != '"') {
            if (*at == '\\') throw std::runtime_error("bad JSON: an escape");
            text += *at++;
        }
        expect('"');
        return text;
    }

public:
    explicit JsonParser(const std::string& text) : at(text.data()), end(text.data() + text.size()) {}

    Json parse() {
        Json json;
        if (take('{')) {
            while (!take('}')) {
                if (!json.members.empty()) expect(',');
                expect('"');
                const std::string name = rest_of_string();
                expect(':');
                json.members[name] = parse();
            }
        } else if (take('[')) {
            while (!take(']')) {
                if (!json.items.empty()) expect(',');
                json.items.push_back(parse());
            }
        } else if (take('"')) {
            json.text = rest_of_string();
        } else {
            std::string word;
            while (at < end && !std::strchr(",]} \n", *at)) word += *at++;
            if (word.empty()) throw std::runtime_error("bad JSON: no value");
            json.number = std::strtod(word.c_str(), nullptr);
        }
        return json;
    }
};

// ---- safetensors: 8 bytes with the length of the header, the header in JSON, the arrays ---------------------------

struct Tensor {
    std::string dtype;  // F16, BF16, F32, F64 or I64
    std::vector<size_t> shape;
    std::string bytes;  // little-endian, the last axis runs fastest

    size_t axis(size_t from_last) const { return shape.at(shape.size() - from_last); }
    size_t lead(size_t axes) const {  // how many there are of the last `axes` axes
        return std::accumulate(shape.begin(), shape.end() - static_cast<long>(axes), size_t{1}, std::multiplies<>());
    }
    size_t size() const { return lead(0); }

    template <class Number>
    std::vector<Number> numbers() const {
        std::vector<Number> result(size());
        if (bytes.size()) std::memcpy(result.data(), bytes.data(), bytes.size());
        return result;
    }
};

using File = std::map<std::string, Tensor>;

std::string read_whole(const std::string& path) {
    std::ifstream stream(path, std::ios::binary);
    if (!stream) throw std::runtime_error("cannot open " + path);
    return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

File read_safetensors(const std::string& path) {
    static const std::map<std::string, size_t> widths = {{"F16", 2}, {"BF16", 2}, {"F32", 4}, {"F64", 8}, {"I64", 8}};
    const std::string content = read_whole(path);
    uint64_t length = 0;
    if (content.size() >= 8) std::memcpy(&length, content.data(), 8);
    if (content.size() < 8 || length > content.size() - 8) throw std::runtime_error("no safetensors file: " + path);
    const std::string header = content.substr(8, length), data = content.substr(8 + length);
    File file;
    for (const auto& [name, entry] : JsonParser(header).parse().members) {
        if (name == "__metadata__") continue;
        Tensor tensor;
        tensor.dtype = entry["dtype"].text;
        for (const Json& axis : entry["shape"].items) tensor.shape.push_back(static_cast<size_t>(axis.number));
        const auto& offsets = entry["data_offsets"].items;
        const auto begin = static_cast<size_t>(offsets.at(0).number), stop = static_cast<size_t>(offsets.at(1).number);
        if (begin > stop || stop > data.size() || stop - begin != tensor.size() * widths.at(tensor.dtype))
            throw std::runtime_error(path + ": the header is wrong about " + name);
        tensor.bytes = data.substr(begin, stop - begin);
        file[name] = tensor;
    }
    return file;
}

// 16 bits as sign, exponent and fraction: 5 and 10 of them in float16, 8 and 7 in bfloat16; no infinity, no NaN.
double from_16_bits(uint16_t bits, int fraction_bits) {
    const int one = 1 << fraction_bits, bias = (1 << (14 - fraction_bits)) - 1;
    const int fraction = bits % one, exponent = bits % 32768 / one;
    const double size = std::ldexp(exponent ? one + fraction : fraction, std::max(exponent, 1) - bias - fraction_bits);
    return bits >> 15 ? -size : size;
}

// Numbers of any dtype as double, which holds them all exactly.
std::vector<double> doubles(const Tensor& tensor) {
    if (tensor.dtype == "F64") return tensor.numbers<double>();
    std::vector<double> result;
    if (tensor.dtype == "F32")
        for (float number : tensor.numbers<float>()) result.push_back(number);
    else if (tensor.dtype == "I64")
        for (int64_t number : tensor.numbers<int64_t>()) result.push_back(static_cast<double>(number));
    else
        for (uint16_t bits : tensor.numbers<uint16_t>())
            result.push_back(from_16_bits(bits, tensor.dtype == "F16" ? 10 : 7));
    return result;
}

// ---- The operations ----------------------------------------------------------------------------------------------

// Sum of a[i] * b[i] in the one order that counts: pad with zeros to a power of two, add halves until one is left.
double halving_dot(const double* a, const double* b, size_t dim) {
    size_t half = 1;
    while (half < dim) half *= 2;
    std::vector<double> terms(half, 0.0);
    for (size_t i = 0; i < dim; i++) terms[i] = a[i] * b[i];
    while (half > 1) {
        half /= 2;
        for (size_t i = 0; i < half; i++) terms[i] += terms[half + i];
    }
    return terms[0];
}

std::vector<double> similarity(const Tensor& a, const Tensor& b) {
    const size_t rows = a.axis(2), columns = b.axis(2), dim = a.axis(1);
    const std::vector<double> left = doubles(a), right = doubles(b);
    std::vector<double> result;
    for (size_t problem = 0; problem < a.lead(2); problem++)
        for (size_t i = 0; i < rows; i++)
            for (size_t j = 0; j < columns; j++) {
                const double *x = &left[(problem * rows + i) * dim], *y = &right[(problem * columns + j) * dim];
                const double dot = halving_dot(x, y, dim);
                const double norms = halving_dot(x, x, dim) * halving_dot(y, y, dim);
                result.push_back(norms == 0 ? 0.0 : dot * std::fabs(dot) / norms);
            }
    return result;
}

// Members are added in token order, starting from -0.0, which alone changes no number; rounded once, to float.
std::vector<float> merge(const Tensor& array, const Tensor& labels, const Tensor& counts) {
    const size_t tokens = array.axis(2), dim = array.axis(1), entries = counts.axis(1);
    const std::vector<double> rows = doubles(array), count = doubles(counts);
    const std::vector<int64_t> label = labels.numbers<int64_t>();
    std::vector<double> sums(count.size() * dim, -0.0);
    for (size_t token = 0; token < label.size(); token++) {
        const size_t entry = token / tokens * entries + static_cast<size_t>(label[token]);
        for (size_t i = 0; i < dim; i++) sums.at(entry * dim + i) += rows[token * dim + i];
    }
    std::vector<float> result(sums.size());
    for (size_t i = 0; i < sums.size(); i++) result[i] = static_cast<float>(sums[i] / count[i / dim]);
    return result;
}

// softmax(scale * query . key + log(count)) @ values; without counts, all are 1.
std::vector<double> attention(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor* counts,
                              double scale) {
    const size_t queries = query.axis(2), entries = keys.axis(2), dim = keys.axis(1), dim_value = values.axis(1);
    const std::vector<double> q = doubles(query), k = doubles(keys), v = doubles(values);
    const std::vector<double> count = counts ? doubles(*counts) : std::vector<double>(keys.lead(1), 1.0);
    std::vector<double> result(query.lead(1) * dim_value, 0.0), weights(entries);
    for (size_t row = 0; row < query.lead(1); row++) {
        const size_t first = row / queries * entries;  // of this problem's entries
        for (size_t j = 0; j < entries; j++)
            weights[j] = scale * halving_dot(&q[row * dim], &k[(first + j) * dim], dim) + std::log(count[first + j]);
        const double highest = *std::max_element(weights.begin(), weights.end());
        double sum = 0;
        for (double& weight : weights) sum += weight = std::exp(weight - highest);
        for (size_t j = 0; j < entries; j++)
            for (size_t i = 0; i < dim_value; i++)
                result[row * dim_value + i] += weights[j] / sum * v[(first + j) * dim_value + i];
    }
    return result;
}

// ---- Comparing ---------------------------------------------------------------------------------------------------

template <class Number>
bool same_bits(const std::vector<Number>& mine, const Tensor& right, const std::string& dtype) {
    return right.dtype == dtype && mine.size() == right.size() &&
           (mine.empty() || std::memcmp(mine.data(), right.bytes.data(), right.bytes.size()) == 0);
}

bool within_bound(const std::vector<double>& mine, const Tensor& oracle, const Tensor& bound) {
    const std::vector<double> right = doubles(oracle), allowed = doubles(bound);
    if (mine.size() != right.size() || allowed.size() != oracle.lead(2)) return false;
    const size_t each = oracle.axis(2) * oracle.axis(1);
    for (size_t i = 0; i < mine.size(); i++)
        if (!(std::fabs(mine[i] - right[i]) <= allowed[i / each])) return false;
    return true;
}

bool holds(const Json& test, const File& file) {
    const std::string &operation = test["operation"].text, name = test["name"].text;
    auto in = [&](const char* array) -> const Tensor& { return file.at(name + "/in/" + array); };
    auto out = [&](const char* array) -> const Tensor& { return file.at(name + "/out/" + array); };
    if (operation == "similarity") return same_bits(similarity(in("a"), in("b")), out("similarity"), "F64");
    if (operation == "merge") return same_bits(merge(in("array"), in("labels"), in("counts")), out("centroids"), "F32");
    const Json& parameters = test["parameters"];
    const bool has_scale = parameters.members.count("scale") > 0;
    const double scale = has_scale ? parameters["scale"].number : 1 / std::sqrt(in("query").axis(1));
    const Tensor* counts = operation == "attention" ? nullptr : &in("counts");
    return within_bound(attention(in("query"), in("keys"), in("values"), counts, scale), out("output"), out("bound"));
}

int main(int count, char** arguments) try {
    if (count != 2) throw std::runtime_error("usage: reader FOLDER");
    const std::string folder = arguments[1], text = read_whole(folder + "/manifest.json");
    const Json manifest = JsonParser(text).parse();
    if (manifest["arithmetic_contract"].number != 1) throw std::runtime_error("another arithmetic contract");
    bool is_right = true;
    for (const std::string operation : {"similarity", "merge", "attention", "clustered_attention"}) {
        const File file = read_safetensors(folder + "/" + operation + ".safetensors");
        int cases = 0, held = 0;
        for (const Json& test : manifest["cases"].items) {
            if (test["operation"].text != operation) continue;
            cases++;
            if (holds(test, file)) held++;
            else std::printf("%s %s differs\n", operation.c_str(), test["name"].text.c_str());
        }
        std::printf("%-20s %3d of %3d cases hold\n", operation.c_str(), held, cases);
        is_right = is_right && cases > 0 && held == cases;
    }
    return is_right ? 0 : 1;
} catch (const std::exception& error) {
    std::fprintf(stderr, "reader: %s\n", error.what());
    return 2;
}
