// One step of pooled matching on a processor: the decisions and the entries of kvcluster.reference.pooled_matching.
//
// Every similarity is the canonical one, for several destinations at once, one in each lane. Products of two floats are
// exact in float64, so that a fused multiply-add gives the same bits.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 8;  // destinations that are scored together: as many as a register has lanes
#else
constexpr int WIDTH = 4;
#endif
constexpr int LEAVES = 16;  // terms of a halving sum that are added in registers

typedef double Doubles __attribute__((vector_size(8 * WIDTH)));
typedef int64_t Integers __attribute__((vector_size(8 * WIDTH)));

struct Step {
    int64_t problems, size, dim, dim_value, chunk, n_merged, threads;
};

// Matches of one problem. Of an entry that is no source they are not set.
struct Matches {
    int32_t* destination;
    double* similarity;
};

// Products k, k + N, k + 2 * N, ... of LEAVES, added as a halving sum adds them.
template <int N>
inline Doubles halves(const double* a, const Doubles* b, int k) {
    if constexpr (N == LEAVES) {
        return a[k] * b[k];
    } else {
        return halves<2 * N>(a, b, k) + halves<2 * N>(a, b, k + N);
    }
}

// The sum of terms, of which there are a power of two: halves are added until one is left.
template <class Number>
inline Number halving_sum(Number* terms, int64_t n) {
    for (int64_t half = n / 2; half > 0; half /= 2)
        for (int64_t i = 0; i < half; i++) terms[i] += terms[i + half];
    return terms[0];
}

// Where feature d goes, so that the terms of each `halves` lie side by side.
inline int64_t place(int64_t d, int64_t padded) {
    const int64_t sums = padded / LEAVES;
    return d % sums * LEAVES + d / sums;
}

// What one thread needs for one chunk: its keys in float64, padded with zeros to a power of two, and their best matches.
struct Chunk {
    int64_t padded;
    std::vector<double> sources, norms, terms;
    std::vector<Doubles> destinations, norms_of_lanes, sums, best;
    std::vector<Integers> block_of_best;

    explicit Chunk(const Step& s) : padded(LEAVES) {
        while (padded < s.dim) padded *= 2;
        const int64_t n = std::min(s.chunk, s.size), n_sources = (n + 1) / 2, blocks = (n / 2 + WIDTH - 1) / WIDTH;
        sources.resize(n_sources * padded);
        norms.resize(n_sources);
        terms.resize(padded);
        destinations.resize(blocks * padded);
        norms_of_lanes.resize(blocks);
        sums.resize(padded / LEAVES);
        best.resize(n_sources);
        block_of_best.resize(n_sources);
    }

    double norm(const float* key, int64_t dim) {
        for (int64_t d = 0; d < dim; d++) terms[d] = static_cast<double>(key[d]) * key[d];
        std::fill(terms.begin() + dim, terms.end(), 0.0);
        return halving_sum(terms.data(), padded);
    }
};

void read_chunk(const float* keys, int64_t size, int64_t dim, Chunk& c) {
    const int64_t n_sources = (size + 1) / 2, n_destinations = size / 2;
    for (int64_t i = 0; i < n_sources; i++) {
        const float* key = keys + 2 * i * dim;
        for (int64_t d = 0; d < dim; d++) c.sources[i * c.padded + place(d, c.padded)] = key[d];
        c.norms[i] = c.norm(key, dim);
    }
    for (int64_t j = 0; j < n_destinations; j++) {
        const float* key = keys + (2 * j + 1) * dim;
        Doubles* block = &c.destinations[j / WIDTH * c.padded];
        for (int64_t d = 0; d < dim; d++) block[place(d, c.padded)][j % WIDTH] = key[d];
        c.norms_of_lanes[j / WIDTH][j % WIDTH] = c.norm(key, dim);
    }
    // A lane without a destination: what is not a number is not the largest.
    for (int64_t j = n_destinations; j % WIDTH != 0; j++) c.norms_of_lanes[j / WIDTH][j % WIDTH] = NAN;
}

// The best destination of each source of a chunk that begins at entry `first`; of ties, the first.
void match_chunk(const float* keys, int64_t first, int64_t size, int64_t dim, Chunk& c, const Matches& into) {
    read_chunk(keys, size, dim, c);
    const int64_t n_sources = (size + 1) / 2, blocks = (size / 2 + WIDTH - 1) / WIDTH;
    std::fill(c.best.begin(), c.best.end(), Doubles{} - INFINITY);
    for (int64_t block = 0; block < blocks; block++) {
        const Doubles* b = &c.destinations[block * c.padded];
        for (int64_t i = 0; i < n_sources; i++) {
            const double* a = &c.sources[i * c.padded];
            for (int64_t part = 0; part < c.padded / LEAVES; part++)
                c.sums[part] = halves<1>(a + part * LEAVES, b + part * LEAVES, 0);
            const Doubles dot = halving_sum(c.sums.data(), c.padded / LEAVES);
            const Doubles norms = c.norms[i] * c.norms_of_lanes[block], ratio = dot * (dot < 0.0 ? -dot : dot) / norms;
            const Doubles similarity = norms == 0.0 ? Doubles{} : ratio;
            const Integers is_better = similarity > c.best[i];
            c.best[i] = is_better ? similarity : c.best[i];
            c.block_of_best[i] = is_better ? Integers{} + block : c.block_of_best[i];
        }
    }
    for (int64_t i = 0; i < n_sources; i++) {
        double best = -INFINITY;
        int64_t destination = 0;
        for (int lane = 0; lane < WIDTH; lane++) {
            const int64_t j = c.block_of_best[i][lane] * WIDTH + lane;
            if (c.best[i][lane] > best || (c.best[i][lane] == best && j < destination)) {
                best = c.best[i][lane];
                destination = j;
            }
        }
        into.destination[first + 2 * i] = static_cast<int32_t>(first + 2 * destination + 1);
        into.similarity[first + 2 * i] = best;
    }
}

