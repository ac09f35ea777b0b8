// Vectors, matrix products and exponentials for the compiled CPU kernels: GCC and Clang vector extensions, so one source
// serves AVX-512, AVX2 and NEON at the width of the machine it is compiled on. T is float or double throughout.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <type_traits>
#include <utility>
#if defined(__FMA__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_FMA)
#include <arm_neon.h>
#endif

#if defined(__AVX512F__)
// 6 × 4 sums, four vectors of the right side and a number of the left fit 32 registers; AVX2 has 16.
constexpr int VECTOR_BYTES = 64, TILE_VECTORS = 4;
#elif defined(__AVX2__)
constexpr int VECTOR_BYTES = 32, TILE_VECTORS = 2;
#else
constexpr int VECTOR_BYTES = 16, TILE_VECTORS = 4;
#endif
constexpr int TILE_ROWS = 6;  // TILE_ROWS × TILE_VECTORS sums stay in registers

template <class T> struct Simd {
    static constexpr int lanes = VECTOR_BYTES / sizeof(T);
    static constexpr int panel = TILE_VECTORS * lanes;  // columns of one tile
    using Word = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
    typedef T V __attribute__((vector_size(VECTOR_BYTES)));
    // A vector at any address of T, which may alias anything: tensors are aligned to their numbers alone.
    typedef T Loose __attribute__((vector_size(VECTOR_BYTES), aligned(alignof(T)), may_alias));
    typedef Word Words __attribute__((vector_size(VECTOR_BYTES)));

    static V load(const T* p) { return *reinterpret_cast<const Loose*>(p); }
    static void store(T* p, V x) { *reinterpret_cast<Loose*>(p) = x; }
    // One number on every lane. Minus: x − 0 is x and costs nothing, where 0 + x is an addition, for −0 becomes 0 by it.
    static V spread(T x) { return x - V{}; }
    static T sum(V x) { return halves<VECTOR_BYTES>(x); }
    template <int BYTES, class X> static T halves(X x) {  // lower half + upper half until one number is left
        if constexpr (BYTES == sizeof(T)) {
            return x;
        } else if constexpr (BYTES == 2 * sizeof(T)) {
            return x[0] + x[1];
        } else {
            typedef T Half __attribute__((vector_size(BYTES / 2)));
            Half low, high;
            std::memcpy(&low, &x, BYTES / 2);
            std::memcpy(&high, reinterpret_cast<const char*>(&x) + BYTES / 2, BYTES / 2);
            return halves<BYTES / 2>(Half(low + high));
        }
    }
    // Lane i of the result is sum(x[i]), added in the same order: each step adds the halves of blocks of BLOCK lanes.
    template <int BLOCK = lanes> static V sums(V* x) {
        if constexpr (BLOCK == 1) {
            return x[0];
        } else {
            for (int i = 0; i < BLOCK / 2; ++i) x[i] = paired<BLOCK>(x[i], x[i + BLOCK / 2], std::make_integer_sequence<int, lanes>());
            return sums<BLOCK / 2>(x);
        }
    }
    template <int BLOCK, int... LANE> static V paired(V x, V y, std::integer_sequence<int, LANE...>) {
        constexpr int half = BLOCK / 2;
        return __builtin_shufflevector(x, y, (LANE % BLOCK < half ? LANE : LANE - half + lanes)...) +
               __builtin_shufflevector(x, y, (LANE % BLOCK < half ? LANE + half : LANE + lanes)...);
    }
    static T max(V x) {
        T top = x[0];
        for (int i = 1; i < lanes; ++i) top = std::max(top, T(x[i]));
        return top;
    }
};

