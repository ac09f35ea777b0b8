// What surrounds the mixers, where PyTorch's CPU path spends its time on calls and passes over memory: products of few
// rows, the RMS norm, the MLP's gate and the causal convolution. T computes, E is how tensors are stored.
#include "simd.h"
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

template <class E> struct Compute { using T = E; };
template <> struct Compute<bfloat16> { using T = float; };

// y (rows, outputs) = x (rows, inputs) · weightᵀ + bias: every weight is read once, by one thread.
struct Linear {
    int64_t rows, inputs, outputs, x_row;
    const void *x, *weight, *bias;
    void* y;
    int64_t threads;
};

// Weights are walked through in the order they lie in, which is what processors fetch ahead of; SUMS hide the latency.
template <class E, int ROWS> void dots(const Linear& p, const typename Compute<E>::T* x, long row, long output) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    constexpr int SUMS = ROWS == 1 ? 4 : 2;
    typename S::V sums[ROWS][SUMS] = {};
    const E* weight = static_cast<const E*>(p.weight) + output * p.inputs;
    long d = 0;
#ifdef __AVX512BF16__
    if constexpr (std::is_same_v<E, bfloat16>) {  // pairs of products at once, of x as it was given
        const E* given = static_cast<const E*>(p.x) + row * p.x_row;
        for (; d + SUMS * 32 <= p.inputs; d += SUMS * 32)
            for (int i = 0; i < SUMS; ++i) {
                __m512bh w = (__m512bh)_mm512_loadu_si512(weight + d + i * 32);
                for (int r = 0; r < ROWS; ++r) {
                    __m512bh pair = (__m512bh)_mm512_loadu_si512(given + r * p.x_row + d + i * 32);
                    sums[r][i] = (typename S::V)_mm512_dpbf16_ps((__m512)sums[r][i], w, pair);
                }
            }
    }
#endif
    for (; d + SUMS * S::lanes <= p.inputs; d += SUMS * S::lanes)
        for (int i = 0; i < SUMS; ++i) {
            typename S::V w = widen(weight + d + i * S::lanes);
            for (int r = 0; r < ROWS; ++r) sums[r][i] += S::load(x + (row + r) * p.inputs + d + i * S::lanes) * w;
        }
    for (int r = 0; r < ROWS; ++r) {
        T total = S::sum(SUMS == 4 ? sums[r][0] + sums[r][1] + (sums[r][2] + sums[r][3]) : sums[r][0] + sums[r][1]);
        for (long rest = d; rest < p.inputs; ++rest) total += x[(row + r) * p.inputs + rest] * T(weight[rest]);
        if (p.bias != nullptr) total += T(static_cast<const E*>(p.bias)[output]);
        static_cast<E*>(p.y)[(row + r) * p.outputs + output] = narrow(total, E());
    }
}

template <class E> void linear(const Linear& p) {
    using T = typename Compute<E>::T;
    Buffer<T> x(p.rows * p.inputs);
    for (long r = 0; r < p.rows; ++r)
        for (long d = 0; d < p.inputs; ++d) x[r * p.inputs + d] = T(static_cast<const E*>(p.x)[r * p.x_row + d]);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.inputs * p.outputs > (1 << 17))
    for (long output = 0; output < p.outputs; ++output) {
        long r = 0;
        for (; r + 4 <= p.rows; r += 4) dots<E, 4>(p, x, r, output);
        for (; r < p.rows; ++r) dots<E, 1>(p, x, r, output);
    }
}

struct Norm {  // y (rows, width) = x / rms(x) · weight, weight (width) or null
    int64_t rows, width;
    const void *x, *weight;
    void* y;
    int64_t epsilon_bits, threads;  // epsilon as the bits of a double
};

template <class E> void rms_norm(const Norm& p) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    double epsilon;
    std::memcpy(&epsilon, &p.epsilon_bits, 8);
    long whole = p.width / S::lanes * S::lanes;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 16))
    for (long r = 0; r < p.rows; ++r) {
        const E* x = static_cast<const E*>(p.x) + r * p.width;
        const E* weight = static_cast<const E*>(p.weight);
        E* y = static_cast<E*>(p.y) + r * p.width;
        typename S::V squares{};
        for (long d = 0; d < whole; d += S::lanes) squares += widen(x + d) * widen(x + d);
        T total = S::sum(squares);
        for (long d = whole; d < p.width; ++d) total += T(x[d]) * T(x[d]);
        T factor = T(1) / std::sqrt(total / T(p.width) + T(epsilon));
        for (long d = 0; d < p.width; ++d) y[d] = narrow(T(x[d]) * factor * (weight == nullptr ? T(1) : T(weight[d])), E());
    }
}

struct Gate {  // y (rows, width) = g relu(a)² of h = [a, g] (rows, 2 width), and the gradient of h
    int64_t rows, width;
    const void *h, *grad;
    void* y;
    int64_t threads;
};

