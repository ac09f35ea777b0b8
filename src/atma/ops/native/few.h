// Scores of few query rows with many keys that lie as rows: bound by reading the keys, which are read where they lie.
#pragma once
#include "simd.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

// Lane-wise partial sums of q[r] · k for ROWS rows of one key, of as much of the width as whole vectors are; what is left
// is added by `rest`.
template <class T, class E, int ROWS>
inline void partial(const E* q, long wide, const E* k, long width, typename Simd<T>::V (&sums)[ROWS]) {
    constexpr long lanes = Simd<T>::lanes;
    for (int r = 0; r < ROWS; ++r) sums[r] = typename Simd<T>::V{};
    long d = 0;
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<E, bfloat16>)
        for (; d + 2 * lanes <= width; d += 2 * lanes) {
            __m512bh x = (__m512bh)_mm512_loadu_si512(k + d);
            for (int r = 0; r < ROWS; ++r)
                sums[r] = (typename Simd<T>::V)_mm512_dpbf16_ps((__m512)sums[r], x, (__m512bh)_mm512_loadu_si512(q + r * wide + d));
        }
#endif
    for (; d + lanes <= width; d += lanes) {
        typename Simd<T>::V x = widen(k + d);
        for (int r = 0; r < ROWS; ++r) sums[r] = fused(widen(q + r * wide + d), x, sums[r]);
    }
}

template <class T, class E> T rest(const E* q, const E* k, long width) {
    T total = 0;
    for (long d = width / Simd<T>::lanes * Simd<T>::lanes; d < width; ++d) total += T(q[d]) * T(k[d]);
    return total;
}

// a (ROWS, a_row) = factor q kᵀ over `keys` keys, each read once. A score has the same bits wherever its key stands among
// them, and whatever rows are beside it.
template <class T, class E, int ROWS>
void score_few(const E* q, const T* factor, long wide, const E* k, long stride, long keys, long width, T* a,
               long a_row) {
    using V = typename Simd<T>::V;
    constexpr long lanes = Simd<T>::lanes;
    V sums[ROWS];
    long j = 0;
    for (; j + lanes <= keys; j += lanes, k += lanes * stride) {
        V parts[ROWS][lanes];
        for (long i = 0; i < lanes; ++i) {
            partial<T, E, ROWS>(q, wide, k + i * stride, width, sums);
            for (int r = 0; r < ROWS; ++r) parts[r][i] = sums[r];
        }
        for (int r = 0; r < ROWS; ++r) {
            V total = Simd<T>::sums(parts[r]);
            if (width % lanes != 0)
                for (long i = 0; i < lanes; ++i) total[i] += rest<T>(q + r * wide, k + i * stride, width);
            Simd<T>::store(a + r * a_row + j, total * factor[r]);
        }
    }
    for (; j < keys; ++j, k += stride) {
        partial<T, E, ROWS>(q, wide, k, width, sums);
        for (int r = 0; r < ROWS; ++r)
            a[r * a_row + j] = (Simd<T>::sum(sums[r]) + rest<T>(q + r * wide, k, width)) * factor[r];
    }
}

template <class T, class E> using Scoring = void (*)(const E*, const T*, long, const E*, long, long, long, T*, long);

template <class T, class E> Scoring<T, E> score_rows(long rows) {  // of as many rows as there are, four at the most
    return rows >= 4 ? score_few<T, E, 4> : rows == 3 ? score_few<T, E, 3> : rows == 2 ? score_few<T, E, 2> : score_few<T, E, 1>;
}
