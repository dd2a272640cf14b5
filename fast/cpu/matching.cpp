// Chunked soft matching and merging on a processor, with the bits of kvcluster.reference.soft_matching and .merging.
//
// A chunk stays in the processor's cache from its first cosine to its last mean. Cosines in float32 settle nearly every
// match: claim E4 of kvcluster.theory bounds their error, for products of keys as they are, scaled afterwards. What they
// leave open, canonical similarities settle; products of two floats are exact in float64, so that a fused multiply-add
// gives the same bits.

#include "vectors.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

constexpr int WIDTH = LANES / 2;       // numbers of a register in float64
constexpr int TILE = 3;                // sources that share the destinations they read; their sums fill the registers
constexpr int64_t BLOCK = 32;          // destinations that stay in the first cache while sources pass
constexpr int64_t RANGE = 96;          // sources of one task, where a chunk is shared by all threads
constexpr int64_t LARGE_CHUNK = 2048;  // tokens from which on it is, if chunks are fewer than threads
constexpr int64_t ENTRIES = 64;        // of one task of merging
constexpr int64_t MAX_DIM = 8192;      // as far as claim E4 is proved
constexpr float SAFE_NORM[2] = {0x1p-40f, 0x1p40f};

typedef double Doubles __attribute__((vector_size(8 * WIDTH)));
typedef float HalfOfFloats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints4 __attribute__((vector_size(16)));

struct Shape {
    int64_t heads, chunks, size, target, threads;  // chunks of a head
};

// Where an array (..., tokens, dim) lies whose features are side by side, in elements.
struct Layout {
    int64_t dim, token, n_lead;
    const int64_t* lead;  // length and stride of each leading axis

    explicit Layout(const int64_t* numbers) : dim(numbers[0]), token(numbers[1]), n_lead(numbers[2]), lead(numbers + 3) {}
    int64_t first_of(int64_t head) const {
        int64_t first = 0;
        for (int64_t axis = n_lead - 1; axis >= 0; head /= lead[2 * axis--])
            first += head % lead[2 * axis] * lead[2 * axis + 1];
        return first;
    }
};

inline Doubles widened(const float* at) {
    HalfOfFloats x;
    std::memcpy(&x, at, sizeof x);
    return __builtin_convertvector(x, Doubles);
}

// Up to LANES elements, then zeros.
template <class Element>
inline Floats load_some(const Element* at, int64_t n) {
    if (n >= LANES) return load(at);
    Element row[LANES] = {};
    std::memcpy(row, at, n * sizeof *at);
    return load(row);
}

// Products of every `stride`-th register of two rows, n of them, a power of two, added as a halving sum adds them.
template <int N>
__attribute__((always_inline)) inline Doubles products(const float* a, const float* b, int64_t stride) {
    if constexpr (N == 1) return widened(a) * widened(b);
    else return products<N / 2>(a, b, 2 * stride) + products<N / 2>(a + stride, b + stride, 2 * stride);
}

Doubles products(const float* a, const float* b, int64_t n, int64_t stride) {
    if (n == 2) return products<2>(a, b, stride);
    if (n == 4) return products<4>(a, b, stride);
    if (n == 8) return products<8>(a, b, stride);
    if (n == 16) return products<16>(a, b, stride);
    return products(a, b, n / 2, 2 * stride) + products(a + stride, b + stride, n / 2, 2 * stride);
}

