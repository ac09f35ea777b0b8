// The rule add where every value channel decays by itself: M ← diag(a) M + β v kᵀ (mixers.md (3.6)). In a chunk the decays
// are in what is written (channels.h): with S = Q Kᵀ up to the diagonal and U = β V, R_p = g_p ∘ Q N + Σ_s S[p, s] D[p, s] ∘ u_s.
#include "channels.h"
#include "turns.h"

namespace {

template <class T> struct ValueChunk {
    long K, V, size = 0;                                          // padded widths, tokens
    Buffer<T> q, k, v, U, beta, k_turned, P, N, out, U_last, room;  // P is S; U_last: U by what is left at the chunk's end
    Channels<T> a;
    explicit ValueChunk(const Problem& p)
        : K(padded<T>(p.width)), V(padded<T>(p.value_width)), q(CHUNK * K), k(CHUNK * K), v(CHUNK * V), U(CHUNK * V),
          beta(CHUNK), k_turned(K * CHUNK), P(CHUNK * CHUNK), N(K * V), out(CHUNK * V), U_last(CHUNK * V),
          room(CHUNK * std::max(K, V)), a(p.value_width) {}

    void read(const Head<T>& head, long t) {
        const Problem& p = head.p;
        size = std::min(CHUNK, p.length - t);
        copy_padded(head.q(t), p.q_token, size, p.width, K, q.get());
        copy_padded(head.k(t), p.k_token, size, p.width, K, k.get());
        copy_padded(head.v(t), p.v_token, size, p.value_width, V, v.get());
        for (long i = 0; i < size; ++i) beta[i] = head.beta(t + i);
        scaled<T>(v, beta, size, V, U);
        a.read(head, t, size);
        times<T>(U, a.L, size * V, U_last.get());
        zero(k_turned.get(), K * CHUNK);
        transpose<T>(k, size, K, K, k_turned, CHUNK);
        lower_product<T>(size, K, q, K, k_turned, P);
    }
    // Σ_{s<p} S[p, s] D[p, s] ∘ u_s into `out`, and a ∘ Q N into `since`.
    void reads(T* since) {
        zero(out.get(), size * V);
        a.template gather<1>({P}, U, {out});
        product<T>(size, V, K, q, K, 1, N, V, since, V, false);
        times<T>(a.G, since, size * V, since);
    }
    void decay_whole(const T* of, T* to) const {
        for (long j = 0; j < K; ++j) times<T>(of + j * V, a.chunk_decay(), V, to + j * V);
    }
};

template <class T> void forward_head(const Problem& p, long index) {
    Head<T> head(p, index);
    ValueChunk<T> c(p);
    zero(c.N.get(), c.K * c.V);
    transpose(head.state(static_cast<const T*>(p.memory)), p.value_width, p.width, p.width, c.N.get(), c.V);
    for (long n = 0; n < chunks_of(p); ++n) {
        if (p.before != nullptr)
            copy_padded<T>(c.N, c.V, p.width, p.value_width, p.value_width,
                           static_cast<T*>(p.before) + (index * chunks_of(p) + n) * p.width * p.value_width);
        c.read(head, n * CHUNK);
        c.reads(c.room);
        for (long i = 0; i < c.size; ++i)
            // What is left of N, of the chunk's earlier writes, and the token's own, which has not decayed.
            for (long e = 0; e < c.V; ++e) c.out[i * c.V + e] += c.room[i * c.V + e] + c.P[i * CHUNK + i] * c.U[i * c.V + e];
        copy_padded<T>(c.out, c.V, c.size, p.value_width, p.value_width,
                       static_cast<T*>(p.out) + (head.row() + n * CHUNK) * p.value_width);
        c.decay_whole(c.N, c.N);
        product<T>(c.K, c.V, c.size, c.k, 1, c.K, c.U_last, c.V, c.N, c.V, true);
    }
    transpose<T>(c.N, p.width, p.value_width, c.V, head.state(static_cast<T*>(p.after)), p.width);
}

template <class T> struct Gradients {  // of one chunk
    Buffer<T> out, U, N, P, q, k, read, since, to_end, turned, room;
    Gradients(long K, long V)
        : out(CHUNK * V), U(CHUNK * V), N(K * V), P(CHUNK * CHUNK), q(CHUNK * K), k(CHUNK * K), read(CHUNK * V),
          since(CHUNK * V), to_end(CHUNK * V), turned(K * V), room(V) {}
};

// Gradients of the writes U, of v and β, and of the log decays.
template <class T> void backward_values(const Head<T>& head, ValueChunk<T>& c, Gradients<T>& d, const Backward& to, long t) {
    const Problem& p = head.p;
    long size = c.size, K = c.K, V = c.V, all = size * V;
    c.reads(d.since);
    zero(d.U.get(), all);
    c.a.scatter(c.P, d.out, d.U);
    for (long i = 0; i < all; ++i) d.read[i] = d.out[i] * c.out[i] - c.U[i] * d.U[i], d.since[i] *= d.out[i];
    // A write lives on in N after the chunk.
    product<T>(size, V, K, c.k, K, 1, d.N, V, d.to_end, V, false);
    for (long i = 0; i < size; ++i)
        for (long e = 0; e < V; ++e) {
            long at = i * V + e;
            T left = c.a.L[at] * d.to_end[at];
            d.U[at] += left + c.P[i * CHUNK + i] * d.out[at];
            d.to_end[at] = left * c.U[at];
        }
    zero(d.room.get(), V);
    for (long j = 0; j < K; ++j)
        for (long e = 0; e < V; ++e) d.room[e] += c.a.chunk_decay()[e] * c.N[j * V + e] * d.N[j * V + e];
    T* grad_decay = static_cast<T*>(to.grad_decay) + (head.row() + t) * p.channels;
    c.a.rate_gradient(head, t, d.read, d.since, d.to_end, d.room, grad_decay);
    for (long i = 0; i < size; ++i) {
        long row = head.row() + t + i;
        if (to.grad_beta != nullptr) static_cast<T*>(to.grad_beta)[row] = dot<T>(d.U + i * V, c.v + i * V, V);
        for (long e = 0; e < p.value_width; ++e)
            static_cast<T*>(to.grad_v)[row * p.value_width + e] = c.beta[i] * d.U[i * V + e];
    }
}

template <class T> void backward_chunk(const Head<T>& head, ValueChunk<T>& c, Gradients<T>& d, const Backward& to, long t) {
    const Problem& p = head.p;
    long size = c.size, K = c.K, V = c.V;
    copy_padded(static_cast<const T*>(to.grad_out) + (head.row() + t) * p.value_width, p.value_width, size, p.value_width, V,
                d.out.get());
    backward_values(head, c, d, to, t);
    // grad S = ⟨dO_p, u_s⟩_D, with its diagonal, on which nothing has decayed.
    c.a.template scores<1>({d.out}, c.U, {d.P});
    for (long i = 0; i < size; ++i) d.P[i * CHUNK + i] = dot<T>(d.out + i * V, c.U + i * V, V);
    times<T>(c.a.G, d.out, size * V, c.room.get());
    transpose<T>(c.N, K, V, V, d.turned, K);                                    // grad q = dS K + (g ∘ dO) Nᵀ
    product<T>(size, K, V, c.room, V, 1, d.turned, K, d.q, K, false);
    lower_times<T>(size, K, d.P, c.k, d.q, true);
    transpose<T>(d.N, K, V, V, d.turned, K);                                    // grad k = dSᵀ Q + (U decayed) dNᵀ
    product<T>(size, K, V, c.U_last, V, 1, d.turned, K, d.k, K, false);
    lower_turned_times<T>(size, K, d.P, c.q, d.k, true);
    long at = (head.row() + t) * p.width;
    copy_padded<T>(d.q, K, size, p.width, p.width, static_cast<T*>(to.grad_q) + at);
    copy_padded<T>(d.k, K, size, p.width, p.width, static_cast<T*>(to.grad_k) + at);
    c.decay_whole(d.N, d.N);
    product<T>(K, V, size, c.q, 1, K, c.room, V, d.N, V, true);                 // grad N: decayed, and + Qᵀ (g ∘ dO)
}

template <class T> void backward_head(const Backward& to, long index) {
    const Problem& p = to.given;
    Head<T> head(p, index);
    ValueChunk<T> c(p);
    Gradients<T> d(c.K, c.V);
    zero(d.N.get(), c.K * c.V), zero(c.N.get(), c.K * c.V);
    transpose(head.state(static_cast<const T*>(to.grad_after)), p.value_width, p.width, p.width, d.N.get(), c.V);
    for (long n = chunks_of(p) - 1; n >= 0; --n) {
        copy_padded(static_cast<const T*>(p.before) + (index * chunks_of(p) + n) * p.width * p.value_width, p.value_width,
                    p.width, p.value_width, c.V, c.N.get());
        c.read(head, n * CHUNK);
        backward_chunk(head, c, d, to, n * CHUNK);
    }
    transpose<T>(d.N, p.width, p.value_width, c.V, head.state(static_cast<T*>(to.grad_memory)), p.width);
}

template <class T> void forward(const Problem& p) {
    bool few = p.length <= FEW_TOKENS && p.before == nullptr;
    long heads = p.batch * p.heads, work = heads * p.length * p.width * p.value_width;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (work > 65536)
    for (long i = 0; i < heads; ++i) few ? turns_of_head<T>(p, i, Axis::value) : forward_head<T>(p, i);
}

template <class T> void backward(const Backward& to) {
#pragma omp parallel for num_threads(to.given.threads) schedule(dynamic)
    for (long i = 0; i < to.given.batch * to.given.heads; ++i) backward_head<T>(to, i);
}
}  // namespace

#define EXPORT(NAME, T)                                          \
    KERNEL(recurrence_by_value_forward_##NAME, Problem, forward<T>) \
    KERNEL(recurrence_by_value_backward_##NAME, Backward, backward<T>)
EXPORT(float32, float)
EXPORT(float64, double)
