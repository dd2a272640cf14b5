// The fast tier of a recall cache on a processor: which clusters stay, which come, and copies of their rows.
//
// As kvcluster.fast.plain.tiers does it, in one call where that takes a dozen.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

struct Step {
    int64_t problems, clusters, choices, step, n_steps;
};

struct Copies {
    int64_t problems, clusters, slow_rows, rows, key_bytes, value_bytes;  // bytes of a row
    int64_t first_exact, n_exact, n_sink, n_body;                         // exact rows to copy: first_exact to n_exact
    int64_t threads;
};

void copy_rows(const Copies& s, const char* const slow[2], char* const held[2], int64_t from, int64_t to, int64_t n) {
    const int64_t bytes[2] = {s.key_bytes, s.value_bytes};
    for (int of = 0; of < 2; of++) std::memmove(held[of] + to * bytes[of], slow[of] + from * bytes[of], n * bytes[of]);
}

}  // namespace

extern "C" {
// `taken` (choices, problems, clusters); all others (problems, clusters), but numbers: clusters asked for, of these
// those held, clusters dropped. `first_row` and `last_step` are changed, `sizes` written.
void kvcluster_replace(const Step* s, const int64_t* taken, const int64_t* counts, int64_t* first_row,
                       int64_t* last_step, int64_t* sizes, int64_t* numbers) {
    const int64_t all = s->problems * s->clusters;
    for (int64_t c = 0; c < all; c++) {
        bool is_asked = false;
        for (int64_t choice = 0; choice < s->choices; choice++) is_asked |= taken[choice * all + c] > 0;
        if (is_asked) last_step[c] = s->step;
        const bool is_held = first_row[c] >= 0;
        sizes[c] = is_asked && !is_held ? counts[c] : 0;
        numbers[0] += is_asked;
        numbers[1] += is_asked && is_held;
        if (is_held && last_step[c] <= s->step - s->n_steps) {
            first_row[c] = -1;
            numbers[2]++;
        }
    }
}

// `end` (problems): rows in use; it and `first_row` are changed. Clusters may come from the fast tier itself, to places
// before their own: so they come in the order in which they lie.
void kvcluster_bring(const Copies* s, const char* keys, const char* values, char* held_keys, char* held_values,
                     const int64_t* first_member, const int64_t* sizes, int64_t* first_row, int64_t* end) {
#pragma omp parallel for num_threads(s->threads) schedule(dynamic)
    for (int64_t problem = 0; problem < s->problems; problem++) {
        const char* const slow[2] = {keys + problem * s->slow_rows * s->key_bytes,
                                     values + problem * s->slow_rows * s->value_bytes};
        char* const held[2] = {held_keys + problem * s->rows * s->key_bytes,
                               held_values + problem * s->rows * s->value_bytes};
        for (int64_t row = s->first_exact; row < s->n_exact; row++)
            copy_rows(*s, slow, held, row < s->n_sink ? row : row + s->n_body, row, 1);
        std::vector<std::pair<int64_t, int64_t>> coming;  // where it begins, cluster
        for (int64_t c = problem * s->clusters; c < (problem + 1) * s->clusters; c++)
            if (sizes[c] > 0) coming.emplace_back(first_member[c], c);
        if (keys == held_keys) std::sort(coming.begin(), coming.end());
        for (const auto& [first, c] : coming) {
            copy_rows(*s, slow, held, s->n_sink + first, end[problem], sizes[c]);
            first_row[c] = end[problem];
            end[problem] += sizes[c];
        }
    }
}
}
