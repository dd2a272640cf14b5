// Vectors of floats, by the extensions of GCC and Clang, and how they are read from each dtype.
//
// They are as wide as the processor's registers: GCC keeps wider ones in memory, which made attention far slower on
// processors without AVX-512. Widths divide 16, of which every dim is a multiple.

#pragma once

#include <cstdint>
#include <cstring>

#if defined __AVX512F__ || defined __F16C__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16;
#else
constexpr int LANES = 8;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Floats4 __attribute__((vector_size(16)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halfwords __attribute__((vector_size(2 * LANES)));

struct Half {
    uint16_t bits;
};
struct Brain {  // bfloat16
    uint16_t bits;
};

template <class To, class From>
inline To same_bits(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "sizes must be equal");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

inline Floats load(const float* at) {
    Floats x;
    std::memcpy(&x, at, sizeof x);
    return x;
}

inline Words load_halfwords(const void* at) {
    Halfwords h;
    std::memcpy(&h, at, sizeof h);
    return __builtin_convertvector(h, Words);
}

inline Floats load(const Brain* at) { return same_bits<Floats>(load_halfwords(at) << 16); }

// Exponent and significand moved into place, then scaled by 2^112, which is right for all finite numbers; the others have
// the largest exponent.
inline Floats load(const Half* at) {
#if defined __AVX512F__
    return same_bits<Floats>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))));
#elif defined __F16C__
    return same_bits<Floats>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at))));
#else
    const Words h = load_halfwords(at);
    const Floats size = same_bits<Floats>((h & 0x7fffu) << 13) * 0x1p112f;
    const Words endless = same_bits<Words>((h & 0x7c00u) == 0x7c00u) & 0x7f800000u;
    return same_bits<Floats>(same_bits<Words>(size) | endless | (h & 0x8000u) << 16);
#endif
}

inline void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

// The lanes of each of four vectors added up.
inline Floats4 sums(Floats a, Floats b, Floats c, Floats d) {
#ifdef __AVX512F__
    const Floats ab =
        __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
        __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    const Floats cd =
        __builtin_shufflevector(c, d, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
        __builtin_shufflevector(c, d, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    const Floats x =
        __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    const auto y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                   __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
#else
    const Floats ab = __builtin_shufflevector(a, b, 0, 8, 2, 10, 4, 12, 6, 14) +
                      __builtin_shufflevector(a, b, 1, 9, 3, 11, 5, 13, 7, 15);
    const Floats cd = __builtin_shufflevector(c, d, 0, 8, 2, 10, 4, 12, 6, 14) +
                      __builtin_shufflevector(c, d, 1, 9, 3, 11, 5, 13, 7, 15);
    const Floats y = __builtin_shufflevector(ab, cd, 0, 1, 8, 9, 4, 5, 12, 13) +
                     __builtin_shufflevector(ab, cd, 2, 3, 10, 11, 6, 7, 14, 15);
#endif
    return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
}

inline float sum(Floats x) { return sums(x, x, x, x)[0]; }

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline float largest(Floats x) {
#ifdef __AVX512F__
    x = larger(x, __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
    x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
    x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
    x = larger(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
#else
    x = larger(x, __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3));
    x = larger(x, __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5));
    x = larger(x, __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6));
#endif
    return x[0];
}

}  // namespace
