// Rows of bytes: what the features of one token are in few bits, and back. See kvcluster.fast.exact.rows.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "quantize.h"

namespace {

struct Rows {
    int64_t n, numbers, groups, bits, nbytes, threads;
};

template <class Element>
void pack(const Rows& s, const Element* array, uint8_t* rows) {
    const int bits = static_cast<int>(s.bits);
    const int64_t scales = s.groups * 4 * bits, zeros = scales + 2 * s.groups;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t first = 0; first < s.n; first += GROUP) {
        const int here = static_cast<int>(std::min<int64_t>(GROUP, s.n - first));
        Numbers numbers = {};
        for (int64_t group = 0; group < s.groups; group++) {
            const int n = static_cast<int>(std::min<int64_t>(GROUP, s.numbers - group * GROUP));
            for (int r = 0; r < here; r++)
                for (int i = 0; i < n; i++) numbers[i][r] = number(array[(first + r) * s.numbers + group * GROUP + i]);
            Codes packed;
            uint16_t of_scales[GROUP];
            int16_t of_zeros[GROUP];
            quantize(numbers, n, bits, packed, of_scales, of_zeros);
            for (int r = 0; r < here; r++) {
                uint8_t* row = rows + (first + r) * s.nbytes;
                for (int i = 0; i < 4 * bits; i++) row[group * 4 * bits + i] = packed[i][r];
                std::memcpy(row + scales + 2 * group, &of_scales[r], sizeof of_scales[r]);
                std::memcpy(row + zeros + 2 * group, &of_zeros[r], sizeof of_zeros[r]);
            }
        }
    }
}

// The 32 codes of a group.
inline void read_codes(const uint8_t* packed, int bits, uint8_t* codes) {
    std::memset(codes, 0, GROUP);
    for (int done = 0, width; done < bits; done += width) {  // 3 bits are a plane of two and one of one
        width = bits == 3 ? 2 - done / 2 : bits;
        const uint8_t mask = static_cast<uint8_t>((1 << width) - 1);
        const uint8_t* plane = packed + 4 * done;
        for (int k = 0; k < 8 / width; k++)
            for (int i = 0; i < 4 * width; i++)
                codes[4 * width * k + i] |= static_cast<uint8_t>((plane[i] >> k * width & mask) << done);
    }
}

void unpack(const Rows& s, const uint8_t* rows, float* array) {
    const int bits = static_cast<int>(s.bits);
    const int64_t scales = s.groups * 4 * bits, zeros = scales + 2 * s.groups;
#pragma omp parallel for num_threads(s.threads) schedule(static)
    for (int64_t r = 0; r < s.n; r++) {
        const uint8_t* row = rows + r * s.nbytes;
        for (int64_t group = 0; group < s.groups; group++) {
            uint16_t of_scale;
            int16_t of_zero;
            std::memcpy(&of_scale, row + scales + 2 * group, sizeof of_scale);
            std::memcpy(&of_zero, row + zeros + 2 * group, sizeof of_zero);
            const float scale = same_bits<float>(static_cast<uint32_t>(of_scale) << 16);
            const float zero = static_cast<float>(of_zero) / PARTS;
            uint8_t codes[GROUP];
            read_codes(row + group * 4 * bits, bits, codes);
            float* to = array + r * s.numbers + group * GROUP;
            const int n = static_cast<int>(std::min<int64_t>(GROUP, s.numbers - group * GROUP));
            for (int i = 0; i < n; i++) to[i] = scale * (static_cast<float>(codes[i]) - zero);
        }
    }
}

}  // namespace

extern "C" {
void kvcluster_pack_rows_float32(const Rows* s, const float* array, uint8_t* rows) { pack(*s, array, rows); }
void kvcluster_pack_rows_float16(const Rows* s, const Half* array, uint8_t* rows) { pack(*s, array, rows); }
void kvcluster_pack_rows_bfloat16(const Rows* s, const Brain* array, uint8_t* rows) { pack(*s, array, rows); }
void kvcluster_unpack_rows(const Rows* s, const uint8_t* rows, float* array) { unpack(*s, rows, array); }
}
