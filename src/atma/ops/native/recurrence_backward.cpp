// Gradients of linear recurrences by hand: back over the chunks, from the memory before each (recurrence_forward.cpp).
#include "chunk.h"

namespace {

template <class T> struct Gradients {  // of one chunk
    Buffer<T> out, U, R, N, N_before, P, A, products, overlaps, k, q, carried, entered, mixed, room, turned, N_turned;
    Gradients(long K, long V)
        : out(CHUNK * V), U(CHUNK * V), R(CHUNK * V), N(K * V), N_before(K * V), P(CHUNK * CHUNK), A(CHUNK * CHUNK),
          products(CHUNK * CHUNK), overlaps(CHUNK * CHUNK), k(CHUNK * K), q(CHUNK * K), carried(CHUNK * K),
          entered(CHUNK * V), mixed(CHUNK * CHUNK), room(CHUNK * std::max(K, V)),
          turned(std::max(K, CHUNK) * std::max(V, CHUNK)), N_turned(K * V) {}
};

// Gradients of R, of A and P as tables of products, and of the writes, in the chunk at token t.
template <class T> void backward_tables(const Head<T>& head, Chunk<T>& c, Gradients<T>& d, const Backward& to, long t) {
    const Problem& p = head.p;
    long size = c.size, K = c.K, V = c.V;
    // The chunk's U, A and P again from N before it: cheaper than keeping them.
    c.write(d.overlaps, d.products);
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
        grad[i] = errors + dot<T>(d.A + i * CHUNK, d.products + i * CHUNK, i);
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
        for (long s = 0; s < i; ++s) below[s] += d.P[row + s] * d.overlaps[row + s];
        for (long s = 0; c.delta && s < i; ++s) below[s] += c.beta[i] * d.A[row + s] * d.products[row + s];
        for (long s = 0; i == size - 1 && s < i; ++s) below[s] += c.last[s] * dot<T>(c.k + s * K, d.carried + s * K, K);
        for (long s = 0; s < i; ++s) spanning += below[s];
        grad[i] = spanning + later;
    }
}

// Gradients of k, and the rest of those of q, where tokens decay as a whole.
template <class T> void backward_keys(Chunk<T>& c, Gradients<T>& d) {
    long size = c.size, K = c.K, V = c.V;
    lower_times<T>(size, K, d.P, c.k, d.q, true);
    // grad k, term by term: as a reader of N and, on both sides, of the chunk's products …
    if (c.delta) product<T>(size, K, V, d.entered, V, 1, d.N_turned, K, d.k, K, false);
    lower_turned_times<T>(size, K, d.P, c.q, d.k, c.delta);
    if (c.delta) {
        lower_times<T>(size, K, d.mixed, c.k, d.k, true);
        lower_turned_times<T>(size, K, d.mixed, c.k, d.k, true);
    }
    for (long i = 0; i < size; ++i)
        // … and through N after = … + (last ∘ K)ᵀ U.
        for (long j = 0; j < K; ++j) d.k[i * K + j] += c.last[i] * d.carried[i * K + j];
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
    else backward_keys(c, d);
    long at = (head.row() + t) * p.width;
    copy_padded<T>(d.q, K, size, p.width, p.width, static_cast<T*>(to.grad_q) + at);
    copy_padded<T>(d.k, K, size, p.width, p.width, static_cast<T*>(to.grad_k) + at);
    // grad N before the chunk: through its decay, through the reads, and through the errors of its writes.
    c.decay_whole(d.N, d.N_before);
    product<T>(K, V, size, c.reading_q(), 1, K, d.room, V, d.N_before, V, true);          // + qᵀ (g ∘ dO) − Kᵀ entered
    if (c.delta) product<T>(K, V, size, c.reading_k(), 1, K, d.entered, V, d.N_before, V, true);
    std::copy(d.N_before.get(), d.N_before + K * V, d.N.get());
}

template <class T> void backward_head(const Backward& to, long index) {
    const Problem& p = to.given;
    Head<T> head(p, index);
    Chunk<T> c(p);
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

template <class T> void backward(const Backward& to) {
#pragma omp parallel for num_threads(to.given.threads) schedule(dynamic)
    for (long i = 0; i < to.given.batch * to.given.heads; ++i) backward_head<T>(to, i);
}
}  // namespace

KERNEL(recurrence_backward_float32, Backward, backward<float>)
KERNEL(recurrence_backward_float64, Backward, backward<double>)
