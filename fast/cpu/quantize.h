// Numbers in few bits, as kvcluster.reference.quantize makes codes, scales and zeros of them.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

constexpr int GROUP = 32;           // numbers with one scale
constexpr int PARTS = 16;           // of a step, of which a zero is a whole number
constexpr int LARGEST_ZERO = 2047;  // steps

// The exact number that an element is.
inline float number(float x) { return x; }
inline float number(Brain x) { return same_bits<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float number(Half x) {
    const float size = same_bits<float>((x.bits & 0x7fffu) << 13) * 0x1p112f;
    return same_bits<float>(same_bits<uint32_t>(size) | (x.bits & 0x8000u) << 16);
}

// Rounded to an integer, ties to even; for numbers far below 2^51.
inline double rounded(double x) { return (x + 0x1.8p52) - 0x1.8p52; }

// Groups that are quantized together: number i of each, side by side, for vectors.
typedef float Numbers[GROUP][GROUP];
typedef uint8_t Codes[GROUP][GROUP];

// Makes packed codes, scales and zeros of 32 groups of `n` numbers. A fused multiply-add gives the same bits: a zero over
// 16 is exact.
void quantize(const Numbers& numbers, int n, int bits, Codes& packed, uint16_t* scales, int16_t* zeros) {
    const double top = (1 << bits) - 1;
    float low[GROUP], high[GROUP];
    std::copy(numbers[0], numbers[0] + GROUP, low);
    std::copy(numbers[0], numbers[0] + GROUP, high);
    for (int i = 1; i < n; i++)
        for (int g = 0; g < GROUP; g++) {
            low[g] = std::min(low[g], numbers[i][g]);
            high[g] = std::max(high[g], numbers[i][g]);
        }
    double steps[GROUP], offsets[GROUP];
    for (int g = 0; g < GROUP; g++) {
        const double range = (static_cast<double>(high[g]) - low[g]) / top;
        const double largest = std::max(std::fabs(low[g]), std::fabs(high[g]));
        const float wanted = static_cast<float>(std::max(range, largest / LARGEST_ZERO));
        scales[g] = static_cast<uint16_t>((same_bits<uint32_t>(wanted) + 0xffff) >> 16);  // up to bfloat16
        const float step = same_bits<float>(static_cast<uint32_t>(scales[g]) << 16);
        steps[g] = step > 0 ? step : INFINITY;
        const double begin = rounded(PARTS * static_cast<double>(low[g]) / steps[g]);
        zeros[g] = static_cast<int16_t>(-begin);
        offsets[g] = -begin / PARTS;
    }
    Codes codes = {};
    for (int i = 0; i < n; i++)
        for (int g = 0; g < GROUP; g++)
            codes[i][g] = static_cast<uint8_t>(static_cast<int>(rounded(numbers[i][g] / steps[g] + offsets[g])));
    for (int done = 0, width; done < bits; done += width) {  // 3 bits are a plane of two and one of one
        width = bits == 3 ? 2 - done / 2 : bits;
        const uint8_t mask = static_cast<uint8_t>((1 << width) - 1);
        for (int i = 0; i < 4 * width; i++) {
            uint8_t* bytes = packed[4 * done + i];
            std::fill(bytes, bytes + GROUP, 0);
            for (int k = 0; k < 8 / width; k++)
                for (int g = 0; g < GROUP; g++)
                    bytes[g] |= static_cast<uint8_t>((codes[i + 4 * width * k][g] >> done & mask) << k * width);
        }
    }
}

// Writes the codes, scales and zeros of `groups` such groups one behind the other.
void write_groups(const Numbers& numbers, int n, int bits, int groups, uint8_t* to_codes, uint8_t* to_scales,
                  uint8_t* to_zeros) {
    Codes packed;
    uint16_t scales[GROUP];
    int16_t zeros[GROUP];
    quantize(numbers, n, bits, packed, scales, zeros);
    for (int g = 0; g < groups; g++)
        for (int i = 0; i < 4 * bits; i++) to_codes[g * 4 * bits + i] = packed[i][g];
    std::memcpy(to_scales, scales, groups * sizeof scales[0]);
    std::memcpy(to_zeros, zeros, groups * sizeof zeros[0]);
}

}  // namespace
