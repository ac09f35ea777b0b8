// The causal depthwise convolution, and the one between two gates that a local mixer is. T computes, E is how tensors are
// stored. Threads own channels, so gradients of the taps are sums in a fixed order.
#include "problem.h"
#include "simd.h"

namespace {

template <class E> struct Compute { using T = E; };
template <> struct Compute<bfloat16> { using T = float; };

PROBLEM(Convolution,  // y (B, T, C) as ops/conv; x (B, T, C) with strides, everything else contiguous
    int64_t batch, length, channels, taps, x_batch, x_token;
    const void *x, *weight, *tail;     // weight (C, W), tail (B, W − 1, C) or null
    const int32_t* since;              // (B, T): tokens since the document began, or null
    const void* grad;
    void* y;                           // or the gradient of x
    void *grad_weight, *grad_tail;     // grad_weight (C, W), grad_tail (B, W − 1, C) or null
    int64_t threads;
)

constexpr long CHANNELS = 64;

template <class E> struct Lane {  // CHANNELS neighbouring channels of one row
    const Convolution& p;
    long b, c, width;
    const E* x(long t) const { return static_cast<const E*>(p.x) + b * p.x_batch + t * p.x_token + c; }
    // The input `lag` before token t: of this call, of the tail, or null where the document had not begun.
    const E* before(long t, long lag) const {
        if (t >= lag) return p.since == nullptr || p.since[b * p.length + t] >= lag ? x(t - lag) : nullptr;
        if (p.tail == nullptr) return nullptr;
        return static_cast<const E*>(p.tail) + (b * (p.taps - 1) + p.taps - 1 + t - lag) * p.channels + c;
    }
    long at(long t) const { return (b * p.length + t) * p.channels + c; }
};

template <class E>
inline __attribute__((always_inline)) void convolve_token(const Lane<E>& lane, long t, long width, const typename Compute<E>::T* weight) {
    using T = typename Compute<E>::T;
    // y[t] = Σ_lag w[W − 1 − lag] x[t − lag], 64 channels at a time: their sums stay in registers over the taps.
    T sums[CHANNELS] = {};
    for (long lag = 0; lag < lane.p.taps; ++lag) {
        const E* x = lane.before(t, lag);
        const T* w = weight + (lane.p.taps - 1 - lag) * CHANNELS;
        if (x != nullptr)
            for (long d = 0; d < width; ++d) sums[d] += w[d] * T(x[d]);
    }
    E* y = static_cast<E*>(lane.p.y) + lane.at(t);
    for (long d = 0; d < width; ++d) y[d] = narrow(sums[d], E());
}

template <class E> void convolve(const Convolution& p) {
    using T = typename Compute<E>::T;
    long lanes = (p.channels + CHANNELS - 1) / CHANNELS;
    Buffer<T> weight(p.taps * lanes * CHANNELS);
    for (long c = 0; c < p.channels; ++c)
        for (long w = 0; w < p.taps; ++w)
            // Taps turned once, so that a tap's channels lie side by side as x's do.
            weight[(c / CHANNELS * p.taps + w) * CHANNELS + c % CHANNELS] = T(static_cast<const E*>(p.weight)[c * p.taps + w]);
#pragma omp parallel for num_threads(p.threads) collapse(2) schedule(static) if (p.batch * p.length * p.channels > (1 << 14))
    for (long b = 0; b < p.batch; ++b)
        for (long n = 0; n < lanes; ++n) {
            Lane<E> lane{p, b, n * CHANNELS, std::min(CHANNELS, long(p.channels) - n * CHANNELS)};
            for (long t = 0; t < p.length; ++t) {
                // A width the compiler knows is unrolled; the last lane may be narrower.
                if (lane.width == CHANNELS) convolve_token<E>(lane, t, CHANNELS, weight + n * p.taps * CHANNELS);
                else convolve_token<E>(lane, t, lane.width, weight + n * p.taps * CHANNELS);
            }
        }
}

template <class E> void convolve_backward(const Convolution& p) {
    using T = typename Compute<E>::T;
    long lanes = (p.channels + CHANNELS - 1) / CHANNELS, kept = p.taps - 1;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (long n = 0; n < lanes; ++n) {
        long c = n * CHANNELS, width = std::min(CHANNELS, long(p.channels) - c);
        Buffer<T> weight(p.taps * CHANNELS), grad_weight(p.taps * CHANNELS), rows((p.length + kept) * CHANNELS);
        std::fill(grad_weight.get(), grad_weight + p.taps * CHANNELS, T(0));
        for (long w = 0; w < p.taps; ++w)
            for (long d = 0; d < width; ++d) weight[w * CHANNELS + d] = T(static_cast<const E*>(p.weight)[(c + d) * p.taps + w]);
        for (long b = 0; b < p.batch; ++b) {
            Lane<E> lane{p, b, c, width};
            // One buffer for tail and x: a gradient W − 1 tokens back lands in the right one by itself.
            T* grad_x = rows + kept * CHANNELS;  // before it, the gradient of the tail
            std::fill(rows.get(), rows + (p.length + kept) * CHANNELS, T(0));
            for (long t = 0; t < p.length; ++t)
                for (long lag = 0; lag < p.taps; ++lag) {
                    // Every pair (input, later gradient) is met once and gives both gradients; where forward read zero,
                    // none.
                    const E *x = lane.before(t, lag), *grad = static_cast<const E*>(p.grad) + lane.at(t);
                    if (x == nullptr) continue;
                    long w = (p.taps - 1 - lag) * CHANNELS;
                    T* into = grad_x + (t - lag) * CHANNELS;
                    for (long d = 0; d < width; ++d) {
                        into[d] += weight[w + d] * T(grad[d]);
                        grad_weight[w + d] += T(x[d]) * T(grad[d]);
                    }
                }
            for (long t = 0; t < p.length; ++t)
                for (long d = 0; d < width; ++d) static_cast<E*>(p.y)[lane.at(t) + d] = narrow(grad_x[t * CHANNELS + d], E());
            for (long i = 0; p.grad_tail != nullptr && i < kept; ++i)
                for (long d = 0; d < width; ++d)
                    static_cast<E*>(p.grad_tail)[(b * kept + i) * p.channels + c + d] = narrow(rows[i * CHANNELS + d], E());
        }
        for (long w = 0; w < p.taps; ++w)
            for (long d = 0; d < width; ++d)
                static_cast<E*>(p.grad_weight)[(c + d) * p.taps + w] = narrow(grad_weight[w * CHANNELS + d], E());
    }
}

PROBLEM(Gated,  // y (B, T, C) = c ⊙ conv(b ⊙ u) of h = [b, c, u] (B, T, 3C); all contiguous
    int64_t batch, length, channels, taps;
    const void *h, *weight;       // weight (C, W)
    const int32_t* since;         // (B, T): tokens since the document began, or null
    const void* grad;             // of y
    void *y, *grad_h, *grad_weight;
    int64_t threads;
)

// VECTORS·lanes neighbouring channels of one row, and rings of W rows of them: row t is at t mod W.
template <class E, int VECTORS> struct Strand {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    using V = typename S::V;
    static constexpr long width = VECTORS * S::lanes;
    const Gated& p;
    long b, c;
    const E* part(long which, long t) const {
        return static_cast<const E*>(p.h) + ((b * p.length + t) * 3 + which) * p.channels + c;
    }
    long at(long t) const { return (b * p.length + t) * p.channels + c; }
    long seen(long t) const {  // how many tokens before t the convolution reaches
        return std::min<long>(p.taps - 1, p.since == nullptr ? t : p.since[b * p.length + t]);
    }
    void taps(V* into) const {  // by lag
        for (long lag = 0; lag < p.taps; ++lag)
            for (int i = 0; i < VECTORS; ++i)
                for (long l = 0; l < S::lanes; ++l)
                    into[lag * VECTORS + i][l] = T(static_cast<const E*>(p.weight)[(c + i * S::lanes + l) * p.taps + p.taps - 1 - lag]);
    }
};

template <class E, int VECTORS> void gated_strand(const Strand<E, VECTORS>& strand) {
    using St = Strand<E, VECTORS>;
    using V = typename St::V;
    const Gated& p = strand.p;
    constexpr long lanes = St::S::lanes;
    Buffer<V> weight(p.taps * VECTORS), ring(p.taps * VECTORS);
    strand.taps(weight);
    for (long t = 0; t < p.length; ++t) {
        const E *b = strand.part(0, t), *c = strand.part(1, t), *u = strand.part(2, t);
        V sums[VECTORS];
        for (int i = 0; i < VECTORS; ++i) {
            // x = b ⊙ u is made once a token and kept for the W − 1 tokens after it: no tensor of it is stored.
            V x = widen(b + i * lanes) * widen(u + i * lanes);
            ring[t % p.taps * VECTORS + i] = x;
            sums[i] = weight[i] * x;
        }
        for (long lag = 1, reach = strand.seen(t); lag <= reach; ++lag)
            for (int i = 0; i < VECTORS; ++i) sums[i] += weight[lag * VECTORS + i] * ring[(t - lag) % p.taps * VECTORS + i];
        E* y = static_cast<E*>(p.y) + strand.at(t);
        // y = c ⊙ conv(x), rounded once to E.
        for (int i = 0; i < VECTORS; ++i) put(y + i * lanes, widen(c + i * lanes) * sums[i]);
    }
}

// Once along the tokens for the gradients of c and of the taps, once back for those of b and u.
template <class E, int VECTORS> void gated_strand_backward(const Strand<E, VECTORS>& strand, typename Strand<E, VECTORS>::V* grad_weight) {
    using St = Strand<E, VECTORS>;
    using V = typename St::V;
    const Gated& p = strand.p;
    constexpr long lanes = St::S::lanes;
    Buffer<V> weight(p.taps * VECTORS), ring(p.taps * VECTORS);
    strand.taps(weight);
    const E* grads = static_cast<const E*>(p.grad);
    auto result = [&](long which, long t) { return static_cast<E*>(p.grad_h) + (strand.part(which, t) - static_cast<const E*>(p.h)); };
    for (long t = 0; t < p.length; ++t) {
        const E *b = strand.part(0, t), *c = strand.part(1, t), *u = strand.part(2, t), *grad = grads + strand.at(t);
        V sums[VECTORS], along[VECTORS];
        for (int i = 0; i < VECTORS; ++i) {
            V x = widen(b + i * lanes) * widen(u + i * lanes);
            ring[t % p.taps * VECTORS + i] = x;
            sums[i] = weight[i] * x;
            // Gradient of conv(x) is grad ⊙ c; with the ring of x it gives that of each tap.
            along[i] = widen(grad + i * lanes) * widen(c + i * lanes);
            grad_weight[i] += along[i] * x;
        }
        for (long lag = 1, reach = strand.seen(t); lag <= reach; ++lag)
            for (int i = 0; i < VECTORS; ++i) {
                V x = ring[(t - lag) % p.taps * VECTORS + i];
                sums[i] += weight[lag * VECTORS + i] * x;
                grad_weight[lag * VECTORS + i] += along[i] * x;
            }
        // grad c = grad ⊙ conv(x), which is computed again rather than kept.
        for (int i = 0; i < VECTORS; ++i) put(result(1, t) + i * lanes, widen(grad + i * lanes) * sums[i]);
    }
    for (long t = p.length - 1; t >= 0; --t) {
        const E *b = strand.part(0, t), *c = strand.part(1, t), *u = strand.part(2, t), *grad = grads + strand.at(t);
        V sums[VECTORS];
        for (int i = 0; i < VECTORS; ++i) {
            // Backwards the ring holds gradients of conv(x): grad x[t] = Σ_lag w[lag] · that of token t + lag.
            ring[t % p.taps * VECTORS + i] = widen(grad + i * lanes) * widen(c + i * lanes);
            sums[i] = weight[i] * ring[t % p.taps * VECTORS + i];
        }
        // Only while the later token's document reaches back to t; once it does not, no later one does.
        for (long lag = 1; lag < p.taps && t + lag < p.length && strand.seen(t + lag) >= lag; ++lag)
            for (int i = 0; i < VECTORS; ++i) sums[i] += weight[lag * VECTORS + i] * ring[(t + lag) % p.taps * VECTORS + i];
        for (int i = 0; i < VECTORS; ++i) {
            // x = b ⊙ u, so each gets the gradient times the other.
            put(result(0, t) + i * lanes, sums[i] * widen(u + i * lanes));
            put(result(2, t) + i * lanes, sums[i] * widen(b + i * lanes));
        }
    }
}

template <class E> void gated(const Gated& p) {
    using Wide = Strand<E, 4>;
    long strands = p.channels / Wide::width, rest = strands * Wide::width, lanes = Wide::S::lanes;
    // Four vectors of channels a strand, and what is left over in single vectors: channels are whole vectors here.
    long narrow_ones = (p.channels - rest) / lanes, all = strands + narrow_ones;
#pragma omp parallel for num_threads(p.threads) collapse(2) schedule(static)
    for (long b = 0; b < p.batch; ++b)
        for (long n = 0; n < all; ++n) {
            if (n < strands) gated_strand(Wide{p, b, n * Wide::width});
            else gated_strand(Strand<E, 1>{p, b, rest + (n - strands) * lanes});
        }
}

template <class E, int VECTORS> void gated_channels_backward(const Gated& p, long c) {
    using St = Strand<E, VECTORS>;
    Buffer<typename St::V> sums(p.taps * VECTORS);
    std::fill(sums.get(), sums + p.taps * VECTORS, typename St::V{});
    // A thread owns its channels through all rows: grad W is one sum in one order.
    for (long b = 0; b < p.batch; ++b) gated_strand_backward(St{p, b, c}, sums.get());
    E* grad = static_cast<E*>(p.grad_weight);
    for (long lag = 0; lag < p.taps; ++lag)
        for (long d = 0; d < St::width; ++d)
            grad[(c + d) * p.taps + p.taps - 1 - lag] = narrow(sums[lag * VECTORS + d / St::S::lanes][d % St::S::lanes], E());
}

template <class E> void gated_backward(const Gated& p) {
    using Wide = Strand<E, 4>;
    long strands = p.channels / Wide::width, rest = strands * Wide::width, lanes = Wide::S::lanes;
    long all = strands + (p.channels - rest) / lanes;
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (long n = 0; n < all; ++n) {
        if (n < strands) gated_channels_backward<E, 4>(p, n * Wide::width);
        else gated_channels_backward<E, 1>(p, rest + (n - strands) * lanes);
    }
}
}  // namespace

#define EXPORT(NAME, E)                                             \
    KERNEL(conv_forward_##NAME, Convolution, convolve<E>)           \
    KERNEL(conv_backward_##NAME, Convolution, convolve_backward<E>) \
    KERNEL(gated_conv_forward_##NAME, Gated, gated<E>)              \
    KERNEL(gated_conv_backward_##NAME, Gated, gated_backward<E>)
EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bfloat16)
