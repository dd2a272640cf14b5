// A decoding step of the recall cache on a processor: which clusters a query takes tokens of, and attention to these.
//
// Selection makes the decisions of kvcluster.reference.select_clusters: scores in float32, and canonical ones in float64
// for the clusters around the end of the budget whose order the float32 scores do not prove (see
// fast/cluster_scores.py and filtered_ranking in fast/selection.py). Attention copies 64 tokens at a time into the
// processor's cache, and goes on as kvcluster_attend does.

#include "attention.cpp"

namespace {

constexpr int CLUSTERS = 256;  // clusters of one scoring program
constexpr int LIST = 256;      // entries of one attention program
constexpr int AHEAD = 8;       // entries that are asked for before they are copied

struct Clusters {
    int64_t problems, group, dim, clusters, budget, threads;
};

// Scores of four clusters, or of one, for N queries of the group: the largest of dot - mean.
template <int N, int C>
void score_tile(const float* probe, const Brain* features, const float* mean, int64_t dims, float* scores) {
    Floats dots[N][C] = {};
    for (int64_t d = 0; d < dims; d += LANES) {
        Floats x[C];
#pragma GCC unroll 4
        for (int c = 0; c < C; c++) {
            x[c] = load(features + c * dims + d);
            if (d % 32 == 0) __builtin_prefetch(features + (c + 2 * C) * dims + d);
        }
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) {
            const Floats q = load(probe + r * dims + d);
#pragma GCC unroll 4
            for (int c = 0; c < C; c++) dots[r][c] += q * x[c];
        }
    }
    for (int r = 0; r < N; r++) {
        const Floats4 of = sums(dots[r][0], dots[r][C > 1], dots[r][2 * (C > 1)], dots[r][3 * (C > 1)]);
        for (int c = 0; c < C; c++) scores[c] = std::max(scores[c], of[c] - mean[r]);
    }
}

template <int N>
void score_rows(const float* probe, const Brain* features, const float* mean, int64_t dims, int64_t n, float* scores) {
    int64_t c = 0;
    for (; c + 4 <= n; c += 4) score_tile<N, 4>(probe, features + c * dims, mean, dims, scores + c);
    for (; c < n; c++) score_tile<N, 1>(probe, features + c * dims, mean, dims, scores + c);
}

void score(const float* probe, const Brain* features, const float* mean, int64_t dims, int64_t group, int64_t n,
           float* scores) {
    std::fill(scores, scores + n, -INFINITY);
    for (int64_t row = 0; row < group; row += TILE) {
        const float* q = probe + row * dims;
        const int64_t tile = std::min<int64_t>(TILE, group - row);
        if (tile == 4) score_rows<4>(q, features, mean + row, dims, n, scores);
        if (tile == 3) score_rows<3>(q, features, mean + row, dims, n, scores);
        if (tile == 2) score_rows<2>(q, features, mean + row, dims, n, scores);
        if (tile == 1) score_rows<1>(q, features, mean + row, dims, n, scores);
    }
}

inline float as_float(float x) { return x; }
inline float as_float(Brain x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }

// The canonical dot product of (query, reach) with (centroid, deviation): a halving sum of exact products.
template <class Element>
double canonical(const float* probe, const Element* features, int64_t dim, std::vector<double>& terms) {
    std::fill(terms.begin(), terms.end(), 0.0);
    for (int64_t d = 0; d < dim; d++) {
        const double centroid = static_cast<double>(probe[d]) * as_float(features[d]);
        const double deviation = static_cast<double>(probe[dim + d]) * as_float(features[dim + d]);
        terms[d] = centroid + deviation;
    }
    for (size_t half = terms.size() / 2; half > 0; half /= 2)
        for (size_t i = 0; i < half; i++) terms[i] += terms[i + half];
    return terms[0];
}

// The score at which a budget below the sum of all counts ends: clusters above it have less than the budget, with those
// at it they have no less.
float score_at_end(std::vector<std::pair<float, int64_t>>& of, int64_t budget) {
    size_t first = 0, last = of.size();
    while (true) {
        const float a = of[first].first, b = of[(first + last) / 2].first, c = of[last - 1].first;
        const float pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        int64_t above = 0, at = 0;
        size_t i = first, lower = first, end = last;  // [first, lower) above, [lower, i) at, [end, last) below
        while (i < end) {
            if (of[i].first > pivot) {
                above += of[i].second;
                std::swap(of[i++], of[lower++]);
            } else if (of[i].first == pivot) {
                at += of[i++].second;
            } else {
                std::swap(of[i], of[--end]);
            }
        }
        if (above >= budget) {
            last = lower;
        } else if (above + at >= budget) {
            return pivot;
        } else {
            budget -= above + at;
            first = end;
        }
    }
}

