// Keys and values in 8 bits beside what bounds their distance from the exact ones (ops/certified): where their rows lie,
// and products of whole numbers. A product with a query in 16 bits is exact, so no order of additions changes a bit.
#pragma once
#include "problem.h"
#include "simd.h"
#if defined(__AVX2__) || defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

using Float = Simd<float>;
using V = Float::V;
using Mask = Float::Words;
constexpr long LANES = Float::lanes, SHORTS = 2 * LANES;  // of a vector
typedef int16_t Shorts __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));

inline float wide(bfloat16 x) { return x; }

// The least bfloat16 that is not below x ≥ 0.
inline bfloat16 upward(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    if ((bits & 0x7f800000) == 0x7f800000) return narrow(x, bfloat16{});
    return {uint16_t((bits + 0xffff) >> 16)};
}

// Whole numbers of 8 bits wider: GCC 12 makes several steps of what is one instruction.
inline Shorts shorts(const int8_t* x) {
#if defined(__AVX512BW__)
    return (Shorts)_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
    typedef int8_t Bytes __attribute__((vector_size(SHORTS), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(x), Shorts);
#endif
}

inline V floats(const int8_t* x) {
#if defined(__AVX512F__)
    return (V)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x))));
#elif defined(__AVX2__)
    return (V)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(x))));
#else
    typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
    return __builtin_convertvector(*reinterpret_cast<const Bytes*>(x), V);
#endif
}

// Each lane: the sum of the products of two neighbouring numbers.
inline Ints pairs(Shorts x, Shorts y) {
#if defined(__AVX512BW__)
    return (Ints)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return (Ints)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__) && !defined(__AVX512F__)
    return (Ints)_mm_madd_epi16((__m128i)x, (__m128i)y);
#else
    Ints a = (Ints)x, b = (Ints)y;
    return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

inline bool any(Mask x) {
#if defined(__AVX512DQ__)
    return _mm512_movepi32_mask((__m512i)x) != 0;
#elif defined(__AVX2__) && !defined(__AVX512F__)
    return _mm256_movemask_ps((__m256)x) != 0;
#else
    Float::Word found = 0;
    for (long i = 0; i < LANES; ++i) found |= x[i];
    return found != 0;
#endif
}

inline Mask lanes_from(long at) {  // at, at + 1, …
    Mask x;
    for (long i = 0; i < LANES; ++i) x[i] = int32_t(at + i);
    return x;
}

// out (R rows, `stride` apart) = q · k of n keys, rows of `width` bytes; q (R, padded) is filled up with zeros.
template <int R> void dots(const int8_t* keys, long n, long width, const int16_t* q, long padded, int32_t* out, long stride) {
    using I = Simd<int32_t>;
    Buffer<int8_t> room(width == padded ? 0 : LANES * padded);
    if (width != padded) std::fill_n(room.get(), LANES * padded, int8_t(0));
    for (long j = 0; j < n; j += LANES) {
        I::V parts[R][LANES];
        for (long i = 0; i < LANES; ++i) {
            const int8_t* k = keys + std::min(j + i, n - 1) * width;  // the last again, for lanes behind it
            if (width != padded) k = std::copy_n(k, width, room + i * padded) - width;
            Ints sums[R];
            for (int r = 0; r < R; ++r) sums[r] = Ints{};
            for (long d = 0; d < padded; d += SHORTS) {
                Shorts x = shorts(k + d);
                for (int r = 0; r < R; ++r)
                    sums[r] += pairs(x, *reinterpret_cast<const Shorts*>(q + r * padded + d));
            }
            for (int r = 0; r < R; ++r) parts[r][i] = (I::V)sums[r];
        }
        for (int r = 0; r < R; ++r) I::store(out + r * stride + j, I::sums(parts[r]));
    }
}

// D (R rows, `wide` apart) += Σ weight · value over the n values at these places, as many columns as are whole vectors.
template <int R, int C>
inline void add_columns(const int8_t* const* at, const int16_t* index, long n, const float* weights, long stride, long column,
                        float* D, long wide) {
    V sums[R][C];
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) sums[r][c] = Float::load(D + r * wide + column + c * LANES);
    for (long i = 0; i < n; ++i) {
        V w[R];
        for (int r = 0; r < R; ++r) w[r] = weights[r * stride + index[i]] - V{};
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) {
            V x = floats(at[i] + column + c * LANES);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[r][c] = fused(w[r], x, sums[r][c]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int c = 0; c < C; ++c) Float::store(D + r * wide + column + c * LANES, sums[r][c]);
}

template <int R>
void add_values(const int8_t* const* at, const int16_t* index, long n, const float* weights, long stride, float* D, long wide) {
    constexpr int C = VECTOR_BYTES == 64 ? 4 : R == 1 ? 8 : R == 2 ? 4 : 2;
    constexpr long some = 64;  // values that stay in the first-level cache while all their columns are read
    for (long i = 0; i < n; i += some) {
        long count = std::min(some, n - i), column = 0;
        for (; column + C * LANES <= wide; column += C * LANES)
            add_columns<R, C>(at + i, index + i, count, weights, stride, column, D, wide);
        for (; column < wide; column += LANES)
            add_columns<R, 1>(at + i, index + i, count, weights, stride, column, D, wide);
    }
}

template <class Work> void for_rows(long rows, Work work) {  // work(constant) of as many rows as there are, at most 4
    if (rows == 1) work(std::integral_constant<int, 1>());
    else if (rows == 2) work(std::integral_constant<int, 2>());
    else if (rows == 3) work(std::integral_constant<int, 3>());
    else work(std::integral_constant<int, 4>());
}
}  // namespace
