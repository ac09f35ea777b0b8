// Attention over a bounded set of kept keys (ops/eviction/reference.py), a token after another: it is written behind those
// kept, its queries read them all, what each key received is added, and at the end of a block of the text's grid the set
// is cut down to its budget. A token's numbers are the same however the text is cut into calls.
#include <limits>
#include <numeric>
#include <vector>

#include "problem.h"
#include "simd.h"

namespace {

PROBLEM(Problem,  // q (B, H, T, K), k and v (B, G, T, K) by strides; all else dense; null may be no address
    int64_t batch, heads, groups, queries, width, slots;
    int64_t q_batch, q_head, q_query, k_batch, k_head, k_query, v_batch, v_head, v_query;
    const void *q, *k, *v, *scale, *null;         // scale and null (B, H, T): what scores are multiplied by, a logit
    const int32_t* length;                        // (B,): tokens before the call
    void *keys, *values;                          // (B, G, K, N) and (B, G, N, K)
    int32_t* place;                               // (B, G, N): positions, −1 for none
    void *lately, *wholly;                        // (B, G, N): weight received
    void *S, *L, *Q, *M;
    int64_t budget, block, window, anchors, threads;
    double decay;
)

constexpr double LOG2E = 1.4426950408889634;

template <class T, class E> struct Kept {  // of one row and head of keys
    const Problem& p;
    long b, g;
    E *keys, *values;
    int32_t* place;
    T *lately, *wholly;

    Kept(const Problem& p, long unit) : p(p), b(unit / p.groups), g(unit % p.groups) {
        long at = unit * p.slots;
        keys = static_cast<E*>(p.keys) + at * p.width, values = static_cast<E*>(p.values) + at * p.width;
        place = p.place + at, lately = static_cast<T*>(p.lately) + at, wholly = static_cast<T*>(p.wholly) + at;
    }
    void put(long slot, long t, long position) const {
        const E* k = static_cast<const E*>(p.k) + b * p.k_batch + g * p.k_head + t * p.k_query;
        const E* v = static_cast<const E*>(p.v) + b * p.v_batch + g * p.v_head + t * p.v_query;
        for (long d = 0; d < p.width; ++d) keys[d * p.slots + slot] = k[d];
        std::copy(v, v + p.width, values + slot * p.width);
        place[slot] = position, lately[slot] = wholly[slot] = 0;
    }
    // Slots `from`, ascending, to the first; those behind are emptied.
    void gather(const std::vector<long>& from, long filled) const {
        long count = from.size();
        auto moved = [&](auto* x, long step, auto nothing) {
            for (long i = 0; i < count; ++i) x[i * step] = x[from[i] * step];
            for (long i = count; i < filled; ++i) x[i * step] = nothing;
        };
        for (long d = 0; d < p.width; ++d) moved(keys + d * p.slots, 1, E{}), moved(values + d, p.width, E{});
        moved(place, 1, int32_t(-1)), moved(lately, 1, T(0)), moved(wholly, 1, T(0));
        for (long i = 0; i < count; ++i) lately[i] *= T(p.decay);
    }
};

// The `wanted` slots of the largest numbers, of equal ones the first; one that is none counts as the largest.
template <class T> void largest(const T* x, std::vector<long>& slots, long wanted) {
    auto value = [&](long i) { return x[i] == x[i] ? x[i] : std::numeric_limits<T>::infinity(); };
    if (wanted >= long(slots.size())) return;
    std::nth_element(slots.begin(), slots.begin() + wanted, slots.end(),
                     [&](long i, long j) { return value(i) != value(j) ? value(i) > value(j) : i < j; });
    slots.resize(wanted);
}

// After the token at `position`, the last of a block: anchors, what stands beside them, and registers (mixers.md, 6.9).
template <class T, class E> void evict(const Kept<T, E>& kept, long filled, long position) {
    const Problem& p = kept.p;
    std::vector<long> all(filled), some, rest;
    std::iota(all.begin(), all.end(), 0L);
    if (filled <= p.budget) return kept.gather(all, filled);
    long free = 0;  // slots before those of the window, which are the last
    while (kept.place[free] + p.window <= position) ++free;
    some.assign(all.begin(), all.begin() + free);
    largest(kept.lately, some, p.anchors);
    std::vector<char> chosen(filled);
    for (long i : some)
        for (long j = std::max(i - 1, 0L); j <= std::min(i + 1, free - 1); ++j)
            if (std::abs(kept.place[j] - kept.place[i]) <= 1) chosen[j] = 1;
    for (long i = free; i < filled; ++i) chosen[i] = 1;
    for (long i = 0; i < free; ++i)
        if (!chosen[i]) rest.push_back(i);
    largest(kept.wholly, rest, p.budget - std::count(chosen.begin(), chosen.end(), 1));
    for (long i : rest) chosen[i] = 1;
    all.clear();
    for (long i = 0; i < filled; ++i)
        if (chosen[i]) all.push_back(i);
    kept.gather(all, filled);
}

// C (rows, columns) = A · B, whatever the columns; whole vectors by tiles.
template <class T, class E>
void multiply(long rows, long columns, long depth, const T* a, long a_row, const E* b, long b_depth, T* c, long c_row) {
    long whole = columns / Simd<T>::lanes * Simd<T>::lanes;
    strip<T>(rows, whole, depth, a, a_row, 1, b, b_depth, c, c_row, false);
    for (long r = 0; r < rows; ++r)
        for (long j = whole; j < columns; ++j) {
            T sum = 0;
            for (long d = 0; d < depth; ++d) sum += a[r * a_row + d] * T(b[d * b_depth + j]);
            c[r * c_row + j] = sum;
        }
}

// In place a → 2^(a − top) over the first `end` columns, zero up to a whole vector. Returns top, Σ and Σ of squares.
template <class T> struct Sums {
    T top, sum, squares;
};
template <class T> Sums<T> soften(T* a, long end) {
    using S = Simd<T>;
    long high = padded<T>(end);
    std::fill(a + end, a + high, T(-1e30));
    typename S::V best = S::load(a), sum{}, squares{};
    for (long j = S::lanes; j < high; j += S::lanes) {
        typename S::V x = S::load(a + j);
        best = x > best ? x : best;
    }
    T top = S::max(best);
    for (long j = 0; j < high; j += S::lanes) {
        typename S::V x = exp2_of(S::load(a + j) - top);
        S::store(a + j, x);
        sum += x, squares += x * x;
    }
    return {top, S::sum(sum), S::sum(squares)};
}

// The query heads of one token over the first `end` slots.
template <class T, class E> void read(const Kept<T, E>& kept, long t, long end, T* q, T* a) {
    const Problem& p = kept.p;
    long group = p.heads / p.groups, columns = padded<T>(p.slots);
    for (long from = 0; from < group; from += TILE_ROWS) {
        long rows = std::min<long>(TILE_ROWS, group - from), first = (kept.b * p.heads + kept.g * group + from) * p.queries + t;
        for (long r = 0; r < rows; ++r) {
            const E* x = static_cast<const E*>(p.q) + kept.b * p.q_batch + (kept.g * group + from + r) * p.q_head + t * p.q_query;
            T scale = static_cast<const T*>(p.scale)[first + r * p.queries] * T(LOG2E);
            for (long d = 0; d < p.width; ++d) q[r * p.width + d] = T(x[d]) * scale;
        }
        multiply<T>(rows, std::min(padded<T>(end), p.slots), p.width, q, p.width, kept.keys, p.slots, a, columns);
        Sums<T> sums[TILE_ROWS];
        for (long r = 0; r < rows; ++r) sums[r] = soften(a + r * columns, end);
        multiply<T>(rows, p.width, end, a, columns, kept.values, p.width, static_cast<T*>(p.S) + first * p.width,
                    p.queries * p.width);
        for (long r = 0; r < rows; ++r) {
            long at = first + r * p.queries;
            static_cast<T*>(p.L)[at] = sums[r].sum, static_cast<T*>(p.Q)[at] = sums[r].squares;
            static_cast<T*>(p.M)[at] = T(sums[r].top / LOG2E);
            // A null's logit may be far above the keys': its mass is then infinite, and they receive nothing.
            T null = p.null == nullptr ? T(0) : std::exp2(static_cast<const T*>(p.null)[at] * T(LOG2E) - sums[r].top);
            T share = 1 / (sums[r].sum + null);
            for (long s = 0; s < end; ++s) {
                T weight = a[r * columns + s] * share;
                kept.lately[s] += weight, kept.wholly[s] += weight;
            }
        }
    }
}

template <class T, class E> void attend_kept(const Problem& p) {
    long rows = std::min<long>(TILE_ROWS, p.heads / p.groups), units = p.batch * p.groups;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (units > 1)
    for (long unit = 0; unit < units; ++unit) {
        Kept<T, E> kept(p, unit);
        Buffer<T> q(rows * p.width), a(rows * padded<T>(p.slots));
        for (long t = 0; t < p.queries; ++t) {
            long n = p.length[kept.b] + t, filled = std::min<long>(n / p.block * p.block, p.budget) + n % p.block;
            kept.put(filled, t, n);
            read(kept, t, filled + 1, q.get(), a.get());
            if ((n + 1) % p.block == 0) evict(kept, filled + 1, n);
        }
    }
}
}  // namespace

#define EXPORT(NAME, T, E) KERNEL(attend_kept_##NAME, Problem, attend_kept<T, E>)
EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, float, bfloat16)
