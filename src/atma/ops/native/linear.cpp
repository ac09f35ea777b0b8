// Products of few rows with a weight: bound by reading it. T computes, E is how tensors are stored.
#include "problem.h"
#include "simd.h"

namespace {

template <class E> struct Compute { using T = E; };
template <> struct Compute<bfloat16> { using T = float; };

constexpr long LONG = 512;  // bytes of an output that is worth a stream of its own beside others

// y (rows, outputs) = x (rows, inputs) · weightᵀ + bias: every weight is read once, by one thread.
PROBLEM(Linear,
    int64_t rows, inputs, outputs;
    const void *x, *weight, *bias;
    void* y;
    int64_t threads;
)

// Of ROWS rows from `row` on, `count` outputs from `output` on, at most as many as a vector has lanes, and the same of
// STREAMS places that are `apart` outputs from one another: as many as registers hold sums for are fetched ahead of at
// once. SUMS hide the latency. The order of additions is the same for any ROWS and STREAMS.
template <class E, int ROWS, int STREAMS>
void products(const Linear& p, const typename Compute<E>::T* x, long row, long output, long apart, long count) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    constexpr int SUMS = 2;
    typename S::V parts[ROWS][STREAMS][S::lanes];
    T rests[ROWS][STREAMS][S::lanes] = {};
    long stride = apart * p.inputs;
    for (long o = 0; o < count; ++o) {
        typename S::V sums[ROWS][STREAMS][SUMS] = {};
        // One output's weights from the first to the last: y[r, o] = Σ_d x[r, d] W[o, d], SUMS partial vectors a row.
        const E* weight = static_cast<const E*>(p.weight) + (output + o) * p.inputs;
        long d = 0;
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<E, bfloat16>) {  // pairs of products at once, of x as it was given
            const E* given = static_cast<const E*>(p.x) + row * p.inputs;
            for (; d + SUMS * 32 <= p.inputs; d += SUMS * 32)
                for (int i = 0; i < SUMS; ++i)
                    for (int s = 0; s < STREAMS; ++s) {
                        __m512bh w = (__m512bh)_mm512_loadu_si512(weight + s * stride + d + i * 32);
                        for (int r = 0; r < ROWS; ++r) {
                            __m512bh pair = (__m512bh)_mm512_loadu_si512(given + r * p.inputs + d + i * 32);
                            sums[r][s][i] = (typename S::V)_mm512_dpbf16_ps((__m512)sums[r][s][i], w, pair);
                        }
                    }
        }
#endif
        // Whatever pairs did not take, or all of it in another dtype, widened to T.
        for (; d + SUMS * S::lanes <= p.inputs; d += SUMS * S::lanes)
            for (int i = 0; i < SUMS; ++i) {
                typename S::V at[ROWS];
                for (int r = 0; r < ROWS; ++r) at[r] = S::load(x + (row + r) * p.inputs + d + i * S::lanes);
                for (int s = 0; s < STREAMS; ++s) {
                    typename S::V w = widen(weight + s * stride + d + i * S::lanes);
                    for (int r = 0; r < ROWS; ++r) sums[r][s][i] = fused(at[r], w, sums[r][s][i]);
                }
            }
        for (int r = 0; r < ROWS; ++r)
            for (int s = 0; s < STREAMS; ++s) {
                parts[r][s][o] = sums[r][s][0] + sums[r][s][1];
                // Inputs that fill no vector are summed on their own, so that nothing is read past the row.
                for (long rest = d; rest < p.inputs; ++rest)
                    rests[r][s][o] += x[(row + r) * p.inputs + rest] * T(weight[s * stride + rest]);
            }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < STREAMS; ++s) {
            long first = output + s * apart;
            for (long o = count; o < S::lanes; ++o) parts[r][s][o] = typename S::V{};
            T totals[S::lanes];
            // A vector of outputs at once by one tree of shuffles: adding up each by itself took most of the time.
            S::store(totals, S::sums(parts[r][s]) + S::load(rests[r][s]));
            const E* bias = p.bias == nullptr ? nullptr : static_cast<const E*>(p.bias) + first;
            E* y = static_cast<E*>(p.y) + (row + r) * p.outputs + first;
            for (long o = 0; o < count; ++o) y[o] = narrow(bias == nullptr ? totals[o] : totals[o] + T(bias[o]), E());
        }
}

// One or two rows of the vectors of outputs from `at` to `last`, in streams as long as they can be.
template <class E, int ROWS, int STREAMS>
void few(const Linear& p, const typename Compute<E>::T* x, long at, long last) {
    constexpr long lanes = Simd<typename Compute<E>::T>::lanes;
    long apart = (std::min<long>(last, p.outputs / lanes) - at) / STREAMS;
    for (long i = 0; i < apart; ++i) products<E, ROWS, STREAMS>(p, x, 0, (at + i) * lanes, apart * lanes, lanes);
    for (at += std::max(apart, 0L) * STREAMS; at < last; ++at)
        products<E, ROWS, 1>(p, x, 0, at * lanes, 0, std::min<long>(lanes, p.outputs - at * lanes));
}

// Any rows, inside outputs: a weight is read from memory once, and from the cache for the rows after the fourth.
template <class E> void many(const Linear& p, const typename Compute<E>::T* x, long at, long last) {
    constexpr long lanes = Simd<typename Compute<E>::T>::lanes;
    for (; at < last; ++at)
        for (long r = 0; r < p.rows; r += 4) {
            auto of = p.rows - r >= 4 ? products<E, 4, 1> : p.rows - r == 3 ? products<E, 3, 1>
                    : p.rows - r == 2 ? products<E, 2, 1> : products<E, 1, 1>;
            of(p, x, r, at * lanes, 0, std::min<long>(lanes, p.outputs - at * lanes));
        }
}

template <class E> void linear(const Linear& p) {
    using T = typename Compute<E>::T;
    constexpr long lanes = Simd<T>::lanes;
    long vectors = (p.outputs + lanes - 1) / lanes;
    Buffer<T> x(p.rows * p.inputs);
    for (long r = 0; r < p.rows; ++r)
        // x is widened once, not once for every output.
        for (long d = 0; d < p.inputs; ++d) x[r * p.inputs + d] = T(static_cast<const E*>(p.x)[r * p.inputs + d]);
    auto of = p.rows == 1 && p.inputs * long(sizeof(E)) >= LONG ? few<E, 1, 4> : p.rows == 2 ? few<E, 2, 2> : many<E>;
#pragma omp parallel for num_threads(p.threads) schedule(static, 1) if (p.rows * p.inputs * p.outputs > (1 << 17))
    for (long t = 0; t < p.threads; ++t) of(p, x, vectors * t / p.threads, vectors * (t + 1) / p.threads);
}
}  // namespace

KERNEL(linear_float32, Linear, linear<float>)
KERNEL(linear_float64, Linear, linear<double>)
KERNEL(linear_bfloat16, Linear, linear<bfloat16>)
