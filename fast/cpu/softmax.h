// A softmax over entries that come block after block, and what is averaged with its weights.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

constexpr int BLOCK = 64;    // entries whose weights are held at once
constexpr int TABLE = 4096;  // counts whose logarithms are looked up

// exp(x) for x <= 0, to two units in the last place (the polynomial of Cephes' expf); 0 below -87, nan of nan.
inline Floats exponential(Floats x) {
    const Ints is_tiny = x < -87.0f;
    const Floats y = is_tiny ? Floats{} - 87.0f : x;
    const Ints n = __builtin_convertvector(y * 1.44269504f - 0.5f, Ints);  // rounded to nearest, as y is not positive
    const Floats whole = __builtin_convertvector(n, Floats);
    const Floats r = (y - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    const Floats power = (p * r * r + r + 1.0f) * same_bits<Floats>((n + 127) << 23);
    return is_tiny ? Floats{} : power;
}

struct Logarithms {
    float of[TABLE];
    Logarithms() {
        for (int count = 0; count < TABLE; count++) of[count] = static_cast<float>(std::log(static_cast<double>(count)));
    }
    float operator()(int32_t count) const {  // nan below 0, where nothing may be looked up
        const bool is_in_table = static_cast<uint32_t>(count) < TABLE;
        return is_in_table ? of[count] : static_cast<float>(std::log(static_cast<double>(count)));
    }
};
const Logarithms log_of_count;

// Running softmax of some query rows: output not yet divided by its sum of weights, that sum, and the highest logit.
struct Partial {
    float *output, *sum, *highest;
};

// Turns logits, of which row r sees those below visible[r] - first, into weights, and takes them into the sums.
template <int N>
void weigh(float (*weights)[BLOCK], const float* bias, int n, int first, const int* visible, int dim, Partial to) {
    for (int r = 0; r < N; r++) {
        float* w = weights[r];
        for (int j = std::min(n, std::max(0, visible[r] - first)); j < BLOCK; j++) w[j] = -INFINITY;
        Floats top = Floats{} + to.highest[r];
        for (int j = 0; j < BLOCK; j += LANES) {
            const Floats logits = load(w + j) + load(bias + j);
            store(w + j, logits);
            top = top > logits ? top : logits;
        }
        const float highest = largest(top);
        if (highest == -INFINITY) {  // nothing seen yet
            std::fill(w, w + BLOCK, 0.0f);
            continue;
        }
        if (highest > to.highest[r]) {
            const float shrink = std::exp(to.highest[r] - highest);
            for (int d = 0; d < dim; d++) to.output[r * dim + d] *= shrink;
            to.sum[r] *= shrink;
            to.highest[r] = highest;
        }
        Floats total = {};
        for (int j = 0; j < BLOCK; j += LANES) {
            const Floats weight = exponential(load(w + j) - highest);
            store(w + j, weight);
            total += weight;
        }
        to.sum[r] += sum(total);
    }
}

// Adds the values of a block, times their weights, to the outputs: first up among themselves, which rounds less than one
// by one to an output that has grown large. Meanwhile the next keys are asked for.
template <class Element, int N>
void add_values(const float (*weights)[BLOCK], const Element* values, int64_t value_stride, const Element* next_keys,
                int64_t key_stride, int n, int dim, float* output) {
    constexpr int LINE = 64 / sizeof(Element);  // elements of a cache line
    constexpr int STEP = 4 * LANES;  // features whose sums fill the registers, with as many rows as a tile has
    int d = 0;
    for (; d + STEP <= dim; d += STEP) {
        Floats out[N][4] = {};
        for (int j = 0; j < n; j++) {
            const int64_t place = static_cast<int64_t>(d) * BLOCK + j * STEP;  // in the next block, line after line
            const Element* ahead = next_keys + place / dim * key_stride + place % dim;
#pragma GCC unroll 4
            for (int line = 0; line < STEP; line += LINE) __builtin_prefetch(ahead + line);
            Floats x[4];
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) x[c] = load(values + j * value_stride + d + c * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < N; r++)
#pragma GCC unroll 4
                for (int c = 0; c < 4; c++) out[r][c] += weights[r][j] * x[c];
        }
#pragma GCC unroll 4
        for (int r = 0; r < N; r++)
#pragma GCC unroll 4
            for (int c = 0; c < 4; c++) {
                float* total = output + r * dim + d + c * LANES;
                store(total, load(total) + out[r][c]);
            }
    }
    for (; d < dim; d += LANES)
        for (int r = 0; r < N; r++) {
            Floats out = {};
            for (int j = 0; j < n; j++) out += weights[r][j] * load(values + j * value_stride + d);
            store(output + r * dim + d, load(output + r * dim + d) + out);
        }
}

// The output of one row from its `n` partial results, the first at `first`, each `step` after the one before.
inline void combine(const std::vector<float>& outputs, const std::vector<float>& sums,
                    const std::vector<float>& highest, int64_t first, int64_t n, int64_t step, int64_t dim,
                    float* out) {
    float top = -INFINITY, weights = 0.0f;
    for (int64_t i = 0; i < n; i++) top = std::max(top, highest[first + i * step]);
    std::fill(out, out + dim, 0.0f);
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = first + i * step;
        const float weight = std::exp(highest[at] - top);
        weights += weight * sums[at];
        for (int64_t d = 0; d < dim; d++) out[d] += weight * outputs[at * dim + d];
    }
    for (int64_t d = 0; d < dim; d++) out[d] /= weights;
}

}  // namespace
