// The soft-capped loss between its products (ops/loss/native.py), on a block of logits (tokens × words) at a time: cap,
// exponentials and sums forward; cap, exponentials, ∂loss/∂logit and its sum over the tokens backward, in place. T
// computes, E is how logits are stored.
#include "problem.h"
#include "simd.h"

namespace {

template <class E> struct Compute { using T = E; };
template <> struct Compute<bfloat16> { using T = float; };

PROBLEM(Sums,
    int64_t rows, columns, first;  // `first` is the word of column 0
    const void *z, *bias;          // E (rows, columns); T (columns), or null
    const int64_t* targets;        // (rows)
    void *top, *total, *chosen;    // T (rows): the running maximum, the sum of exp(y − top), the target's y if it is here
    double cap;
    int64_t threads;
)

PROBLEM(Slopes,
    int64_t rows, columns, first;
    void* z;  // becomes ∂loss/∂z
    const void* bias;
    const int64_t* targets;
    const void *partition, *grad;  // T (rows): log Σ exp of all words, and the gradient of the loss
    void* grad_bias;               // T (columns), added to
    double cap;
    int64_t threads;
)

constexpr long CHUNK = 256;  // columns that stay in the first-level cache
constexpr double LOG2E = 1.4426950408889634;

// 1 / √x of x > 0 no larger than the largest number: Newton's steps from a guess by the exponent; NaN stays.
inline Simd<float>::V inverse_root(Simd<float>::V x) {
    x = x > 3e38f ? 3e38f : x;
    Simd<float>::V y = (Simd<float>::V)(0x5f3759df - ((Simd<float>::Words)x >> 1));
    for (int i = 0; i < 3; ++i) y *= 1.5f - 0.5f * x * y * y;
    return x == x ? y : x;
}
inline Simd<double>::V inverse_root(Simd<double>::V x) {
    for (int i = 0; i < Simd<double>::lanes; ++i) x[i] = 1 / std::sqrt(x[i]);
    return x;
}

// y / z of y = cap z / √(z² + cap²), 1 for no cap: 0.
template <class V, class T> V slope_at(V z, T cap) {
    return cap > 0 ? cap * inverse_root(z * z + cap * cap) : V{} + T(1);
}

// z + bias of up to CHUNK columns, then zeros to a whole vector.
template <class E, class T> void read(const E* z, const T* bias, long columns, T* to) {
    using S = Simd<T>;
    long d = 0;
    for (; d + S::lanes <= columns; d += S::lanes)
        S::store(to + d, bias == nullptr ? widen(z + d) : widen(z + d) + S::load(bias + d));
    for (; d < columns; ++d) to[d] = T(z[d]) + (bias == nullptr ? T(0) : bias[d]);
    for (; d % S::lanes != 0; ++d) to[d] = 0;
}

template <class E> void forward_row(const Sums& p, long r) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    using V = typename S::V;
    const T cap = T(p.cap), *bias = static_cast<const T*>(p.bias);
    const E* z = static_cast<const E*>(p.z) + r * p.columns;
    T &top = static_cast<T*>(p.top)[r], &total = static_cast<T*>(p.total)[r];
    alignas(64) T y[CHUNK];
    long target = p.targets[r] - p.first;
    for (long c = 0; c < p.columns; c += CHUNK) {
        long columns = std::min(CHUNK, p.columns - c), wide = padded<T>(columns);
        read(z + c, bias == nullptr ? nullptr : bias + c, columns, y);
        // Words in pieces of CHUNK, with a running maximum and sum as in attention: log Σ exp needs one pass.
        V highest = V{} + top, sums{};
        for (long d = 0; d < wide; d += S::lanes) {
            V x = S::load(y + d);
            // y = cap z / √(z² + cap²).
            S::store(y + d, x * slope_at(x, cap));
        }
        // y of the target, if its word is in this piece: the loss is log Σ exp y − y_target.
        if (target >= c && target < c + columns) static_cast<T*>(p.chosen)[r] = y[target - c];
        // The rest of the last vector must not be the maximum, and weighs nothing.
        std::fill(y + columns, y + wide, -INFINITY);
        for (long d = 0; d < wide; d += S::lanes) highest = S::load(y + d) > highest ? S::load(y + d) : highest;
        T high = S::max(highest);
        for (long d = 0; d < wide; d += S::lanes) sums += exp2_of((S::load(y + d) - high) * T(LOG2E));
        // The sum so far shrinks to the new maximum, then this piece joins.
        total = total * exp2_of_one((top - high) * T(LOG2E)) + S::sum(sums);
        top = high;
    }
}

template <class E> void forward(const Sums& p) {
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.columns > (1 << 14))
    for (long r = 0; r < p.rows; ++r) forward_row<E>(p, r);
}

// Columns c to c + columns of every row: (exp(y − partition) − [target]) · grad · dy/dz with dy/dz = (cap / √(z² + cap²))³.
template <class E> void backward_columns(const Slopes& p, long c, long columns) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    using V = typename S::V;
    const T cap = T(p.cap), *bias = static_cast<const T*>(p.bias);
    T* grad_bias = static_cast<T*>(p.grad_bias) + c;
    alignas(64) T share[CHUNK], slope[CHUNK], sums[CHUNK] = {};
    for (long r = 0; r < p.rows; ++r) {
        E* z = static_cast<E*>(p.z) + r * p.columns + c;
        // Of this row; threads own columns, so that grad_bias is one sum over the rows in order.
        T partition = static_cast<const T*>(p.partition)[r], grad = static_cast<const T*>(p.grad)[r];
        read(z, bias == nullptr ? nullptr : bias + c, columns, share);
        for (long d = 0; d < columns; d += S::lanes) {
            V x = S::load(share + d), s = slope_at(x, cap);
            // softmax of y, of the logits computed again; s = y / z = cap / √(z² + cap²), and dy/dz = s³.
            S::store(share + d, exp2_of((x * s - partition) * T(LOG2E)));
            S::store(slope + d, s * s * s * grad);
        }
        long target = p.targets[r] - p.first - c;
        // ∂loss/∂y = softmax(y) − [word is the target].
        if (target >= 0 && target < columns) share[target] -= 1;
        long d = 0;
        for (; d + S::lanes <= columns; d += S::lanes) {
            V found = S::load(share + d) * S::load(slope + d);
            S::store(sums + d, S::load(sums + d) + found);
            // ∂loss/∂z takes the logits' place: the two products that follow read it there.
            put(z + d, found);
        }
        for (; d < columns; ++d) sums[d] += share[d] * slope[d], z[d] = narrow(share[d] * slope[d], E());
    }
    for (long d = 0; d < columns; ++d) grad_bias[d] += sums[d];
}

template <class E> void backward(const Slopes& p) {
    // Pieces no wider than a thread's share, so that few words still use every thread.
    long share = (p.columns + p.threads - 1) / p.threads, step = std::min(CHUNK, padded<typename Compute<E>::T>(share));
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.columns > (1 << 14))
    for (long c = 0; c < p.columns; c += step) backward_columns<E>(p, c, std::min(step, long(p.columns) - c));
}
}  // namespace

#define EXPORT(NAME, E)                           \
    KERNEL(loss_forward_##NAME, Sums, forward<E>) \
    KERNEL(loss_backward_##NAME, Slopes, backward<E>)
EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bfloat16)
