// By how much each token of a chunk surpasses all others for some query, as kvcluster.reference.attended_matching defines
// it: dot products in float64, whose terms are exact, added by halving. Tokens lie side by side in the registers, so that
// each lane adds the terms of one token.

#include "vectors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t TOKENS = 4;  // whose dot products are made together
typedef double Terms __attribute__((vector_size(TOKENS * sizeof(double))));

struct Chunks {
    int64_t chunks, size, dim, queries, threads;
    int64_t chunk, token;  // strides of keys, in elements
};

// The sum of every `stride`-th term of TOKENS tokens, N of them, a power of two: adding halves pairs a term with the one
// half of the terms further, so the even and the odd terms are each added in the same way, and then together.
template <int64_t N>
__attribute__((always_inline)) inline Terms halving_sum(const double* query, const double* keys, int64_t stride) {
    if constexpr (N == 1) {
        Terms key;
        std::memcpy(&key, keys, sizeof key);
        return *query * key;
    } else {
        return halving_sum<N / 2>(query, keys, 2 * stride) +
               halving_sum<N / 2>(query + stride, keys + stride * TOKENS, 2 * stride);
    }
}

Terms dot(const double* query, const double* keys, int64_t n, int64_t stride) {
    if (n == 8) return halving_sum<8>(query, keys, stride);
    if (n == 16) return halving_sum<16>(query, keys, stride);
    if (n == 32) return halving_sum<32>(query, keys, stride);
    if (n == 64) return halving_sum<64>(query, keys, stride);
    return dot(query, keys, n / 2, 2 * stride) + dot(query + stride, keys + stride * TOKENS, n / 2, 2 * stride);
}

template <class Element>
void margins(const Chunks& s, const Element* keys, const Element* queries, double* result) {
    int64_t padded = 8;
    while (padded < s.dim) padded *= 2;
    const int64_t row = (s.size + TOKENS - 1) / TOKENS * TOKENS;
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<float> one(s.dim);
        std::vector<double> query(padded, 0.0), across(padded * row, 0.0), dots(row);  // zeros where there is nothing
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < s.chunks; chunk++) {
            const Element* first = keys + chunk * s.chunk;
            for (int64_t t = 0; t < s.size; t++) {
                for (int64_t d = 0; d < s.dim; d += LANES) store(&one[d], load(first + t * s.token + d));
                for (int64_t d = 0; d < s.dim; d++) across[(t / TOKENS * padded + d) * TOKENS + t % TOKENS] = one[d];
            }
            double* of_chunk = result + chunk * s.size;
            for (int64_t t = 0; t < s.size; t++) of_chunk[t] = -std::numeric_limits<double>::infinity();
            for (int64_t q = 0; q < s.queries; q++) {
                const Element* next = queries + (chunk * s.queries + q) * s.dim;
                for (int64_t d = 0; d < s.dim; d += LANES) store(&one[d], load(next + d));
                for (int64_t d = 0; d < s.dim; d++) query[d] = one[d];
                for (int64_t t = 0; t < row; t += TOKENS) {
                    const Terms sums = dot(query.data(), &across[t * padded], padded, 1);
                    std::memcpy(&dots[t], &sums, sizeof sums);
                }
                double best = -std::numeric_limits<double>::infinity(), second = best;
                int64_t place = 0;
                for (int64_t t = 0; t < s.size; t++)
                    if (dots[t] > best) {
                        second = best;
                        best = dots[t];
                        place = t;
                    } else if (dots[t] > second) {
                        second = dots[t];
                    }
                const double of_best = best - second;
                for (int64_t t = 0; t < s.size; t++) of_chunk[t] = std::max(of_chunk[t], dots[t] - best);
                of_chunk[place] = std::max(of_chunk[place], of_best);
            }
        }
    }
}

}  // namespace

extern "C" {
void kvcluster_margins_float32(const Chunks* s, const float* k, const float* q, double* r) { margins(*s, k, q, r); }
void kvcluster_margins_float16(const Chunks* s, const Half* k, const Half* q, double* r) { margins(*s, k, q, r); }
void kvcluster_margins_bfloat16(const Chunks* s, const Brain* k, const Brain* q, double* r) { margins(*s, k, q, r); }
}
