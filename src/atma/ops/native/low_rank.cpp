// What low-rank adapters add to the rows of a call, each its own adapter's, or nothing (ops/low_rank). Rows of one adapter
// are computed together, each as if it were alone: every sum runs over the inputs, then over the rank, in their order.
// T computes, E is how rows are stored.
#include <vector>
#include "problem.h"
#include "simd.h"

namespace {

template <class E> struct Compute { using T = E; };
template <> struct Compute<bfloat16> { using T = float; };

constexpr long TOGETHER = 24;  // rows that a factor is read for

PROBLEM(LowRank,  // y (rows, outputs) += x (rows, inputs) A B; A (inputs, wide rank), B (rank, wide outputs) of type T
    int64_t rows, inputs, outputs, tokens, slots;
    const int32_t* which;  // (rows / tokens): a place in the table, or −1
    const int64_t* table;  // (slots, 3): the addresses of A and B, and the rank, 0 for none
    const void* x;
    void* y;
    int64_t threads;
)

template <class T> long wide(long count) {  // filled up to 64 bytes
    constexpr long lanes = 64 / sizeof(T);
    return (count + lanes - 1) / lanes * lanes;
}

struct Piece { long slot, first, count; };  // rows of one adapter, by their places in a list of rows

// Some of the rows, all of the adapter of that slot.
template <class E> void add_some(const LowRank& p, long slot, const long* row, long count) {
    using T = typename Compute<E>::T;
    const int64_t* place = p.table + 3 * slot;
    const T *a = reinterpret_cast<const T*>(place[0]), *b = reinterpret_cast<const T*>(place[1]);
    long rank = place[2], middle = wide<T>(rank), outputs = wide<T>(p.outputs);
    Buffer<T> x(count * p.inputs), h(count * middle), added(count * outputs);
    for (long r = 0; r < count; ++r) {
        const E* from = static_cast<const E*>(p.x) + row[r] * p.inputs;
        for (long d = 0; d < p.inputs; ++d) x[r * p.inputs + d] = T(from[d]);
    }
    product<T>(count, middle, p.inputs, x, p.inputs, 1, a, middle, h, middle, false);
    product<T>(count, outputs, rank, h, middle, 1, b, outputs, added, outputs, false);
    for (long r = 0; r < count; ++r) {
        E* y = static_cast<E*>(p.y) + row[r] * p.outputs;
        for (long d = 0; d < p.outputs; ++d) y[d] = narrow(T(T(y[d]) + added[r * outputs + d]), E());
    }
}

template <class E> void add_low_rank(const LowRank& p) {
    std::vector<long> rows;
    std::vector<Piece> pieces;
    long texts = p.rows / p.tokens;
    for (long slot = 0; slot < p.slots; ++slot) {
        if (p.table[3 * slot + 2] == 0) continue;
        long first = rows.size();
        for (long n = 0; n < texts; ++n)
            for (long t = 0; p.which[n] == slot && t < p.tokens; ++t) rows.push_back(n * p.tokens + t);
        for (; first < long(rows.size()); first += TOGETHER)
            pieces.push_back({slot, first, std::min<long>(TOGETHER, rows.size() - first)});
    }
    long count = pieces.size();
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (count > 1 && long(rows.size()) * (p.inputs + p.outputs) > (1 << 14))
    for (long i = 0; i < count; ++i) add_some<E>(p, pieces[i].slot, rows.data() + pieces[i].first, pieces[i].count);
}
}  // namespace

KERNEL(add_low_rank_float32, LowRank, add_low_rank<float>)
KERNEL(add_low_rank_float64, LowRank, add_low_rank<double>)
KERNEL(add_low_rank_bfloat16, LowRank, add_low_rank<bfloat16>)
