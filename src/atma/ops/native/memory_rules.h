// Of a neural memory, what is done to whole matrices beside a token's step: softmax of rows (kl), Newton–Schulz (muon), norms
// (lq, renorm), and boundaries of the grid (ops/fast_weights/boundary.py).
#pragma once
#include "memory_network.h"

namespace {

// Of a row, use(d, e^(a_d − the largest)) for every place d: as one vector, and what is left as one number.
template <class T, class F> void exponentials(const T* row, long n, F use) {
    using S = Simd<T>;
    long d = 0;
    T most = row[0];
    if (n >= S::lanes) {
        typename S::V tops = S::load(row);
        for (; d + S::lanes <= n; d += S::lanes) tops = S::load(row + d) > tops ? S::load(row + d) : tops;
        most = S::max(tops);
    }
    for (; d < n; ++d) most = row[d] > most ? row[d] : most;
    for (d = 0; d + S::lanes <= n; d += S::lanes) use(d, exp2_of((S::load(row + d) - most) * T(1.4426950408889634)));
    for (; d < n; ++d) use(d, std::exp(row[d] - most));
}

// A sum of vectors and of single numbers.
template <class T> struct Sum {
    typename Simd<T>::V vectors{};
    T numbers = 0;
    void add(typename Simd<T>::V x) { vectors += x; }
    void add(T x) { numbers += x; }
    T total() const { return Simd<T>::sum(vectors) + numbers; }
};

// out = ρ(Z) x, ρ(Z) the columns times the softmax of each row.
template <class T> void soft_dots(const T* dual, long rows, long columns, const T* x, T* out) {
    for (long r = 0; r < rows; ++r) {
        Sum<T> sum, found;
        exponentials(dual + r * columns, columns, [&](long d, auto e) { sum.add(e), found.add(e * get<decltype(e)>(x + d)); });
        out[r] = columns * (found.total() / sum.total());
    }
}

template <class T> void soften(const T* dual, long rows, long columns, T* to) {
    for (long r = 0; r < rows; ++r) {
        T* row = to + r * columns;
        Sum<T> sum;
        exponentials(dual + r * columns, columns, [&](long d, auto e) { set(row + d, e), sum.add(e); });
        T scale = columns / sum.total();
        for (long d = 0; d < columns; ++d) row[d] *= scale;
    }
}

constexpr double ROUNDS[2][5][3] = {
    {{3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315}, {3.4445, -4.7750, 2.0315}},
    {{4.0848, -6.8946, 2.9270}, {3.9505, -6.3029, 2.6377}, {3.7418, -5.5913, 2.3037}, {2.8769, -3.1427, 1.2046}, {2.8366, -3.0525, 1.2012}},
};

template <class T> void turn(const T* from, long rows, long columns, long from_row, T* to, long to_row) {
    constexpr long side = 16;
    for (long r0 = 0; r0 < rows; r0 += side)
        for (long c0 = 0; c0 < columns; c0 += side)
            for (long c = c0; c < std::min(c0 + side, columns); ++c)
                for (long r = r0; r < std::min(r0 + side, rows); ++r) to[c * to_row + r] = from[r * from_row + c];
}

// NS(S) of S (rows, columns): X = S/(‖S‖ + 1e-7), transposed if it is tall; five times G = X Xᵀ, X ← a X + (b G + c G²) X.
template <class T> void newton_schulz(const T* s, long rows, long columns, int schedule, T* to) {
    bool tall = rows > columns;
    long m = tall ? columns : rows, n = tall ? rows : columns, wide = padded<T>(n), high = padded<T>(m);
    Buffer<T> room(2 * m * wide + n * high + 2 * m * high);
    T *X = room, *Y = X + m * wide, *turned = Y + m * wide, *G = turned + n * high, *P = G + m * high;
    std::fill(X, P + m * high, T(0));
    double square = 0;
    for (long i = 0; i < rows * columns; ++i) square += double(s[i]) * s[i];
    T scale = 1 / (T(std::sqrt(square)) + T(1e-7));
    if (tall) turn(s, rows, columns, columns, X, wide);
    else for (long r = 0; r < m; ++r) std::copy_n(s + r * n, n, X + r * wide);
    for (long i = 0; i < m * wide; ++i) X[i] *= scale;
    for (const auto& round : ROUNDS[schedule]) {
        T a = T(round[0]), b = T(round[1]), c = T(round[2]);
        turn(X, m, n, wide, turned, high);
        product<T>(m, high, n, X, wide, 1, turned, high, G, high, false);
        for (long i = 0; i < m * high; ++i) P[i] = b * G[i], Y[i] = c * G[i];
        product<T>(m, high, m, Y, high, 1, G, high, P, high, true);
        for (long i = 0; i < m * wide; ++i) Y[i] = a * X[i];
        product<T>(m, wide, m, P, high, 1, X, wide, Y, wide, true);
        std::swap(X, Y);
    }
    if (tall) turn(X, m, n, wide, to, columns);
    else for (long r = 0; r < m; ++r) std::copy_n(X + r * wide, n, to + r * n);
}

// ‖A‖_q^(2 − q) over all entries.
template <class T> T scale_of(const T* a, long size, double q) {
    double sum = 0;
    for (long i = 0; i < size; ++i) {
        double square = double(a[i]) * a[i];
        sum += q == 4 ? square * square : std::pow(square, q / 2);
    }
    return T(std::pow(sum, (2 - q) / q));
}

// A where it is within the radius of W⁰, else the point of the way there that is.
template <class T> void draw_back(const Head<T>& head, int i) {
    const T* start = head.initial(i);
    T* a = head.weights(i);
    long size = head.size(i);
    double moved = 0, whole = 0;
    for (long n = 0; n < size; ++n) {
        moved += double(a[n] - start[n]) * (a[n] - start[n]);
        whole += double(start[n]) * start[n];
    }
    double most = head.p.radius * std::sqrt(whole), far = std::sqrt(moved);
    for (long n = 0; far > most && n < size; ++n) a[n] = start[n] + T(most / far) * (a[n] - start[n]);
}

// W̄ ← ρ(A) (4.7).
template <class T> void renew(const Head<T>& head) {
    const Memory& p = head.p;
    for (int i = 0; i < p.matrices; ++i) {
        T *a = head.weights(i), *anchor = head.anchor(i), part = T(1) / p.chunk, scale = 1;
        long size = head.size(i);
        for (long n = 0; p.average && n < size; ++n) a[n] = anchor[n] + (a[n] - anchor[n]) * part;
        if (!std::isinf(p.radius)) draw_back(head, i);
        if (p.retention == LQ) scale = head.own(p.scale, p.matrices)[i] = scale_of(a, size, p.norm_power);
        if (p.retention == KL) soften(a, head.rows(i), head.columns(i), anchor);
        else if (p.retention == LQ) for (long n = 0; n < size; ++n) anchor[n] = scale * a[n];
        else std::copy_n(a, size, anchor);
    }
}

template <class T> T length(const T* row, long n) {
    T square = 0;
    for (long d = 0; d < n; ++d) square += row[d] * row[d];
    return std::sqrt(square);
}

// W and W̄ of A, which lies in W: (4.15) and (4.16).
template <class T> void retain(const Head<T>& head, int i) {
    long columns = head.columns(i);
    for (long r = 0; r < head.rows(i); ++r) {
        T *a = head.weights(i) + r * columns, *anchor = head.anchor(i) + r * columns, scale = 1;
        if (head.p.retention != PLAIN) scale = length(head.initial(i) + r * columns, columns) / (length(a, columns) + T(1e-5));
        for (long d = 0; d < columns; ++d) anchor[d] = a[d] * scale;
        if (head.p.retention == RENORM) std::copy_n(anchor, columns, a);
    }
}

// A matrix at the end of a chunk: S ← η̄ S − U, A = Γ(W̄) + S, or − U, or + NS(S), which with θ̄ is multiplied by it.
template <class T> void write(const Head<T>& head, int i) {
    const Memory& p = head.p;
    long rows = head.rows(i), columns = head.columns(i), size = rows * columns;
    const T *keep = head.own(p.pending_keep, head.wide()), *eta = head.own(p.pending_momentum, head.wide());
    const T *theta = head.own(p.pending_step, head.wide_step()), *initial = head.initial(i);
    T *a = head.weights(i), *anchor = head.anchor(i), *s = head.momentum(i), *pending = head.pending(i);
    auto place = [&](long n) { return p.gates != BY_CHANNEL ? 0 : i == 0 ? n / columns : n % columns; };
    for (long n = 0; s != nullptr && n < size; ++n) s[n] = eta[place(n)] / p.chunk * s[n] - pending[n];
    Buffer<T> orthogonal(p.optimiser == MUON ? size : 0);
    if (p.optimiser == MUON) newton_schulz(s, rows, columns, p.schedule, orthogonal.get());
    for (long n = 0; n < size; ++n) {
        T gamma = keep[place(n)], kept = p.to_initial ? initial[n] + gamma * (anchor[n] - initial[n]) : gamma * anchor[n];
        T step = p.optimiser == GD ? -pending[n] : p.optimiser == MOMENTUM ? s[n] : orthogonal[n];
        a[n] = kept + (theta == nullptr ? step : theta[p.gates == BY_MATRIX ? i : place(n)] / p.chunk * step);
        pending[n] = 0;
    }
    retain(head, i);
}
}  // namespace
