// The key of every chunk that new tokens make full (ops/chunk_keys/reference.py), of each query head.
#include "chosen.h"
#include "few.h"
#include "problem.h"

namespace {

PROBLEM(Problem,  // strides in elements; ring (B, H, chunk, K) contiguous; keys, values and summaries as Rows
    int64_t batch, heads, queries, width, groups, chunk, row;
    int64_t q_batch, q_head, q_query, k_batch, k_head, k_row, v_batch, v_head, v_row, s_batch, s_head;
    int64_t pool_page, table_row;
    const void *q, *ring, *keys, *values, *summaries;
    const int32_t *table, *length;
)

// In place a → softmax(a), n numbers.
template <class T> void softmax(T* a, long n) {
    T top = *std::max_element(a, a + n), sum = 0;
    for (long j = 0; j < n; ++j) sum += a[j] = std::exp(a[j] - top);
    for (long j = 0; j < n; ++j) a[j] /= sum;
}

template <class T, class E> void chunk_key(const Problem& p, long b, long h, long n) {
    long g = h / (p.heads / p.groups), wide = padded<T>(p.width), from = n * p.chunk;
    auto keys = rows_of<E>(p, p.keys, {p.k_batch, p.k_head, p.k_row}, p.width);
    auto values = rows_of<E>(p, p.values, {p.v_batch, p.v_head, p.v_row}, p.width);
    auto into = rows_of<E>(p, p.summaries, {p.s_batch, p.s_head, p.row}, p.row);
    into.groups = p.heads;
    const E *k = keys.at(b, g, from), *v = values.at(b, g, from);
    Buffer<T> a(p.chunk + Simd<T>::lanes), weights(p.chunk), o(wide), c(wide);
    Buffer<E> q(wide);
    T scale = T(1) / std::sqrt(T(p.width));
    std::fill_n(weights.get(), p.chunk, T(0)), std::fill_n(o.get(), wide, T(0)), std::fill_n(c.get(), wide, T(0));
    for (long r = 0; r < p.chunk; ++r) {
        // A query is among the new ones, or in the ring at its place in the chunk.
        long i = from + r - p.length[b];
        const E* x = i >= 0 ? static_cast<const E*>(p.q) + b * p.q_batch + h * p.q_head + i * p.q_query
                            : static_cast<const E*>(p.ring) + ((b * p.heads + h) * p.chunk + r) * p.width;
        std::copy(x, x + p.width, q.get());
        score_few<T, E, 1>(q, &scale, wide, k, keys.stride(), p.chunk, p.width, a, 0);
        softmax<T>(a, p.chunk);
        for (long j = 0; j < p.chunk; ++j) weights[j] += a[j];
    }
    // o: the mean of what the queries read is what their mean weights read.
    for (long j = 0; j < p.chunk; ++j)
        for (long d = 0; d < p.width; ++d) o[d] += weights[j] / T(p.chunk) * T(v[j * values.stride() + d]);
    for (long j = 0; j < p.chunk; ++j) {
        a[j] = 0;
        for (long d = 0; d < p.width; ++d) a[j] += o[d] * T(k[j * keys.stride() + d]);
        a[j] *= scale;
    }
    softmax<T>(a, p.chunk);
    for (long j = 0; j < p.chunk; ++j)
        for (long d = 0; d < p.width; ++d) c[d] += a[j] * T(k[j * keys.stride() + d]);
    E* out = const_cast<E*>(into.at(b, h, from));
    for (long d = 0; d < p.width; ++d) out[d] = narrow(c[d], E());
    out[p.width] = narrow(T(n == 0), E());
}

template <class T, class E> void chunk_keys(const Problem& p) {
    for (long b = 0; b < p.batch; ++b)
        for (long n = p.length[b] / p.chunk; (n + 1) * p.chunk <= p.length[b] + p.queries; ++n)
            for (long h = 0; h < p.heads; ++h) chunk_key<T, E>(p, b, h, n);
}
}  // namespace

#define EXPORT(NAME, T, E) KERNEL(chunk_keys_##NAME, Problem, chunk_keys<T, E>)
EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, float, bfloat16)
