// Kernels for serving: what a token's row of a result is, bit for bit, does not depend on how many rows a call has, on
// how a text was cut into calls, or on the number of threads. Every sum runs in one order (products: packed.cpp).
// T computes, E is how tensors are stored.
#include <limits>
#include "problem.h"
#include "simd.h"

namespace {

template <class E> struct Compute { using T = E; };
template <> struct Compute<bfloat16> { using T = float; };

constexpr double LOG2E = 1.4426950408889634;

// 1 / (1 + e^−x).
template <class T> typename Simd<T>::V sigmoid(typename Simd<T>::V x) {
    typename Simd<T>::V e = exp2_of((x < T(0) ? x : -x) * T(LOG2E));
    return (x < T(0) ? e : e * T(0) + T(1)) / (e + T(1));
}

// to[d] = x[d] σ(gate[d]); the last vector is filled up, so that every number is computed the same way.
template <class T, class X, class E> void gated(const X* x, const E* gate, long width, E* to) {
    using S = Simd<T>;
    for (long d = 0; d < width; d += S::lanes) {
        long count = std::min<long>(S::lanes, width - d);
        alignas(64) T g[S::lanes] = {}, y[S::lanes];
        for (long i = 0; i < count; ++i) g[i] = T(gate[d + i]);
        S::store(y, sigmoid<T>(S::load(g)));
        for (long i = 0; i < count; ++i) to[d + i] = narrow(T(x[d + i]) * y[i], E());
    }
}

PROBLEM(Gating,  // y (B, T, H, K) = x (B, H, T, K) ⊙ σ(gate (B, H, T, K), with strides)
    int64_t batch, heads, tokens, width, gate_batch, gate_head, gate_token;
    const void *x, *gate;
    void* y;
)

template <class X, class E> void gate_rows(const Gating& p) {  // x is X, the gate and y E
    using T = typename Compute<E>::T;
    for (long b = 0; b < p.batch; ++b)
        for (long t = 0; t < p.tokens; ++t)
            for (long h = 0; h < p.heads; ++h)
                gated<T, X, E>(static_cast<const X*>(p.x) + ((b * p.heads + h) * p.tokens + t) * p.width,
                               static_cast<const E*>(p.gate) + b * p.gate_batch + h * p.gate_head + t * p.gate_token,
                               p.width, static_cast<E*>(p.y) + ((b * p.tokens + t) * p.heads + h) * p.width);
}

PROBLEM(Rotation,  // y (B, H, T, K) of x with strides: the first `pairs` pairs of each half by position · frequency
    int64_t batch, heads, tokens, width, pairs, x_batch, x_head, x_token, position_batch;
    const void* x;
    const int32_t* position;  // (B or 1, T)
    const double* frequency;  // (pairs)
    void* y;
)

template <class E> void rotate(const Rotation& p) {
    using T = typename Compute<E>::T;
    Buffer<T> cosine(p.pairs), sine(p.pairs);
    long half = p.width / 2;
    for (long b = 0; b < p.batch; ++b)
        for (long t = 0; t < p.tokens; ++t) {
            for (long i = 0; i < p.pairs; ++i) {
                double angle = p.position[b * p.position_batch + t] * p.frequency[i];
                cosine[i] = T(narrow(T(std::cos(angle)), E())), sine[i] = T(narrow(T(std::sin(angle)), E()));
            }
            for (long h = 0; h < p.heads; ++h) {
                const E* x = static_cast<const E*>(p.x) + b * p.x_batch + h * p.x_head + t * p.x_token;
                E* y = static_cast<E*>(p.y) + ((b * p.heads + h) * p.tokens + t) * p.width;
                std::copy(x, x + p.width, y);
                for (long i = 0; i < p.pairs; ++i) {
                    T left = T(x[i]), right = T(x[half + i]);
                    y[i] = narrow(left * cosine[i] + right * sine[i], E());
                    y[half + i] = narrow(right * cosine[i] - left * sine[i], E());
                }
            }
        }
}

template <class T> T dot(const T* x, const T* y, long wide) {  // wide: a multiple of the lanes
    typename Simd<T>::V sums{};
    for (long d = 0; d < wide; d += Simd<T>::lanes) sums += Simd<T>::load(x + d) * Simd<T>::load(y + d);
    return Simd<T>::sum(sums);
}

template <class T, class E> void unit(const E* x, long width, long wide, T* to) {
    for (long d = 0; d < wide; ++d) to[d] = d < width ? T(x[d]) : T(0);
    T factor = std::max(std::sqrt(dot(to, to, wide)), T(1e-12));
    for (long d = 0; d < width; ++d) to[d] /= factor;
}

PROBLEM(Elements,  // y (n) of x (n), each by itself
    int64_t n;
    const void* x;
    void* y;
)

template <class E, class F> void each(const Elements& p, F make) {
    using T = typename Compute<E>::T;
    for (long i = 0; i < p.n; ++i) static_cast<E*>(p.y)[i] = narrow(T(make(T(static_cast<const E*>(p.x)[i]))), E());
}

template <class E> void sigmoid_rows(const Elements& p) {
    each<E>(p, [](auto x) { return 1 / (1 + std::exp(-x)); });
}

template <class E> void log_sigmoid_rows(const Elements& p) {
    each<E>(p, [](auto x) { return std::min(x, decltype(x)(0)) - std::log1p(std::exp(-std::abs(x))); });
}

template <class E> void expm1_rows(const Elements& p) {
    each<E>(p, [](auto x) { return std::expm1(x); });
}

PROBLEM(Units,  // y (B, H, T, K) = x / |x| of x with strides, as it is computed
    int64_t batch, heads, tokens, width, x_batch, x_head, x_token;
    const void* x;
    void* y;
    int64_t threads;
)

template <class E> void unit_rows(const Units& p) {
    using T = typename Compute<E>::T;
    long wide = padded<T>(p.width), count = p.batch * p.heads;
#pragma omp parallel num_threads(p.threads) if (count * p.tokens * p.width > (1 << 15))
    {
        Buffer<T> room(wide);
#pragma omp for schedule(static)
        for (long n = 0; n < count; ++n)
            for (long t = 0; t < p.tokens; ++t) {
                const E* x = static_cast<const E*>(p.x) + n / p.heads * p.x_batch + n % p.heads * p.x_head + t * p.x_token;
                T *y = static_cast<T*>(p.y) + (n * p.tokens + t) * p.width, *to = wide == p.width ? y : room.get();
                unit<T, E>(x, p.width, wide, to);
                if (to != y) std::copy_n(to, p.width, y);
            }
    }
}

PROBLEM(Largest,  // y (rows): where each row of x (rows, width) is largest, the first of equals; −1 if that is not finite
    int64_t rows, width, x_row;
    const void* x;
    int64_t* y;
)

template <class T> int64_t place_of_largest(const T* x, long width) {
    using S = Simd<T>;
    typename S::V top = typename S::V{} - std::numeric_limits<T>::infinity();
    typename S::Words wrong{};
    long d = 0;
    for (; d + S::lanes <= width; d += S::lanes) {
        typename S::V some = S::load(x + d);
        wrong |= some != some;
        top = some > top ? some : top;
    }
    T largest = S::max(top);
    bool finite = true;
    for (int i = 0; i < S::lanes; ++i) finite &= wrong[i] == 0;
    for (; d < width; ++d) finite &= x[d] == x[d], largest = std::max(largest, x[d]);
    return finite && std::isfinite(largest) ? std::find(x, x + width, largest) - x : -1;
}

template <class T> void largest(const Largest& p) {
    for (long r = 0; r < p.rows; ++r) p.y[r] = place_of_largest(static_cast<const T*>(p.x) + r * p.x_row, p.width);
}

PROBLEM(Forbidding,  // −∞ in the rows of x (…, width) that `held` (count, 2) names, where a bit is 0 of those at its address
    int64_t count, width, x_row;
    const int64_t* held;
    void* x;
)

template <class T> void forbid(const Forbidding& p) {
    for (long i = 0; i < p.count; ++i) {
        T* x = static_cast<T*>(p.x) + p.held[2 * i] * p.x_row;
        const uint32_t* bits = reinterpret_cast<const uint32_t*>(p.held[2 * i + 1]);
        for (long d = 0; d < p.width; d += 32) {
            uint32_t some = bits[d >> 5];
            long end = std::min(d + 32, p.width);
            if (some == 0) std::fill(x + d, x + end, -std::numeric_limits<T>::infinity());
            else if (some != ~uint32_t(0))
                for (long j = d; j < end; ++j)
                    if (!(some >> (j - d) & 1)) x[j] = -std::numeric_limits<T>::infinity();
        }
    }
}
}  // namespace

KERNEL(forbid_float32, Forbidding, forbid<float>)
KERNEL(forbid_float64, Forbidding, forbid<double>)
KERNEL(largest_float32, Largest, largest<float>)
KERNEL(largest_float64, Largest, largest<double>)
#define EXPORT(NAME, E)                                                \
    KERNEL(gate_rows_##NAME, Gating, gate_rows<E, E>)                  \
    KERNEL(gate_wide_rows_##NAME, Gating, gate_rows<Compute<E>::T, E>) \
    KERNEL(rotate_##NAME, Rotation, rotate<E>)                         \
    KERNEL(unit_rows_##NAME, Units, unit_rows<E>)                      \
    KERNEL(sigmoid_rows_##NAME, Elements, sigmoid_rows<E>)             \
    KERNEL(log_sigmoid_rows_##NAME, Elements, log_sigmoid_rows<E>)     \
    KERNEL(expm1_rows_##NAME, Elements, expm1_rows<E>)
EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bfloat16)
