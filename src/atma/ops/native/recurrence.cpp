// The gated delta rule (ops/recurrent/reference.py) in chunks of tokens, one head after the other, and in single steps.
// Within a chunk D[p, s] = γ_{s+1} … γ_p, zero across documents, g[p] the decay since before the chunk, and with the
// strictly lower A = β ∘ D ∘ K Kᵀ the writes U solve (I + A) U = R = β (V − g ∘ K N), where N = Mᵀ (K, V) is the memory.
#include "problem.h"
#include "simd.h"

namespace {

PROBLEM(Problem,  // what ops/recurrent/native.py hands over; strides in elements, the last axis contiguous
    int64_t batch, heads, length, width, groups, value_width, threads;
    int64_t q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token;
    const void *q, *k, *v, *log_decay, *beta;  // the last two (B, H, T) contiguous
    const uint8_t* born;                       // (B, T), 1 where a document begins, or null
    const void* memory;                        // (B, H, V, K)
    void *out, *after, *before;                // (B, H, T, V), (B, H, V, K), (B, H, chunks, K, V) or null
    const void *grad_out, *grad_after;
    void *grad_q, *grad_k, *grad_v, *grad_decay, *grad_beta, *grad_memory;  // per query head
)

constexpr long CHUNK = 64, FEW_TOKENS = 8;

template <class T> struct Head {
    const Problem& p;
    long b, h, group;
    Head(const Problem& p, long index) : p(p), b(index / p.heads), h(index % p.heads), group(h / (p.heads / p.groups)) {}
    long row() const { return (b * p.heads + h) * p.length; }
    const T* q(long t) const { return static_cast<const T*>(p.q) + b * p.q_batch + h * p.q_head + t * p.q_token; }
    const T* k(long t) const { return static_cast<const T*>(p.k) + b * p.k_batch + group * p.k_head + t * p.k_token; }
    const T* v(long t) const { return static_cast<const T*>(p.v) + b * p.v_batch + group * p.v_head + t * p.v_token; }
    // log γ_t; β_t.
    T rate(long t) const { return static_cast<const T*>(p.log_decay)[row() + t]; }
    T beta(long t) const { return static_cast<const T*>(p.beta)[row() + t]; }
    bool born(long t) const { return p.born != nullptr && p.born[b * p.length + t] != 0; }
    template <class P> P* state(P* base) const { return base + (b * p.heads + h) * p.width * p.value_width; }
};

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

template <class T> struct Chunk {
    long K, V, size = 0;              // padded widths, tokens
    Buffer<T> q, k, v, k_turned;      // (C, K), (C, K), (C, V), (K, C)
    Buffer<T> D, A, P, g, last, beta; // (C, C) three times, (C) three times
    Buffer<T> held, U, N;             // K N (C, V), (C, V), (K, V)
    Chunk(long width, long value_width)
        : K(padded<T>(width)), V(padded<T>(value_width)), q(CHUNK * K), k(CHUNK * K), v(CHUNK * V), k_turned(CHUNK * K),
          D(CHUNK * CHUNK), A(CHUNK * CHUNK), P(CHUNK * CHUNK), g(CHUNK), last(CHUNK), beta(CHUNK), held(CHUNK * V),
          U(CHUNK * V), N(K * V) {}

    void read(const Head<T>& head, long t) {
        const Problem& p = head.p;
        size = std::min(CHUNK, p.length - t);
        copy_padded(head.q(t), p.q_token, size, p.width, K, q.get());
        copy_padded(head.k(t), p.k_token, size, p.width, K, k.get());
        copy_padded(head.v(t), p.v_token, size, p.value_width, V, v.get());
        // Kᵀ beside K: K Kᵀ and q Kᵀ then read both sides in the order they lie in.
        zero(k_turned.get(), K * CHUNK);
        transpose<T>(k, size, K, K, k_turned, CHUNK);
        for (long i = 0; i < size; ++i) beta[i] = head.beta(t + i);
        decays(head, t);
    }
    void decays(const Head<T>& head, long t) {
        using S = Simd<T>;
        constexpr T log2e = T(1.4426950408889634);
        Buffer<T> sums(CHUNK);
        zero(sums.get(), CHUNK), zero(D.get(), CHUNK * CHUNK);
        // sums[s] = log2 of γ_{s+1} … γ_i at row i, begun at s itself. Differences of one running sum would cancel, and
        // would carry what an earlier document left into this one by rounding.
        T since = 0;
        for (long i = 0; i < size; ++i) {
            bool born = head.born(t + i);
            // A document that begins here is γ = 0: what was before it weighs 2^−1e30 = 0, exactly.
            T rate = born ? T(-1e30) : head.rate(t + i) * log2e;
            since += rate;
            // g_i = γ_1 … γ_i, the decay of the memory from before the chunk.
            g[i] = exp2_of_one(std::min(since, T(0)));
            for (long s = 0; s < i; ++s) sums[s] += rate;
            for (long s = 0; s <= i; s += S::lanes) S::store(D + i * CHUNK + s, exp2_of(S::load(sums + s)));
            zero(D + i * CHUNK + i + 1, CHUNK - i - 1);
        }
        // How much of token i's write is left when the chunk ends.
        for (long i = 0; i < size; ++i) last[i] = D[(size - 1) * CHUNK + i];
    }
    // A, and the writes U from the memory N before the chunk; `products` gets K Kᵀ if asked for.
    void write(T* products) {
        // k_p·k_s of every pair, and K N: what the memory from before the chunk says of each key.
        lower_product<T>(size, K, k, K, k_turned, A);
        if (products != nullptr) std::copy(A.get(), A + size * CHUNK, products);
        product<T>(size, V, K, k, K, 1, N, V, held, V, false);
        for (long i = 0; i < size; ++i) {
            // A = β ∘ D ∘ K Kᵀ strictly below the diagonal: how far earlier writes of the chunk already answer key i.
            for (long s = 0; s < i; ++s) A[i * CHUNK + s] *= beta[i] * D[i * CHUNK + s];
            zero(A + i * CHUNK + i, CHUNK - i);
            // R = β (v − g K N): each token's error as if it were the only one of the chunk.
            for (long d = 0; d < V; ++d) U[i * V + d] = beta[i] * (v[i * V + d] - g[i] * held[i * V + d]);
        }
        // U = (I + A)⁻¹ R takes off what the others write before it.
        solve();
    }
    // (I + A) U = U in place, six rows at a time: what earlier rows wrote, then the rows among themselves.
    void solve() {
        Buffer<T> negative(CHUNK * CHUNK);
        for (long i = 0; i < size * CHUNK; ++i) negative[i] = -A[i];
        for (long i = 0; i < size; i += TILE_ROWS) {
            long count = std::min<long>(TILE_ROWS, size - i);
            // A is unit lower triangular after I: substitution from the top, stable however alike the keys are.
            strip<T>(count, V, i, negative + i * CHUNK, CHUNK, 1, U.get(), V, U + i * V, V, true);
            for (long r = i + 1; r < i + count; ++r)
                strip<T>(1, V, r - i, negative + r * CHUNK + i, CHUNK, 1, U + i * V, V, U + r * V, V, true);
        }
    }
    // (I + A)ᵀ X = X in place.
    void solve_turned(T* X) {
        Buffer<T> negative(CHUNK * CHUNK);
        for (long i = 0; i < size * CHUNK; ++i) negative[i] = -A[i];
        for (long end = size; end > 0; end -= TILE_ROWS) {
            long i = std::max(0L, end - TILE_ROWS);
            // The transpose is upper triangular: substitution from the bottom.
            strip<T>(end - i, V, size - end, negative + end * CHUNK + i, 1, CHUNK, X + end * V, V, X + i * V, V, true);
            for (long r = end - 2; r >= i; --r)
                strip<T>(1, V, end - 1 - r, negative + (r + 1) * CHUNK + r, 1, CHUNK, X + (r + 1) * V, V, X + r * V, V, true);
        }
    }
    // P = D ∘ q Kᵀ; `overlaps` gets q Kᵀ if asked for.
    void score(T* overlaps) {
        lower_product<T>(size, K, q, K, k_turned, P);
        if (overlaps != nullptr) std::copy(P.get(), P + size * CHUNK, overlaps);
        for (long i = 0; i < size; ++i) {
            for (long s = 0; s <= i; ++s) P[i * CHUNK + s] *= D[i * CHUNK + s];
            zero(P + i * CHUNK + i + 1, CHUNK - i - 1);
        }
    }
    // x scaled by row: (rows, width) ∘ factor (rows), into `to`.
    void scaled(const T* x, const T* factor, long width, T* to) const {
        for (long i = 0; i < size; ++i)
            for (long d = 0; d < width; ++d) to[i * width + d] = factor[i] * x[i * width + d];
    }
    // N ← g_last N + (last ∘ K)ᵀ U.
    void advance(T* room) {
        scaled(k, last, K, room);
        for (long i = 0; i < K * V; ++i) N[i] *= g[size - 1];
        product<T>(K, V, size, room, 1, K, U, V, N, V, true);
    }
};

template <class T> void forward_head(const Problem& p, long index) {
    Head<T> head(p, index);
    Chunk<T> c(p.width, p.value_width);
    Buffer<T> room(CHUNK * c.K), out(CHUNK * c.V);
    zero(c.N.get(), c.K * c.V);
    // M (V, K) as N = Mᵀ (K, V): every product then has the value width as its columns.
    transpose(head.state(static_cast<const T*>(p.memory)), p.value_width, p.width, p.width, c.N.get(), c.V);
    long chunks = (p.length + CHUNK - 1) / CHUNK;
    for (long n = 0; n < chunks; ++n) {
        // Kept for the backward pass, which goes back over the chunks and cannot undo a decay.
        if (p.before != nullptr)
            copy_padded<T>(c.N, c.V, p.width, p.value_width, p.value_width,
                           static_cast<T*>(p.before) + (index * chunks + n) * p.width * p.value_width);
        c.read(head, n * CHUNK);
        c.write(nullptr);
        c.score(nullptr);
        // R_out = g ∘ Q N, what is left of the memory, …
        c.scaled(c.q, c.g, c.K, room);
        product<T>(c.size, c.V, c.K, room, c.K, 1, c.N, c.V, out, c.V, false);
        for (long i = 0; i < c.size; i += TILE_ROWS) {
            long count = std::min<long>(TILE_ROWS, c.size - i);
            // … + (D ∘ Q Kᵀ) U, what the chunk itself wrote up to and with each token.
            strip<T>(count, c.V, i + count, c.P + i * CHUNK, CHUNK, 1, c.U.get(), c.V, out + i * c.V, c.V, true);
        }
        copy_padded<T>(out, c.V, c.size, p.value_width, p.value_width,
                       static_cast<T*>(p.out) + (head.row() + n * CHUNK) * p.value_width);
        c.advance(room);
    }
    transpose<T>(c.N, p.width, p.value_width, c.V, head.state(static_cast<T*>(p.after)), p.width);
}

// Token after token: the memory (V, K) is read and written once for each.
template <class T> void step_head(const Problem& p, long index) {
    using S = Simd<T>;
    Head<T> head(p, index);
    T* M = head.state(static_cast<T*>(p.after));
    const T* old = head.state(static_cast<const T*>(p.memory));
    long whole = p.width / S::lanes * S::lanes;
    for (long t = 0; t < p.length; ++t, old = M) {
        // Decay first, then write, then read.
        T decay = head.born(t) ? T(0) : std::exp(head.rate(t)), beta = head.beta(t);
        const T *q = head.q(t), *k = head.k(t), *v = head.v(t);
        for (long e = 0; e < p.value_width; ++e) {
            const T* from = old + e * p.width;
            T* row = M + e * p.width;
            // A row e of M holds value channel e: rows do not meet, so one pass over each is enough.
            typename S::V seen{}, read{};
            T seen_rest = 0, read_rest = 0;
            for (long d = 0; d < whole; d += S::lanes) seen += S::load(from + d) * S::load(k + d);
            for (long d = whole; d < p.width; ++d) seen_rest += from[d] * k[d];
            // β (v − γ M k): γ times the old row's product, the decayed row is never stored.
            T error = beta * (v[e] - decay * (S::sum(seen) + seen_rest));
            for (long d = 0; d < whole; d += S::lanes) {
                // γ M + β (v − γ M k) kᵀ, and M q of it while it is in the register.
                typename S::V next = decay * S::load(from + d) + error * S::load(k + d);
                S::store(row + d, next);
                read += next * S::load(q + d);
            }
            for (long d = whole; d < p.width; ++d) {
                row[d] = decay * from[d] + error * k[d];
                read_rest += row[d] * q[d];
            }
            static_cast<T*>(p.out)[(head.row() + t) * p.value_width + e] = S::sum(read) + read_rest;
        }
    }
}

template <class T> struct Gradients {  // of one chunk
    Buffer<T> out, U, R, N, N_before, P, A, products, overlaps, k, q, carried, room, turned;
    Gradients(long K, long V)
        : out(CHUNK * V), U(CHUNK * V), R(CHUNK * V), N(K * V), N_before(K * V), P(CHUNK * CHUNK), A(CHUNK * CHUNK),
          products(CHUNK * CHUNK), overlaps(CHUNK * CHUNK), k(CHUNK * K), q(CHUNK * K), carried(CHUNK * K),
          room(CHUNK * std::max(K, V)), turned(std::max(K, CHUNK) * std::max(V, CHUNK)) {}
};

// Gradients of q, k, v, R, A, P of the chunk at token t, and of the memory before it in place of that after it.
template <class T> void backward_chunk(const Head<T>& head, Chunk<T>& c, Gradients<T>& d, long t) {
    const Problem& p = head.p;
    long size = c.size, K = c.K, V = c.V;
    // The chunk's U, A and P again from N before it: cheaper than keeping them.
    c.write(d.products);
    c.score(d.overlaps);
    copy_padded(static_cast<const T*>(p.grad_out) + (head.row() + t) * p.value_width, p.value_width, size, p.value_width, V,
                d.out.get());
    // A write is read by the chunk's own later queries (P) and lives on in the memory after it (last ∘ k).
    product<T>(size, V, size, c.P, 1, CHUNK, d.out, V, d.U, V, false);   // grad U = Pᵀ dO + (last ∘ K) dN
    c.scaled(c.k, c.last, K, d.room);
    product<T>(size, V, K, d.room, K, 1, d.N, V, d.U, V, true);
    // U = (I + A)⁻¹ R, so grad R = (I + A)⁻ᵀ grad U and grad A = −grad R Uᵀ below the diagonal.
    std::copy(d.U.get(), d.U + size * V, d.R.get());
    c.solve_turned(d.R);
    zero(d.turned.get(), V * CHUNK);
    transpose<T>(c.U, size, V, V, d.turned, CHUNK);
    lower_product<T>(size, V, d.R, V, d.turned, d.A);
    lower_product<T>(size, V, d.out, V, d.turned, d.P);
    for (long i = 0; i < size; ++i) {
        for (long s = 0; s <= i; ++s) {
            // Both tables carry D: with it they are the gradients of β k·k and of q·k.
            d.A[i * CHUNK + s] *= -c.D[i * CHUNK + s];
            d.P[i * CHUNK + s] *= c.D[i * CHUNK + s];
        }
        zero(d.A + i * CHUNK + i, CHUNK - i), zero(d.P + i * CHUNK + i + 1, CHUNK - i - 1);
    }
}

// Gradients of beta and of the log decays, after `backward_chunk`. Sums stay inside a document.
template <class T> void backward_rates(const Head<T>& head, const Chunk<T>& c, const Gradients<T>& d, const T* entered, long t) {
    const Problem& p = head.p;
    long size = c.size, K = c.K, V = c.V;
    Buffer<T> since(CHUNK), read(CHUNK * V), below(CHUNK);
    // Three things depend on a decay: g (the memory from before the chunk), D (between two tokens), last (to its end).
    product<T>(size, V, K, c.q, K, 1, c.N, V, read, V, false);
    for (long i = 0; i < size; ++i) {
        // grad β: R = β (v − g K N) directly, and through A = β ∘ D ∘ K Kᵀ.
        T errors = dot<T>(d.R + i * V, c.v + i * V, V) - c.g[i] * dot<T>(d.R + i * V, c.held + i * V, V);
        static_cast<T*>(p.grad_beta)[head.row() + t + i] = errors + dot<T>(d.A + i * CHUNK, d.products + i * CHUNK, i);
        // g_i ∂/∂g_i: through what the query reads of N, and through the error's K N.
        since[i] = c.g[i] * dot<T>(d.out + i * V, read + i * V, V) - dot<T>(entered + i * V, c.held + i * V, V);
    }
    // N after = g_last N + …: the whole memory decays by the chunk.
    since[size - 1] += c.g[size - 1] * dot<T>(d.N, c.N, K * V);
    zero(below.get(), CHUNK);  // below[s]: Σ over p ≥ the row at hand of what depends on D[p, s]
    T later = 0;
    for (long i = size - 1; i >= 0; --i) {
        // log γ_i is in g_p for every p ≥ i: sums from the end.
        later += since[i];
        T spanning = 0;
        for (long s = 0; s < i; ++s) {
            long at = i * CHUNK + s;
            // … and in D[p, s] for s < i ≤ p: rows from the end, columns before i. Never a difference of sums, as
            // forward.
            below[s] += d.P[at] * d.overlaps[at] + c.beta[i] * d.A[at] * d.products[at];
            if (i == size - 1) below[s] += c.last[s] * dot<T>(c.k + s * K, d.carried + s * K, K);
            spanning += below[s];
        }
        static_cast<T*>(p.grad_decay)[head.row() + t + i] = spanning + later;
    }
}

template <class T> void backward_head(const Problem& p, long index) {
    Head<T> head(p, index);
    Chunk<T> c(p.width, p.value_width);
    long K = c.K, V = c.V, chunks = (p.length + CHUNK - 1) / CHUNK;
    Gradients<T> d(K, V);
    Buffer<T> N_turned(K * V), entered(CHUNK * V), mixed(CHUNK * CHUNK);
    zero(d.N.get(), K * V), zero(c.N.get(), K * V);
    transpose(head.state(static_cast<const T*>(p.grad_after)), p.value_width, p.width, p.width, d.N.get(), V);
    for (long n = chunks - 1; n >= 0; --n) {
        long t = n * CHUNK;
        copy_padded(static_cast<const T*>(p.before) + (index * chunks + n) * p.width * p.value_width, p.value_width, p.width,
                    p.value_width, V, c.N.get());
        c.read(head, t);
        backward_chunk(head, c, d, t);
        long size = c.size;
        for (long i = 0; i < size; ++i)
            for (long e = 0; e < V; ++e) {
                // grad v = β ∘ grad R; g ∘ that is the gradient of K N.
                T error = c.beta[i] * d.R[i * V + e];
                if (e < p.value_width) static_cast<T*>(p.grad_v)[(head.row() + t + i) * p.value_width + e] = error;
                entered[i * V + e] = c.g[i] * error;
            }
        for (long i = 0; i < size; ++i)
            // Gradient of K Kᵀ, which k enters from both sides.
            for (long s = 0; s < CHUNK; ++s) mixed[i * CHUNK + s] = c.beta[i] * d.A[i * CHUNK + s];
        transpose<T>(d.N, K, V, V, d.turned, K);                                    // carried = U dNᵀ
        product<T>(size, K, V, c.U, V, 1, d.turned, K, d.carried, K, false);
        transpose<T>(c.N, K, V, V, N_turned, K);
        c.scaled(d.out, c.g, V, d.room);                                            // grad q = dP K + (g ∘ dO) Nᵀ
        product<T>(size, K, V, d.room, V, 1, N_turned, K, d.q, K, false);
        product<T>(size, K, size, d.P, CHUNK, 1, c.k, K, d.q, K, true);
        for (long i = 0; i < size * V; ++i) entered[i] = -entered[i];
        product<T>(size, K, V, entered, V, 1, N_turned, K, d.k, K, false);          // grad k, term by term
        product<T>(size, K, size, d.P, 1, CHUNK, c.q, K, d.k, K, true);
        product<T>(size, K, size, mixed, CHUNK, 1, c.k, K, d.k, K, true);
        product<T>(size, K, size, mixed, 1, CHUNK, c.k, K, d.k, K, true);
        for (long i = 0; i < size; ++i)
            // Through N after = … + (last ∘ K)ᵀ U.
            for (long j = 0; j < K; ++j) d.k[i * K + j] += c.last[i] * d.carried[i * K + j];
        long at = (head.row() + t) * p.width;
        copy_padded<T>(d.q, K, size, p.width, p.width, static_cast<T*>(p.grad_q) + at);
        copy_padded<T>(d.k, K, size, p.width, p.width, static_cast<T*>(p.grad_k) + at);
        // grad N before the chunk: through its decay, through the reads, and through the errors of its writes.
        for (long i = 0; i < K * V; ++i) d.N_before[i] = c.g[size - 1] * d.N[i];
        product<T>(K, V, size, c.q, 1, K, d.room, V, d.N_before, V, true);          // + qᵀ (g ∘ dO) − Kᵀ entered
        product<T>(K, V, size, c.k, 1, K, entered, V, d.N_before, V, true);
        for (long i = 0; i < size * V; ++i) entered[i] = -entered[i];
        backward_rates(head, c, d, entered.get(), t);
        std::copy(d.N_before.get(), d.N_before + K * V, d.N.get());
    }
    transpose<T>(d.N, p.width, p.value_width, V, head.state(static_cast<T*>(p.grad_memory)), p.width);
}

template <class T> void forward(const Problem& p) {
    // Few tokens are bound by reading M, not by products: a chunk's tables would not pay.
    bool few = p.length <= FEW_TOKENS && p.before == nullptr;
    long heads = p.batch * p.heads, work = heads * p.length * p.width * p.value_width;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (work > 65536)
    for (long i = 0; i < heads; ++i) few ? step_head<T>(p, i) : forward_head<T>(p, i);
}
template <class T> void backward(const Problem& p) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
    for (long i = 0; i < p.batch * p.heads; ++i) backward_head<T>(p, i);
}
}  // namespace

#define EXPORT(NAME, T)                               \
    KERNEL(recurrence_forward_##NAME, Problem, forward<T>) \
    KERNEL(recurrence_backward_##NAME, Problem, backward<T>)
EXPORT(float32, float)
EXPORT(float64, double)
