// Linear recurrences (ops/recurrent/reference.py, mixers.md section 3): what the compiled kernels of all rules and decays
// share. The memory is N = Mᵀ (K, V) here, so that every product has the value width as its columns.
#pragma once
#include "problem.h"
#include "simd.h"

namespace {

PROBLEM(Problem,  // what ops/recurrent/native.py hands over; strides in elements, the last axis contiguous
    int64_t batch, heads, length, width, q_groups, k_groups, v_groups, value_width, delta, channels, threads;
    int64_t together;  // neighbouring heads that a thread takes chunk by chunk, as they share one q and one k
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
    const void *q, *k, *v, *log_decay, *beta;  // the last two contiguous, (B, H, T, channels or nothing) and (B, H, T), or null
    const uint8_t* born;                       // (B, T), 1 where a document begins, or null
    const void* memory;                        // (B, H, V, K)
    void *out, *after, *before;                // (B, H, T, V), (B, H, V, K), (B, H, chunks, K, V) or null
)

// grad_q and grad_k (B, H / together, T, K), all others per head; grad_decay and grad_beta null where there is none of them.
PROBLEM(Backward,
    Problem given;
    const void *grad_out, *grad_after;
    void *grad_q, *grad_k, *grad_v, *grad_decay, *grad_beta, *grad_memory;
)

constexpr long CHUNK = 64, FEW_TOKENS = 8;

template <class T> struct Head {
    const Problem& p;
    long b, h, q_group, k_group, v_group;
    Head(const Problem& p, long index)
        : p(p), b(index / p.heads), h(index % p.heads), q_group(h / (p.heads / p.q_groups)),
          k_group(h / (p.heads / p.k_groups)), v_group(h / (p.heads / p.v_groups)) {}
    long index() const { return b * p.heads + h; }
    long row() const { return index() * p.length; }
    const T* q(long t) const { return static_cast<const T*>(p.q) + b * p.q_batch + q_group * p.q_head + t * p.q_token; }
    const T* k(long t) const { return static_cast<const T*>(p.k) + b * p.k_batch + k_group * p.k_head + t * p.k_token; }
    const T* v(long t) const { return static_cast<const T*>(p.v) + b * p.v_batch + v_group * p.v_head + t * p.v_token; }
    // log a_t, one number or of every channel; β_t.
    T rate(long t) const { return p.log_decay == nullptr ? T(0) : static_cast<const T*>(p.log_decay)[row() + t]; }
    const T* rates(long t) const { return static_cast<const T*>(p.log_decay) + (row() + t) * p.channels; }
    T beta(long t) const { return p.beta == nullptr ? T(1) : static_cast<const T*>(p.beta)[row() + t]; }
    bool born(long t) const { return p.born != nullptr && p.born[b * p.length + t] != 0; }
    template <class P> P* state(P* base) const { return base + index() * p.width * p.value_width; }
};

template <class T> constexpr T log2e = T(1.4426950408889634);
// log a where a document begins, a decay of 0: what was before it weighs 2^−1e30 = 0, exactly.
template <class T> constexpr T birth = T(-1e30);

template <class T> void zero(T* x, long size) { std::fill(x, x + size, T(0)); }

template <class T> void copy_padded(const T* from, long stride, long rows, long width, long wide, T* to) {
    for (long r = 0; r < rows; ++r)
        for (long d = 0; d < wide; ++d) to[r * wide + d] = d < width ? from[r * stride + d] : T(0);
}

template <class T> void transpose(const T* from, long rows, long columns, long from_row, T* to, long to_row) {
    constexpr long side = 16;  // blocks, so that neither side strides through the cache
    for (long r0 = 0; r0 < rows; r0 += side)
        for (long c0 = 0; c0 < columns; c0 += side)
            for (long c = c0; c < std::min(c0 + side, columns); ++c)
                for (long r = r0; r < std::min(r0 + side, rows); ++r) to[c * to_row + r] = from[r * from_row + c];
}

// to (rows, width) = x ∘ y of the same shape.
template <class T> void times(const T* x, const T* y, long size, T* to) {
    for (long i = 0; i < size; ++i) to[i] = x[i] * y[i];
}

template <class T> T dot(const T* x, const T* y, long width) {
    using S = Simd<T>;
    typename S::V sums{};
    long d = 0;
    for (; d + S::lanes <= width; d += S::lanes) sums += S::load(x + d) * S::load(y + d);
    T total = S::sum(sums);
    for (; d < width; ++d) total += x[d] * y[d];
    return total;
}

// Products of row i with the columns up to i alone: the (C, C) tables that are wanted on and below the diagonal.
template <class T> void lower_product(long size, long depth, const T* a, long a_row, const T* b, T* c) {
    for (long i = 0; i < size; i += TILE_ROWS) {
        long count = std::min<long>(TILE_ROWS, size - i);
        strip<T>(count, padded<T>(i + count), depth, a + i * a_row, a_row, 1, b, CHUNK, c + i * CHUNK, CHUNK, false);
    }
}

// C (size, width) += or = A B, of A (C, C) what is on and below the diagonal.
template <class T> void lower_times(long size, long width, const T* a, const T* b, T* c, bool add) {
    for (long i = 0; i < size; i += TILE_ROWS) {
        long count = std::min<long>(TILE_ROWS, size - i);
        strip<T>(count, width, i + count, a + i * CHUNK, CHUNK, 1, b, width, c + i * width, width, add);
    }
}

// C (size, width) += or = Aᵀ B, of A (C, C) what is on and below the diagonal.
template <class T> void lower_turned_times(long size, long width, const T* a, const T* b, T* c, bool add) {
    for (long i = 0; i < size; i += TILE_ROWS) {
        long count = std::min<long>(TILE_ROWS, size - i);
        strip<T>(count, width, size - i, a + i * CHUNK + i, 1, CHUNK, b + i * width, width, c + i * width, width, add);
    }
}

// x scaled by row: (rows, width) ∘ factor (rows), into `to`.
template <class T> void scaled(const T* x, const T* factor, long rows, long width, T* to) {
    for (long i = 0; i < rows; ++i)
        for (long d = 0; d < width; ++d) to[i * width + d] = factor[i] * x[i * width + d];
}

inline long chunks_of(const Problem& p) { return (p.length + CHUNK - 1) / CHUNK; }
}  // namespace
