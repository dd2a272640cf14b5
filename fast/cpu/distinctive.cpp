// How alike each token of a chunk is to the centroid of all of them, as kvcluster.reference.distinctive_matching defines
// it: sums in float64 in a fixed order. Products of two floats are exact in float64, so that a fused multiply-add gives
// the same bits.

#include "vectors.h"

#include <cmath>
#include <vector>

namespace {

struct Tokens {
    int64_t problems, size, dim, threads;
    int64_t problem, token;  // strides, in elements
};

// The sum of terms, of which there are a power of two: halves are added until one is left.
inline double halving_sum(double* terms, int64_t n) {
    for (int64_t half = n / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) terms[i] += terms[i + half];
    return terms[0];
}

template <class Element>
void likeness(const Tokens& s, const Element* tokens, double* result) {
    int64_t padded = 1;
    while (padded < s.dim) padded *= 2;
#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
    for (int64_t problem = 0; problem < s.problems; problem++) {
        const Element* chunk = tokens + problem * s.problem;
        std::vector<float> token(s.dim);
        std::vector<double> mean(s.dim, -0.0), dots(padded), squares(padded);
        for (int64_t t = 0; t < s.size; t++) {
            for (int64_t d = 0; d < s.dim; d += LANES) store(&token[d], load(chunk + t * s.token + d));
            for (int64_t d = 0; d < s.dim; d++) mean[d] += token[d];
        }
        for (int64_t d = 0; d < s.dim; d++) {
            mean[d] = static_cast<float>(mean[d] / static_cast<double>(s.size));
            squares[d] = mean[d] * mean[d];
        }
        for (int64_t d = s.dim; d < padded; d++) squares[d] = 0.0;
        const double of_mean = halving_sum(squares.data(), padded);
        for (int64_t t = 0; t < s.size; t++) {
            for (int64_t d = 0; d < s.dim; d += LANES) store(&token[d], load(chunk + t * s.token + d));
            for (int64_t d = 0; d < s.dim; d++) {
                const double x = token[d];
                dots[d] = x * mean[d];
                squares[d] = x * x;
            }
            for (int64_t d = s.dim; d < padded; d++) dots[d] = squares[d] = 0.0;
            const double dot = halving_sum(dots.data(), padded);
            const double norms = halving_sum(squares.data(), padded) * of_mean;
            result[problem * s.size + t] = norms == 0.0 ? 0.0 : dot * std::fabs(dot) / norms;
        }
    }
}

}  // namespace

extern "C" {
void kvcluster_likeness_float32(const Tokens* s, const float* tokens, double* result) { likeness(*s, tokens, result); }
void kvcluster_likeness_float16(const Tokens* s, const Half* tokens, double* result) { likeness(*s, tokens, result); }
void kvcluster_likeness_bfloat16(const Tokens* s, const Brain* tokens, double* result) { likeness(*s, tokens, result); }
}
