// Quantized entries on a processor: blocks of 32 are made, and attended to, code by code.
//
// A block is described by `kvcluster.fast.exact.blocks.BlockLayout`. Its codes come in groups of 32 with one scale and
// one zero: entries of a channel of the keys, features of an entry of the values. So both halves of attention are one
// loop: 32 sums, to which each group adds its numbers times a coefficient. Numbers are `code - zero / 16`, exact;
// the coefficient holds the scale. Codes go to registers and never to memory in another form.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "entries.h"
#include "quantize.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int LANES_OF_HALF = GROUP / 2;
constexpr int PACKED_TILE = 4;    // query rows that share one pass over a block
constexpr int SPLIT_BLOCKS = 64;  // blocks of one program, 2048 entries
constexpr int CACHE_LINE = 64;    // bytes

typedef uint8_t Bytes __attribute__((vector_size(LANES)));
typedef int16_t Shorts __attribute__((vector_size(2 * LANES)));

inline int16_t integer(const uint8_t* at) {
    int16_t x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline Floats integers(const uint8_t* at) {
    Shorts x;
    std::memcpy(&x, at, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, Ints), Floats);
}

// The lanes' numbers from `first` on, divided by `of`.
inline Ints lanes(int first, int of) {
    Ints x = {};
    for (int lane = 0; lane < LANES; lane++) x[lane] = (first + lane) / of;
    return x;
}

// LANES bytes, one in each lane. GCC would widen eight of them one by one.
inline Ints bytes(const uint8_t* at) {
#if defined __AVX512F__
    return reinterpret_cast<Ints>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#elif defined __AVX2__
    return reinterpret_cast<Ints>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at))));
#else
    Bytes x;
    std::memcpy(&x, at, sizeof x);
    return __builtin_convertvector(x, Ints);
#endif
}

// Eight bytes, or four, over and over.
inline Ints eight_bytes(const uint8_t* at) {
    uint64_t x[LANES / 8];
    for (int i = 0; i < LANES / 8; i++) std::memcpy(&x[i], at, 8);
    return bytes(reinterpret_cast<const uint8_t*>(x));
}

inline Ints four_bytes(const uint8_t* at) {
    uint32_t x[LANES / 4];
    for (int i = 0; i < LANES / 4; i++) std::memcpy(&x[i], at, 4);
    return bytes(reinterpret_cast<const uint8_t*>(x));
}

// Of the 32 codes of a group those from `lane` on, and those from 16 + lane on: a vector of each.
template <int BITS>
inline void read_codes(const uint8_t* at, int lane, Ints* codes) {
    if constexpr (BITS == 8) {
        codes[0] = bytes(at + lane);
        codes[1] = bytes(at + LANES_OF_HALF + lane);
    } else if constexpr (BITS == 4) {
        const Ints both = bytes(at + lane);
        codes[0] = both & 15;
        codes[1] = both >> 4;
    } else {  // a plane of two bits, and for three bits one of their high bit
        const Ints two = eight_bytes(at);
        codes[0] = two >> 2 * lanes(lane, 8) & 3;
        codes[1] = two >> 2 * lanes(LANES_OF_HALF + lane, 8) & 3;
        if constexpr (BITS == 3) {
            const Ints one = four_bytes(at + 8);
            codes[0] |= (one >> lanes(lane, 4) & 1) << 2;
            codes[1] |= (one >> lanes(LANES_OF_HALF + lane, 4) & 1) << 2;
        }
    }
}

// Groups of 32 numbers one after the other, `stride` bytes apart, with their zeros.
struct Groups {
    const uint8_t* codes;
    int64_t stride;
    const float* zeros;
    int n;
};

// Adds up the numbers of `groups`, each times the coefficient that row r has for its group: of the 32 sums of each row
// those from `lane` and from 16 + lane on.
template <int BITS, int N>
inline void add_groups(const Groups& groups, int lane, const float* coefficients, int64_t of_row, Floats (*sums)[2]) {
    for (int k = 0; k < groups.n; k++) {
        Ints codes[2];
        read_codes<BITS>(groups.codes + k * groups.stride, lane, codes);
        const Floats a = __builtin_convertvector(codes[0], Floats) - groups.zeros[k];
        const Floats b = __builtin_convertvector(codes[1], Floats) - groups.zeros[k];
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) {
            const float coefficient = coefficients[r * of_row + k];
            sums[r][0] += coefficient * a;
            sums[r][1] += coefficient * b;
        }
    }
}

// Where the parts of a block lie, in bytes from its first.
struct Layout {
    int64_t dim, nbytes, value_codes, key_scales, key_zeros, value_scales, value_zeros, counts;
};

