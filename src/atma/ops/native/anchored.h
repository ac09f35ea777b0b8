// A matrix memory whose inner gradients are taken at an anchor (ops/fast_weights, mixers.md sections 4.2 to 4.4), piece by
// piece: what the scan forward and its gradient share. A matrix is N = Wᵀ (K, V) here, so that every product has the value
// width as its columns; tables of pieces are (N, B, H, …).
#pragma once
#include "recurrence.h"

namespace {

PROBLEM(Anchored,  // all contiguous; what a rule has not is null
    int64_t pieces, batch, heads, columns, width, value_width;
    int64_t bias, average, to_initial, threads;  // of Bias; C, or 0 where the last weights are read; W° = W⁰, or 0
    const void *k, *target, *delta, *gain, *shift;                          // (N, B, H, J, ·), (N, B, H, J), (H, V)
    const void *kept, *wrote, *moved, *momentum_kept, *momentum_wrote;      // B, G and f at the last token; of S likewise
    const void *initial, *weights, *anchor, *momentum;                      // (H, K, V), and (B, H, K, V)
    const uint8_t *ends, *begun;                                            // (N, B)
    void *e, *before, *momentum_before, *after, *anchor_after, *momentum_after;
)

PROBLEM(AnchoredBackward,  // those of initial, gain and shift for each row and head
    Anchored given;
    const void *grad_e, *grad_before, *grad_momentum_before, *grad_after, *grad_anchor_after, *grad_momentum_after;
    void *grad_k, *grad_target, *grad_delta, *grad_gain, *grad_shift;
    void *grad_kept, *grad_wrote, *grad_moved, *grad_momentum_kept, *grad_momentum_wrote;
    void *grad_initial, *grad_weights, *grad_anchor, *grad_momentum;
)

enum Bias { DOT = 0, L2 = 1, HUBER = 2 };

template <class T> T total(const T* x, long width) {
    using S = Simd<T>;
    typename S::V sums{};
    long d = 0;
    for (; d + S::lanes <= width; d += S::lanes) sums += S::load(x + d);
    T found = S::sum(sums);
    for (; d < width; ++d) found += x[d];
    return found;
}

// One head of one row: where its tables lie, and its running matrices.
template <class T> struct Anchor {
    const Anchored& p;
    const long b, h, J, K, V, K_wide, V_wide, size;
    Buffer<T> keys, core, errors, A, W, S, from;  // (J, K), (J, V) twice, (K, V) four times: A, W̄, S and W°
    const T *gain, *shift;
    Anchor(const Anchored& p, long index)
        : p(p), b(index / p.heads), h(index % p.heads), J(p.columns), K(p.width), V(p.value_width), K_wide(padded<T>(K)),
          V_wide(padded<T>(V)), size(K * V_wide), keys(J * K_wide), core(J * V_wide), errors(J * V_wide), A(size), W(size),
          S(size), from(size), gain(of_head(p.gain)), shift(of_head(p.shift)) {
        zero(from.get(), size), zero(S.get(), size);
        if (p.initial != nullptr) fetch(static_cast<const T*>(p.initial) + h * K * V, from);
    }
    const T* of_head(const void* x) const { return x == nullptr ? nullptr : static_cast<const T*>(x) + h * V; }
    bool has_momentum() const { return p.momentum != nullptr; }
    bool to_initial() const { return p.to_initial != 0; }
    // The piece n of this row and head, in tables of `each` numbers a head.
    long place(long n, long each) const { return ((n * p.batch + b) * p.heads + h) * each; }
    template <class P> P* at(P* base, long n, long each) const { return base == nullptr ? nullptr : base + place(n, each); }
    const T* table(const void* x, long n, long each) const { return at(static_cast<const T*>(x), n, each); }
    T* table(void* x, long n, long each) const { return at(static_cast<T*>(x), n, each); }
    bool marked(const uint8_t* rows, long n) const { return rows != nullptr && rows[n * p.batch + b] != 0; }
    void fetch(const T* from_there, T* to) const { copy_padded<T>(from_there, V, K, V, V_wide, to); }
    void keep(const T* matrix, T* to) const {
        if (to != nullptr) copy_padded<T>(matrix, V_wide, K, V, V, to);
    }
    void fetch_keys(long n) { copy_padded<T>(table(p.k, n, J * K), K, J, K, K_wide, keys.get()); }
    // core = Z N̄.
    void outputs(const T* anchor) { product<T>(J, V_wide, K, keys, K_wide, 1, anchor, V_wide, core, V_wide, false); }
};

// e of one token from its core, and what its gradient needs again: n = (core − mean)/root, err = ∂ℓ/∂f, d = gain ∘ err.
template <class T> struct Token {
    const long V;
    const int64_t bias;
    const T *gain, *shift;
    Buffer<T> n, err, d;
    T root = 1, squared = 0, along = 0;  // along = mean(d ∘ n)
    explicit Token(const Anchor<T>& a) : V(a.V), bias(a.p.bias), gain(a.gain), shift(a.shift), n(V), err(V), d(V) {}

    void error(const T* core, const T* target, T delta) {
        if (gain != nullptr) {
            T mean = total(core, V) / V;
            for (long i = 0; i < V; ++i) n[i] = core[i] - mean;
            root = std::sqrt(dot<T>(n, n, V) / V + T(1e-6));
            for (long i = 0; i < V; ++i) n[i] /= root;
        }
        if (bias == DOT) {
            for (long i = 0; i < V; ++i) err[i] = -target[i];
            return;
        }
        for (long i = 0; i < V; ++i) err[i] = (gain == nullptr ? core[i] : gain[i] * n[i] + shift[i]) - target[i];
        if (bias != HUBER) return;
        squared = dot<T>(err, err, V);
        T scale = delta / std::sqrt(std::max(delta * delta, squared));
        for (long i = 0; i < V; ++i) err[i] *= scale;
    }
    void gradient(T* e) {
        if (gain == nullptr) {
            std::copy(err.get(), err + V, e);
            return;
        }
        for (long i = 0; i < V; ++i) d[i] = gain[i] * err[i];
        T mean = total<T>(d, V) / V;
        along = dot<T>(d, n, V) / V;
        for (long i = 0; i < V; ++i) e[i] = (d[i] - mean - n[i] * along) / root;
    }
};
}  // namespace
