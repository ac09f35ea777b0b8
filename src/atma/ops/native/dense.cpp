// What surrounds the mixers, where PyTorch's CPU path spends its time on calls and passes over memory: the RMS norm and
// the MLP's gate. T computes, E is how tensors are stored.
#include "problem.h"
#include "simd.h"

namespace {

template <class E> struct Compute { using T = E; };
template <> struct Compute<bfloat16> { using T = float; };

PROBLEM(Norm,  // y (rows, width) = x / rms(x) · weight, weight (width) or null
    int64_t rows, width;
    const void *x, *weight;
    void* y;
    double epsilon;
    int64_t threads;
)

// x is E, the weight W, y O.
template <class E, class W, class O>
void norm_row(const E* x, const W* weight, long width, typename Compute<E>::T epsilon, O* y) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    long d = 0;
    typename S::V squares{};
    for (; d + S::lanes <= width; d += S::lanes) squares += widen(x + d) * widen(x + d);
    // x / sqrt(mean x² + ε): sums in T, whatever x is stored as.
    T total = S::sum(squares);
    for (; d < width; ++d) total += T(x[d]) * T(x[d]);
    T factor = T(1) / std::sqrt(total / T(width) + epsilon);
    for (d = 0; d + S::lanes <= width; d += S::lanes) {
        typename S::V unit = widen(x + d) * factor;
        // Rounded to O once, after the weight.
        put(y + d, weight == nullptr ? unit : unit * widen(weight + d));
    }
    for (; d < width; ++d) y[d] = narrow(T(x[d]) * factor * (weight == nullptr ? T(1) : T(weight[d])), O());
}

template <class E, class W, class O> void rms_norm(const Norm& p) {
    using T = typename Compute<E>::T;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 16))
    for (long r = 0; r < p.rows; ++r)
        norm_row(static_cast<const E*>(p.x) + r * p.width, static_cast<const W*>(p.weight), p.width,
                 T(p.epsilon), static_cast<O*>(p.y) + r * p.width);
}

PROBLEM(NormGradient,
    int64_t rows, width;
    const void *x, *weight, *grad;  // of y, as y is stored
    void *grad_x, *grad_weight;     // as x, and (width) computed, or null
    double epsilon;
    int64_t threads;
)

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
        // Σ x² and Σ x g in one pass over x.
        squares += at * at, products += at * (weight == nullptr ? given : given * widen(weight + d));
    }
    T square = S::sum(squares), along = S::sum(products);
    for (; d < p.width; ++d)
        square += T(x[d]) * T(x[d]), along += T(x[d]) * T(grad[d]) * (weight == nullptr ? T(1) : weight[d]);
    T factor = T(1) / std::sqrt(square / T(p.width) + T(p.epsilon));
    // u mean(g u) / rms = x · (Σ x g / width) / rms³: one factor is left for the pass below.
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
        // Rows of a part are fixed by their number, so grad_weight has the same bits with any number of threads.
        for (long r = part * p.rows / NORM_PARTS; r < (part + 1) * p.rows / NORM_PARTS; ++r)
            norm_row_backward<E, O>(p, r, p.grad_weight == nullptr ? nullptr : sums + part * p.width);
    for (long d = 0; d < p.width && p.grad_weight != nullptr; ++d) {
        T total = 0;
        for (long part = 0; part < NORM_PARTS; ++part) total += sums[part * p.width + d];
        static_cast<T*>(p.grad_weight)[d] = total;
    }
}

PROBLEM(Gate,  // y (rows, width) = g φ(a) of h = [a, g] (rows, 2 width), and the gradient of h
    int64_t rows, width;
    const void *h, *grad;
    void* y;
    int64_t threads;
)

// Each φ as x φ(a) and x φ′(a), of vectors.
template <class T> struct Square {  // relu(a)²
    using V = typename Simd<T>::V;
    static V up(V a) { return a <= V{} ? V{} : a; }  // NaN stays
    static V times(V x, V a) { return x * up(a) * up(a); }
    static V times_slope(V x, V a) { return x * (up(a) + up(a)); }
};

constexpr double LOG2E = 1.4426950408889634, ROOT_2_OVER_PI = 0.7978845608028654, CUBIC = 0.044715;

// 1 / (1 + e^−x). Beyond ±MOST it is 0 or 1 to the last bit, or as good as that.
template <class T> typename Simd<T>::V logistic(typename Simd<T>::V x) {
    constexpr T MOST = std::is_same_v<T, float> ? T(80) : T(700);
    using V = typename Simd<T>::V;
    V held = x > MOST ? V{} + MOST : x;
    held = held < -MOST ? V{} - MOST : held;
    return T(1) / (T(1) + exp2_of(held * T(-LOG2E)));
}