// Of n groups the zeros in steps, and for each of N rows its factors times the scales; n a multiple of LANES.
template <int N>
inline void prepare(const uint8_t* scales, const uint8_t* zeros, int n, const float* factors, int64_t of_row,
                    float* to_zeros, float* coefficients) {
    for (int k = 0; k < n; k += LANES) {
        const Floats scale = load(reinterpret_cast<const Brain*>(scales) + k);
        store(to_zeros + k, integers(zeros + 2 * k) * (1.0f / PARTS));
#pragma GCC unroll 4
        for (int r = 0; r < N; r++) store(coefficients + r * n + k, load(factors + r * of_row + k) * scale);
    }
}

// What a program works with.
struct Scratch {
    std::vector<float> coefficients, zeros;
    explicit Scratch(int64_t dim) {
        const int64_t n = std::max<int64_t>(dim, GROUP);
        coefficients.resize(PACKED_TILE * n);
        zeros.resize(n);
    }
};

template <int BITS, int N>
void add_keys(const Layout& at, const uint8_t* block, const float* query, Scratch& scratch, float (*logits)[BLOCK]) {
    const int dim = static_cast<int>(at.dim);
    float *zeros = scratch.zeros.data(), *coefficients = scratch.coefficients.data();
    prepare<N>(block + at.key_scales, block + at.key_zeros, dim, query, dim, zeros, coefficients);
    const Groups channels = {block, 4 * BITS, zeros, dim};
    for (int lane = 0; lane < LANES_OF_HALF; lane += LANES) {
        Floats sums[N][2] = {};
        add_groups<BITS, N>(channels, lane, coefficients, dim, sums);
        for (int r = 0; r < N; r++) {
            store(logits[r] + lane, sums[r][0]);
            store(logits[r] + LANES_OF_HALF + lane, sums[r][1]);
        }
    }
}

template <int BITS, int N>
void add_values(const Layout& at, const uint8_t* block, const float (*weights)[BLOCK], Scratch& scratch,
                float* output) {
    float *zeros = scratch.zeros.data(), *coefficients = scratch.coefficients.data();
    for (int64_t feature = 0; feature < at.dim; feature += GROUP) {
        const uint8_t *scales = block + at.value_scales + 2 * feature, *of = block + at.value_zeros + 2 * feature;
        prepare<N>(scales, of, GROUP, weights[0], BLOCK, zeros, coefficients);
        const Groups entries = {block + at.value_codes + feature * 4 * BITS, 4 * BITS, zeros, GROUP};
        for (int lane = 0; lane < LANES_OF_HALF; lane += LANES) {
            Floats sums[N][2] = {};
            add_groups<BITS, N>(entries, lane, coefficients, GROUP, sums);
            for (int r = 0; r < N; r++) {
                float* out = output + r * at.dim + feature + lane;
                store(out, load(out) + sums[r][0]);
                if (feature + LANES_OF_HALF < at.dim)
                    store(out + LANES_OF_HALF, load(out + LANES_OF_HALF) + sums[r][1]);
            }
        }
    }
}

// Asks for bytes that are read soon: scales lie far from codes, and no processor guesses both.
inline void ask_for(const uint8_t* from, int64_t n) {
    for (int64_t i = 0; i < n; i += CACHE_LINE) __builtin_prefetch(from + i);
}

// Takes at most two blocks into the partial results of the N rows of a tile; all rows see all their entries.
template <int KEY_BITS, int VALUE_BITS, int N>
void attend_blocks(const Layout& at, const uint8_t* blocks, int n, const float* query, Scratch& scratch, Partial to) {
    alignas(64) float weights[N][BLOCK], bias[BLOCK] = {};
    int visible[N];
    std::fill(visible, visible + N, n * GROUP);
    const uint8_t* ahead = blocks + BLOCK / GROUP * at.nbytes;
    for (int b = 0; b < n; b++) {
        ask_for(ahead + b * at.nbytes, at.value_codes);
        ask_for(ahead + b * at.nbytes + at.key_scales, at.value_scales - at.key_scales);
        float(*part)[BLOCK] = reinterpret_cast<float(*)[BLOCK]>(&weights[0][b * GROUP]);
        add_keys<KEY_BITS, N>(at, blocks + b * at.nbytes, query, scratch, part);
        for (int j = 0; j < GROUP; j++)
            bias[b * GROUP + j] = log_of_count(integer(blocks + b * at.nbytes + at.counts + 2 * j));
    }
    weigh<N>(weights, bias, n * GROUP, 0, visible, static_cast<int>(at.dim), to);
    for (int b = 0; b < n; b++) {
        ask_for(ahead + b * at.nbytes + at.value_codes, at.key_scales - at.value_codes);
        ask_for(ahead + b * at.nbytes + at.value_scales, at.nbytes - at.value_scales);
        const float(*part)[BLOCK] = reinterpret_cast<const float(*)[BLOCK]>(&weights[0][b * GROUP]);
        add_values<VALUE_BITS, N>(at, blocks + b * at.nbytes, part, scratch, to.output);
    }
}

