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

// `count` outputs, at most as many as a vector has lanes, of ROWS rows. Weights are walked through in the order they lie
// in, which is what processors fetch ahead of; SUMS hide the latency. The order of additions is the same for any ROWS.
template <class E, int ROWS>
void products(const Linear& p, const typename Compute<E>::T* x, long row, long output, long count) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    constexpr int SUMS = 4;
    typename S::V parts[ROWS][S::lanes] = {}, rests[ROWS] = {};
    for (long o = 0; o < count; ++o) {
        typename S::V sums[ROWS][SUMS] = {};
        const E* weight = static_cast<const E*>(p.weight) + (output + o) * p.inputs;
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
            parts[r][o] = sums[r][0] + sums[r][1] + (sums[r][2] + sums[r][3]);
            for (long rest = d; rest < p.inputs; ++rest) rests[r][o] += x[(row + r) * p.inputs + rest] * T(weight[rest]);
            if (p.bias != nullptr) rests[r][o] += T(static_cast<const E*>(p.bias)[output + o]);
        }
    }
    for (int r = 0; r < ROWS; ++r) {
        typename S::V total = S::sums(parts[r]) + rests[r];
        for (long o = 0; o < count; ++o) static_cast<E*>(p.y)[(row + r) * p.outputs + output + o] = narrow(T(total[o]), E());
    }
}

template <class E> void linear(const Linear& p) {
    using T = typename Compute<E>::T;
    constexpr long lanes = Simd<T>::lanes;
    Buffer<T> x(p.rows * p.inputs);
    for (long r = 0; r < p.rows; ++r)
        for (long d = 0; d < p.inputs; ++d) x[r * p.inputs + d] = T(static_cast<const E*>(p.x)[r * p.x_row + d]);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.inputs * p.outputs > (1 << 17))
    for (long output = 0; output < p.outputs; output += lanes)
        for (long r = 0; r < p.rows; r += 4) {
            long rows = p.rows - r, count = std::min(lanes, long(p.outputs) - output);
            auto some = rows >= 4 ? products<E, 4> : rows == 3 ? products<E, 3> : rows == 2 ? products<E, 2> : products<E, 1>;
            some(p, x, r, output, count);
        }
}

struct Norm {  // y (rows, width) = x / rms(x) · weight, weight (width) or null
    int64_t rows, width;
    const void *x, *weight;
    void* y;
    int64_t epsilon_bits, threads;  // epsilon as the bits of a double
};

// x is E, the weight W, y O.
template <class E, class W, class O>
void norm_row(const E* x, const W* weight, long width, typename Compute<E>::T epsilon, O* y) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    long d = 0;
    typename S::V squares{};
    for (; d + S::lanes <= width; d += S::lanes) squares += widen(x + d) * widen(x + d);
    T total = S::sum(squares);
    for (; d < width; ++d) total += T(x[d]) * T(x[d]);
    T factor = T(1) / std::sqrt(total / T(width) + epsilon);
    for (d = 0; d + S::lanes <= width; d += S::lanes) {
        typename S::V unit = widen(x + d) * factor;
        put(y + d, weight == nullptr ? unit : unit * widen(weight + d));
    }
    for (; d < width; ++d) y[d] = narrow(T(x[d]) * factor * (weight == nullptr ? T(1) : T(weight[d])), O());
}

double real(int64_t bits) {
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
}

template <class E, class W, class O> void rms_norm(const Norm& p) {
    using T = typename Compute<E>::T;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 16))
    for (long r = 0; r < p.rows; ++r)
        norm_row(static_cast<const E*>(p.x) + r * p.width, static_cast<const W*>(p.weight), p.width,
                 T(real(p.epsilon_bits)), static_cast<O*>(p.y) + r * p.width);
}

struct NormGradient {
    int64_t rows, width;
    const void *x, *weight, *grad;  // of y, as y is stored
    void *grad_x, *grad_weight;     // as x, and (width) computed, or null
    int64_t epsilon_bits, threads;
};

constexpr long NORM_PARTS = 16;  // sums of the weight's gradient, so that their order is that of no number of threads