template <class E> void gate_forward(const Gate& p) {
    using T = typename Compute<E>::T;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 15))
    for (long r = 0; r < p.rows; ++r) {
        const E *a = static_cast<const E*>(p.h) + 2 * r * p.width, *g = a + p.width;
        E* y = static_cast<E*>(p.y) + r * p.width;
        for (long d = 0; d < p.width; ++d) {
            T up = T(a[d]) <= T(0) ? T(0) : T(a[d]);
            y[d] = narrow(T(g[d]) * up * up, E());
        }
    }
}

template <class E> void gate_backward(const Gate& p) {
    using T = typename Compute<E>::T;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 15))
    for (long r = 0; r < p.rows; ++r) {
        const E *a = static_cast<const E*>(p.h) + 2 * r * p.width, *g = a + p.width;
        const E* grad = static_cast<const E*>(p.grad) + r * p.width;
        E *grad_a = static_cast<E*>(p.y) + 2 * r * p.width, *grad_g = grad_a + p.width;
        for (long d = 0; d < p.width; ++d) {
            T up = T(a[d]) <= T(0) ? T(0) : T(a[d]), given = grad[d];
            grad_a[d] = narrow(2 * given * T(g[d]) * up, E());
            grad_g[d] = narrow(given * up * up, E());
        }
    }
}

struct Convolution {  // y (B, T, C) as ops/conv; x (B, T, C) with strides, everything else contiguous
    int64_t batch, length, channels, taps, x_batch, x_token;
    const void *x, *weight, *tail;     // weight (C, W), tail (B, W − 1, C) or null
    const int32_t* since;              // (B, T): tokens since the document began, or null
    const void* grad;
    void *y, *after;                   // y or the gradient of x; after: the next tail, or null
    void *grad_weight, *grad_tail;     // grad_weight (C, W), grad_tail (B, W − 1, C) or null
    int64_t threads;
};

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

template <class E> void convolve(const Convolution& p) {
    using T = typename Compute<E>::T;
    long lanes = (p.channels + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for num_threads(p.threads) collapse(2) schedule(static) if (p.batch * p.length * p.channels > (1 << 14))
    for (long b = 0; b < p.batch; ++b)
        for (long n = 0; n < lanes; ++n) {
            Lane<E> lane{p, b, n * CHANNELS, std::min(CHANNELS, long(p.channels) - n * CHANNELS)};
            Buffer<T> weight(p.taps * CHANNELS);
            for (long w = 0; w < p.taps; ++w)
                for (long d = 0; d < lane.width; ++d)
                    weight[w * CHANNELS + d] = T(static_cast<const E*>(p.weight)[(lane.c + d) * p.taps + w]);
            T sums[CHANNELS];
            for (long t = 0; t < p.length; ++t) {
                std::fill(sums, sums + CHANNELS, T(0));
                for (long lag = 0; lag < p.taps; ++lag) {
                    const E* x = lane.before(t, lag);
                    const T* w = weight + (p.taps - 1 - lag) * CHANNELS;
                    if (x != nullptr)
                        for (long d = 0; d < lane.width; ++d) sums[d] += w[d] * T(x[d]);
                }
                E* y = static_cast<E*>(p.y) + lane.at(t);
                for (long d = 0; d < lane.width; ++d) y[d] = narrow(sums[d], E());
            }
            for (long i = 0; p.after != nullptr && i < p.taps - 1; ++i) {
                const E* x = lane.before(p.length - 1, p.taps - 2 - i);
                E* after = static_cast<E*>(p.after) + (b * (p.taps - 1) + i) * p.channels + lane.c;
                for (long d = 0; d < lane.width; ++d) after[d] = x == nullptr ? narrow(T(0), E()) : x[d];
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
            T* grad_x = rows + kept * CHANNELS;  // before it, the gradient of the tail
            std::fill(rows.get(), rows + (p.length + kept) * CHANNELS, T(0));
            for (long t = 0; t < p.length; ++t)
                for (long lag = 0; lag < p.taps; ++lag) {
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
}  // namespace

#define EXPORT(NAME, E)                                                                          \
    extern "C" void linear_##NAME(const Linear* p) { linear<E>(*p); }                            \
    extern "C" void rms_norm_##NAME(const Norm* p) { rms_norm<E>(*p); }                          \
    extern "C" void gate_forward_##NAME(const Gate* p) { gate_forward<E>(*p); }                  \
    extern "C" void gate_backward_##NAME(const Gate* p) { gate_backward<E>(*p); }                \
    extern "C" void conv_forward_##NAME(const Convolution* p) { convolve<E>(*p); }               \
    extern "C" void conv_backward_##NAME(const Convolution* p) { convolve_backward<E>(*p); }
EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bfloat16)