template <int KEY_BITS, int VALUE_BITS>
void attend_packed(const Layout& at, const uint8_t* blocks, int n, int rows, const float* query, Partial to) {
    Scratch scratch(at.dim);
    for (int first = 0; first < n; first += BLOCK / GROUP)
        for (int row = 0; row < rows; row += PACKED_TILE) {
            const uint8_t* here = blocks + first * at.nbytes;
            const int tile = std::min(PACKED_TILE, rows - row), of_block = std::min(BLOCK / GROUP, n - first);
            const float* q = query + row * at.dim;
            const Partial part = {to.output + row * at.dim, to.sum + row, to.highest + row};
            if (tile == 4) attend_blocks<KEY_BITS, VALUE_BITS, 4>(at, here, of_block, q, scratch, part);
            if (tile == 3) attend_blocks<KEY_BITS, VALUE_BITS, 3>(at, here, of_block, q, scratch, part);
            if (tile == 2) attend_blocks<KEY_BITS, VALUE_BITS, 2>(at, here, of_block, q, scratch, part);
            if (tile == 1) attend_blocks<KEY_BITS, VALUE_BITS, 1>(at, here, of_block, q, scratch, part);
        }
}

template <int KEY_BITS>
void attend_with(int value_bits, const Layout& at, const uint8_t* blocks, int n, int rows, const float* query,
                 Partial to) {
    if (value_bits == 8) attend_packed<KEY_BITS, 8>(at, blocks, n, rows, query, to);
    if (value_bits == 4) attend_packed<KEY_BITS, 4>(at, blocks, n, rows, query, to);
    if (value_bits == 3) attend_packed<KEY_BITS, 3>(at, blocks, n, rows, query, to);
    if (value_bits == 2) attend_packed<KEY_BITS, 2>(at, blocks, n, rows, query, to);
}

void attend_any(int key_bits, int value_bits, const Layout& at, const uint8_t* blocks, int n, int rows,
                const float* query, Partial to) {
    if (key_bits == 8) attend_with<8>(value_bits, at, blocks, n, rows, query, to);
    if (key_bits == 4) attend_with<4>(value_bits, at, blocks, n, rows, query, to);
    if (key_bits == 3) attend_with<3>(value_bits, at, blocks, n, rows, query, to);
    if (key_bits == 2) attend_with<2>(value_bits, at, blocks, n, rows, query, to);
}

struct Shape {
    int64_t problems, heads, rows, queries, threads, key_bits, value_bits;
    int64_t key_batch, value_batch, count_batch, block_batch;  // strides from batch row to batch row
    Layout layout;
};

// The exact entries of a KV head, and its blocks: how many, and the first places in a batch row.
struct Head {
    int64_t entries, first, blocks, first_block;
};

template <class Element>
void attend(const Shape& s, const Head* heads, const float* query, const Element* keys, const Element* values,
            const int32_t* counts, const uint8_t* blocks, float* output) {
    const Layout& at = s.layout;
    int64_t longest = 0, most_blocks = 0;
    for (int64_t head = 0; head < s.heads; head++) {
        longest = std::max(longest, heads[head].entries);
        most_blocks = std::max(most_blocks, heads[head].blocks);
    }
    const int64_t of_blocks = (most_blocks + SPLIT_BLOCKS - 1) / SPLIT_BLOCKS;
    const int64_t splits = of_blocks + (longest + SPLIT - 1) / SPLIT, tiles = (s.rows + ROWS - 1) / ROWS;
    const int64_t total = s.problems * s.rows * splits;
    std::vector<float> outputs(total * at.dim, 0.0f), sums(total, 0.0f), highest(total, -INFINITY);

#pragma omp parallel for num_threads(s.threads) schedule(dynamic)
    for (int64_t program = 0; program < s.problems * tiles * splits; program++) {
        const int64_t problem = program / (tiles * splits), row = program / splits % tiles * ROWS;
        const int64_t split = program % splits, batch = problem / s.heads;
        const Head& head = heads[problem % s.heads];
        const int rows = static_cast<int>(std::min<int64_t>(ROWS, s.rows - row));
        const int64_t place = (problem * splits + split) * s.rows + row;
        const float* q = query + (problem * s.rows + row) * at.dim;
        const Partial to = {&outputs[place * at.dim], &sums[place], &highest[place]};
        if (split < of_blocks) {
            const int64_t first = split * SPLIT_BLOCKS;
            const int64_t n = std::min<int64_t>(SPLIT_BLOCKS, head.blocks - first);
            if (n > 0)
                attend_any(static_cast<int>(s.key_bits), static_cast<int>(s.value_bits), at,
                           blocks + batch * s.block_batch + (head.first_block + first) * at.nbytes,
                           static_cast<int>(n), rows, q, to);
            continue;
        }
        const int64_t first = (split - of_blocks) * SPLIT;
        if (first >= head.entries) continue;
        int visible[ROWS];
        for (int r = 0; r < rows; r++)
            visible[r] = static_cast<int>(head.entries - s.queries + (row + r) % s.queries + 1 - first);
        const Entries<Element> entries = {
            keys + batch * s.key_batch + (head.first + first) * at.dim,
            values + batch * s.value_batch + (head.first + first) * at.dim,
            at.dim,
            at.dim,
            counts + batch * s.count_batch + head.first + first,
            static_cast<int>(at.dim),
        };
        attend_split(entries, static_cast<int>(std::min<int64_t>(SPLIT, head.entries - first)), rows, q, visible, to);
    }

    for (int64_t problem = 0; problem < s.problems; problem++)
        for (int64_t row = 0; row < s.rows; row++)
            combine(outputs, sums, highest, problem * splits * s.rows + row, splits, s.rows, at.dim,
                    output + (problem * s.rows + row) * at.dim);
}

