// What searches among keys share (search.cpp): products of one query with keys that lie in one piece or in pages, and the
// best of many scores in the order of their places.
#pragma once
#include <limits>

#include "problem.h"
#include "simd.h"

namespace {

// A score that is no number counts as the largest: what it stands for is read, and spoils no one else's choice.
template <class T> inline T ordered(T x) { return x == x ? x : std::numeric_limits<T>::infinity(); }

// Keys of one row and head. In one piece: `stride` numbers from key to key. In pages: (K, page), by the row's table.
template <class T, class E> struct Keys {
    const E* first;
    long stride, width, page;  // page 0: in one piece
    const int32_t* table;
    long table_row, page_stride;  // numbers from a page of the pool to the next

    const E* at(long s) const {
        if (page == 0) return first + s * stride;
        return first + table[s / page % table_row] * page_stride + s % page;
    }
    long step() const { return page == 0 ? 1 : page; }  // from number to number of one key

    T score(const T* q, long s) const {
        const E* k = at(s);
        using S = Simd<T>;
        typename S::V sum{};
        long d = 0;
        if (page == 0)
            for (; d + S::lanes <= width; d += S::lanes) sum += S::load(q + d) * widen(k + d);
        T total = S::sum(sum);
        for (; d < width; ++d) total += q[d] * T(k[d * step()]);
        return total;
    }
    void fetch(long s) const {
        if (page == 0) __builtin_prefetch(at(s)), __builtin_prefetch(at(s) + 64 / sizeof(E));
    }
    // The largest score of each of `rows` queries (rows, wide) among keys [s, s + count), which lie in one page of the pool.
    void largest(const T* q, long wide, long rows, long s, long count, T* best) const {
        using S = Simd<T>;
        bool whole = count % S::lanes == 0 && (page != 0 || width % S::lanes == 0);
        const T none = -std::numeric_limits<T>::infinity();
        const typename S::V nothing = typename S::V{} + none;
        for (long r = 0; r < rows; ++r) {
            best[r] = none;
            if (!whole) {
                for (long j = 0; j < count; ++j) best[r] = std::max(best[r], ordered(score(q + r * wide, s + j)));
                continue;
            }
            typename S::V top = nothing;
            for (long j = 0; j < count; j += S::lanes) {
                typename S::V x = page == 0 ? of_rows(q + r * wide, at(s + j)) : of_columns(q + r * wide, at(s + j));
                x = x == x ? x : -nothing;
                top = x > top ? x : top;
            }
            best[r] = S::max(top);
        }
    }
    typename Simd<T>::V of_rows(const T* q, const E* k) const {
        using S = Simd<T>;
        typename S::V sums[S::lanes];
        for (int j = 0; j < S::lanes; ++j) {
            typename S::V sum{};
            for (long d = 0; d < width; d += S::lanes) sum += S::load(q + d) * widen(k + j * stride + d);
            sums[j] = sum;
        }
        return S::sums(sums);
    }
    typename Simd<T>::V of_columns(const T* q, const E* k) const {
        typename Simd<T>::V sum{};
        for (long d = 0; d < width; ++d) sum += q[d] * widen(k + d * page);
        return sum;
    }
};

// kept[i]: whether scores[i] is among the `wanted` largest; of equal ones the first are. `room` (count).
template <class T> inline void best_of(const T* scores, long count, long wanted, T* room, bool* kept) {
    if (count <= wanted) {
        std::fill(kept, kept + count, true);
        return;
    }
    std::copy(scores, scores + count, room);
    std::nth_element(room, room + wanted - 1, room + count, [](T a, T b) { return a > b; });
    T least = room[wanted - 1];
    long above = 0;
    for (long i = 0; i < count; ++i) above += scores[i] > least;
    for (long i = 0, equal = wanted - above; i < count; ++i) kept[i] = scores[i] > least || (scores[i] == least && equal-- > 0);
}
}  // namespace
