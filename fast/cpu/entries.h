// Attention of query rows to entries that lie one behind the other, in a softmax that runs over blocks of them.

#pragma once

#include <algorithm>
#include <cstdint>

#include "softmax.h"

namespace {

constexpr int TILE = LANES / 4;  // query rows that share one pass over a block: their sums fill the registers
constexpr int ROWS = 64;         // query rows of one program
constexpr int SPLIT = 2048;      // entries of one program

// What one program knows of the entries of its split.
template <class Element>
struct Entries {
    const Element *keys, *values;
    int64_t key_stride, value_stride;  // from entry to entry
    const int32_t* counts;             // null where every count is 1
    int dim;                           // a multiple of LANES
};

// Takes the entries from `first` to `first + n`, at most BLOCK, into the partial results of the rows of one tile. Row r
// sees entries below visible[r]. While keys are read the values are asked for, and meanwhile the next keys. Returns the sum
// of zeros times the products of query and key: NaN where one of them is not finite, as it is where a key is not.
template <class Element, int N>
float attend_block(const Entries<Element>& e, int first, int n, const float* query, const int* visible, Partial to) {
    constexpr int LINE = 64 / sizeof(Element);  // elements of a cache line
    const int dim = e.dim;
    const Element* keys = e.keys + first * e.key_stride;
    const Element* values = e.values + first * e.value_stride;
    alignas(64) float weights[N][BLOCK];
    Floats4 zeros = {};
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
            zeros += logits * 0.0f;
        }
    }
    for (; i < n; i++)
        for (int r = 0; r < N; r++) {
            Floats dot = {};
            for (int d = 0; d < dim; d += LANES) dot += load(keys + i * e.key_stride + d) * load(query + r * dim + d);
            weights[r][i] = sum(dot);
            zeros[0] += weights[r][i] * 0.0f;
        }

    alignas(64) float bias[BLOCK] = {};
    if (e.counts)
        for (int j = 0; j < n; j++) bias[j] = log_of_count(e.counts[first + j]);
    weigh<N>(weights, bias, n, first, visible, dim, to);
    add_values<Element, N>(weights, values, e.value_stride, keys + BLOCK * e.key_stride, e.key_stride, n, dim, to.output);
    return zeros[0] + zeros[1] + zeros[2] + zeros[3];
}

// As attend_block, for all rows of a program and any number of entries.
template <class Element>
float attend_split(const Entries<Element>& e, int n, int rows, const float* query, const int* visible, Partial to) {
    float zeros = 0.0f;
    for (int first = 0; first < n; first += BLOCK)
        for (int row = 0; row < rows; row += TILE) {
            const int tile = std::min(TILE, rows - row);
            const int last = *std::max_element(visible + row, visible + row + tile);
            const int block = std::min({BLOCK, n - first, last - first});
            if (block <= 0) continue;
            const float* q = query + row * e.dim;
            const Partial part = {to.output + row * e.dim, to.sum + row, to.highest + row};
            if constexpr (TILE == 4) {
                if (tile == 4) zeros += attend_block<Element, 4>(e, first, block, q, visible + row, part);
                if (tile == 3) zeros += attend_block<Element, 3>(e, first, block, q, visible + row, part);
            }
            if (tile == 2) zeros += attend_block<Element, 2>(e, first, block, q, visible + row, part);
            if (tile == 1) zeros += attend_block<Element, 1>(e, first, block, q, visible + row, part);
        }
    return zeros;
}

}  // namespace