struct Problem {
    const float *probe, *mean, *scores;
    const Brain* features;
    const int64_t* counts;
    float lead;  // infinite where float32 is not safe
};

void take(const Problem& p, const Clusters& s, int64_t* taken) {
    int64_t total = 0;
    for (int64_t c = 0; c < s.clusters; c++) total += p.counts[c];
    if (total <= s.budget || s.budget <= 0) {
        for (int64_t c = 0; c < s.clusters; c++) taken[c] = s.budget > 0 ? p.counts[c] : 0;
        return;
    }
    std::vector<int64_t> open;
    int64_t left = s.budget;
    float end = 0.0f;
    if (p.lead < INFINITY) {
        std::vector<std::pair<float, int64_t>> of(s.clusters);
        for (int64_t c = 0; c < s.clusters; c++) of[c] = {p.scores[c], p.counts[c]};
        end = score_at_end(of, s.budget);
    }
    for (int64_t c = 0; c < s.clusters; c++) {
        const bool is_open = !(p.lead < INFINITY) || (p.scores[c] >= end - p.lead && p.scores[c] <= end + p.lead);
        taken[c] = !is_open && p.scores[c] > end ? p.counts[c] : 0;
        left -= taken[c];
        if (is_open) open.push_back(c);
    }
    if (open.size() > 1) {
        size_t padded = 1;
        while (padded < static_cast<size_t>(s.dim)) padded *= 2;
        std::vector<double> terms(padded), means(s.group);
        for (int64_t r = 0; r < s.group; r++) means[r] = canonical(p.probe + 2 * r * s.dim, p.mean, s.dim, terms);
        std::vector<std::pair<double, int64_t>> order;
        for (const int64_t c : open) {
            double best = -INFINITY;
            for (int64_t r = 0; r < s.group; r++) {
                const Brain* features = p.features + 2 * c * s.dim;
                best = std::max(best, canonical(p.probe + 2 * r * s.dim, features, s.dim, terms) - means[r]);
            }
            order.emplace_back(-best, c);
        }
        std::sort(order.begin(), order.end());  // descending scores, of ties the first cluster
        for (size_t i = 0; i < open.size(); i++) open[i] = order[i].second;
    }
    for (const int64_t c : open) {
        taken[c] = std::min(left, p.counts[c]);
        left -= taken[c];
    }
}

struct Body {
    int64_t problems, rows, dim, room;        // room: tokens from problem to problem
    int64_t n_sink, n_exact, n_body, clusters;  // exact tokens: sinks before the body, which is in cluster order, and others
    int64_t threads;
};

// Output (problems, rows, dim) from the partial results of all splits.
void combine(const Body& s, int64_t splits, const float* outputs, const float* sums, const float* highest,
             float* output) {
    for (int64_t problem = 0; problem < s.problems; problem++)
        for (int64_t row = 0; row < s.rows; row++) {
            float* out = output + (problem * s.rows + row) * s.dim;
            const int64_t first = problem * splits * s.rows + row, last = first + splits * s.rows;
            float top = -INFINITY, weights = 0.0f;
            for (int64_t at = first; at < last; at += s.rows) top = std::max(top, highest[at]);
            std::fill(out, out + s.dim, 0.0f);
            for (int64_t at = first; at < last; at += s.rows) {
                const float weight = std::exp(highest[at] - top);
                weights += weight * sums[at];
                for (int64_t d = 0; d < s.dim; d++) out[d] += weight * outputs[at * s.dim + d];
            }
            for (int64_t d = 0; d < s.dim; d++) out[d] /= weights;
        }
}

