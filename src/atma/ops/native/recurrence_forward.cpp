// Linear recurrences in chunks of tokens, one head after the other, and few tokens in turn.
#include "chunk.h"
#include "turns.h"

namespace {

template <class T> void forward_head(const Problem& p, long index) {
    Head<T> head(p, index);
    Chunk<T> c(p);
    Buffer<T> room(CHUNK * c.K), out(CHUNK * c.V);
    zero(c.N.get(), c.K * c.V);
    transpose(head.state(static_cast<const T*>(p.memory)), p.value_width, p.width, p.width, c.N.get(), c.V);
    for (long n = 0; n < chunks_of(p); ++n) {
        // Kept for the backward pass, which goes back over the chunks and cannot undo a decay.
        if (p.before != nullptr)
            copy_padded<T>(c.N, c.V, p.width, p.value_width, p.value_width,
                           static_cast<T*>(p.before) + (index * chunks_of(p) + n) * p.width * p.value_width);
        c.read(head, n * CHUNK);
        c.write(nullptr, nullptr);
        // R_out = g ∘ Q N, what is left of the memory, …
        scaled<T>(c.reading_q(), c.g, c.size, c.K, room);
        product<T>(c.size, c.V, c.K, room, c.K, 1, c.N, c.V, out, c.V, false);
        // … + (D ∘ Q Kᵀ) U, what the chunk itself wrote up to and with each token.
        lower_times<T>(c.size, c.V, c.P, c.U, out, true);
        copy_padded<T>(out, c.V, c.size, p.value_width, p.value_width,
                       static_cast<T*>(p.out) + (head.row() + n * CHUNK) * p.value_width);
        c.advance(room);
    }
    transpose<T>(c.N, p.width, p.value_width, c.V, head.state(static_cast<T*>(p.after)), p.width);
}

template <class T> void forward(const Problem& p) {
    // Few tokens are bound by reading M, not by products: a chunk's tables would not pay.
    bool few = p.length <= FEW_TOKENS && p.before == nullptr;
    long heads = p.batch * p.heads, work = heads * p.length * p.width * p.value_width;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (work > 65536)
    for (long i = 0; i < heads; ++i) few ? turns_of_head<T>(p, i, Axis::key) : forward_head<T>(p, i);
}
}  // namespace

KERNEL(recurrence_forward_float32, Problem, forward<float>)
KERNEL(recurrence_forward_float64, Problem, forward<double>)
