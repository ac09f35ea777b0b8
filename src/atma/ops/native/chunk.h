// One chunk of a head, forward (mixers.md (3.4), (3.5)). With D[p, s] = a_{s+1} … a_p, zero across documents, g[p] the decay
// since before the chunk and A = β ∘ D ∘ K Kᵀ strictly below the diagonal, the writes U of the rule delta solve
// (I + A) U = R = β (V − g ∘ K N); those of the rule add are β V. Where every key channel decays by itself, the decays
// are in the keys and queries (channels.h), and D, g and `last` are ones. Of heads that share q and k, one after the other,
// the first reads them and multiplies them for all.
#pragma once
#include "channels.h"

namespace {

template <class T> struct Chunk {
    const bool delta, by_channel;
    long K, V, size = 0;              // padded widths, tokens
    Buffer<T> q, k, v, k_turned;      // (C, K), (C, K), (C, V), (K, C)
    Buffer<T> D, minus_A, P;          // (C, C) each
    Buffer<T> g, last, beta;          // (C) each
    Buffer<T> tables;                 // room for the next two, where they are kept
    T *overlaps, *products;           // q Kᵀ and K Kᵀ, by channel with the decays in them; else they become P and minus_A
    Buffer<T> held, U, memories;      // K N (C, V), (C, V), N of every head
    long place = 0;                   // of the head at hand among those that are taken together
    T* N;                             // its memory, (K, V)
    Channels<T> a;                    // … of the key axis, and with them (C, K) each:
    Buffer<T> q_read, k_read, k_last; // g ∘ Q, g ∘ K, K by what is left of it at the chunk's end
    Chunk(const Problem& p, bool keep)
        : delta(p.delta != 0), by_channel(p.channels != 0), K(padded<T>(p.width)), V(padded<T>(p.value_width)), q(CHUNK * K),
          k(CHUNK * K), v(CHUNK * V), k_turned(CHUNK * K), D(CHUNK * CHUNK), minus_A(CHUNK * CHUNK), P(CHUNK * CHUNK), g(CHUNK),
          last(CHUNK), beta(CHUNK), tables(keep ? 2 * CHUNK * CHUNK : 1),
          overlaps(keep ? tables : P), products(keep ? tables + CHUNK * CHUNK : minus_A), held(CHUNK * V), U(CHUNK * V),
          memories(p.together * K * V), N(memories), a(by_channel ? p.width : 1), q_read(by_channel ? CHUNK * K : 1),
          k_read(by_channel ? CHUNK * K : 1), k_last(by_channel ? CHUNK * K : 1) {
        if (!by_channel) return;
        std::fill_n(g.get(), CHUNK, T(1)), std::fill_n(last.get(), CHUNK, T(1));
        for (long i = 0; i < CHUNK; ++i)
            for (long s = 0; s < CHUNK; ++s) D[i * CHUNK + s] = T(s <= i);
    }
    // What reads the memory from before the chunk, but for g; what writes into that after it, but for `last`.
    const T* reading_q() const { return by_channel ? q_read : q; }
    const T* reading_k() const { return by_channel ? k_read : k; }
    const T* writing_k() const { return by_channel ? k_last : k; }

    void read(const Head<T>& head, long t) {
        const Problem& p = head.p;
        size = std::min(CHUNK, p.length - t), place = head.h % p.together, N = memories + place * K * V;
        if (place == 0) {
            copy_padded(head.q(t), p.q_token, size, p.width, K, q.get());
            copy_padded(head.k(t), p.k_token, size, p.width, K, k.get());
        }
        copy_padded(head.v(t), p.v_token, size, p.value_width, V, v.get());
        for (long i = 0; i < size; ++i) beta[i] = head.beta(t + i);
        if (by_channel) {
            a.read(head, t, size);
            times<T>(q, a.G, size * K, q_read.get());
            times<T>(k, a.G, size * K, k_read.get());
            times<T>(k, a.L, size * K, k_last.get());
            return;
        }
        decays(head, t);
        if (place > 0) return;
        // Kᵀ beside K: K Kᵀ and q Kᵀ then read both sides in the order they lie in.
        zero(k_turned.get(), K * CHUNK);
        transpose<T>(k, size, K, K, k_turned, CHUNK);
        lower_product<T>(size, K, q, K, k_turned, overlaps);
        // k_p·k_s of every pair: how far earlier writes of the chunk already answer a key.
        if (delta) lower_product<T>(size, K, k, K, k_turned, products);
    }
    void decays(const Head<T>& head, long t) {
        using S = Simd<T>;
        Buffer<T> sums(CHUNK);
        zero(sums.get(), CHUNK), zero(D.get(), CHUNK * CHUNK);
        // sums[s] = log2 of a_{s+1} … a_i at row i, begun at s itself. Differences of one running sum would cancel, and
        // would carry what an earlier document left into this one by rounding.
        T since = 0;
        for (long i = 0; i < size; ++i) {
            T rate = head.born(t + i) ? birth<T> : head.rate(t + i) * log2e<T>;
            since += rate;
            // g_i = a_1 … a_i, the decay of the memory from before the chunk.
            g[i] = exp2_of_one(std::min(since, T(0)));
            for (long s = 0; s < i; ++s) sums[s] += rate;
            for (long s = 0; s <= i; s += S::lanes) S::store(D + i * CHUNK + s, exp2_of(S::load(sums + s)));
            zero(D + i * CHUNK + i + 1, CHUNK - i - 1);
        }
        // How much of token i's write is left when the chunk ends.
        for (long i = 0; i < size; ++i) last[i] = D[(size - 1) * CHUNK + i];
    }
    // P = D ∘ q Kᵀ up to the diagonal, and A and the writes U from the memory N before the chunk.
    void write() {
        if (by_channel) overlap_by_channel();
        for (long i = 0; i < size; ++i) {
            weigh(overlaps, T(1), i, i + 1, P);
            zero(P + i * CHUNK + i + 1, CHUNK - i - 1);
        }
        if (!delta) return scaled<T>(v, beta, size, V, U);
        // K N: what the memory from before the chunk says of each key.
        product<T>(size, V, K, reading_k(), K, 1, N, V, held, V, false);
        for (long i = 0; i < size; ++i) {
            weigh(products, -beta[i], i, i, minus_A);
            zero(minus_A + i * CHUNK + i, CHUNK - i);
            // R = β (v − g K N): each token's error as if it were the only one of the chunk.
            for (long d = 0; d < V; ++d) U[i * V + d] = beta[i] * (v[i * V + d] - g[i] * held[i * V + d]);
        }
        // U = (I + A)⁻¹ R takes off what the others write before it.
        solve();
    }
    // The first columns of row i of a table, by a number and by D, in place or into another table.
    void weigh(const T* table, T by, long i, long columns, T* to) const {
        using S = Simd<T>;
        for (long s = 0; s < columns; s += S::lanes)
            S::store(to + i * CHUNK + s, S::load(table + i * CHUNK + s) * (by * S::load(D + i * CHUNK + s)));
    }
    void overlap_by_channel() {
        if (delta) a.template scores<2>({q, k}, k, {overlaps, products});
        else a.template scores<1>({q}, k, {overlaps});
        // A token's own write has not decayed when it is read.
        for (long i = 0; i < size; ++i) overlaps[i * CHUNK + i] = dot<T>(q + i * K, k + i * K, K);
    }
    // (I + A) U = U in place, six rows at a time: what earlier rows wrote, then the rows among themselves.
    void solve() {
        for (long i = 0; i < size; i += TILE_ROWS) {
            long count = std::min<long>(TILE_ROWS, size - i);
            // A is unit lower triangular after I: substitution from the top, stable however alike the keys are.
            strip<T>(count, V, i, minus_A + i * CHUNK, CHUNK, 1, U.get(), V, U + i * V, V, true);
            for (long r = i + 1; r < i + count; ++r)
                strip<T>(1, V, r - i, minus_A + r * CHUNK + i, CHUNK, 1, U + i * V, V, U + r * V, V, true);
        }
    }
    // (I + A)ᵀ X = X in place.
    void solve_turned(T* X) {
        for (long end = size; end > 0; end -= TILE_ROWS) {
            long i = std::max(0L, end - TILE_ROWS);
            // The transpose is upper triangular: substitution from the bottom.
            strip<T>(end - i, V, size - end, minus_A + end * CHUNK + i, 1, CHUNK, X + end * V, V, X + i * V, V, true);
            for (long r = end - 2; r >= i; --r)
                strip<T>(1, V, end - 1 - r, minus_A + (r + 1) * CHUNK + r, 1, CHUNK, X + (r + 1) * V, V, X + r * V, V, true);
        }
    }
    // N by the decay of the whole chunk, of `of` into `to`.
    void decay_whole(const T* of, T* to) const {
        if (by_channel) return scaled<T>(of, a.chunk_decay(), K, V, to);
        for (long i = 0; i < K * V; ++i) to[i] = g[size - 1] * of[i];
    }
    // N ← g_last N + (last ∘ K)ᵀ U.
    void advance(T* room) {
        scaled<T>(writing_k(), last, size, K, room);
        decay_whole(N, N);
        product<T>(K, V, size, room, 1, K, U, V, N, V, true);
    }
};
}  // namespace