// The canonical dot product of two rows of `padded` numbers.
double dot(const float* a, const float* b, int64_t padded) {
    const Doubles x = products(a, b, padded / WIDTH, WIDTH);
    double lanes[WIDTH];
    std::memcpy(lanes, &x, sizeof x);
    for (int half = WIDTH / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
    return lanes[0];
}

// The two highest cosines of a source in each lane, and where the highest one is.
struct Best {
    Floats4 first, second;
    Ints4 place;
};

// What is known of the match of a source; a similarity only where `is_scored`.
struct Match {
    int32_t destination;
    bool is_scored;
    float cosine;
    double similarity;
};

// What one thread needs for one chunk: its entries, padded with zeros to a power of two, and what is decided of them.
struct Chunk {
    int64_t padded = LANES;  // numbers of a row
    bool is_safe, has_norms;
    std::vector<Floats> rows;
    std::vector<float> inverse_norms;  // of destinations, then of sources
    std::vector<double> norms;
    std::vector<Best> best;
    std::vector<Match> matches;
    std::vector<int32_t> order, joined, begins, members;

    Chunk(int64_t size, int64_t dim) {
        while (padded < dim) padded *= 2;
        rows.resize(size * padded / LANES);
        inverse_norms.resize(size + 4);
        norms.resize(size);
        best.resize(size / 2 + 1);
        matches.resize(size / 2 + 1);
        order.resize(size / 2 + 1);
        joined.resize(size);
        begins.resize(size + 1);
        members.resize(size);
    }
    float* row(int64_t entry) { return reinterpret_cast<float*>(rows.data()) + entry * padded; }
    const float* row(int64_t entry) const { return reinterpret_cast<const float*>(rows.data()) + entry * padded; }
};

// Norms of all entries in float32: of destinations, 4 of which are used together, then of sources.
void measure(int64_t size, int64_t dim, Chunk& c) {
    c.is_safe = dim <= MAX_DIM;
    c.has_norms = false;
    const int64_t n_destinations = size / 2, after = (n_destinations + 3) / 4 * 4;
    for (int64_t j = n_destinations; j < after; j++) c.inverse_norms[j] = NAN;  // no cosine is higher or lower
    for (int64_t entry = 0; entry < size; entry++) {
        const float* row = c.row(entry);
        Floats squares = {};
        for (int64_t d = 0; d < dim; d += LANES) squares += load(row + d) * load(row + d);
        const float norm = std::sqrt(sum(squares));
        c.is_safe = c.is_safe && norm > SAFE_NORM[0] && norm < SAFE_NORM[1];
        c.inverse_norms[entry % 2 == 1 ? entry / 2 : after + entry / 2] = 1 / norm;
    }
}

// Cosines of N sources from `i` on and the destinations from `from` to `to`, taken into what is best.
template <int N>
void filter(int64_t i, int64_t from, int64_t to, int64_t n_destinations, int64_t dim, Chunk& c) {
    const float* inverse_norms = &c.inverse_norms[(n_destinations + 3) / 4 * 4 + i];
    Best best[N];
    std::copy(&c.best[i], &c.best[i] + N, best);
    for (int64_t j = from; j < to; j += 4) {
        const float *sources = c.row(2 * i), *destinations[4];
        for (int k = 0; k < 4; k++) destinations[k] = c.row(2 * std::min(j + k, n_destinations - 1) + 1);
        Floats dots[N][4] = {};
        for (int64_t d = 0; d < dim; d += LANES) {
            Floats x[N];
#pragma GCC unroll 4
            for (int r = 0; r < N; r++) x[r] = load(sources + 2 * r * c.padded + d);
#pragma GCC unroll 4
            for (int k = 0; k < 4; k++) {
                const Floats y = load(destinations[k] + d);
#pragma GCC unroll 4
                for (int r = 0; r < N; r++) dots[r][k] += x[r] * y;
            }
        }
        Floats4 scale;
        std::memcpy(&scale, &c.inverse_norms[j], sizeof scale);
        const Ints4 places = Ints4{0, 1, 2, 3} + static_cast<int32_t>(j);
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) {
            const Floats4 cosines = sums(dots[r][0], dots[r][1], dots[r][2], dots[r][3]) * inverse_norms[r] * scale;
            const Ints4 is_first = cosines > best[r].first, is_second = cosines > best[r].second;
            best[r].second = is_first ? best[r].first : is_second ? cosines : best[r].second;
            best[r].first = is_first ? cosines : best[r].first;
            best[r].place = is_first ? places : best[r].place;
        }
    }
    std::copy(best, best + N, &c.best[i]);
}

double similarity(int64_t a, int64_t b, const Chunk& c) {
    const double product = dot(c.row(a), c.row(b), c.padded), norms = c.norms[a] * c.norms[b];
    return norms == 0.0 ? 0.0 : product * std::fabs(product) / norms;
}

void take_norms(int64_t size, Chunk& c) {
    if (!c.has_norms)
        for (int64_t entry = 0; entry < size; entry++) c.norms[entry] = dot(c.row(entry), c.row(entry), c.padded);
    c.has_norms = true;
}

