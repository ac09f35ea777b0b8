// Products of weights in 8 and 4 bits with rows in 8 bits: what both have of one. Numbers of a row are whole multiples of
// a scale, their products are summed as integers, exactly: neither order, nor threads, nor other rows can show.
#pragma once
#include <cmath>
#include <limits>
#include "panels.h"
#include "problem.h"
#include "simd.h"
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#define NARROW_DOTS 1  // four products of unsigned and signed bytes in one instruction, on all of a vector's lanes
#else
#define NARROW_DOTS 0
#endif

namespace narrow_rows {

using S = Simd<float>;
using Words = S::Words;

constexpr float LEAST = 1e-30f;  // what is smaller than this everywhere is a row of zeros

template <class E> struct Row {
    // The largest |x[d]|, or NaN where one is NaN or infinite.
    static float largest(const E* x, long count) {
        int32_t top = 0;
        for (long d = 0; d < count; ++d) {
            float value = float(x[d]);
            int32_t bits;
            std::memcpy(&bits, &value, 4);
            top = std::max(top, bits & 0x7fffffff);  // as integers: above every finite number are infinity and NaN
        }
        float found;
        std::memcpy(&found, &top, 4);
        return top < 0x7f800000 ? found : std::numeric_limits<float>::quiet_NaN();
    }

    // codes[d] = round(x[d] · 127 / largest), ties to even; returns the scale: NaN, and codes 0, for what is not finite.
    template <class A> static float scaled(const E* x, long count, A* codes, int shift) {
        float top = largest(x, count);
        bool some = top >= LEAST;
        float by = some ? 127.0f / top : 0.0f;
        for (long d = 0; d < count; ++d)
            codes[d] = A(int32_t(some ? std::nearbyint(float(x[d]) * by) : 0.0f) + shift);
        return some ? top / 127.0f : top < LEAST ? 0.0f : top;
    }
};

inline Words broadcast(const void* four) {  // four bytes on every lane
    int32_t word;
    std::memcpy(&word, four, 4);
    return Words{} + word;
}

inline S::V floats(Words x) { return __builtin_convertvector(x, S::V); }

template <class F> inline void by_rows(long rows, F&& of) {  // what is left of ROWS has its own code, sums in registers
    switch (rows) {
        case 6: return of(std::integral_constant<int, 6>());
        case 5: return of(std::integral_constant<int, 5>());
        case 4: return of(std::integral_constant<int, 4>());
        case 3: return of(std::integral_constant<int, 3>());
        case 2: return of(std::integral_constant<int, 2>());
        case 1: return of(std::integral_constant<int, 1>());
    }
}
}  // namespace narrow_rows
