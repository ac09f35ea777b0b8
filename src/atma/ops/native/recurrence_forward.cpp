// Linear recurrences in chunks of tokens, heads that share q and k side by side, and few tokens in turn.
#include "chunk.h"
#include "turns.h"

namespace {

template <class T> void forward_chunk(const Head<T>& head, Chunk<T>& c, long n, T* room, T* out) {
    const Problem& p = head.p;
    c.read(head, n * CHUNK);
    // Kept for the backward pass, which goes back over the chunks and cannot undo a decay.
    if (p.before != nullptr)
        copy_padded<T>(c.N, c.V, p.width, p.value_width, p.value_width,
                       static_cast<T*>(p.before) + (head.index() * chunks_of(p) + n) * p.width * p.value_width);
    c.write();
    // R_out = g ∘ Q N, what is left of the memory, …
    scaled<T>(c.reading_q(), c.g, c.size, c.K, room);
    product<T>(c.size, c.V, c.K, room, c.K, 1, c.N, c.V, out, c.V, false);
    // … + (D ∘ Q Kᵀ) U, what the chunk itself wrote up to and with each token.
    lower_times<T>(c.size, c.V, c.P, c.U, out, true);
    copy_padded<T>(out, c.V, c.size, p.value_width, p.value_width,
                   static_cast<T*>(p.out) + (head.row() + n * CHUNK) * p.value_width);
    c.advance(room);
}

// Heads [first, first + together).
template <class T> void forward_heads(const Problem& p, long first) {
    Chunk<T> c(p, p.together > 1);
    Buffer<T> room(CHUNK * c.K), out(CHUNK * c.V);
    long size = c.K * c.V;
    zero(c.memories.get(), p.together * size);
    for (long i = 0; i < p.together; ++i)
        transpose(Head<T>(p, first + i).state(static_cast<const T*>(p.memory)), p.value_width, p.width, p.width,
                  c.memories + i * size, c.V);
    for (long n = 0; n < chunks_of(p); ++n)
        for (long i = 0; i < p.together; ++i) forward_chunk<T>(Head<T>(p, first + i), c, n, room, out);
    for (long i = 0; i < p.together; ++i)
        transpose<T>(c.memories + i * size, p.width, p.value_width, c.V,
                     Head<T>(p, first + i).state(static_cast<T*>(p.after)), p.width);
}

template <class T> void forward(const Problem& p) {
    // Few tokens are bound by reading M, not by products: a chunk's tables would not pay.
    bool few = p.length <= FEW_TOKENS && p.before == nullptr;
    long heads = p.batch * p.heads, work = heads * p.length * p.width * p.value_width, step = few ? 1 : p.together;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (work > 65536)
    for (long i = 0; i < heads; i += step) few ? turns_of_head<T>(p, i, Axis::key) : forward_heads<T>(p, i);
}
}  // namespace

KERNEL(recurrence_forward_float32, Problem, forward<float>)
KERNEL(recurrence_forward_float64, Problem, forward<double>)
