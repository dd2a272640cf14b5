// Clustered attention to pages: every request attends to blocks of its own list, wherever in the pool they lie.
//
// The numbers are those of attention.cpp: float32, splits of fixed length that are combined in order. A page of one
// KV head holds its keys feature by feature, then its values token by token, then its counts, as vLLM's CPU backend
// lays out keys and values. So the logits of 16 entries are one vector, and no vector is ever added up.

#include "softmax.h"

namespace {

constexpr int TILE = 4;      // query rows that share one pass over a page
constexpr int ROWS = 64;     // query rows of one program
constexpr int SPLIT = 1024;  // entries of one program, a multiple of BLOCK
constexpr int PIECE = 2 * LANES;  // entries that are scored at once, never of two pages

// Strides are counted in elements of the dtype of the pages.
struct Shape {
    int64_t requests, heads, group, dim;  // KV heads, and query heads that share one
    int64_t page, table;                  // tokens of a page; blocks in a row of the table
    int64_t block_stride, head_stride;    // from page to page, and between the KV heads of one
    int64_t threads;
};

// A request: its queries are `n_tokens` rows from `first_token` on, the last of its `n_entries` entries are those of
// these tokens; the pages from `counted` to `uncounted` of its list hold counts, all others tokens.
struct Request {
    int64_t first_token, n_tokens, n_entries, counted, uncounted;