// The matches of sources `first` to `last`, by cosines where these settle them.
void match_sources(int64_t first, int64_t last, int64_t n_destinations, int64_t dim, float lead, Chunk& c) {
    const Floats4 lowest = Floats4{} - INFINITY;
    std::fill(&c.best[first], &c.best[first] + (last - first), Best{lowest, lowest, Ints4{}});
    for (int64_t from = 0; from < n_destinations; from += BLOCK) {
        const int64_t to = std::min(from + BLOCK, n_destinations);
        int64_t i = first;
        for (; i + TILE <= last; i += TILE) filter<TILE>(i, from, to, n_destinations, dim, c);
        for (; i < last; i++) filter<1>(i, from, to, n_destinations, dim, c);
    }
    for (int64_t i = first; i < last; i++) {
        const Best& best = c.best[i];
        Match& match = c.matches[i];
        float second = -INFINITY;
        match.cosine = -INFINITY;
        for (int lane = 0; lane < 4; lane++) {
            second = std::max({second, best.second[lane], std::min(best.first[lane], match.cosine)});
            if (best.first[lane] > match.cosine) {
                match.cosine = best.first[lane];
                match.destination = best.place[lane];
            }
        }
        match.is_scored = !(second < match.cosine - lead);
    }
}

// The destination of highest canonical similarity, of ties the first, for a source that the cosines leave open.
void settle(int64_t i, int64_t n_destinations, Chunk& c) {
    Match& match = c.matches[i];
    match.is_scored = true;
    match.similarity = -INFINITY;
    match.destination = 0;
    for (int64_t j = 0; j < n_destinations; j++) {
        const double found = similarity(2 * i, 2 * j + 1, c);
        if (found > match.similarity) {
            match.similarity = found;
            match.destination = static_cast<int32_t>(j);
        }
    }
}

// The best destination of each source. How many needed canonical similarities is added to `n_scored`.
void match(int64_t size, int64_t dim, int64_t threads, Chunk& c) {
    const int64_t n_sources = (size + 1) / 2, n_destinations = size / 2;
    const float lead = (4.0f * dim + 72) * 0x1p-24f;
    measure(size, dim, c);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t first = 0; first < n_sources; first += RANGE) {
        const int64_t last = std::min(first + RANGE, n_sources);
        if (c.is_safe) match_sources(first, last, n_destinations, dim, lead, c);
        else for (int64_t i = first; i < last; i++) c.matches[i].is_scored = true;
    }
    bool any = false;
    for (int64_t i = 0; i < n_sources; i++) any = any || c.matches[i].is_scored;
    if (!any) return;
    take_norms(size, c);
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
    for (int64_t i = 0; i < n_sources; i++)
        if (c.matches[i].is_scored) settle(i, n_destinations, c);
}

// Puts the `n_merged` best sources first in `order`; of ties, the first.
void cut(int64_t size, int64_t n_merged, int64_t dim, Chunk& c) {
    const int64_t n_sources = (size + 1) / 2;
    const float lead = (4.0f * dim + 72) * 0x1p-24f;
    for (int64_t i = 0; i < n_sources; i++) c.order[i] = static_cast<int32_t>(i);
    if (n_merged == n_sources) return;
    const auto begin = c.order.begin(), middle = begin + n_merged, end = begin + n_sources;
    if (c.is_safe) {
        const auto is_closer = [&](int32_t a, int32_t b) { return c.matches[a].cosine > c.matches[b].cosine; };
        std::nth_element(begin, middle, end, is_closer);  // *middle is the first that is left out
        const int32_t last_in = *std::max_element(begin, middle, is_closer);
        if (c.matches[last_in].cosine - c.matches[*middle].cosine > lead) return;
    }
    take_norms(size, c);
    for (int64_t i = 0; i < n_sources; i++) {
        Match& match = c.matches[i];
        if (!match.is_scored) match.similarity = similarity(2 * i, 2 * match.destination + 1, c);
        match.is_scored = true;
    }
    std::nth_element(begin, middle, end, [&](int32_t a, int32_t b) {
        const double similar_a = c.matches[a].similarity, similar_b = c.matches[b].similarity;
        return similar_a != similar_b ? similar_a > similar_b : a < b;
    });
}