template <class Element>
void attend_body(const Body& s, const float* query, const Element* keys, const Element* values,
                 const int64_t* first_member, const int64_t* taken, float* output) {
    constexpr int LINE = 64 / sizeof(Element);  // elements of a cache line
    std::vector<std::vector<int64_t>> lists(s.problems);
    int64_t splits = 1;
#pragma omp parallel for num_threads(s.threads) reduction(max : splits)
    for (int64_t problem = 0; problem < s.problems; problem++) {
        std::vector<int64_t>& list = lists[problem];
        for (int64_t i = 0; i < s.n_exact; i++) list.push_back(i < s.n_sink ? i : i + s.n_body);
        for (int64_t c = problem * s.clusters; c < (problem + 1) * s.clusters; c++)
            for (int64_t i = 0; i < taken[c]; i++) list.push_back(s.n_sink + first_member[c] + i);
        splits = std::max<int64_t>(splits, (list.size() + LIST - 1) / LIST);
    }
    const int64_t total = s.problems * splits * s.rows;
    std::vector<float> outputs(total * s.dim, 0.0f), sums(total, 0.0f), highest(total, -INFINITY);

#pragma omp parallel num_threads(s.threads)
    {
        std::vector<Element> copied(2 * BLOCK * s.dim);
        std::vector<int> visible(s.rows, BLOCK);
#pragma omp for schedule(dynamic)
        for (int64_t program = 0; program < s.problems * splits; program++) {
            const int64_t problem = program / splits, start = program % splits * LIST;
            const std::vector<int64_t>& list = lists[problem];
            const int64_t stop = std::min<int64_t>(list.size(), start + LIST);
            const int64_t at = program * s.rows;
            for (int64_t first = start; first < stop; first += BLOCK) {
                const int64_t n = std::min<int64_t>(BLOCK, stop - first);
                for (int64_t i = 0; i < n; i++) {
                    const int64_t ahead = (problem * s.room + list[std::min(first + i + AHEAD, stop - 1)]) * s.dim;
                    for (int64_t d = 0; d < s.dim; d += LINE) {
                        __builtin_prefetch(keys + ahead + d);
                        __builtin_prefetch(values + ahead + d);
                    }
                    const int64_t row = (problem * s.room + list[first + i]) * s.dim;
                    std::memcpy(&copied[i * s.dim], keys + row, s.dim * sizeof(Element));
                    std::memcpy(&copied[(BLOCK + i) * s.dim], values + row, s.dim * sizeof(Element));
                }
                const Entries<Element> entries = {
                    &copied[0], &copied[BLOCK * s.dim], s.dim, s.dim, nullptr, static_cast<int>(s.dim)};
                attend_split(entries, static_cast<int>(n), static_cast<int>(s.rows), query + problem * s.rows * s.dim,
                             visible.data(), {&outputs[at * s.dim], &sums[at], &highest[at]});
            }
        }
    }
    combine(s, splits, outputs.data(), sums.data(), highest.data(), output);
}

}  // namespace

extern "C" {
// Features are centroid, deviation side by side; largest has the lengths of the longest of each.
void kvcluster_take(const Clusters* s, const float* probe, const Brain* features, const float* mean,
                    const float* largest, const int64_t* counts, int64_t* taken) {
    const int64_t dims = 2 * s->dim, parts = (s->clusters + CLUSTERS - 1) / CLUSTERS;
    std::vector<float> scores(s->problems * s->clusters), means(s->problems * s->group), leads(s->problems);
    for (int64_t problem = 0; problem < s->problems; problem++) {
        double reached = 0.0, longest = 0.0;
        const float *centroid = largest + 2 * problem, *deviation = centroid + 1;
        for (int64_t row = problem * s->group; row < (problem + 1) * s->group; row++) {
            double query = 0.0, reach = 0.0, dot = 0.0;
            for (int64_t d = 0; d < dims; d++) {
                const double x = probe[row * dims + d];
                (d < s->dim ? query : reach) += x * x;
                dot += x * mean[problem * dims + d];
            }
            means[row] = static_cast<float>(dot);
            longest = std::max(longest, std::sqrt(query));
            reached = std::max(reached, std::sqrt(query) * *centroid + std::sqrt(reach) * *deviation);
        }
        const bool is_safe = longest > 0x1p-40 && longest < 0x1p40 && *centroid > 0x1p-40f && *centroid < 0x1p40f &&
                             *deviation < 0x1p40f && dims <= 8192;
        leads[problem] = is_safe ? static_cast<float>((2 * dims + 64) * 0x1p-24 * reached) : INFINITY;
    }
#pragma omp parallel for num_threads(s->threads) schedule(dynamic)
    for (int64_t program = 0; program < s->problems * parts; program++) {
        const int64_t problem = program / parts, first = program % parts * CLUSTERS;
        const int64_t at = problem * s->clusters + first;
        score(probe + problem * s->group * dims, features + at * dims, &means[problem * s->group], dims, s->group,
              std::min<int64_t>(CLUSTERS, s->clusters - first), &scores[at]);
    }
#pragma omp parallel for num_threads(s->threads) schedule(dynamic)
    for (int64_t problem = 0; problem < s->problems; problem++) {
        const int64_t at = problem * s->clusters;
        const Problem p = {probe + problem * s->group * dims, mean + problem * dims, &scores[at],
                           features + at * dims,              counts + at,           leads[problem]};
        take(p, *s, taken + at);
    }
}

#define ATTEND_BODY(NAME, ELEMENT)                                                                                   \
    void kvcluster_attend_body_##NAME(const Body* s, const float* query, const ELEMENT* keys, const ELEMENT* values, \
                                      const int64_t* first_member, const int64_t* taken, float* output) {            \
        attend_body(*s, query, keys, values, first_member, taken, output);                                           \
    }
ATTEND_BODY(float32, float)
ATTEND_BODY(float16, Half)
ATTEND_BODY(bfloat16, Brain)
}