struct Rows {
    int64_t problems, blocks, dim, key_bits, value_bits, threads;
    int64_t key_problem, key_entry, value_problem, value_entry, count_problem, count_entry;  // strides, in elements
    Layout layout;
};

template <class Element>
void pack(const Rows& s, const Element* keys, const Element* values, const int32_t* counts, uint8_t* blocks) {
    const Layout& at = s.layout;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t i = 0; i < s.problems * s.blocks; i++) {
        const int64_t problem = i / s.blocks, first = i % s.blocks * GROUP;
        uint8_t* block = blocks + i * at.nbytes;
        const Element* key = keys + problem * s.key_problem + first * s.key_entry;
        const Element* value = values + problem * s.value_problem + first * s.value_entry;
        const int32_t* count = counts + problem * s.count_problem + first * s.count_entry;
        Numbers numbers = {};
        for (int64_t d = 0; d < at.dim; d += GROUP) {
            const int groups = static_cast<int>(std::min<int64_t>(GROUP, at.dim - d));
            for (int j = 0; j < GROUP; j++)
                for (int g = 0; g < groups; g++) numbers[j][g] = number(key[j * s.key_entry + d + g]);
            write_groups(numbers, GROUP, static_cast<int>(s.key_bits), groups, block + d * 4 * s.key_bits,
                         block + at.key_scales + 2 * d, block + at.key_zeros + 2 * d);
        }
        for (int64_t feature = 0; feature < s.dim; feature += GROUP) {
            const int n = static_cast<int>(std::min<int64_t>(GROUP, s.dim - feature));
            for (int j = 0; j < GROUP; j++)
                for (int d = 0; d < n; d++) numbers[d][j] = number(value[j * s.value_entry + feature + d]);
            write_groups(numbers, n, static_cast<int>(s.value_bits), GROUP,
                         block + at.value_codes + feature * 4 * s.value_bits, block + at.value_scales + 2 * feature,
                         block + at.value_zeros + 2 * feature);
        }
        for (int j = 0; j < GROUP; j++) {
            const int16_t tokens = static_cast<int16_t>(count[j * s.count_entry]);
            std::memcpy(block + at.counts + 2 * j, &tokens, sizeof tokens);
        }
    }
}

}  // namespace

extern "C" {
void kvcluster_pack_float32(const Rows* s, const float* keys, const float* values, const int32_t* counts,
                            uint8_t* blocks) {
    pack(*s, keys, values, counts, blocks);
}
void kvcluster_pack_float16(const Rows* s, const Half* keys, const Half* values, const int32_t* counts,
                            uint8_t* blocks) {
    pack(*s, keys, values, counts, blocks);
}
void kvcluster_pack_bfloat16(const Rows* s, const Brain* keys, const Brain* values, const int32_t* counts,
                             uint8_t* blocks) {
    pack(*s, keys, values, counts, blocks);
}
void kvcluster_attend_packed_float32(const Shape* s, const Head* heads, const float* query, const float* keys,
                                     const float* values, const int32_t* counts, const uint8_t* blocks,
                                     float* output) {
    attend(*s, heads, query, keys, values, counts, blocks, output);
}
void kvcluster_attend_packed_float16(const Shape* s, const Head* heads, const float* query, const Half* keys,
                                     const Half* values, const int32_t* counts, const uint8_t* blocks,
                                     float* output) {
    attend(*s, heads, query, keys, values, counts, blocks, output);
}
void kvcluster_attend_packed_bfloat16(const Shape* s, const Head* heads, const float* query, const Brain* keys,
                                      const Brain* values, const int32_t* counts, const uint8_t* blocks,
                                      float* output) {
    attend(*s, heads, query, keys, values, counts, blocks, output);
}
}