// With u = x / rms(x) and g = grad · weight: grad_x = (g − u mean(g u)) / rms(x), grad_weight += grad · u.
template <class E, class O>
void norm_row_backward(const NormGradient& p, long r, typename Compute<E>::T* grad_weight) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    using V = typename S::V;
    const E* x = static_cast<const E*>(p.x) + r * p.width;
    const O* grad = static_cast<const O*>(p.grad) + r * p.width;
    const T* weight = static_cast<const T*>(p.weight);
    E* grad_x = static_cast<E*>(p.grad_x) + r * p.width;
    long d = 0;
    V squares{}, products{};
    for (; d + S::lanes <= p.width; d += S::lanes) {
        V at = widen(x + d), given = widen(grad + d);
        squares += at * at, products += at * (weight == nullptr ? given : given * widen(weight + d));
    }
    T square = S::sum(squares), along = S::sum(products);
    for (; d < p.width; ++d)
        square += T(x[d]) * T(x[d]), along += T(x[d]) * T(grad[d]) * (weight == nullptr ? T(1) : weight[d]);
    T factor = T(1) / std::sqrt(square / T(p.width) + T(real(p.epsilon_bits)));
    T back = along / T(p.width) * factor * factor;
    for (d = 0; d + S::lanes <= p.width; d += S::lanes) {
        V at = widen(x + d), given = widen(grad + d);
        put(grad_x + d, ((weight == nullptr ? given : given * widen(weight + d)) - at * back) * factor);
        if (grad_weight != nullptr) S::store(grad_weight + d, S::load(grad_weight + d) + given * at * factor);
    }
    for (; d < p.width; ++d) {
        T given = grad[d];
        grad_x[d] = narrow(((weight == nullptr ? given : given * weight[d]) - T(x[d]) * back) * factor, E());
        if (grad_weight != nullptr) grad_weight[d] += given * T(x[d]) * factor;
    }
}

template <class E, class O> void rms_norm_backward(const NormGradient& p) {
    using T = typename Compute<E>::T;
    Buffer<T> sums(NORM_PARTS * p.width);
    std::fill(sums.get(), sums + NORM_PARTS * p.width, T(0));
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 15))
    for (long part = 0; part < NORM_PARTS; ++part)
        for (long r = part * p.rows / NORM_PARTS; r < (part + 1) * p.rows / NORM_PARTS; ++r)
            norm_row_backward<E, O>(p, r, p.grad_weight == nullptr ? nullptr : sums + part * p.width);
    for (long d = 0; d < p.width && p.grad_weight != nullptr; ++d) {
        T total = 0;
        for (long part = 0; part < NORM_PARTS; ++part) total += sums[part * p.width + d];
        static_cast<T*>(p.grad_weight)[d] = total;
    }
}

struct Gate {  // y (rows, width) = g relu(a)² of h = [a, g] (rows, 2 width), and the gradient of h
    int64_t rows, width;
    const void *h, *grad;
    void* y;
    int64_t threads;
};

template <class X> X above_zero(X x) { return x <= X{} ? X{} : x; }  // NaN stays

template <class E> void gate_forward(const Gate& p) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 15))
    for (long r = 0; r < p.rows; ++r) {
        const E *a = static_cast<const E*>(p.h) + 2 * r * p.width, *g = a + p.width;
        E* y = static_cast<E*>(p.y) + r * p.width;
        long d = 0;
        for (; d + S::lanes <= p.width; d += S::lanes) {
            typename S::V up = above_zero(widen(a + d));
            put(y + d, widen(g + d) * up * up);
        }
        for (; d < p.width; ++d) {
            T up = above_zero(T(a[d]));
            y[d] = narrow(T(g[d]) * up * up, E());
        }
    }
}

template <class E> void gate_backward(const Gate& p) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 15))
    for (long r = 0; r < p.rows; ++r) {
        const E *a = static_cast<const E*>(p.h) + 2 * r * p.width, *g = a + p.width;
        const E* grad = static_cast<const E*>(p.grad) + r * p.width;
        E *grad_a = static_cast<E*>(p.y) + 2 * r * p.width, *grad_g = grad_a + p.width;
        long d = 0;
        for (; d + S::lanes <= p.width; d += S::lanes) {
            typename S::V up = above_zero(widen(a + d)), along = widen(grad + d) * up;
            put(grad_a + d, (along + along) * widen(g + d));
            put(grad_g + d, along * up);
        }
        for (; d < p.width; ++d) {
            T up = above_zero(T(a[d])), along = T(grad[d]) * up;
            grad_a[d] = narrow((along + along) * T(g[d]), E());
            grad_g[d] = narrow(along * up, E());
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
    extern "C" void rms_norm_##NAME(const Norm* p) { rms_norm<E, E, E>(*p); }                    \
    extern "C" void gate_forward_##NAME(const Gate* p) { gate_forward<E>(*p); }                  \
    extern "C" void gate_backward_##NAME(const Gate* p) { gate_backward<E>(*p); }                \
    extern "C" void conv_forward_##NAME(const Convolution* p) { convolve<E>(*p); }               \
    extern "C" void conv_backward_##NAME(const Convolution* p) { convolve_backward<E>(*p); }
EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bfloat16)

// Training: x and the weight are E, y is O.
#define EXPORT_NORM(NAME, E, O)                                                                                   \
    extern "C" void norm_forward_##NAME(const Norm* p) { rms_norm<E, Compute<E>::T, O>(*p); }                     \
    extern "C" void norm_backward_##NAME(const NormGradient* p) { rms_norm_backward<E, O>(*p); }
EXPORT_NORM(float32, float, float)
EXPORT_NORM(float64, double, double)
EXPORT_NORM(bfloat16, bfloat16, bfloat16)
EXPORT_NORM(lowered_float32, float, bfloat16)
