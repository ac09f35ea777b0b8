// New keys and values into their shadows: 8 bits with one scale a row, and how far from the exact ones they are.
#include "shadow.h"

namespace {

PROBLEM(Writing,  // k and v (B, G, T, K); row s of a text lies in its page s / page; a contiguous leaf is one page a text
    int64_t batch, groups, tokens, width, page, table_row;
    int64_t k_batch, k_head, k_token, v_batch, v_head, v_token;
    const void *k, *v;
    const int32_t *table, *length;
    void *keys, *values;                                                        // int8
    void *key_scale, *key_error, *value_scale, *value_error, *value_norm;       // bfloat16, one a row
    int64_t threads;
)

// x = scale · y + what is `error` long at the most; `norm` is the length of scale · y at the least rounded up.
struct Row {
    bfloat16 scale, error, norm;
};

template <class E> Row quantise(const E* x, long width, int8_t* y) {
    float most = 0, error = 0, norm = 0;
    for (long d = 0; d < width; ++d) most = std::max(most, std::abs(float(x[d])));
    for (long d = 0; d < width; ++d) most = float(x[d]) != float(x[d]) ? float(x[d]) : most;  // NaN, which max passes over
    bfloat16 scale = upward(most / 127.0f);
    float unit = scale, inverse = unit > 0 ? 1.0f : 0.0f;
    for (long d = 0; d < width; ++d) {
        float ratio = inverse * float(x[d]) / (unit > 0 ? unit : 1.0f);
        float whole = std::min(std::max(std::nearbyint(ratio), -127.0f), 127.0f);
        y[d] = whole == whole ? int8_t(whole) : int8_t(0);
        float near = unit * whole, left = float(x[d]) - near;
        error += left * left, norm += near * near;
    }
    constexpr float up = 1 + 1.0f / 65536;  // more than the sums of squares lost to rounding
    return {scale, upward(std::sqrt(error) * up), upward(std::sqrt(norm) * up)};
}

template <class E> void write(const Writing& p) {
#pragma omp parallel for num_threads(p.threads) if (p.batch * p.tokens > 64)
    for (long i = 0; i < p.batch * p.tokens; ++i) {
        long b = i / p.tokens, t = i % p.tokens, position = p.length[b] + t;
        long page = p.table[b * p.table_row + position / p.page % p.table_row];
        for (long g = 0; g < p.groups; ++g) {
            long at = (page * p.groups + g) * p.page + position % p.page;
            Row key = quantise(static_cast<const E*>(p.k) + b * p.k_batch + g * p.k_head + t * p.k_token, p.width,
                               static_cast<int8_t*>(p.keys) + at * p.width);
            Row value = quantise(static_cast<const E*>(p.v) + b * p.v_batch + g * p.v_head + t * p.v_token, p.width,
                                 static_cast<int8_t*>(p.values) + at * p.width);
            static_cast<bfloat16*>(p.key_scale)[at] = key.scale, static_cast<bfloat16*>(p.key_error)[at] = key.error;
            static_cast<bfloat16*>(p.value_scale)[at] = value.scale, static_cast<bfloat16*>(p.value_error)[at] = value.error;
            static_cast<bfloat16*>(p.value_norm)[at] = value.norm;
        }
    }
}
}  // namespace

KERNEL(shadow_write_float32, Writing, write<float>)
KERNEL(shadow_write_bfloat16, Writing, write<bfloat16>)
