// The network of a neural memory and the gradients of its inner loss (ops/fast_weights/network.py), for a few tokens of one
// head side by side.
#pragma once
#include "memory_passes.h"

namespace {

// Φ(x) and x Φ′(x), or σ(x) and x σ(x) (1 − σ(x)): activations are x times the first, their slopes the sum of both.
inline void curve(Simd<float>::V x, bool gelu, Simd<float>::V& value, Simd<float>::V& more) {
    using V = Simd<float>::V;
    constexpr float log2e = 1.44269504f;
    if (gelu) {
        // Abramowitz and Stegun 7.1.26: 1 − erf(y) to 1.5e-7.
        V size = x < 0 ? -x : x, bell = exp2_of(x * x * (-0.5f * log2e)), t = 1.0f / (1.0f + 0.231641888f * size);
        V rest = 0.5f * bell * t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
        value = x < 0 ? rest : 1.0f - rest;
        value = x != x ? x : value;
        more = x * bell * 0.398942280f;
    } else {
        V size = x < 0 ? -x : x, e = exp2_of(size * -log2e), sigma = (x < 0 ? e : V{} + 1.0f) / (1.0f + e);
        value = x != x ? x : sigma;
        more = x * value * (1.0f - value);
    }
}
inline void curve(Simd<double>::V x, bool gelu, Simd<double>::V& value, Simd<double>::V& more) {
    for (int i = 0; i < Simd<double>::lanes; ++i) {
        value[i] = gelu ? 0.5 * (1 + std::erf(x[i] * 0.7071067811865476)) : 1 / (1 + std::exp(-x[i]));
        more[i] = gelu ? x[i] * std::exp(-0.5 * x[i] * x[i]) * 0.3989422804014327 : x[i] * value[i] * (1 - value[i]);
    }
}

// act(x) of n numbers, and act′(x) unless slope is null. All three have room for whole vectors.
template <class T> void activate(const T* x, long n, bool gelu, T* h, T* slope) {
    using S = Simd<T>;
    for (long i = 0; i < n; i += S::lanes) {
        typename S::V at = S::load(x + i), value{}, more{};
        curve(at, gelu, value, more);
        S::store(h + i, at * value);
        if (slope != nullptr) S::store(slope + i, value + more);
    }
}

template <class T> T mean(const T* x, long n) {
    T sum = 0;
    for (long i = 0; i < n; ++i) sum += x[i];
    return sum / n;
}

// (core − mean)/√(variance + ε), and the root.
template <class T> T normed(const T* core, long n, T* to) {
    T centre = mean(core, n), square = 0;
    for (long i = 0; i < n; ++i) to[i] = core[i] - centre, square += to[i] * to[i];
    T root = std::sqrt(square / n + T(EPSILON));
    for (long i = 0; i < n; ++i) to[i] /= root;
    return root;
}

// J x + N(core) of one token; `found` may be core.
template <class T> void output(const Head<T>& head, const T* core, const T* x, T* found) {
    const Memory& p = head.p;
    long width = p.value;
    Buffer<T> skipped(p.residual == SKIP ? width : 0);
    if (p.norm) {
        const T *gain = head.slow(p.gain, width), *shift = head.slow(p.shift, width);
        normed(core, width, found);
        for (long i = 0; i < width; ++i) found[i] = gain[i] * found[i] + shift[i];
    } else if (found != core) {
        std::copy_n(core, width, found);
    }
    if (p.residual == SKIP) dots(head.slow(p.skip, width * p.inner), width, p.inner, x, 1, skipped.get()), x = skipped;
    for (long i = 0; p.residual != NONE && i < width; ++i) found[i] += x[i];
}

// e = ∂ℓ/∂f of f, in place: the table of section 4.2.
template <class T> void at_output(const Memory& p, const T* v, const T* delta, T* f) {
    long width = p.value;
    T squared = 0;
    for (long i = 0; i < width; ++i) f[i] = p.bias == DOT ? -v[i] : f[i] - v[i];
    if (p.bias == HUBER || p.bias == HUBER_SWITCH)
        for (long i = 0; i < width; ++i) squared += f[i] * f[i];
    for (long i = 0; p.bias == LP && i < width; ++i) {
        T x = f[i] * f[i] + T(EPSILON);
        f[i] *= p.power == 3 ? std::sqrt(x) : T(std::pow(double(x), (p.power - 2) / 2));
    }
    for (long i = 0; p.bias == HUBER_COORDINATE && i < width; ++i) {
        T most = delta[p.delta_width == 1 ? 0 : i];
        f[i] = f[i] < -most ? -most : f[i] > most ? most : f[i];
    }
    T bound = p.bias == HUBER ? std::sqrt(squared < delta[0] * delta[0] ? delta[0] * delta[0] : squared) : T(0);
    for (long i = 0; p.bias == HUBER && i < width; ++i) f[i] = f[i] * delta[0] / bound;
    for (long i = 0; p.bias == HUBER_SWITCH && !(squared <= delta[0] * delta[0]) && i < width; ++i)
        f[i] = delta[0] * f[i] / std::sqrt(f[i] * f[i] + T(EPSILON));
}

// e₁ = ∂ℓ/∂core of e, in place: with n the normed core and d = gain ⊙ e, (d − mean d − n mean(d ⊙ n))/root.
template <class T> void through_norm(const Head<T>& head, const T* core, T* n, T* e) {
    long width = head.p.value;
    const T* gain = head.slow(head.p.gain, width);
    T root = normed(core, width, n), along = 0;
    for (long i = 0; i < width; ++i) e[i] *= gain[i], along += e[i] * n[i];
    T centre = mean(e, width);
    along /= width;
    for (long i = 0; i < width; ++i) e[i] = (e[i] - centre - n[i] * along) / root;
}

template <class T> T squares(const T* x, long n) {
    T sum = 0;
    for (long i = 0; i < n; ++i) sum += x[i] * x[i];
    return sum;
}

// What the gradients of `count` tokens are computed in, and e (count, rows) and z (count, columns) of each matrix.
template <class T> struct Gradients {
    long count;
    T *up, *gate, *slope, *h, *core, *n, *back, *e[3];
    const T* z[3];
    static long padded_to(long n) { return padded<T>(n) + Simd<T>::lanes; }
    static long room(const Memory& p) { return 7 * padded_to(p.window * p.hidden) + 3 * padded_to(p.window * p.value); }
    Gradients(const Memory& p, T* at) : count(p.window) {
        for (T** x : {&up, &gate, &slope, &h, &back, &e[1], &e[2]}) *x = at, at += padded_to(count * p.hidden);
        for (T** x : {&core, &n, &e[0]}) *x = at, at += padded_to(count * p.value);
    }
};

// Of ∇_W ℓ(f(W; x), v) = e zᵀ, at weights W, of x (count, K′) and v (count, V).
template <class T>
void gradients(const Head<T>& head, const T* const* weights, const T* x, const T* v, const T* delta, Gradients<T>& g) {
    const Memory& p = head.p;
    long all = g.count * p.hidden;
    bool deep = p.matrices > 1;
    if (deep) dots(weights[1], p.hidden, p.inner, x, g.count, g.up), activate(g.up, all, p.activation == GELU, g.h, g.slope);
    if (p.matrices > 2) {
        dots(weights[2], p.hidden, p.inner, x, g.count, g.gate);
        for (long i = 0; i < all; ++i) g.e[2][i] = g.h[i], g.h[i] *= g.gate[i];
    }
    g.z[0] = deep ? g.h : x, g.z[1] = g.z[2] = x;
    if (p.bias != DOT || p.norm) dots(weights[0], p.value, p.hidden, g.z[0], g.count, g.core);
    for (long j = 0; j < g.count; ++j) {
        T *e = g.e[0] + j * p.value, *core = g.core + j * p.value;
        if (p.bias != DOT) output(head, core, x + j * p.inner, e);
        at_output(p, v + j * p.value, delta, e);
        if (p.norm) through_norm(head, core, g.n, e);
        T length = 1;
        if (p.normalised) length = std::max(length, squares(g.h + j * p.hidden, p.hidden));
        for (long r = 0; p.normalised && r < p.value; ++r) e[r] /= length;
    }
    if (!deep) return;
    turned_dots(weights[0], p.value, p.hidden, g.e[0], g.count, g.back);
    for (long i = 0; i < all; ++i) g.e[1][i] = g.back[i] * g.slope[i];
    if (p.matrices < 3) return;
    for (long i = 0; i < all; ++i) g.e[1][i] *= g.gate[i], g.e[2][i] *= g.back[i];
}
}  // namespace
