// A linear layer of few rows: every weight is read once for several of them.

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int TILE = 4;             // outputs that are worked on at once
constexpr int ROWS = LANES / 4;     // and rows: their sums fill the registers

template <int N>
void multiply(const float* weights, int64_t inputs, const float* rows, int64_t outputs, float* to) {
    Floats dots[N][TILE] = {};
    for (int64_t i = 0; i < inputs; i += LANES) {
        const float* ahead = weights + TILE * inputs + TILE * i;  // the next outputs' weights, line after line
#pragma GCC unroll 4
        for (int line = 0; line < TILE; line++) __builtin_prefetch(ahead + line * LANES);
        Floats w[TILE];
#pragma GCC unroll 4
        for (int o = 0; o < TILE; o++) w[o] = load(weights + o * inputs + i);
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) {
            const Floats x = load(rows + r * inputs + i);
#pragma GCC unroll 4
            for (int o = 0; o < TILE; o++) dots[r][o] += x * w[o];
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < N; r++) {
        const Floats4 out = sums(dots[r][0], dots[r][1], dots[r][2], dots[r][3]);
        std::memcpy(to + r * outputs, &out, sizeof out);
    }
}

}  // namespace

// rows (n, inputs) times weights (outputs, inputs) transposed; inputs a multiple of 16, outputs of 4.
extern "C" void kvcluster_linear(const float* weights, const float* rows, float* to, int64_t n, int64_t inputs,
                                 int64_t outputs, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t output = 0; output < outputs; output += TILE)
        for (int64_t row = 0; row < n; row += ROWS) {
            const float *w = weights + output * inputs, *x = rows + row * inputs;
            float* out = to + row * outputs + output;
            const int64_t tile = std::min<int64_t>(ROWS, n - row);
            if constexpr (ROWS == 4) {
                if (tile == 4) multiply<4>(w, inputs, x, outputs, out);
                if (tile == 3) multiply<3>(w, inputs, x, outputs, out);
            }
            if (tile == 2) multiply<2>(w, inputs, x, outputs, out);
            if (tile == 1) multiply<1>(w, inputs, x, outputs, out);
        }
}
