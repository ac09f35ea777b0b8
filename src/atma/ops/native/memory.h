// Neural memories token after token (ops/fast_weights/reference.py, mixers.md section 4): what is handed over, and where the
// numbers of one head lie. W₁ has the value width as rows, W₂ and W₃ the hidden width; a network without them is W₁ alone.
#pragma once
#include "problem.h"
#include "simd.h"

namespace {

PROBLEM(Memory,  // what ops/fast_weights/native.py hands over, contiguous; what a rule does not need is null
    int64_t batch, heads, tokens, value, hidden, inner, k_groups, v_groups, matrices, threads;
    int64_t activation, residual, norm, bias, retention, to_initial, optimiser, schedule, anchor_hidden, normalised, average;
    int64_t at_end, chunk, window, gates, delta_width;  // at_end: chunks are written at their end
    double power, norm_power, radius;
    const void *q, *k, *v, *step, *keep, *momentum, *delta, *omega;  // by token, as `Gates` has them
    const void *initial[3], *gain, *shift, *skip;                    // (H, …)
    const int32_t* length;                                           // (B,)
    void *anchors[3], *weights[3], *momenta[3], *scale, *k_tail, *v_tail;
    void *pending[3], *pending_momentum, *pending_keep, *pending_step;
    void* out;  // (B, H, T, V)
)

// As the tuples of ops/fast_weights/native.py.
enum Activation { GELU, SILU };
enum Residual { NONE, IDENTITY, SKIP };
enum Bias { DOT, L2, LP, HUBER, HUBER_COORDINATE, HUBER_SWITCH };
enum Retention { PLAIN, LQ, KL, RENORM, RENORM_AFTER_READ };
enum Optimiser { GD, MOMENTUM, MUON };
enum Axis { BY_HEAD, BY_CHANNEL, BY_MATRIX };

constexpr double EPSILON = 1e-6;

template <class T> struct Head {
    const Memory& p;
    long index, b, h;
    Head(const Memory& p, long index) : p(p), index(index), b(index / p.heads), h(index % p.heads) {}
    long rows(int i) const { return i == 0 ? p.value : p.hidden; }
    long columns(int i) const { return i == 0 ? p.hidden : p.inner; }
    long size(int i) const { return rows(i) * columns(i); }
    long tail() const { return p.window - 1; }
    // Of this head in (B, H, …), and of slow weights in (H, …); `each` numbers a head.
    T* own(void* base, long each) const { return base == nullptr ? nullptr : static_cast<T*>(base) + index * each; }
    const T* slow(const void* base, long each) const {
        return base == nullptr ? nullptr : static_cast<const T*>(base) + h * each;
    }
    const T* token(const void* base, long t, long each) const {
        return base == nullptr ? nullptr : static_cast<const T*>(base) + (index * p.tokens + t) * each;
    }
    const T* shared(const void* base, long groups, long t, long each) const {
        long group = h / (p.heads / groups);
        return static_cast<const T*>(base) + ((b * groups + group) * p.tokens + t) * each;
    }
    T* anchor(int i) const { return own(p.anchors[i], size(i)); }
    T* weights(int i) const { return own(p.weights[i], size(i)); }
    T* momentum(int i) const { return own(p.momenta[i], size(i)); }
    T* pending(int i) const { return own(p.pending[i], size(i)); }
    const T* initial(int i) const { return slow(p.initial[i], size(i)); }
    // How many numbers a head has of γ and η, and of θ.
    long wide() const { return p.gates == BY_CHANNEL ? p.value : 1; }
    long wide_step() const { return p.gates == BY_MATRIX ? p.matrices : wide(); }
    bool step_at_end() const { return p.pending_step != nullptr; }
};
}  // namespace
