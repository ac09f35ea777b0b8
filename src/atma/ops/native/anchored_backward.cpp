// Gradients of the scan of a matrix memory, by hand: back over the pieces, from the weights before each.
#include "anchored.h"

namespace {

template <class T> struct Gradients {  // of the running matrices, and of one piece
    Buffer<T> A, W, S, A_turned, S_turned, W_turned, before, e, k, core, through, gain, shift, token_d, token_n;
    explicit Gradients(const Anchor<T>& a)
        : A(a.size), W(a.size), S(a.size), A_turned(a.V * a.K_wide), S_turned(a.V * a.K_wide), W_turned(a.V * a.K_wide),
          before(a.size), e(a.J * a.V_wide), k(a.J * a.K_wide), core(a.J * a.V_wide), through(a.J * a.V_wide),
          gain(a.V_wide), shift(a.V_wide), token_d(a.V), token_n(a.V) {
        zero(A.get(), a.size), zero(W.get(), a.size), zero(S.get(), a.size);
        zero(gain.get(), a.V_wide), zero(shift.get(), a.V_wide);
    }
};

// One token, from the gradient of its e to those of its core, target, δ, gain and shift.
template <class T> struct Back {
    Token<T>& t;
    Gradients<T>& d;
    const long V;

    // e = (d − mean d − n mean(d ∘ n))/root: gradients of d (token_d), n (token_n) and, returned, root.
    T through_norm(const T* grad_e) {
        T mean = total(grad_e, V) / V, along = dot<T>(grad_e, t.n, V) / V, own = total<T>(t.d, V) / V, root = 0;
        for (long i = 0; i < V; ++i) {
            T e = (t.d[i] - own - t.n[i] * t.along) / t.root;
            root -= grad_e[i] * e;
            d.token_d[i] = (grad_e[i] - mean - t.n[i] * along) / t.root;
            d.token_n[i] = -(grad_e[i] * t.along + t.d[i] * along) / t.root;
        }
        return root / t.root;
    }
    // From err = ∂ℓ/∂f, whose gradient is in token_d, to r = f − v, in place; the gradient of δ is returned.
    T through_bias(T delta) {
        if (t.bias != HUBER || !(t.squared > delta * delta)) return 0;
        // err = δ r/‖r‖, so r/‖r‖ is err/δ.
        T norm = std::sqrt(t.squared), along = dot<T>(t.err, d.token_d, V);
        for (long i = 0; i < V; ++i) d.token_d[i] = (delta * d.token_d[i] - t.err[i] * along / delta) / norm;
        return along / delta;
    }
    // core behind n = (core − mean)/root, whose gradients are token_n and `root`.
    void to_core(T root, T* grad_core) {
        T rest = (root - dot<T>(d.token_n, t.n, V) / t.root) / V;
        for (long i = 0; i < V; ++i) grad_core[i] = d.token_n[i] / t.root + rest * t.n[i];
        T mean = total(grad_core, V) / V;
        for (long i = 0; i < V; ++i) grad_core[i] -= mean;
    }
    T token(const T* grad_e, T delta, T* grad_target, T* grad_core) {
        const bool normed = t.gain != nullptr;
        T root = 0;
        if (normed) {
            root = through_norm(grad_e);
            for (long i = 0; i < V; ++i) d.gain[i] += t.err[i] * d.token_d[i], d.token_d[i] *= t.gain[i];
        } else std::copy(grad_e, grad_e + V, d.token_d.get());
        T grad_delta = through_bias(delta);
        for (long i = 0; i < V; ++i) grad_target[i] = -d.token_d[i];
        if (t.bias == DOT) zero(d.token_d.get(), V);
        if (!normed) {
            std::copy(d.token_d.get(), d.token_d + V, grad_core);
            return grad_delta;
        }
        for (long i = 0; i < V; ++i) {
            d.gain[i] += d.token_d[i] * t.n[i], d.shift[i] += d.token_d[i];
            d.token_n[i] += t.gain[i] * d.token_d[i];
        }
        to_core(root, grad_core);
        return grad_delta;
    }
};

// Through − Σ_j part_j z_j e_jᵀ of a matrix whose gradient is `grad` (K, V): to e and part here, to z by its transpose.
template <class T>
void through_sum(Anchor<T>& a, Gradients<T>& d, const T* grad, const T* part, const T* e, T* turned, T* grad_part) {
    const long J = a.J, V = a.V, wide = a.V_wide;
    product<T>(J, wide, a.K, a.keys, a.K_wide, 1, grad, wide, d.through, wide, false);
    for (long j = 0; j < J; ++j) {
        grad_part[j] = -dot<T>(d.through + j * wide, e + j * V, V);
        for (long i = 0; i < V; ++i) d.e[j * wide + i] -= part[j] * d.through[j * wide + i];
    }
    zero(turned, V * a.K_wide);
    transpose<T>(grad, a.K, V, wide, turned, a.K_wide);
    for (long j = 0; j < J; ++j)
        for (long i = 0; i < V; ++i) a.errors[j * wide + i] = -part[j] * e[j * V + i];
    product<T>(J, a.K_wide, V, a.errors, wide, 1, turned, a.K_wide, d.k, a.K_wide, true);
}

// (4.11) backwards: from the gradients of A and S behind the piece to those before it.
template <class T> void through_piece(Anchor<T>& a, Gradients<T>& d, const AnchoredBackward& to, long n) {
    const Anchored& p = a.p;
    const long J = a.J, size = a.size;
    const T *e = a.table(p.e, n, J * a.V), kept = *a.table(p.kept, n, 1);
    T *grad_kept = a.table(to.grad_kept, n, 1), *grad_initial = d.before;
    through_sum<T>(a, d, d.A, a.table(p.wrote, n, J), e, d.A_turned, a.table(to.grad_wrote, n, J));
    *grad_kept = dot<T>(d.A, a.A, size);
    if (a.to_initial()) {
        *grad_kept -= dot<T>(d.A, a.from, size);
        for (long i = 0; i < size; ++i) grad_initial[i] += (1 - kept) * d.A[i];
    }
    if (a.has_momentum()) {
        const T moved = *a.table(p.moved, n, 1), left = *a.table(p.momentum_kept, n, 1);
        T* steps = a.table(to.grad_momentum_wrote, n, J);
        through_sum<T>(a, d, d.S, a.table(p.momentum_wrote, n, J), e, d.S_turned, steps);
        *a.table(to.grad_moved, n, 1) = dot<T>(d.A, a.S, size);
        *a.table(to.grad_momentum_kept, n, 1) = dot<T>(d.S, a.S, size);
        for (long i = 0; i < size; ++i) d.S[i] = left * d.S[i] + moved * d.A[i];
    }
    for (long i = 0; i < size; ++i) d.A[i] *= kept;
}

// From the gradients of e to those of keys, targets, δ and the anchor.
template <class T> void through_errors(Anchor<T>& a, Gradients<T>& d, Token<T>& t, const AnchoredBackward& to, long n) {
    const Anchored& p = a.p;
    const long J = a.J, V = a.V, wide = a.V_wide;
    const T *target = a.table(p.target, n, J * V), *delta = a.table(p.delta, n, J);
    T *grad_target = a.table(to.grad_target, n, J * V), *grad_delta = a.table(to.grad_delta, n, J);
    Back<T> back{t, d, V};
    a.outputs(a.W);
    zero(d.core.get(), J * wide);
    for (long j = 0; j < J; ++j) {
        T own = delta == nullptr ? T(0) : delta[j];
        t.error(a.core + j * wide, target + j * V, own);
        t.gradient(a.errors);
        own = back.token(d.e + j * wide, own, grad_target + j * V, d.core + j * wide);
        if (grad_delta != nullptr) grad_delta[j] = own;
    }
    zero(d.W_turned.get(), V * a.K_wide);
    transpose<T>(a.W, a.K, V, wide, d.W_turned, a.K_wide);
    product<T>(J, a.K_wide, V, d.core, wide, 1, d.W_turned, a.K_wide, d.k, a.K_wide, true);
    product<T>(a.K, wide, J, a.keys, 1, a.K_wide, d.core, wide, d.W, wide, true);
}

// W̄ ← A at a boundary, backwards; of the mean of a chunk's steps, A ← W̄ + (A − W̄)/C first.
template <class T> void through_boundary(const Anchor<T>& a, Gradients<T>& d) {
    const T part = a.p.average != 0 ? T(1) / a.p.average : T(1);
    for (long i = 0; i < a.size; ++i) {
        T both = d.A[i] + d.W[i];
        d.A[i] = part * both, d.W[i] = (1 - part) * both;
    }
}

template <class T> void more(const Anchor<T>& a, const T* from, T* to) {  // to (K, wide) += from (K, V)
    for (long r = 0; r < a.K; ++r)
        for (long i = 0; i < a.V; ++i) to[r * a.V_wide + i] += from[r * a.V + i];
}

template <class T> void piece(Anchor<T>& a, Gradients<T>& d, Token<T>& t, const AnchoredBackward& to, long n) {
    const Anchored& p = a.p;
    const long J = a.J, each = a.K * a.V;
    a.fetch_keys(n);
    a.fetch(a.table(p.before, n, each), a.A);
    // Only a call's first piece may begin inside a chunk, where W̄ is not A.
    a.fetch(n == 0 && !a.marked(p.begun, n) ? a.table(p.anchor, 0, each) : a.table(p.before, n, each), a.W);
    if (a.has_momentum()) a.fetch(a.table(p.momentum_before, n, each), a.S);
    if (a.marked(p.ends, n)) through_boundary(a, d);
    copy_padded<T>(a.table(to.grad_e, n, J * a.V), a.V, J, a.V, a.V_wide, d.e.get());
    zero(d.k.get(), J * a.K_wide);
    through_piece(a, d, to, n);
    through_errors(a, d, t, to, n);
    copy_padded<T>(d.k, a.K_wide, J, a.K, a.K, a.table(to.grad_k, n, J * a.K));
    more(a, a.table(to.grad_before, n, each), d.A.get());
    if (a.has_momentum()) more(a, a.table(to.grad_momentum_before, n, each), d.S.get());
    if (!a.marked(p.begun, n)) return;
    for (long i = 0; i < a.size; ++i) d.before[i] += d.A[i] + d.W[i];
    zero(d.A.get(), a.size), zero(d.W.get(), a.size), zero(d.S.get(), a.size);
}

template <class T> void back_head(const AnchoredBackward& to, long index) {
    const Anchored& p = to.given;
    Anchor<T> a(p, index);
    Token<T> t(a);
    Gradients<T> d(a);
    const long each = a.K * a.V;
    zero(d.before.get(), a.size);
    a.fetch(a.table(to.grad_after, 0, each), d.A);
    a.fetch(a.table(to.grad_anchor_after, 0, each), d.W);
    if (a.has_momentum()) a.fetch(a.table(to.grad_momentum_after, 0, each), d.S);
    zero(a.errors.get(), a.J * a.V_wide);
    for (long n = p.pieces - 1; n >= 0; --n) piece(a, d, t, to, n);
    a.keep(d.A, a.table(to.grad_weights, 0, each));
    a.keep(d.W, a.table(to.grad_anchor, 0, each));
    a.keep(d.S, a.table(to.grad_momentum, 0, each));
    a.keep(d.before, a.table(to.grad_initial, 0, each));
    if (a.gain == nullptr) return;
    std::copy(d.gain.get(), d.gain + a.V, a.table(to.grad_gain, 0, a.V));
    std::copy(d.shift.get(), d.shift + a.V, a.table(to.grad_shift, 0, a.V));
}

template <class T> void back(const AnchoredBackward& to) {
#pragma omp parallel for num_threads(to.given.threads) schedule(dynamic)
    for (long i = 0; i < to.given.batch * to.given.heads; ++i) back_head<T>(to, i);
}
}  // namespace

KERNEL(anchored_backward_float32, AnchoredBackward, back<float>)
KERNEL(anchored_backward_float64, AnchoredBackward, back<double>)