// New entry of each old one, in `joined`, after the first `n_merged` sources of `order` have joined their destinations.
void join(int64_t size, int64_t n_merged, Chunk& c) {
    std::fill(c.joined.begin(), c.joined.begin() + size, -1);
    for (int64_t i = 0; i < n_merged; i++) c.joined[2 * c.order[i]] = 2 * c.matches[c.order[i]].destination + 1;
    int32_t n_left = 0;  // those that stay are numbered again, in their old order
    for (int64_t entry = 0; entry < size; entry++)
        if (c.joined[entry] < 0) c.begins[entry] = n_left++;
    for (int64_t entry = 0; entry < size; entry++)
        c.joined[entry] = c.begins[c.joined[entry] < 0 ? entry : c.joined[entry]];
}

// The tokens of each entry, one entry after the other, ascending in each; entry e's begin at `begins[e]`.
void sort_members(const int64_t* labels, int64_t n_tokens, int64_t n_entries, int32_t* begins, int32_t* members) {
    std::fill(begins, begins + n_entries + 1, 0);
    for (int64_t t = 0; t < n_tokens; t++) begins[labels[t] + 1]++;
    for (int64_t e = 0; e < n_entries; e++) begins[e + 1] += begins[e];
    for (int64_t t = 0; t < n_tokens; t++) members[begins[labels[t]]++] = static_cast<int32_t>(t);
    std::copy_backward(begins, begins + n_entries, begins + n_entries + 1);
    begins[0] = 0;
}

// The mean of n members of `tokens`, N registers of it from feature d on, added in float64 one after the other.
template <int N, class Element>
inline void average_registers(const Element* tokens, const Layout& layout, const int32_t* members, int64_t n, int64_t d,
                              float* mean) {
    Doubles sums[N][2];
#pragma GCC unroll 4
    for (int k = 0; k < N; k++) sums[k][0] = sums[k][1] = -Doubles{};  // only -0.0 + x is x for every x
    for (int64_t m = 0; m < n; m++) {
        const Element* row = tokens + members[m] * layout.token + d;
#pragma GCC unroll 4
        for (int k = 0; k < N; k++) {
            const Floats x = N > 1 ? load(row + k * LANES) : load_some(row, layout.dim - d);
            HalfOfFloats halves[2];
            std::memcpy(halves, &x, sizeof x);
            for (int half = 0; half < 2; half++) sums[k][half] += __builtin_convertvector(halves[half], Doubles);
        }
    }
    const double count = static_cast<double>(n);
#pragma GCC unroll 4
    for (int k = 0; k < N; k++) {
        HalfOfFloats halves[2];
        for (int half = 0; half < 2; half++) halves[half] = __builtin_convertvector(sums[k][half] / count, HalfOfFloats);
        const int64_t n_features = N > 1 ? LANES : std::min<int64_t>(LANES, layout.dim - d);
        std::memcpy(mean + d + k * LANES, halves, n_features * sizeof(float));
    }
}

// Means of the members of the entries `first` to `last`, into rows of `stride` numbers.
template <class Element>
void average(const Element* tokens, const Layout& layout, int64_t first, int64_t last, const int32_t* begins,
             const int32_t* members, float* means, int64_t stride) {
    for (int64_t e = first; e < last; e++) {
        const int32_t* of_entry = members + begins[e];
        const int64_t n = begins[e + 1] - begins[e];
        int64_t d = 0;
        for (; d + 4 * LANES <= layout.dim; d += 4 * LANES)
            average_registers<4>(tokens, layout, of_entry, n, d, means + e * stride);
        for (; d < layout.dim; d += LANES) average_registers<1>(tokens, layout, of_entry, n, d, means + e * stride);
    }
}

// One chunk: where its keys, its values and its results are; values and means are null where none are wanted.
template <class Element>
struct Problem {
    const Element *keys, *values;
    int64_t *labels, *counts;
    float *key_means, *value_means;
};

