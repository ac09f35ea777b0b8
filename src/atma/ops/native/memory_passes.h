// Passes over one matrix of a neural memory: products with vectors, and the step of a token, which decays, writes and reads
// every number once. A sum is taken in the same order however many inputs there are beside it.
#pragma once
#include "memory.h"

namespace {

template <class X, class T> inline X get(const T* p) {
    if constexpr (std::is_same_v<X, T>) return *p;
    else return Simd<T>::load(p);
}
template <class T> inline void set(T* p, T x) { *p = x; }
template <class T> inline void set(T* p, typename Simd<T>::V x) { Simd<T>::store(p, x); }

// Sums of as many rows as a vector has lanes: of vectors, and of what was left of each row.
template <class T> struct Sums {
    using S = Simd<T>;
    typename S::V sums[S::lanes]{};
    alignas(64) T rest[S::lanes]{};
    void store(T* to, long count) {
        typename S::V total = S::sums(sums) + S::load(rest);
        std::memcpy(to, &total, count * sizeof(T));
    }
};

// The first `count` numbers at p, then zeros; `inside` where a whole vector may be read there.
template <class T> inline typename Simd<T>::V some(const T* p, long count, bool inside, typename Simd<T>::Words there) {
    typename Simd<T>::V x{};
    if (inside) return there ? Simd<T>::load(p) : x;
    std::memcpy(&x, p, count * sizeof(T));
    return x;
}
template <class T> inline typename Simd<T>::Words first_lanes(long count) {
    typename Simd<T>::Words there{};
    for (int i = 0; i < Simd<T>::lanes; ++i) there[i] = i < count ? -1 : 0;
    return there;
}

// x lies `wide` apart, with zeros behind its columns up to whole vectors.
template <class T, int N>
void some_dots(const T* matrix, long rows, long columns, const T* x, long wide, T* out) {
    using S = Simd<T>;
    using V = typename S::V;
    long whole = columns / S::lanes * S::lanes, left = columns - whole;
    typename S::Words there = first_lanes<T>(left);
    for (long first = 0; first < rows; first += S::lanes) {
        long count = std::min<long>(S::lanes, rows - first);
        V found[N][S::lanes]{};
        for (long i = 0; i < count; ++i) {
            const T* row = matrix + (first + i) * columns;
            V sums[N]{};
            auto add = [&](V w, long d) {
                for (int n = 0; n < N; ++n) sums[n] = fused(w, S::load(x + n * wide + d), sums[n]);
            };
            for (long d = 0; d < whole; d += S::lanes) add(S::load(row + d), d);
            if (left > 0) add(some(row + whole, left, first + i + 1 < rows && columns >= S::lanes, there), whole);
            for (int n = 0; n < N; ++n) found[n][i] = sums[n];
        }
        for (int n = 0; n < N; ++n) {
            V total = S::sums(found[n]);
            std::memcpy(out + n * rows + first, &total, count * sizeof(T));
        }
    }
}

// to (inputs, wide) = x (inputs, columns), with zeros up to whole vectors.
template <class T> void widen_rows(const T* x, long inputs, long columns, T* to) {
    long wide = padded<T>(columns);
    for (long n = 0; n < inputs; ++n) std::fill(std::copy_n(x + n * columns, columns, to + n * wide), to + (n + 1) * wide, T(0));
}

// out (inputs, rows) = x (inputs, columns) times the transposed matrix (rows, columns).
template <class T> void dots(const T* matrix, long rows, long columns, const T* x, long inputs, T* out) {
    long wide = padded<T>(columns), n = 0;
    Buffer<T> room(wide == columns ? 0 : inputs * wide);
    if (wide != columns) widen_rows(x, inputs, columns, room.get()), x = room;
    for (; n + 4 <= inputs; n += 4) some_dots<T, 4>(matrix, rows, columns, x + n * wide, wide, out + n * rows);
    for (; n < inputs; ++n) some_dots<T, 1>(matrix, rows, columns, x + n * wide, wide, out + n * rows);
}

// out (inputs, columns) = e (inputs, rows) times the matrix (rows, columns).
template <class T> void turned_dots(const T* matrix, long rows, long columns, const T* e, long inputs, T* out) {
    long whole = columns / Simd<T>::lanes * Simd<T>::lanes;
    product<T>(inputs, whole, rows, e, rows, 1, matrix, columns, out, columns, false);
    for (long n = 0; n < inputs; ++n)
        for (long d = whole; d < columns; ++d) {
            T sum = 0;
            for (long r = 0; r < rows; ++r) sum += e[n * rows + r] * matrix[r * columns + d];
            out[n * columns + d] = sum;
        }
}

// SPLIT: A ← Γ(A) and S ← η S + u, which another step puts together.
enum class Mode { plain, momentum, split };

template <class T> struct Update {
    T *a, *s;
    const T *initial, *gamma, *eta;  // of rows, or of columns; the first null where A decays to zero
    const T *e, *z;                  // u = Σ_j e_j z_jᵀ: (rows, count), and (count, columns), rows of whole vectors if several
    long rows, columns, count;
    T* room;          // as many rows of u as a vector has lanes, where count > 1
    const T* x;       // what A is multiplied by once it is written
    const T* anchor;  // of the mean W̄ + (A − W̄) part, which is then read; else null
    T part;
    T* out;
};

// A, and S, of one row at one place, or at as many as a vector has lanes; what is read there.
template <class T, Mode MODE, bool INITIAL, bool COLUMNS, class X>
inline X step(const Update<T>& p, long r, long d, T by, const T* z) {
    long at = r * p.columns + d;
    auto gate = [&](const T* x) { return COLUMNS ? get<X>(x + d) : X{} + x[r]; };
    X u = by * get<X>(z + d), next = get<X>(p.a + at);
    if constexpr (INITIAL) {
        X initial = get<X>(p.initial + at);
        next = initial + gate(p.gamma) * (next - initial);
    } else {
        next = gate(p.gamma) * next;
    }
    if constexpr (MODE == Mode::plain) {
        next += u;
    } else {
        X s = gate(p.eta) * get<X>(p.s + at) + u;
        set(p.s + at, s);
        if constexpr (MODE == Mode::momentum) next += s;
    }
    set(p.a + at, next);
    if (p.anchor == nullptr) return next;
    X anchor = get<X>(p.anchor + at);
    return anchor + (next - anchor) * p.part;
}

template <class T, Mode MODE, bool INITIAL, bool COLUMNS> void pass(const Update<T>& p) {
    using S = Simd<T>;
    long wide = padded<T>(p.columns);
    for (long first = 0; first < p.rows; first += S::lanes) {
        long count = std::min<long>(S::lanes, p.rows - first);
        if (p.count > 1) product<T>(count, wide, p.count, p.e + first * p.count, p.count, 1, p.z, wide, p.room, wide, false);
        Sums<T> found;
        for (long i = 0; i < count; ++i) {
            long r = first + i, d = 0;
            T by = p.count > 1 ? T(1) : p.e[r], rest = 0;
            const T* z = p.count > 1 ? p.room + i * wide : p.z;
            typename S::V sum{};
            for (; d + S::lanes <= p.columns; d += S::lanes)
                sum += step<T, MODE, INITIAL, COLUMNS, typename S::V>(p, r, d, by, z) * S::load(p.x + d);
            for (; d < p.columns; ++d) rest += step<T, MODE, INITIAL, COLUMNS, T>(p, r, d, by, z) * p.x[d];
            found.sums[i] = sum, found.rest[i] = rest;
        }
        found.store(p.out + first, count);
    }
}

template <class T, Mode MODE> void pass(const Update<T>& p, bool by_columns) {
    if (p.initial != nullptr) return by_columns ? pass<T, MODE, true, true>(p) : pass<T, MODE, true, false>(p);
    return by_columns ? pass<T, MODE, false, true>(p) : pass<T, MODE, false, false>(p);
}
}  // namespace
