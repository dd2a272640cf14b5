// Which clusters the next query may want, and word to the system that their rows will be read from a mapped file.

#include <sys/mman.h>

#include "recall.cpp"

namespace {

struct Ahead {
    int64_t problems, group, dim, clusters, tokens, slow_rows, n_sink, page;
    int64_t key_bytes, value_bytes;  // of a row
};

void announce(const char* rows, int64_t bytes, int64_t page) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(rows), down = begin % page;
    madvise(reinterpret_cast<void*>(begin - down), bytes + down, MADV_WILLNEED);
}

}  // namespace

extern "C" {
// The clusters with the highest scores, of together at most `tokens`, but those whose `first_row` says that they are
// in the fast tier. Scores in float32: whichever are read ahead, results are the same.
void kvcluster_read_ahead(const Ahead* s, const float* probe, const Brain* features, const float* mean,
                          const int64_t* counts, const int64_t* first_member, const int64_t* first_row,
                          const char* keys, const char* values) {
    const int64_t dims = 2 * s->dim;
    std::vector<float> scores(s->clusters), means(s->group);
    std::vector<std::pair<float, int64_t>> order(s->clusters);
    for (int64_t problem = 0; problem < s->problems; problem++) {
        const float* queries = probe + problem * s->group * dims;
        for (int64_t row = 0; row < s->group; row++) {
            double dot = 0.0;
            for (int64_t d = 0; d < dims; d++) dot += static_cast<double>(queries[row * dims + d]) * mean[problem * dims + d];
            means[row] = static_cast<float>(dot);
        }
        const int64_t at = problem * s->clusters;
        score(queries, features + at * dims, means.data(), dims, s->group, s->clusters, scores.data());
        for (int64_t c = 0; c < s->clusters; c++) order[c] = {-scores[c], at + c};
        std::sort(order.begin(), order.end());
        int64_t left = s->tokens;
        for (const auto& [_, c] : order) {
            left -= counts[c];
            if (left < 0) break;
            if (first_row[c] >= 0) continue;
            const int64_t first = problem * s->slow_rows + s->n_sink + first_member[c];
            announce(keys + first * s->key_bytes, counts[c] * s->key_bytes, s->page);
            announce(values + first * s->value_bytes, counts[c] * s->value_bytes, s->page);
        }
    }
}
}
