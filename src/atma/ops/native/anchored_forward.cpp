// The scan of a matrix memory over its pieces: the inner gradients e at each anchor, and the weights before each piece.
#include "anchored.h"

namespace {

template <class T> void piece(Anchor<T>& a, Token<T>& token, long n) {
    const Anchored& p = a.p;
    const long J = a.J, V = a.V, wide = a.V_wide;
    const T *target = a.table(p.target, n, J * V), *delta = a.table(p.delta, n, J), *wrote = a.table(p.wrote, n, J);
    T* e = a.table(p.e, n, J * V);
    a.fetch_keys(n);
    a.outputs(a.W);
    zero(a.errors.get(), J * wide);
    for (long j = 0; j < J; ++j) {
        token.error(a.core + j * wide, target + j * V, delta == nullptr ? T(0) : delta[j]);
        token.gradient(e + j * V);
        for (long i = 0; i < V; ++i) a.errors[j * wide + i] = -wrote[j] * e[j * V + i];
    }
    // A ← W° + B (A − W°) + f S − Σ g_j z_j e_jᵀ (4.11).
    const T kept = *a.table(p.kept, n, 1), moved = a.has_momentum() ? *a.table(p.moved, n, 1) : T(0);
    for (long i = 0; i < a.size; ++i) a.A[i] = kept * a.A[i] + moved * a.S[i];
    if (a.to_initial())
        for (long i = 0; i < a.size; ++i) a.A[i] += (1 - kept) * a.from[i];
    product<T>(a.K, wide, J, a.keys, 1, a.K_wide, a.errors, wide, a.A, wide, true);
    if (!a.has_momentum()) return;
    const T left = *a.table(p.momentum_kept, n, 1), *steps = a.table(p.momentum_wrote, n, J);
    for (long j = 0; j < J; ++j)
        for (long i = 0; i < V; ++i) a.errors[j * wide + i] = -steps[j] * e[j * V + i];
    for (long i = 0; i < a.size; ++i) a.S[i] *= left;
    product<T>(a.K, wide, J, a.keys, 1, a.K_wide, a.errors, wide, a.S, wide, true);
}

template <class T> void scan_head(const Anchored& p, long index) {
    Anchor<T> a(p, index);
    Token<T> token(a);
    const long each = a.K * a.V;
    a.fetch(a.table(p.weights, 0, each), a.A);
    a.fetch(a.table(p.anchor, 0, each), a.W);
    if (a.has_momentum()) a.fetch(a.table(p.momentum, 0, each), a.S);
    for (long n = 0; n < p.pieces; ++n) {
        if (a.marked(p.begun, n)) {
            std::copy(a.from.get(), a.from + a.size, a.A.get());
            std::copy(a.from.get(), a.from + a.size, a.W.get());
            zero(a.S.get(), a.size);
        }
        a.keep(a.A, a.table(p.before, n, each));
        a.keep(a.S, a.table(p.momentum_before, n, each));
        piece(a, token, n);
        if (!a.marked(p.ends, n)) continue;
        if (p.average != 0)
            for (long i = 0; i < a.size; ++i) a.A[i] = a.W[i] + (a.A[i] - a.W[i]) / p.average;
        std::copy(a.A.get(), a.A + a.size, a.W.get());
    }
    a.keep(a.A, a.table(p.after, 0, each));
    a.keep(a.W, a.table(p.anchor_after, 0, each));
    a.keep(a.S, a.table(p.momentum_after, 0, each));
}

template <class T> void scan(const Anchored& p) {
    long heads = p.batch * p.heads, work = heads * p.pieces * p.columns * p.width * p.value_width;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (work > 65536)
    for (long i = 0; i < heads; ++i) scan_head<T>(p, i);
}
}  // namespace

KERNEL(anchored_forward_float32, Anchored, scan<float>)
KERNEL(anchored_forward_float64, Anchored, scan<double>)