template <class T> struct Silu {  // a σ(a)
    using V = typename Simd<T>::V;
    static V times(V x, V a) { return x * (a * logistic<T>(a)); }
    static V times_slope(V x, V a) {
        V open = logistic<T>(a);
        return x * (open * (T(1) + a * (T(1) - open)));
    }
};

template <class T> struct GeluTanh {  // ½ a (1 + tanh u) = a σ(2 u), u = √(2/π) (a + 0.044715 a³)
    using V = typename Simd<T>::V;
    static V open(V a) { return logistic<T>(a * (T(1) + a * a * T(CUBIC)) * T(2 * ROOT_2_OVER_PI)); }
    static V times(V x, V a) { return x * (a * open(a)); }
    static V times_slope(V x, V a) {
        V part = open(a), inner = (T(1) + a * a * T(3 * CUBIC)) * T(2 * ROOT_2_OVER_PI);  // d 2u/da
        return x * (part + a * part * (T(1) - part) * inner);
    }
};

// The first `count` numbers at x, then zeros.
template <class E> typename Simd<typename Compute<E>::T>::V some(const E* x, long count) {
    E held[Simd<typename Compute<E>::T>::lanes] = {};
    std::copy(x, x + count, held);
    const E* whole = held;
    return widen(whole);
}

template <class E> void put_some(E* y, typename Simd<typename Compute<E>::T>::V x, long count) {
    E held[Simd<typename Compute<E>::T>::lanes];
    E* whole = held;
    put(whole, x);
    std::copy(held, held + count, y);
}

template <class E, class F> void gate_forward(const Gate& p) {
    using S = Simd<typename Compute<E>::T>;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 15))
    for (long r = 0; r < p.rows; ++r) {
        const E *a = static_cast<const E*>(p.h) + 2 * r * p.width, *g = a + p.width;
        E* y = static_cast<E*>(p.y) + r * p.width;
        long d = 0;
        for (; d + S::lanes <= p.width; d += S::lanes) {
            // g φ(a) is rounded once.
            put(y + d, F::times(widen(g + d), widen(a + d)));
        }
        if (long rest = p.width - d; rest > 0) put_some(y + d, F::times(some(g + d, rest), some(a + d, rest)), rest);
    }
}

template <class E, class F> void gate_backward(const Gate& p) {
    using S = Simd<typename Compute<E>::T>;
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.width > (1 << 15))
    for (long r = 0; r < p.rows; ++r) {
        const E *a = static_cast<const E*>(p.h) + 2 * r * p.width, *g = a + p.width;
        const E* grad = static_cast<const E*>(p.grad) + r * p.width;
        E *grad_a = static_cast<E*>(p.y) + 2 * r * p.width, *grad_g = grad_a + p.width;
        long d = 0;
        for (; d + S::lanes <= p.width; d += S::lanes) {
            // ∂/∂a of g φ(a) = g φ′(a), ∂/∂g = φ(a).
            typename S::V given = widen(grad + d), at = widen(a + d);
            put(grad_a + d, F::times_slope(given, at) * widen(g + d));
            put(grad_g + d, F::times(given, at));
        }
        if (long rest = p.width - d; rest > 0) {
            typename S::V given = some(grad + d, rest), at = some(a + d, rest);
            put_some(grad_a + d, F::times_slope(given, at) * some(g + d, rest), rest);
            put_some(grad_g + d, F::times(given, at), rest);
        }
    }
}
}  // namespace

#define GATE(KIND, NAME, E, F)                                                   \
    KERNEL(gate_##KIND##_forward_##NAME, Gate, gate_forward<E, F<Compute<E>::T>>) \
    KERNEL(gate_##KIND##_backward_##NAME, Gate, gate_backward<E, F<Compute<E>::T>>)
#define EXPORT(NAME, E)                                \
    KERNEL(rms_norm_##NAME, Norm, rms_norm<E, E, E>)   \
    GATE(square, NAME, E, Square) GATE(silu, NAME, E, Silu) GATE(gelu, NAME, E, GeluTanh)
EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bfloat16)

// Training: x and the weight are E, y is O.
#define EXPORT_NORM(NAME, E, O)                                      \
    KERNEL(norm_forward_##NAME, Norm, rms_norm<E, Compute<E>::T, O>) \
    KERNEL(norm_backward_##NAME, NormGradient, rms_norm_backward<E, O>)
EXPORT_NORM(float32, float, float)
EXPORT_NORM(float64, double, double)
EXPORT_NORM(bfloat16, bfloat16, bfloat16)
EXPORT_NORM(lowered_float32, float, bfloat16)
