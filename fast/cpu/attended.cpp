// By how much each token of a chunk surpasses all others for some query, as kvcluster.reference.attended_matching defines
// it: dot products in float64, whose terms are exact, added by halving. Tokens lie side by side in the registers, so that
// each lane adds in the order of one token.

#include "vectors.h"

#include <limits>
#include <vector>

namespace {

constexpr int64_t TOKENS = 16;  // whose dot products are made together

struct Chunks {
    int64_t chunks, size, dim, queries, threads;
    int64_t chunk, token;  // strides of keys, in elements
};

template <class Element>
void margins(const Chunks& s, const Element* keys, const Element* queries, double* result) {
    int64_t padded = 1;
    while (padded < s.dim) padded *= 2;
    const int64_t columns = (s.size + TOKENS - 1) / TOKENS * TOKENS;
#pragma omp parallel num_threads(s.threads)
    {
        std::vector<float> row(s.dim), across(s.dim * columns, 0.0f);
        std::vector<double> terms(padded * TOKENS), dots(columns);
#pragma omp for schedule(dynamic)
        for (int64_t chunk = 0; chunk < s.chunks; chunk++) {
            const Element* first = keys + chunk * s.chunk;
            for (int64_t t = 0; t < s.size; t++) {
                for (int64_t d = 0; d < s.dim; d += LANES) store(&row[d], load(first + t * s.token + d));
                for (int64_t d = 0; d < s.dim; d++) across[d * columns + t] = row[d];
            }
            double* of_chunk = result + chunk * s.size;
            for (int64_t t = 0; t < s.size; t++) of_chunk[t] = -std::numeric_limits<double>::infinity();
            for (int64_t q = 0; q < s.queries; q++) {
                const Element* query = queries + (chunk * s.queries + q) * s.dim;
                for (int64_t d = 0; d < s.dim; d += LANES) store(&row[d], load(query + d));
                for (int64_t t = 0; t < columns; t += TOKENS) {
                    for (int64_t d = 0; d < s.dim; d++)
                        for (int64_t i = 0; i < TOKENS; i++)
                            terms[d * TOKENS + i] =
                                static_cast<double>(row[d]) * static_cast<double>(across[d * columns + t + i]);
                    for (int64_t i = s.dim * TOKENS; i < padded * TOKENS; i++) terms[i] = 0.0;
                    for (int64_t half = padded * TOKENS / 2; half >= TOKENS; half /= 2)
                        for (int64_t i = 0; i < half; i++) terms[i] += terms[i + half];
                    for (int64_t i = 0; i < TOKENS; i++) dots[t + i] = terms[i];
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
                for (int64_t t = 0; t < s.size; t++) {
                    const double margin = dots[t] - (t == place ? second : best);
                    if (margin > of_chunk[t]) of_chunk[t] = margin;
                }
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