    int64_t rows(const Shape& s) const { return n_tokens * s.group; }  // of each KV head
    int64_t tiles(const Shape& s) const { return (rows(s) + ROWS - 1) / ROWS; }
    int64_t splits() const { return (n_entries + SPLIT - 1) / SPLIT; }
};

// Logits of a piece's entries, its keys `page` apart from feature to feature, for the rows of one tile.
template <class Element, int N>
void score(const Element* keys, int64_t page, const float* query, int dim, float (*weights)[BLOCK]) {
    Floats dots[N][2] = {};
    for (int d = 0; d < dim; d++) {
        const Floats a = load(keys + d * page), b = load(keys + d * page + LANES);
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) {
            const Floats q = Floats{} + query[r * dim + d];
            dots[r][0] += q * a;
            dots[r][1] += q * b;
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < N; r++) {
        store(weights[r], dots[r][0]);
        store(weights[r] + LANES, dots[r][1]);
    }
}

// PIECE entries that lie side by side in one page, of which `n` exist, and the piece whose keys are wanted next.
template <class Element>
struct Piece {
    const Element* cell;
    const Element* next;
    int offset, n;  // entries of the page before it; what is scored beyond n is never seen
    bool has_counts;
};

// The pieces of a block into the results of one tile; `first` is the place of the first entry in the split.
template <class Element, int N>
void attend_block(const Piece<Element>* pieces, int n_pieces, const Shape& s, int first, const float* query,
                  const int* visible, Partial to) {
    const int dim = static_cast<int>(s.dim);
    alignas(64) float weights[N][BLOCK], bias[BLOCK] = {};
    int n = 0;
    for (int i = 0; i < n_pieces; i++) {
        const Piece<Element>& p = pieces[i];
        float(*logits)[BLOCK] = reinterpret_cast<float(*)[BLOCK]>(*weights + i * PIECE);
        score<Element, N>(p.cell + p.offset, s.page, query, dim, logits);
        if (p.has_counts) {
            const char* counts = reinterpret_cast<const char*>(p.cell + 2 * s.page * s.dim);
            for (int j = 0; j < p.n; j++) {
                int32_t count;
                std::memcpy(&count, counts + (p.offset + j) * sizeof count, sizeof count);
                bias[i * PIECE + j] = log_of_count(count);
            }
        }
        n += p.n;
    }
    weigh<N>(weights, bias, n, first, visible, dim, to);
    for (int i = 0; i < n_pieces; i++) {
        const Piece<Element>& p = pieces[i];
        add_values<Element, N>(reinterpret_cast<const float (*)[BLOCK]>(*weights + i * PIECE),
                               p.cell + (s.page + p.offset) * s.dim, s.dim, p.next, s.dim, p.n, dim, to.output);
    }
}

// One program: some rows of one KV head of one request, and the entries of one split.
template <class Element>
void attend_split(const Shape& s, const Request& q, const Element* pages, const int32_t* blocks, int64_t split,
                  int rows, const float* query, const int* visible, Partial to) {
    const int64_t from = split * SPLIT, until = std::min<int64_t>(from + SPLIT, q.n_entries);
    for (int64_t block = from; block < until; block += BLOCK) {
        Piece<Element> pieces[BLOCK / PIECE];
        int n_pieces = 0;
        for (int64_t entry = block; entry < std::min(block + BLOCK, until); entry += PIECE) {
            const int64_t place = entry / s.page, offset = entry % s.page;
            const int64_t later = std::min(entry + BLOCK, until - 1);
            pieces[n_pieces++] = {pages + blocks[place] * s.block_stride,
                                  pages + blocks[later / s.page] * s.block_stride + later % s.page,
                                  static_cast<int>(offset), static_cast<int>(std::min<int64_t>(PIECE, until - entry)),
                                  place >= q.counted && place < q.uncounted};
        }
        const int first = static_cast<int>(block - from);
        for (int row = 0; row < rows; row += TILE) {
            const int tile = std::min(TILE, rows - row);
            const int last = *std::max_element(visible + row, visible + row + tile);
            const int seen = std::min(n_pieces, (last - first + PIECE - 1) / PIECE);  // of the pieces, by any row
            if (seen <= 0) continue;
            const float* of_tile = query + row * s.dim;
            const Partial part = {to.output + row * s.dim, to.sum + row, to.highest + row};
            if (tile == 4) attend_block<Element, 4>(pieces, seen, s, first, of_tile, visible + row, part);
            if (tile == 3) attend_block<Element, 3>(pieces, seen, s, first, of_tile, visible + row, part);
            if (tile == 2) attend_block<Element, 2>(pieces, seen, s, first, of_tile, visible + row, part);
            if (tile == 1) attend_block<Element, 1>(pieces, seen, s, first, of_tile, visible + row, part);
        }
    }
}

// Where the programs and the partial results of each request begin.
struct Plan {
    std::vector<int64_t> programs{0}, results{0};
};

template <class Element>
void attend(const Shape& s, const Request* requests, const int32_t* tables, const float* query, const Element* pages,
            float* output) {
    Plan plan;
    for (int64_t i = 0; i < s.requests; i++) {
        const Request& q = requests[i];
        plan.programs.push_back(plan.programs.back() + s.heads * q.splits() * q.tiles(s));
        plan.results.push_back(plan.results.back() + s.heads * q.splits() * q.rows(s));
    }
    const int64_t total = plan.results.back();
    std::vector<float> outputs(total * s.dim, 0.0f), sums(total, 0.0f), highest(total, -INFINITY);

#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
    for (int64_t program = 0; program < plan.programs.back(); program++) {
        const int64_t i = std::upper_bound(plan.programs.begin(), plan.programs.end(), program) -
                          plan.programs.begin() - 1;
        const Request& q = requests[i];
        const int64_t all = q.rows(s), tiles = q.tiles(s), splits = q.splits(), mine = program - plan.programs[i];
        const int64_t head = mine / (tiles * splits), row = mine / splits % tiles * ROWS, split = mine % splits;
        const int rows = static_cast<int>(std::min<int64_t>(ROWS, all - row));
        int visible[ROWS];
        std::vector<float> query_rows(rows * s.dim);  // row r: new token r / group, query head r % group of `head`
        for (int r = 0; r < rows; r++) {
            const int64_t token = (row + r) / s.group;
            visible[r] = static_cast<int>(q.n_entries - q.n_tokens + token + 1 - split * SPLIT);
            const int64_t at = ((q.first_token + token) * s.heads + head) * s.group + (row + r) % s.group;
            std::copy_n(query + at * s.dim, s.dim, &query_rows[r * s.dim]);
        }
        const int64_t at = plan.results[i] + (head * splits + split) * all + row;
        attend_split(s, q, pages + head * s.head_stride, tables + i * s.table, split, rows, query_rows.data(), visible,
                     {&outputs[at * s.dim], &sums[at], &highest[at]});
    }

    for (int64_t i = 0; i < s.requests; i++) {
        const int64_t all = requests[i].rows(s), splits = requests[i].splits();
        for (int64_t head = 0; head < s.heads; head++)
            for (int64_t row = 0; row < all; row++) {
                const int64_t token = requests[i].first_token + row / s.group;
                const int64_t at = (token * s.heads + head) * s.group + row % s.group;
                combine(outputs, sums, highest, plan.results[i] + head * splits * all + row, splits, all, s.dim,
                        output + at * s.dim);
            }
    }
}

}  // namespace

extern "C" {
void kvcluster_attend_pages_float32(const Shape* s, const Request* requests, const int32_t* tables, const float* query,
                                    const float* pages, float* output) {
    attend(*s, requests, tables, query, pages, output);
}
void kvcluster_attend_pages_float16(const Shape* s, const Request* requests, const int32_t* tables, const float* query,
                                    const Half* pages, float* output) {
    attend(*s, requests, tables, query, pages, output);
}
void kvcluster_attend_pages_bfloat16(const Shape* s, const Request* requests, const int32_t* tables,
                                     const float* query, const Brain* pages, float* output) {
    attend(*s, requests, tables, query, pages, output);
}
}
