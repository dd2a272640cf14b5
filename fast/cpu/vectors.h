// Vectors of 16 floats, by the extensions of GCC and Clang, and how they are read from each dtype.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef float Floats8 __attribute__((vector_size(4 * LANES / 2)));
typedef float Floats4 __attribute__((vector_size(4 * LANES / 4)));
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

// Exponent and significand moved into place, then scaled by 2^112; right for subnormal and for all finite numbers.
inline Floats load(const Half* at) {
    const Words h = load_halfwords(at);
    const Floats size = same_bits<Floats>((h & 0x7fffu) << 13) * 0x1p112f;
    return same_bits<Floats>(same_bits<Words>(size) | (h & 0x8000u) << 16);
}

inline void store(float* at, Floats x) { std::memcpy(at, &x, sizeof x); }

// The lanes of each of four vectors added up.
inline Floats4 sums(Floats a, Floats b, Floats c, Floats d) {
    const Floats ab =
        __builtin_shufflevector(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
        __builtin_shufflevector(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    const Floats cd =
        __builtin_shufflevector(c, d, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
        __builtin_shufflevector(c, d, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    const Floats x =
        __builtin_shufflevector(ab, cd, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
        __builtin_shufflevector(ab, cd, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    const Floats8 y = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(y, y, 0, 1, 2, 3) + __builtin_shufflevector(y, y, 4, 5, 6, 7);
}

inline float sum(Floats x) { return sums(x, x, x, x)[0]; }

}  // namespace