// a b + c, rounded once where the processor can. Compilers make one instruction of it or two as they see fit, for some
// processors by how many sums there are side by side: where the same number is to come of different code, it says which.
inline Simd<float>::V fused(Simd<float>::V a, Simd<float>::V b, Simd<float>::V c) {
#if defined(__AVX512F__)
    return (Simd<float>::V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && defined(__AVX2__)
    return (Simd<float>::V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__ARM_FEATURE_FMA) && defined(__aarch64__)
    return (Simd<float>::V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}
inline Simd<double>::V fused(Simd<double>::V a, Simd<double>::V b, Simd<double>::V c) {
#if defined(__AVX512F__)
    return (Simd<double>::V)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__) && defined(__AVX2__)
    return (Simd<double>::V)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#elif defined(__ARM_FEATURE_FMA) && defined(__aarch64__)
    return (Simd<double>::V)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
    return a * b + c;
#endif
}

struct bfloat16 {
    uint16_t bits;
    operator float() const {
        uint32_t wide = uint32_t(bits) << 16;
        float x;
        std::memcpy(&x, &wide, 4);
        return x;
    }
};

inline bfloat16 narrow(float x, bfloat16) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    // Rounding could carry a NaN's bits over into infinity.
    if (x != x) return {uint16_t((bits >> 16) | 64)};
    return {uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <class T> inline T narrow(T x, T) { return x; }

// One vector of T from storage of another type.
template <class T> inline typename Simd<T>::V widen(const T* p) { return Simd<T>::load(p); }
inline Simd<float>::V widen(const bfloat16* p) {
    constexpr int bytes = VECTOR_BYTES / 2;
    typedef uint16_t Half __attribute__((vector_size(bytes), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(VECTOR_BYTES)));
    return (Simd<float>::V)(__builtin_convertvector(*reinterpret_cast<const Half*>(p), Wide) << 16);
}

// One vector into storage of another type, rounded as `narrow` does.
template <class T> inline void put(T* p, typename Simd<T>::V x) { Simd<T>::store(p, x); }
inline void put(bfloat16* p, Simd<float>::V x) {
    constexpr int bytes = VECTOR_BYTES / 2;
    typedef uint16_t Half __attribute__((vector_size(bytes), aligned(2), may_alias));
    typedef uint32_t Wide __attribute__((vector_size(VECTOR_BYTES)));
    Wide bits = (Wide)x, near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    near = x != x ? (bits >> 16) | 64 : near;
    *reinterpret_cast<Half*>(p) = __builtin_convertvector(near, Half);
}

// 2^x for x ≤ 0, exactly 0 below the smallest normal exponent, NaN for NaN. Float: relative error 2e-7 (degree 6).
inline Simd<float>::V exp2_of(Simd<float>::V x) {
    using S = Simd<float>;
    const float magic = 12582912.0f;  // adding it rounds to an integer, which then stands in the low bits
    S::V t = x + magic, f = x - (t - magic);
    // 2^f for |f| ≤ ½ by Horner's rule, times 2^t by adding t to the exponent's bits.
    S::V y = 1.535336188319500e-4f * f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    y = y * f + 1.0f;
    S::V power = (S::V)((S::Words)y + ((S::Words)t << 23));
    return x <= -126.0f ? S::V{} : power;
}
inline Simd<double>::V exp2_of(Simd<double>::V x) {
    for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = x[i] <= -1022.0 ? 0.0 : std::exp2(x[i]);
    return x;
}

template <class T> inline T exp2_of_one(T x) { return x <= T(sizeof(T) == 4 ? -126 : -1022) ? T(0) : std::exp2(x); }

// sums (ROWS, VECTORS·lanes) += A (ROWS, depth) · B (depth, VECTORS·lanes), A with any strides, B as it is stored.
template <class T, int ROWS, int VECTORS, class E>
inline __attribute__((always_inline)) void accumulate(const T* a, long a_row, long a_depth, const E* b, long b_depth,
                                                      long depth, typename Simd<T>::V (&sums)[ROWS][VECTORS]) {
    using S = Simd<T>;
    for (long d = 0; d < depth; ++d, a += a_depth, b += b_depth) {
        // B's row once for all ROWS; each number of A is spread over a vector: ROWS × VECTORS sums without a store.
        typename S::V right[VECTORS];
        for (int j = 0; j < VECTORS; ++j) right[j] = widen(b + j * S::lanes);
        for (int r = 0; r < ROWS; ++r) {
            typename S::V left = S::spread(a[r * a_row]);
            for (int j = 0; j < VECTORS; ++j) sums[r][j] = fused(left, right[j], sums[r][j]);
        }
    }
}

// C (ROWS, VECTORS·lanes) += or = A · B.
template <class T, int ROWS, int VECTORS, class E>
inline void tile(const T* a, long a_row, long a_depth, const E* b, long b_depth, T* c, long c_row, long depth, bool add) {
    using S = Simd<T>;
    typename S::V sums[ROWS][VECTORS];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < VECTORS; ++j) sums[r][j] = add ? S::load(c + r * c_row + j * S::lanes) : typename S::V{};
    accumulate<T, ROWS, VECTORS>(a, a_row, a_depth, b, b_depth, depth, sums);
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < VECTORS; ++j) S::store(c + r * c_row + j * S::lanes, sums[r][j]);
}

