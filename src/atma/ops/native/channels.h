// Decays of every channel of an axis within a chunk, and products through them (mixers.md, section 3.2).
// With D[p, s] = a_{s+1} … a_p of a channel, in blocks of BLOCK tokens: inside a block D is multiplied up token after
// token; between two blocks it is the decay since the reader's block began, times that up to there, each 2 to the power
// of a sum of its own logs, none above 0. So strong decays vanish, and nothing overflows or cancels.
#pragma once
#include "recurrence.h"

namespace {

constexpr long BLOCK = 16;

template <class T> struct Channels {
    using S = Simd<T>;
    using V = typename S::V;
    long W, size = 0;  // padded channels, tokens
    // a_t; since its block began, with t; from after t to its block's end; since the chunk began; to the chunk's end.
    Buffer<T> a, E, F, G, L;
    Buffer<T> running, turned, product_room;  // (C, W), (W, C), (BLOCK, W)
    explicit Channels(long width)
        : W(padded<T>(width)), a(CHUNK * W), E(CHUNK * W), F(CHUNK * W), G(CHUNK * W), L(CHUNK * W), running(CHUNK * W),
          turned(W * CHUNK), product_room(BLOCK * W) {}

    static long end_of(long i, long size) { return std::min(i + BLOCK, size); }
    const T* block_decay(long end) const { return E + (end - 1) * W; }  // of the whole block that ends there
    const T* chunk_decay() const { return G + (size - 1) * W; }

    void read(const Head<T>& head, long t, long count) {
        size = count;
        copy_padded(head.rates(t), head.p.channels, size, head.p.channels, W, a.get());
        for (long i = 0; i < size; ++i) {
            bool born = head.born(t + i);
            for (long d = 0; d < W; ++d) a[i * W + d] = born ? birth<T> : a[i * W + d] * log2e<T>;
        }
        for (long d = 0; d < W; d += S::lanes) exponentials(d);
        for (long i = 0; i < size; ++i) std::copy_n(E + i * W, W, G + i * W), std::copy_n(F + i * W, W, L + i * W);
        // Across blocks: whole blocks' decays, multiplied.
        for (long i = BLOCK; i < size; ++i) times<T>(G + i * W, G + (i / BLOCK * BLOCK - 1) * W, W, G + i * W);
        T* rest = product_room;  // decay from a block's first token to the chunk's end
        std::fill_n(rest, W, T(1));
        for (long i = (size - 1) / BLOCK * BLOCK; i > 0; i -= BLOCK) {
            times<T>(rest, block_decay(end_of(i, size)), W, rest);
            decayed(L, i - BLOCK, i, rest);
        }
    }
    // Channels [d, d + lanes) of E, F and a, of which a holds the logs (to base 2) so far.
    void exponentials(long d) {
        for (long i = 0; i < size; i += BLOCK) {
            long end = end_of(i, size);
            V since{};
            for (long p = i; p < end; ++p) since += S::load(a + p * W + d), S::store(E + p * W + d, exp2_of(since));
            since = V{};
            for (long s = end - 1; s >= i; --s) {
                S::store(F + s * W + d, exp2_of(since));
                since += S::load(a + s * W + d);
            }
        }
        for (long i = 0; i < size; ++i) S::store(a + i * W + d, exp2_of(S::load(a + i * W + d)));
    }
    // rows [from, to) of x ∘ the decay of a block.
    void decayed(T* x, long from, long to, const T* decay) const {
        for (long i = from; i < to; ++i) times<T>(x + i * W, decay, W, x + i * W);
    }

    // tables[r][p, s] = Σ_κ x[r]_pκ D_κ[p, s] y_sκ for s < p, 0 from the diagonal on: ⟨x_p, y_s⟩_D.
    template <int N> void scores(const T* const (&x)[N], const T* y, T* const (&tables)[N]) {
        times<T>(y, F.get(), size * W, running.get());
        transpose<T>(running, size, W, W, turned, CHUNK);
        for (long i = 0; i < size; i += BLOCK) {
            long end = end_of(i, size);
            for (int r = 0; r < N; ++r) {
                zero(tables[r] + i * CHUNK, (end - i) * CHUNK);
                if (i == 0) continue;
                // (x_p ∘ E_p) · (y_s ∘ decay from s to the block's beginning).
                times<T>(x[r] + i * W, E + i * W, (end - i) * W, product_room.get());
                product<T>(end - i, i, W, product_room, W, 1, turned, CHUNK, tables[r] + i * CHUNK, CHUNK, false);
            }
            scores_within<N>(i, end, x, y, tables);
            const T* decay = block_decay(end);
            for (long d = 0; d < W; ++d)
                for (long s = 0; s < i; s += S::lanes)
                    S::store(turned + d * CHUNK + s, decay[d] * S::load(turned + d * CHUNK + s));
        }
    }
    template <int N> void scores_within(long i, long end, const T* const (&x)[N], const T* y, T* const (&tables)[N]) {
        std::copy_n(y + i * W, (end - i) * W, running.get());
        for (long p = i + 1; p < end; ++p) {
            V sums[N][BLOCK] = {};
            for (long s = 0; s < p - i; ++s) {
                V sum[N] = {};
                for (long d = 0; d < W; d += S::lanes) {
                    // Every y_s so far decays by a_p; then x_p meets it.
                    V now = S::load(running + s * W + d) * S::load(a + p * W + d);
                    S::store(running + s * W + d, now);
                    for (int r = 0; r < N; ++r) sum[r] += now * S::load(x[r] + p * W + d);
                }
                for (int r = 0; r < N; ++r) sums[r][s] = sum[r];
            }
            for (int r = 0; r < N; ++r)
                for (long s = 0; s < BLOCK && i + s < CHUNK; s += S::lanes)
                    S::store(tables[r] + p * CHUNK + i + s, S::sums(sums[r] + s));
        }
    }

    // out[r]_p += Σ_{s<p} tables[r][p, s] D[p, s] ∘ y_s.
    template <int N> void gather(const T* const (&tables)[N], const T* y, T* const (&out)[N]) {
        times<T>(y, F.get(), size * W, running.get());
        for (long i = 0; i < size; i += BLOCK) {
            long end = end_of(i, size);
            for (int r = 0; r < N && i > 0; ++r) {
                product<T>(end - i, W, i, tables[r] + i * CHUNK, CHUNK, 1, running, W, product_room, W, false);
                add_times(product_room, E + i * W, (end - i) * W, out[r] + i * W);
            }
            for (long d = 0; d < W; d += S::lanes) gather_within<N>(i, end, d, tables, y, out);
            decayed(running, 0, i, block_decay(end));
        }
    }
    template <int N>
    void gather_within(long i, long end, long d, const T* const (&tables)[N], const T* y, T* const (&out)[N]) {
        V now[BLOCK];
        for (long p = i; p < end; ++p) {
            V decay = S::load(a + p * W + d), sum[N] = {};
            for (long s = 0; s < p - i; ++s) {
                now[s] *= decay;
                for (int r = 0; r < N; ++r) sum[r] += tables[r][p * CHUNK + i + s] * now[s];
            }
            now[p - i] = S::load(y + p * W + d);
            for (int r = 0; r < N; ++r) S::store(out[r] + p * W + d, S::load(out[r] + p * W + d) + sum[r]);
        }
    }

    // out_s += Σ_{p>s} tables[p, s] D[p, s] ∘ x_p: what each token's value gets back from those that read it.
    void scatter(const T* table, const T* x, T* out) {
        times<T>(x, E.get(), size * W, running.get());
        for (long i = (size - 1) / BLOCK * BLOCK; i >= 0; i -= BLOCK) {
            long end = end_of(i, size);
            if (end < size) {
                product<T>(end - i, W, size - end, table + end * CHUNK + i, 1, CHUNK, running + end * W, W, product_room, W,
                           false);
                add_times(product_room, F + i * W, (end - i) * W, out + i * W);
            }
            for (long d = 0; d < W; d += S::lanes) scatter_within(i, end, d, table, x, out);
            decayed(running, end, size, block_decay(end));
        }
    }
    void scatter_within(long i, long end, long d, const T* table, const T* x, T* out) const {
        V now[BLOCK];
        for (long s = end - 1; s >= i; --s) {
            V sum{};
            for (long p = s + 1; p < end; ++p) {
                now[p - i] *= S::load(a + (s + 1) * W + d);
                sum += table[p * CHUNK + s] * now[p - i];
            }
            now[s - i] = S::load(x + s * W + d);
            S::store(out + s * W + d, S::load(out + s * W + d) + sum);
        }
    }
    static void add_times(const T* x, const T* y, long size, T* to) {
        for (long i = 0; i < size; ++i) to[i] += x[i] * y[i];
    }
    // Gradient of log a from what it is in. `within`: x ∘ ∂x − y ∘ ∂y of pairs of tokens of the chunk; `since`: of G,
    // `to_end`: of L, `across`: of the whole chunk's decay. Sums stay inside a document.
    void rate_gradient(const Head<T>& head, long t, const T* within, const T* since, const T* to_end, const T* across,
                       T* grad) const {
        Buffer<T> sums(3 * W);
        T *pairs = sums, *later = sums + W, *all = sums + 2 * W;
        zero(pairs, W);
        std::copy_n(across, W, later), zero(all, W);
        // log a_i is in L_s for s < i: from the beginning …
        for (long i = 0; i < size; ++i)
            for (long d = 0; d < head.p.channels; ++d) grad[i * head.p.channels + d] = all[d], all[d] += to_end[i * W + d];
        for (long i = size - 1; i >= 0; --i) {
            bool born = head.born(t + i);
            for (long d = 0; d < head.p.channels; ++d) {
                // … in G_p for p ≥ i and in D[p, s] for s < i ≤ p: from the end. No pair spans a document's beginning.
                later[d] += since[i * W + d];
                pairs[d] = born ? T(0) : pairs[d] + within[i * W + d];
                grad[i * head.p.channels + d] += later[d] + pairs[d];
            }
        }
    }
};
}  // namespace
