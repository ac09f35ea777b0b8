// Linear recurrences token after token: the memory (V, K) is read and written once for each.
#pragma once
#include "recurrence.h"

namespace {

enum class Axis { key, value };
enum class Decay { one, key, value };  // one number, or one of every channel of an axis

// β w of as many rows of M as a vector has lanes; w = v, or v − M k of the decayed M. `weighed` is k, or a ∘ k where key
// channels decay: the decayed row is never stored.
template <class T, bool DELTA, Decay DECAY>
void writes(const T* from, const T* weighed, const T* v, const T* a, T beta, long wide, T* error) {
    using S = Simd<T>;
    using V = typename S::V;
    if constexpr (!DELTA) return S::store(error, beta * S::load(v));
    V sums[S::lanes];
    for (int i = 0; i < S::lanes; ++i) {
        sums[i] = V{};
        for (long d = 0; d < wide; d += S::lanes) sums[i] += S::load(from + i * wide + d) * S::load(weighed + d);
    }
    if constexpr (DECAY == Decay::key) S::store(error, beta * (S::load(v) - S::sums(sums)));
    else S::store(error, beta * (S::load(v) - a[0] * S::sums(sums)));
}

// M = diag(a)-decayed `from` + β w kᵀ, read = M q. M (tall, wide), as many rows at a time as a vector has lanes, and each
// in the order it lies in: rows side by side, or the next ones' writes ahead, were faster in the cache, and up to twice as
// slow where M comes from memory.
template <class T, bool DELTA, Decay DECAY>
void step(const T* from, T* M, const T* q, const T* k, const T* weighed, const T* v, const T* a, T beta, long tall, long wide,
          T* read) {
    using S = Simd<T>;
    using V = typename S::V;
    alignas(64) T error[S::lanes];
    for (long e = 0; e < tall; e += S::lanes) {
        writes<T, DELTA, DECAY>(from + e * wide, weighed, v + e, a, beta, wide, error);
        V sums[S::lanes];
        for (int i = 0; i < S::lanes; ++i) {
            sums[i] = V{};
            const T *row = from + (e + i) * wide, by = error[i], kept = a[DECAY == Decay::value ? e + i : 0];
            T* to = M + (e + i) * wide;
            for (long d = 0; d < wide; d += S::lanes) {
                V decay = DECAY == Decay::key ? S::load(a + d) : kept - V{};
                V next = decay * S::load(row + d) + by * S::load(k + d);
                S::store(to + d, next);
                sums[i] += next * S::load(q + d);
            }
        }
        S::store(read + e, S::sums(sums));
    }
}

template <class T> void resize(const T* from, long rows, long width, T* to, long wide) {  // (rows, width), wide apart
    for (long e = 0; e < rows; ++e) std::copy_n(from + e * width, std::min(width, wide), to + e * wide);
}

template <class T> const T* filled(const T* x, long width, long wide, T* room) {  // with zeros up to wide
    return width == wide ? x : (std::fill(std::copy_n(x, width, room), room + wide, T(0)), room);
}

// a of one token: a number, or a vector with zeros up to `wide`.
template <class T, Decay DECAY> void decays_of(const Head<T>& head, long t, long wide, T* a) {
    using S = Simd<T>;
    if constexpr (DECAY == Decay::one) {
        a[0] = head.born(t) ? T(0) : std::exp(head.rate(t));
    } else {
        const T* rates = filled(head.rates(t), head.p.channels, wide, a);
        bool born = head.born(t);
        for (long d = 0; d < wide; d += S::lanes) S::store(a + d, born ? typename S::V{} : exp2_of(S::load(rates + d) * log2e<T>));
    }
}

template <class T, bool DELTA, Decay DECAY> void turns(const Problem& p, long index) {
    Head<T> head(p, index);
    long wide = padded<T>(p.width), tall = padded<T>(p.value_width), channels = DECAY == Decay::value ? tall : wide;
    bool whole = wide == p.width && tall == p.value_width;
    Buffer<T> room(std::max(tall, wide) + wide + (whole ? 0 : 2 * wide + 2 * tall + tall * wide));
    T *a = room, *a_k = a + std::max(tall, wide), *q_room = a_k + wide, *k_room = q_room + wide, *v_room = k_room + wide,
      *read = v_room + tall;
    const T* from = head.state(static_cast<const T*>(p.memory));
    T *after = head.state(static_cast<T*>(p.after)), *M = whole ? after : read + tall;
    if (!whole) std::fill(M, M + tall * wide, T(0)), resize(from, p.value_width, p.width, M, wide), from = M;
    for (long t = 0; t < p.length; ++t, from = M) {
        const T* q = filled(head.q(t), p.width, wide, q_room);
        const T* k = filled(head.k(t), p.width, wide, k_room);
        const T* v = filled(head.v(t), p.value_width, tall, v_room);
        decays_of<T, DECAY>(head, t, channels, a);
        if (DELTA && DECAY == Decay::key) times<T>(a, k, wide, a_k);
        T* out = static_cast<T*>(p.out) + (head.row() + t) * p.value_width;
        step<T, DELTA, DECAY>(from, M, q, k, DECAY == Decay::key ? a_k : k, v, a, head.beta(t), tall, wide, whole ? out : read);
        if (!whole) std::copy_n(read, p.value_width, out);
    }
    if (!whole) resize(M, p.value_width, wide, after, p.width);
}

template <class T> void turns_of_head(const Problem& p, long index, Axis axis) {
    if (p.channels == 0) return p.delta ? turns<T, true, Decay::one>(p, index) : turns<T, false, Decay::one>(p, index);
    if (axis == Axis::value) return turns<T, false, Decay::value>(p, index);
    return p.delta ? turns<T, true, Decay::key>(p, index) : turns<T, false, Decay::key>(p, index);
}
}  // namespace