// New entry of each old one after the best matches of all chunks have merged; of ties, the first.
void join(const Step& s, const Matches& matches, int32_t* labels) {
    std::vector<int32_t> sources;
    const int64_t last = s.size - (s.size % s.chunk == 1);  // an entry alone in the last chunk finds none
    for (int64_t entry = 0; entry < last; entry++)
        if (entry % s.chunk % 2 == 0) sources.push_back(static_cast<int32_t>(entry));
    const auto is_before = [&](int32_t a, int32_t b) {
        const double similar_a = matches.similarity[a], similar_b = matches.similarity[b];
        return similar_a != similar_b ? similar_a > similar_b : a < b;
    };
    std::nth_element(sources.begin(), sources.begin() + s.n_merged, sources.end(), is_before);
    std::fill(labels, labels + s.size, -1);
    for (int64_t i = 0; i < s.n_merged; i++) labels[sources[i]] = matches.destination[sources[i]];
    // First those that stay are numbered again, in their old order; the others follow their destination, which stays.
    std::vector<int32_t> merged(labels, labels + s.size);
    int32_t n_left = 0;
    for (int64_t entry = 0; entry < s.size; entry++)
        if (merged[entry] < 0) labels[entry] = n_left++;
    for (int64_t entry = 0; entry < s.size; entry++)
        if (merged[entry] >= 0) labels[entry] = labels[merged[entry]];
}

// Means of the entries (size, dim) that share a label, weighted by their counts, added in ascending order.
void merge(const Step& s, int64_t dim, const float* array, const int32_t* counts, const int32_t* labels, float* means) {
    const int64_t n_left = s.size - s.n_merged;
    std::vector<double> sums(n_left * dim, -0.0);  // only -0.0 + x is x for every x
    std::vector<int64_t> totals(n_left);
    for (int64_t entry = 0; entry < s.size; entry++) {
        double* sum = &sums[labels[entry] * dim];
        for (int64_t d = 0; d < dim; d++) sum[d] += static_cast<double>(array[entry * dim + d]) * counts[entry];
        totals[labels[entry]] += counts[entry];
    }
    for (int64_t left = 0; left < n_left; left++)
        for (int64_t d = 0; d < dim; d++)
            means[left * dim + d] = static_cast<float>(sums[left * dim + d] / static_cast<double>(totals[left]));
}

}  // namespace

extern "C" void kvcluster_pooled_step(const Step* step, const float* keys, const float* values, const int32_t* counts,
                                      float* new_keys, float* new_values, int32_t* new_counts) {
    const Step& s = *step;
    const int64_t chunks = (s.size + s.chunk - 1) / s.chunk, n_left = s.size - s.n_merged;
    std::vector<int32_t> destinations(s.problems * s.size), labels(s.problems * s.size);
    std::vector<double> similarities(s.problems * s.size);
#pragma omp parallel num_threads(s.threads)
    {
        Chunk chunk(s);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < s.problems * chunks; i++) {
            const int64_t problem = i / chunks, first = i % chunks * s.chunk, size = std::min(s.chunk, s.size - first);
            const Matches matches = {&destinations[problem * s.size], &similarities[problem * s.size]};
            if (size > 1) match_chunk(keys + (problem * s.size + first) * s.dim, first, size, s.dim, chunk, matches);
        }
#pragma omp for schedule(dynamic)
        for (int64_t problem = 0; problem < s.problems; problem++) {
            join(s, {&destinations[problem * s.size], &similarities[problem * s.size]}, &labels[problem * s.size]);
            std::fill(new_counts + problem * n_left, new_counts + (problem + 1) * n_left, 0);
            for (int64_t entry = problem * s.size; entry < (problem + 1) * s.size; entry++)
                new_counts[problem * n_left + labels[entry]] += counts[entry];
        }
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < 2 * s.problems; i++) {
            const int64_t problem = i / 2, dim = i % 2 == 0 ? s.dim : s.dim_value;
            const float* array = (i % 2 == 0 ? keys : values) + problem * s.size * dim;
            float* means = (i % 2 == 0 ? new_keys : new_values) + problem * n_left * dim;
            merge(s, dim, array, counts + problem * s.size, &labels[problem * s.size], means);
        }
    }
}
