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

#include "entries.h"

namespace {

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

// Returns whether all products of query and key and all outputs are finite: if they are, so is all that was read.
template <class Element>
bool attend(const Shape& s, const Head* heads, const float* query, const Element* keys, const Element* values,
            const int32_t* counts, float* output) {
    int64_t longest = 0;
    for (int64_t head = 0; head < s.heads; head++) longest = std::max(longest, heads[head].entries);
    const int64_t splits = (longest + SPLIT - 1) / SPLIT, tiles = (s.rows + ROWS - 1) / ROWS;
    const int64_t total = s.problems * s.rows * splits;
    std::vector<float> outputs(total * s.dim, 0.0f), sums(total, 0.0f), highest(total, -INFINITY);
    float zeros = 0.0f;

#pragma omp parallel for num_threads(s.threads) schedule(dynamic) reduction(+ : zeros)
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
        zeros += attend_split(entries, static_cast<int>(std::min<int64_t>(SPLIT, head.entries - first)), rows,
                              query + (problem * s.rows + row) * s.dim, visible,
                              {&outputs[at * s.dim], &sums[at], &highest[at]});
    }

    for (int64_t problem = 0; problem < s.problems; problem++)
        for (int64_t row = 0; row < s.rows; row++)
            combine(outputs, sums, highest, problem * splits * s.rows + row, splits, s.rows, s.dim,
                    output + (problem * s.rows + row) * s.dim);
    for (int64_t i = 0; i < s.problems * s.rows * s.dim; i++) zeros += output[i] * 0.0f;
    return zeros == 0.0f;
}

}  // namespace

extern "C" {
#define ATTEND(NAME, ELEMENT)                                                                                        \
    int kvcluster_attend_##NAME(const Shape* s, const Head* heads, const float* query, const ELEMENT* keys,          \
                                const ELEMENT* values, const int32_t* counts, float* output) {                      \
        return attend(*s, heads, query, keys, values, counts, output);                                               \
    }
ATTEND(float32, float)
ATTEND(float16, Half)
ATTEND(bfloat16, Brain)
}
