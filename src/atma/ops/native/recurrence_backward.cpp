// Gradients of linear recurrences by hand: back over the chunks, from the memory before each (recurrence_forward.cpp).
#include "chunk.h"

namespace {

template <class T> struct Shared {  // of one chunk, per head, or summed over heads that share q and k
    Buffer<T> q, k, P, mixed;
    Shared(long K) : q(CHUNK * K), k(CHUNK * K), P(CHUNK * CHUNK), mixed(CHUNK * CHUNK) {}
};

template <class T> struct Gradients : Shared<T> {  // of one chunk
    Shared<T> all;  // … of the heads so far
    Buffer<T> out, U, R, N_before, A, carried, entered, room, turned, N_turned, memories;
    T* N;  // of the memory of the head at hand
    Gradients(long K, long V, long heads)
        : Shared<T>(K), all(K), out(CHUNK * V), U(CHUNK * V), R(CHUNK * V), N_before(K * V), A(CHUNK * CHUNK),
          carried(CHUNK * K), entered(CHUNK * V), room(CHUNK * std::max(K, V)),
          turned(std::max(K, CHUNK) * std::max(V, CHUNK)), N_turned(K * V), memories(heads * K * V), N(memories) {}
};

// What a head brings, taken as it is if it is the first, else added.
template <class T> void take(Buffer<T>& x, Buffer<T>& all, long size, bool first) {
    if (first) return std::swap(x.held, all.held);
    for (long i = 0; i < size; ++i) all[i] += x[i];
}

// Gradients of R, of A and P as tables of products, and of the writes, in the chunk at token t.
template <class T> void backward_tables(const Head<T>& head, Chunk<T>& c, Gradients<T>& d, const Backward& to, long t) {
    const Problem& p = head.p;
    long size = c.size, K = c.K, V = c.V;
    // The chunk's U, A and P again from N before it: cheaper than keeping them.
    c.write();
    copy_padded(static_cast<const T*>(to.grad_out) + (head.row() + t) * p.value_width, p.value_width, size, p.value_width, V,
                d.out.get());
    // A write is read by the chunk's own later queries (P) and lives on in the memory after it (last ∘ k).
    lower_turned_times<T>(size, V, c.P, d.out, d.U, false);              // grad U = Pᵀ dO + (last ∘ K) dN
    scaled<T>(c.writing_k(), c.last, size, K, d.room);
    product<T>(size, V, K, d.room, K, 1, d.N, V, d.U, V, true);
    // U = (I + A)⁻¹ R, so grad R = (I + A)⁻ᵀ grad U and grad A = −grad R Uᵀ below the diagonal.
    std::copy(d.U.get(), d.U + size * V, d.R.get());
    if (c.delta) c.solve_turned(d.R);
    zero(d.turned.get(), V * CHUNK);
    transpose<T>(c.U, size, V, V, d.turned, CHUNK);
    if (c.delta) lower_product<T>(size, V, d.R, V, d.turned, d.A);
    lower_product<T>(size, V, d.out, V, d.turned, d.P);
    for (long i = 0; i < size; ++i) {
        // Both tables carry D: with it they are the gradients of β k·k and of q·k.
        for (long s = 0; c.delta && s <= i; ++s) d.A[i * CHUNK + s] *= -c.D[i * CHUNK + s];
        for (long s = 0; s <= i; ++s) d.P[i * CHUNK + s] *= c.D[i * CHUNK + s];
        zero(d.P + i * CHUNK + i + 1, CHUNK - i - 1);
        if (c.delta) zero(d.A + i * CHUNK + i, CHUNK - i);
    }
    for (long i = 0; i < size; ++i)
        for (long e = 0; e < V; ++e) {
            // grad v = β ∘ grad R; g ∘ that is the gradient of K N, negated.
            T error = c.beta[i] * d.R[i * V + e];
            if (e < p.value_width) static_cast<T*>(to.grad_v)[(head.row() + t + i) * p.value_width + e] = error;
            d.entered[i * V + e] = c.g[i] * error;
        }
    if (!c.delta) return;
    for (long i = 0; i < size; ++i)
        // Gradient of K Kᵀ, which k enters from both sides.
        for (long s = 0; s < CHUNK; ++s) d.mixed[i * CHUNK + s] = c.beta[i] * d.A[i * CHUNK + s];
}

// grad β: R = β (v − g K N) directly, and through A = β ∘ D ∘ K Kᵀ.
template <class T> void backward_beta(const Head<T>& head, const Chunk<T>& c, const Gradients<T>& d, T* grad) {
    long V = c.V;
    for (long i = 0; i < c.size; ++i) {
        grad[i] = dot<T>(d.R + i * V, c.v + i * V, V);
        if (!c.delta) continue;
        T errors = grad[i] - c.g[i] * dot<T>(d.R + i * V, c.held + i * V, V);
        grad[i] = errors + dot<T>(d.A + i * CHUNK, c.products + i * CHUNK, i);
    }
}

// Gradients of the log decays, one a token, of a chunk. Sums stay inside a document.
template <class T> void backward_rates(const Chunk<T>& c, const Gradients<T>& d, T* grad) {
    long size = c.size, K = c.K, V = c.V;
    Buffer<T> since(CHUNK), below(CHUNK);
    // Three things depend on a decay: g (the memory from before the chunk), D (between two tokens), last (to its end).
    for (long i = 0; i < size; ++i) {
        // g_i ∂/∂g_i: through what the query reads of N, as d.q has it so far, and through the error's K N.
        since[i] = dot<T>(c.q + i * K, d.q + i * K, K);
        if (c.delta) since[i] -= dot<T>(d.entered + i * V, c.held + i * V, V);
    }
    // N after = g_last N + …: the whole memory decays by the chunk.
    since[size - 1] += c.g[size - 1] * dot<T>(d.N, c.N, K * V);
    zero(below.get(), CHUNK);  // below[s]: Σ over p ≥ the row at hand of what depends on D[p, s]
    T later = 0;
    for (long i = size - 1; i >= 0; --i) {
        // log a_i is in g_p for every p ≥ i: sums from the end.
        later += since[i];
        T spanning = 0;
        long row = i * CHUNK;
        // … and in D[p, s] for s < i ≤ p: rows from the end, columns before i. Never a difference of sums, as forward.
        for (long s = 0; s < i; ++s) below[s] += d.P[row + s] * c.overlaps[row + s];
        for (long s = 0; c.delta && s < i; ++s) below[s] += c.beta[i] * d.A[row + s] * c.products[row + s];
        for (long s = 0; i == size - 1 && s < i; ++s) below[s] += c.last[s] * dot<T>(c.k + s * K, d.carried + s * K, K);
        for (long s = 0; s < i; ++s) spanning += below[s];
        grad[i] = spanning + later;
    }
}

// Gradient of k through the memories, where tokens decay as a whole: N after = … + (last ∘ K)ᵀ U, and as a reader of N.
template <class T> void backward_memory_keys(const Chunk<T>& c, Gradients<T>& d) {
    scaled<T>(d.carried, c.last, c.size, c.K, d.k);
    if (c.delta) product<T>(c.size, c.K, c.V, d.entered, c.V, 1, d.N_turned, c.K, d.k, c.K, true);
}

// The rest of the gradients of q and k, through the chunk's own products, whose gradients are those of all heads.
template <class T> void backward_keys(const Chunk<T>& c, Shared<T>& d) {
    long size = c.size, K = c.K;
    lower_times<T>(size, K, d.P, c.k, d.q, true);
    lower_turned_times<T>(size, K, d.P, c.q, d.k, true);
    if (!c.delta) return;
    lower_times<T>(size, K, d.mixed, c.k, d.k, true);
    lower_turned_times<T>(size, K, d.mixed, c.k, d.k, true);
}

// Gradients of q, k and the log decays where every key channel decays by itself: those of tokens as readers and as writers
// apart, since g enters with the one and −g with the other (section 3.2).
template <class T> void backward_channels(const Head<T>& head, Chunk<T>& c, Gradients<T>& d, T* grad, long t) {
    long size = c.size, K = c.K, V = c.V, all = size * K;
    Buffer<T> reader(CHUNK * K), writer(CHUNK * K), since(CHUNK * K), within(CHUNK * K), across(K);
    zero(d.q.get(), all), zero(reader.get(), all), zero(writer.get(), all);
    if (c.delta) {
        c.a.template gather<2>({d.P, d.mixed}, c.k, {d.q, reader});
        c.a.scatter(d.mixed, c.k, writer);
    } else c.a.template gather<1>({d.P}, c.k, {d.q});
    c.a.scatter(d.P, c.q, writer);
    for (long i = 0; i < all; ++i) within[i] = c.q[i] * d.q[i] + c.k[i] * (reader[i] - writer[i]);
    // What is read of N: by the queries, and by the keys' errors.
    product<T>(size, K, V, d.room, V, 1, d.N_turned, K, since, K, false);
    times<T>(c.a.G, since, all, since.get());
    for (long i = 0; i < all; ++i) d.q[i] += since[i], since[i] *= c.q[i];
    if (c.delta) {
        Buffer<T> errors(CHUNK * K);
        product<T>(size, K, V, d.entered, V, 1, d.N_turned, K, errors, K, false);
        times<T>(c.a.G, errors, all, errors.get());
        for (long i = 0; i < all; ++i) reader[i] += errors[i], since[i] += c.k[i] * errors[i];
    }
    // A token's own write does not decay before it is read.
    for (long i = 0; i < size; ++i)
        for (long j = 0; j < K; ++j) {
            T own = d.P[i * CHUNK + i], left = c.a.L[i * K + j] * d.carried[i * K + j];
            d.q[i * K + j] += own * c.k[i * K + j];
            d.k[i * K + j] = reader[i * K + j] + writer[i * K + j] + own * c.q[i * K + j] + left;
            d.carried[i * K + j] = left * c.k[i * K + j];
        }
    for (long j = 0; j < K; ++j) across[j] = c.a.chunk_decay()[j] * dot<T>(c.N + j * V, d.N + j * V, V);
    c.a.rate_gradient(head, t, within, since, d.carried, across, grad);
}

template <class T> void backward_chunk(const Head<T>& head, Chunk<T>& c, Gradients<T>& d, const Backward& to, long t) {
    const Problem& p = head.p;
    long size = c.size, K = c.K, V = c.V;
    d.N = d.memories + c.place * K * V;
    backward_tables(head, c, d, to, t);
    if (to.grad_beta != nullptr) backward_beta(head, c, d, static_cast<T*>(to.grad_beta) + head.row() + t);
    transpose<T>(d.N, K, V, V, d.turned, K);                                    // carried = U dNᵀ
    product<T>(size, K, V, c.U, V, 1, d.turned, K, d.carried, K, false);
    transpose<T>(c.N, K, V, V, d.N_turned, K);
    T* grad_decay = static_cast<T*>(to.grad_decay);
    scaled<T>(d.out, c.g, size, V, d.room);
    if (!c.by_channel) {
        product<T>(size, K, V, d.room, V, 1, d.N_turned, K, d.q, K, false);     // grad q = (g ∘ dO) Nᵀ + dP K
        if (grad_decay != nullptr) backward_rates(c, d, grad_decay + head.row() + t);
    }
    for (long i = 0; i < size * V; ++i) d.entered[i] = -d.entered[i];
    if (c.by_channel) backward_channels(head, c, d, grad_decay + (head.row() + t) * p.channels, t);
    else backward_memory_keys(c, d);
    take<T>(d.q, d.all.q, size * K, c.place == 0), take<T>(d.k, d.all.k, size * K, c.place == 0);
    take<T>(d.P, d.all.P, size * CHUNK, c.place == 0);
    if (c.delta) take<T>(d.mixed, d.all.mixed, size * CHUNK, c.place == 0);
    // grad N before the chunk: through its decay, through the reads, and through the errors of its writes.
    c.decay_whole(d.N, d.N_before);
    product<T>(K, V, size, c.reading_q(), 1, K, d.room, V, d.N_before, V, true);          // + qᵀ (g ∘ dO) − Kᵀ entered
    if (c.delta) product<T>(K, V, size, c.reading_k(), 1, K, d.entered, V, d.N_before, V, true);
    std::copy(d.N_before.get(), d.N_before + K * V, d.N);
}

// Heads [first, first + together).
template <class T> void backward_heads(const Backward& to, long first) {
    const Problem& p = to.given;
    Chunk<T> c(p, true);
    long K = c.K, V = c.V, states = p.together * K * V;
    Gradients<T> d(K, V, p.together);
    zero(d.memories.get(), states), zero(c.memories.get(), states);
    for (long i = 0; i < p.together; ++i)
        transpose(Head<T>(p, first + i).state(static_cast<const T*>(to.grad_after)), p.value_width, p.width, p.width,
                  d.memories + i * K * V, V);
    for (long n = chunks_of(p) - 1; n >= 0; --n) {
        for (long i = first; i < first + p.together; ++i) {
            Head<T> head(p, i);
            c.read(head, n * CHUNK);
            copy_padded(static_cast<const T*>(p.before) + (i * chunks_of(p) + n) * p.width * p.value_width, p.value_width,
                        p.width, p.value_width, V, c.N);
            backward_chunk(head, c, d, to, n * CHUNK);
        }
        if (!c.by_channel) backward_keys<T>(c, d.all);
        long at = (first / p.together * p.length + n * CHUNK) * p.width;
        copy_padded<T>(d.all.q, K, c.size, p.width, p.width, static_cast<T*>(to.grad_q) + at);
        copy_padded<T>(d.all.k, K, c.size, p.width, p.width, static_cast<T*>(to.grad_k) + at);
    }
    for (long i = 0; i < p.together; ++i)
        transpose<T>(d.memories + i * K * V, p.width, p.value_width, V,
                     Head<T>(p, first + i).state(static_cast<T*>(to.grad_memory)), p.width);
}

template <class T> void backward(const Backward& to) {
#pragma omp parallel for num_threads(to.given.threads) schedule(dynamic)
    for (long i = 0; i < to.given.batch * to.given.heads; i += to.given.together) backward_heads<T>(to, i);
}
}  // namespace

KERNEL(recurrence_backward_float32, Backward, backward<float>)
KERNEL(recurrence_backward_float64, Backward, backward<double>)