template <class T, int VECTORS, class E>
inline void some_rows(long rows, const T* a, long a_row, long a_depth, const E* b, long b_depth, T* c, long c_row,
                      long depth, bool add) {
    // ROWS is known to the compiler, so that the sums are registers; what is left of a matrix has fewer.
    switch (rows) {
        case 6: return tile<T, 6, VECTORS>(a, a_row, a_depth, b, b_depth, c, c_row, depth, add);
        case 5: return tile<T, 5, VECTORS>(a, a_row, a_depth, b, b_depth, c, c_row, depth, add);
        case 4: return tile<T, 4, VECTORS>(a, a_row, a_depth, b, b_depth, c, c_row, depth, add);
        case 3: return tile<T, 3, VECTORS>(a, a_row, a_depth, b, b_depth, c, c_row, depth, add);
        case 2: return tile<T, 2, VECTORS>(a, a_row, a_depth, b, b_depth, c, c_row, depth, add);
        case 1: return tile<T, 1, VECTORS>(a, a_row, a_depth, b, b_depth, c, c_row, depth, add);
    }
}

// C (rows ≤ 6, columns) += or = A · B; columns is a multiple of the lanes.
template <class T, class E>
inline void strip(long rows, long columns, long depth, const T* a, long a_row, long a_depth, const E* b, long b_depth,
                  T* c, long c_row, bool add) {
    constexpr int lanes = Simd<T>::lanes, panel = Simd<T>::panel;
    long j = 0;
    // Whole tiles, then single vectors.
    for (; j + panel <= columns; j += panel)
        some_rows<T, TILE_VECTORS>(rows, a, a_row, a_depth, b + j, b_depth, c + j, c_row, depth, add);
    for (; j < columns; j += lanes) some_rows<T, 1>(rows, a, a_row, a_depth, b + j, b_depth, c + j, c_row, depth, add);
}

template <class T>
inline void product(long rows, long columns, long depth, const T* a, long a_row, long a_depth, const T* b, long b_depth,
                    T* c, long c_row, bool add) {
    for (long i = 0; i < rows; i += TILE_ROWS)
        strip<T>(std::min<long>(TILE_ROWS, rows - i), columns, depth, a + i * a_row, a_row, a_depth, b, b_depth,
                 c + i * c_row, c_row, add);
}

template <class T> inline long padded(long width) { return (width + Simd<T>::lanes - 1) / Simd<T>::lanes * Simd<T>::lanes; }

// Uninitialised, aligned, freed at the end of its scope.
template <class T> struct Buffer {
    std::unique_ptr<T, decltype(&std::free)> held;
    explicit Buffer(long size)
        : held(static_cast<T*>(std::aligned_alloc(64, (std::max<long>(size, 1) * sizeof(T) + 63) / 64 * 64)), &std::free) {}
    T* get() const { return held.get(); }
    operator T*() const { return held.get(); }
};