// All rounds of a chunk; returns how many sources needed canonical similarities.
template <class Element>
int64_t compress_chunk(const Shape& s, const Layout& key, const Layout& value, const Problem<Element>& p,
                       int64_t threads, Chunk& c) {
    int64_t size = s.size, n_scored = 0;
    for (int64_t t = 0; t < size; t++) {
        p.labels[t] = t;
        for (int64_t d = 0; d < key.dim; d += LANES)
            store(c.row(t) + d, load_some(p.keys + t * key.token + d, key.dim - d));
    }
    sort_members(p.labels, s.size, size, c.begins.data(), c.members.data());
    while (size > s.target) {
        const int64_t n_merged = std::min(size / 2, size - s.target);
        match(size, key.dim, threads, c);
        cut(size, n_merged, key.dim, c);
        for (int64_t i = 0; i < (size + 1) / 2; i++) n_scored += c.matches[i].is_scored;
        join(size, n_merged, c);
        for (int64_t t = 0; t < s.size; t++) p.labels[t] = c.joined[p.labels[t]];
        size -= n_merged;
        sort_members(p.labels, s.size, size, c.begins.data(), c.members.data());
        if (size > s.target) average(p.keys, key, 0, size, c.begins.data(), c.members.data(), c.row(0), c.padded);
    }
    for (int64_t e = 0; e < size; e++) p.counts[e] = c.begins[e + 1] - c.begins[e];
    if (p.key_means) average(p.keys, key, 0, size, c.begins.data(), c.members.data(), p.key_means, key.dim);
    if (p.values) average(p.values, value, 0, size, c.begins.data(), c.members.data(), p.value_means, value.dim);
    return n_scored;
}

template <class Element>
int64_t compress(const Shape& s, const Layout& key, const Layout& value, const Element* keys, const Element* values,
                 int64_t* labels, int64_t* counts, float* key_means, float* value_means) {
    const int64_t n = s.heads * s.chunks;
    const bool is_shared = s.size >= LARGE_CHUNK && n < s.threads;
    int64_t n_scored = 0;
#pragma omp parallel num_threads(is_shared ? 1 : s.threads) reduction(+ : n_scored)
    {
        Chunk c(s.size, key.dim);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < n; i++) {
            const int64_t head = i / s.chunks, token = i % s.chunks * s.size;
            const Problem<Element> p = {keys + key.first_of(head) + token * key.token,
                                        values ? values + value.first_of(head) + token * value.token : nullptr,
                                        labels + i * s.size,
                                        counts + i * s.target,
                                        key_means ? key_means + i * s.target * key.dim : nullptr,
                                        values ? value_means + i * s.target * value.dim : nullptr};
            n_scored += compress_chunk(s, key, value, p, is_shared ? s.threads : 1, c);
        }
    }
    return n_scored;
}

// Means of all clusters of labels (heads, size), each of its head's tokens: (heads, target, dim).
template <class Element>
void merge(const Shape& s, const Layout& layout, const Element* array, const int64_t* labels, float* means) {
    const int64_t blocks = (s.target + ENTRIES - 1) / ENTRIES;
    std::vector<int32_t> members(s.heads * s.size), begins(s.heads * (s.target + 1));
#pragma omp parallel num_threads(s.threads)
    {
#pragma omp for schedule(dynamic)
        for (int64_t head = 0; head < s.heads; head++)
            sort_members(labels + head * s.size, s.size, s.target, &begins[head * (s.target + 1)], &members[head * s.size]);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.heads * blocks; i++) {
            const int64_t head = i / blocks, first = i % blocks * ENTRIES;
            average(array + layout.first_of(head), layout, first, std::min(first + ENTRIES, s.target),
                    &begins[head * (s.target + 1)], &members[head * s.size], means + head * s.target * layout.dim, layout.dim);
        }
    }
}

}  // namespace

extern "C" {
#define KVCLUSTER_FOR(name, Element)                                                                                    \
    int64_t kvcluster_soft_matching_##name(const Shape* s, const int64_t* key, const int64_t* value, const Element* k,  \
                                           const Element* v, int64_t* labels, int64_t* counts, float* key_means,        \
                                           float* value_means) {                                                        \
        return compress(*s, Layout(key), Layout(value), k, v, labels, counts, key_means, value_means);                  \
    }                                                                                                                   \
    void kvcluster_merge_##name(const Shape* s, const int64_t* layout, const Element* array, const int64_t* labels,     \
                                float* means) {                                                                         \
        merge(*s, Layout(layout), array, labels, means);                                                                \
    }
KVCLUSTER_FOR(float32, float)
KVCLUSTER_FOR(float16, Half)
KVCLUSTER_FOR(bfloat16, Brain)
}
