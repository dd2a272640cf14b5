// Clustered attention on a processor: every key and value is read once for all query rows that share them.
//
// softmax(scale * query . key + log(count)) @ value, in float32 whatever the dtype of the cache. The entries are
// attended to in splits of fixed length, whose partial results are then combined in order: the result depends neither
// on the number of threads nor on their timing. Vectors are those of GCC and Clang (16 floats, lowered to whatever the
// processor has), so no instruction set is named here.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "softmax.h"

namespace {

constexpr int TILE = 4;      // query rows that share one pass over a block
constexpr int ROWS = 64;     // query rows of one program
constexpr int SPLIT = 2048;  // entries of one program

// What one program knows of the entries of its split.
template <class Element>
struct Entries {
    const Element *keys, *values;
    int64_t key_stride, value_stride;  // from entry to entry
    const int32_t* counts;             // null where every count is 1
    int dim;                           // a multiple of LANES
};

// Takes the entries from `first` to `first + n`, at most BLOCK, into the partial results of the rows of one tile. Row r
// sees entries below visible[r]. While keys are read the values are asked for, and meanwhile the next keys.
template <class Element, int N>
void attend_block(const Entries<Element>& e, int first, int n, const float* query, const int* visible, Partial to) {
    constexpr int LINE = 64 / sizeof(Element);  // elements of a cache line
    const int dim = e.dim;
    const Element* keys = e.keys + first * e.key_stride;
    const Element* values = e.values + first * e.value_stride;
    alignas(64) float weights[N][BLOCK];
    int i = 0;
    for (; i + 4 <= n; i += 4) {
        const Element* key = keys + i * e.key_stride;
        Floats dots[N][4] = {};
        for (int d = 0; d < dim; d += LANES) {
            const Element* ahead = values + (i + 4 * d / dim) * e.value_stride + 4 * d % dim;
#pragma GCC unroll 4
            for (int line = 0; line < 4 * LANES; line += LINE) __builtin_prefetch(ahead + line);
            Floats x[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) x[c] = load(key + c * e.key_stride + d);
#pragma GCC unroll 4
            for (int r = 0; r < N; r++) {
                const Floats q = load(query + r * dim + d);
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) dots[r][c] += q * x[c];
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) {
            const Floats4 logits = sums(dots[r][0], dots[r][1], dots[r][2], dots[r][3]);
            std::memcpy(&weights[r][i], &logits, sizeof logits);
        }
    }
    for (; i < n; i++)
        for (int r = 0; r < N; r++) {
            Floats dot = {};
            for (int d = 0; d < dim; d += LANES) dot += load(keys + i * e.key_stride + d) * load(query + r * dim + d);
            weights[r][i] = sum(dot);
        }

    alignas(64) float bias[BLOCK] = {};
    if (e.counts)
        for (int j = 0; j < n; j++) bias[j] = log_of_count(e.counts[first + j]);
    weigh<N>(weights, bias, n, first, visible, dim, to);
    add_values<Element, N>(weights, values, e.value_stride, keys + BLOCK * e.key_stride, e.key_stride, n, dim, to.output);
}

template <class Element>
void attend_split(const Entries<Element>& e, int n, int rows, const float* query, const int* visible, Partial to) {
    for (int first = 0; first < n; first += BLOCK)
        for (int row = 0; row < rows; row += TILE) {
            const int tile = std::min(TILE, rows - row);
            const int last = *std::max_element(visible + row, visible + row + tile);
            const int block = std::min({BLOCK, n - first, last - first});
            if (block <= 0) continue;
            const float* q = query + row * e.dim;
            const Partial part = {to.output + row * e.dim, to.sum + row, to.highest + row};
            if (tile == 4) attend_block<Element, 4>(e, first, block, q, visible + row, part);
            if (tile == 3) attend_block<Element, 3>(e, first, block, q, visible + row, part);
            if (tile == 2) attend_block<Element, 2>(e, first, block, q, visible + row, part);
            if (tile == 1) attend_block<Element, 1>(e, first, block, q, visible + row, part);
        }
}

// Strides and places are counted in elements; the stride of a feature is 1. Query row r of a problem belongs to the new
// token r % queries, which sees all entries of its head but the tokens after it.
struct Shape {
    int64_t problems, heads;  // a problem is a KV head of a batch row
    int64_t rows, queries;    // rows of a problem: query heads that share its KV head, times new tokens
    int64_t dim, threads;
    int64_t key_batch, key_entry;
    int64_t value_batch, value_entry;
    int64_t count_batch;
};

// Where the entries of a KV head lie in the memory of a batch row, and how many there are: heads may differ.
struct Head {
    int64_t entries, key, value, count;
};

template <class Element>
void attend(const Shape& s, const Head* heads, const float* query, const Element* keys, const Element* values,
            const int32_t* counts, float* output) {
    int64_t longest = 0;
    for (int64_t head = 0; head < s.heads; head++) longest = std::max(longest, heads[head].entries);
    const int64_t splits = (longest + SPLIT - 1) / SPLIT, tiles = (s.rows + ROWS - 1) / ROWS;
    const int64_t total = s.problems * s.rows * splits;
    std::vector<float> outputs(total * s.dim, 0.0f), sums(total, 0.0f), highest(total, -INFINITY);

#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
    for (int64_t program = 0; program < s.problems * tiles * splits; program++) {
        const int64_t problem = program / (tiles * splits), tile = program / splits % tiles, split = program % splits;
        const int64_t batch = problem / s.heads;
        const Head& head = heads[problem % s.heads];
        const int64_t first = split * SPLIT, row = tile * ROWS;
        if (first >= head.entries) continue;
        const int rows = static_cast<int>(std::min<int64_t>(ROWS, s.rows - row));
        int visible[ROWS];
        for (int r = 0; r < rows; r++)
            visible[r] = static_cast<int>(head.entries - s.queries + (row + r) % s.queries + 1 - first);
        const Entries<Element> entries = {
            keys + batch * s.key_batch + head.key + first * s.key_entry,
            values + batch * s.value_batch + head.value + first * s.value_entry,
            s.key_entry,
            s.value_entry,
            counts ? counts + batch * s.count_batch + head.count + first : nullptr,
            static_cast<int>(s.dim),
        };
        const int64_t at = (problem * splits + split) * s.rows + row;
        attend_split(entries, static_cast<int>(std::min<int64_t>(SPLIT, head.entries - first)), rows,
                     query + (problem * s.rows + row) * s.dim, visible,
                     {&outputs[at * s.dim], &sums[at], &highest[at]});
    }

    for (int64_t problem = 0; problem < s.problems; problem++)
        for (int64_t row = 0; row < s.rows; row++)
            combine(outputs, sums, highest, problem * splits * s.rows + row, splits, s.rows, s.dim,
                    output + (problem * s.rows + row) * s.dim);
}

}  // namespace

extern "C" {
void kvcluster_attend_float32(const Shape* s, const Head* heads, const float* query, const float* keys,
                              const float* values, const int32_t* counts, float* output) {
    attend(*s, heads, query, keys, values, counts, output);
}
void kvcluster_attend_float16(const Shape* s, const Head* heads, const float* query, const Half* keys,
                              const Half* values, const int32_t* counts, float* output) {
    attend(*s, heads, query, keys, values, counts, output);
}
void kvcluster_attend_bfloat16(const Shape* s, const Head* heads, const float* query, const Brain* keys,
                               const Brain* values, const int32_t* counts, float* output) {
    attend(*s, heads, query, keys, values, counts, output);
}
}
