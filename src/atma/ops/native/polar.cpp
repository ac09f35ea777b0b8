// Streamed attention statistics (ops/polar/reference.py) with the scores of one block of queries and keys at a time in
// the second-level cache. Query rows that share a key/value head are worked on together, position-major: row = query ×
// group + head. Each row sees the keys first ≤ s < last, an interval that never moves back along the queries.
#include "few.h"
#include "problem.h"

namespace {

PROBLEM(Problem,  // what ops/polar/native.py hands over; strides in elements, the last axis contiguous
    int64_t batch, heads, queries, width, groups, keys, threads;
    int64_t q_batch, q_head, q_query, k_batch, k_head, k_key, v_batch, v_head, v_key;
    int64_t scale_batch, scale_head, scale_query;
    const void *q, *k, *v, *scale;
    const int32_t *first, *last;             // (B, T)
    void *S, *L, *Q, *M;                     // (B, H, T, K) and (B, H, T); gradients of the first three in the backward
    void *grad_q, *grad_k, *grad_v;          // grad_q of the scaled products: not yet times the scale; (…) contiguous
)

// Six rows by KEY_BLOCK scores are 6 KiB of the first-level cache; with ROW_BLOCK query rows its keys and values stay
// in the second. FEW_ROWS: up to these a call is bound by reading keys, which then are not laid out anew but read in
// place.
constexpr long KEY_BLOCK = 256, ROW_BLOCK = 144, SPLIT_KEYS = 512, FEW_ROWS = 16;
constexpr long LAID_OUT = 8192;  // keys laid out for products at once: bounds what a call needs beside its results

template <class T> struct Block {  // of one key/value head: what the rows of a query block are and see
    const Problem& p;
    long b, g, group, from, to;    // queries [from, to)
    long rows() const { return (to - from) * group; }
    long first(long row) const { return p.first[b * p.queries + from + row / group]; }
    long last(long row) const { return std::min<long>(p.last[b * p.queries + from + row / group], p.keys); }
    long at(long row) const { return (b * p.heads + g * group + row % group) * p.queries + from + row / group; }
    T scale(long row) const {
        return static_cast<const T*>(p.scale)[b * p.scale_batch + (g * group + row % group) * p.scale_head +
                                              (from + row / group) * p.scale_query];
    }
};

// Logits are to base 2 throughout, t log₂e in one factor: 2^x needs no multiplication where e^x has one. M leaves in
// nats.
constexpr double LOG2E = 1.4426950408889634;

template <class T, class E> const E* query(const Problem& p, long b, long h, long i) {
    return static_cast<const E*>(p.q) + b * p.q_batch + h * p.q_head + i * p.q_query;
}

// Scaled query rows (rows, wide), zero beyond the width.
template <class T, class E> void gather_queries(const Block<T>& block, T factor, T* rows, long wide) {
    const Problem& p = block.p;
    for (long r = 0; r < block.rows(); ++r) {
        const E* q = query<T, E>(p, block.b, block.g * block.group + r % block.group, block.from + r / block.group);
        T scale = block.scale(r) * factor;
        for (long d = 0; d < wide; ++d) rows[r * wide + d] = d < p.width ? T(q[d]) * scale : T(0);
    }
}

// Keys [from, to) as panels (panels, wide, panel): the columns of a panel are neighbouring keys.
template <class T, class E> void transpose(const E* x, long stride, long from, long to, long width, long wide, T* out) {
    constexpr long panel = Simd<T>::panel;
    for (long s = from; s < to; s += panel, out += wide * panel)
        for (long d = 0; d < wide; ++d)
            for (long j = 0; j < panel; ++j)
                out[d * panel + j] = d < width && s + j < to ? T(x[(s + j) * stride + d]) : T(0);
}

template <class T, class E> void copy_rows(const E* x, long stride, long from, long to, long width, long wide, T* out) {
    for (long s = from; s < to; ++s, out += wide)
        for (long d = 0; d < wide; ++d) out[d] = d < width ? T(x[s * stride + d]) : T(0);
}

// The columns of a block of keys [j, j + size) that rows [row, row + count) see: relative to j.
template <class T> struct Span {
    long from, to;
    Span(const Block<T>& block, long row, long count, long j, long size)
        : from(std::clamp(block.first(row) - j, 0L, size)), to(std::clamp(block.last(row + count - 1) - j, 0L, size)) {}
};

// a = q kᵀ of a strip of at most six rows over the panels of its span.
template <class T>
void score_strip(const T* q, long count, long wide, const T* panels, Span<T> span, T* a, long a_row) {
    constexpr long panel = Simd<T>::panel;
    for (long c = span.from / panel; c * panel < span.to; ++c)
        strip<T>(count, panel, wide, q, wide, 1, panels + c * wide * panel, panel, a + c * panel, a_row, false);
}

template <class T> struct Sums {
    T top, sum, squares;
};

// In place a → 2^(a − top) over the columns [from, to) that a row sees, zero elsewhere in [low, high). `sums` is updated
// to the new maximum; returns the factor by which what was read before must shrink.
template <class T> T soften(T* a, long from, long to, long low, long high, Sums<T>& sums) {
    using S = Simd<T>;
    constexpr long lanes = S::lanes;
    for (long j = low; j < from; ++j) a[j] = T(-1e30);
    for (long j = std::max(to, low); j < high; ++j) a[j] = T(-1e30);
    // M of these columns, four times: hidden columns hold −1e30, which no score is below, so the mask costs no
    // comparison.
    typename S::V best = S::load(a + low);
    for (long j = low + lanes; j < high; j += lanes) {
        typename S::V x = S::load(a + j);
        best = x > best ? x : best;
    }
    // The running maximum M, and p = 2^(a − M) ≤ 1: nothing overflows, however large t grows.
    T top = std::max(sums.top, S::max(best));
    typename S::V sum{}, squares{};
    for (long j = low; j < high; j += lanes) {
        typename S::V x = exp2_of(S::load(a + j) - top);
        S::store(a + j, x);
        sum += x;
        squares += x * x;
    }
    // α = 2^(M_old − M_new): L grows to the new maximum by α, Q by α², since its terms are squares.
    T shrink = exp2_of_one(sums.top - top);
    sums = {top, sums.sum * shrink + S::sum(sum), sums.squares * shrink * shrink + S::sum(squares)};
    return shrink;
}

template <class T> void zero(T* x, long size) { std::fill(x, x + size, T(0)); }

// One block of queries against the keys of [base, end) that it sees, added to S and sums. panels and values begin at base.
template <class T>
void attend(const Block<T>& block, const T* q, const T* panels, const T* values, long base, long end, long wide, T* a, T* S,
            Sums<T>* sums) {
    constexpr long lanes = Simd<T>::lanes, panel = Simd<T>::panel;
    // Blocks before the first row's window, or after the last row's position, are not visited at all.
    long rows = block.rows(), begin = base + std::max(0L, block.first(0) - base) / panel * panel;
    for (long j = begin; j < std::min(end, block.last(rows - 1)); j += KEY_BLOCK)
        for (long r = 0; r < rows; r += TILE_ROWS) {
            long count = std::min<long>(TILE_ROWS, rows - r), size = std::min(KEY_BLOCK, end - j);
            Span<T> span(block, r, count, j, size);
            // Of the blocks visited, a strip of six rows takes the columns that any of them sees, to a whole vector.
            if (span.from >= span.to) continue;
            long low = span.from / lanes * lanes, high = (span.to + lanes - 1) / lanes * lanes;
            score_strip(q + r * wide, count, wide, panels + (j - base) * wide, span, a, KEY_BLOCK);
            for (long i = r; i < r + count; ++i) {
                T* row = a + (i - r) * KEY_BLOCK;
                Span<T> seen(block, i, 1, j, size);
                if (seen.from >= seen.to) {
                    // A row of the strip that sees nothing here must add nothing to S below: p = 0, with M, L, Q left
                    // alone.
                    zero(row + low, high - low);
                    continue;
                }
                T shrink = soften(row, seen.from, seen.to, low, high, sums[i]);
                // S ← α S, before this block's p v are added. Mostly M stays and this is skipped.
                if (shrink != T(1))
                    for (long d = 0; d < wide; ++d) S[i * wide + d] *= shrink;
            }
            // S += p V of the six rows at once.
            strip<T>(count, wide, high - low, a + low, KEY_BLOCK, 1, values + (j - base + low) * wide, wide, S + r * wide,
                     wide, true);
        }
}

template <class T> void put(const Block<T>& block, const T* S, const Sums<T>* sums, long wide) {
    const Problem& p = block.p;
    for (long r = 0; r < block.rows(); ++r) {
        long at = block.at(r);
        std::copy(S + r * wide, S + r * wide + p.width, static_cast<T*>(p.S) + at * p.width);
        static_cast<T*>(p.L)[at] = sums[r].sum;
        static_cast<T*>(p.Q)[at] = sums[r].squares;
        // M as the backward pass and the null sink want it: a natural logarithm's.
        static_cast<T*>(p.M)[at] = T(sums[r].top / LOG2E);
    }
}

template <class T, class E> struct Head {  // one key/value head: its sizes, and the keys that any query sees
    const Problem& p;
    long b, g, group, wide, from, to;
    Head(const Problem& p, long index)
        : p(p), b(index / p.groups), g(index % p.groups), group(p.heads / p.groups), wide(padded<T>(p.width)),
          from(p.first[b * p.queries]), to(std::min<long>(p.last[b * p.queries + p.queries - 1], p.keys)) {}
    const E* key(long s) const { return static_cast<const E*>(p.k) + b * p.k_batch + g * p.k_head + s * p.k_key; }
    const E* value(long s) const { return static_cast<const E*>(p.v) + b * p.v_batch + g * p.v_head + s * p.v_key; }
    long room() const { return (to - from + KEY_BLOCK) * wide; }  // a block that begins at the last key stays inside
    Block<T> block(long i, long step) const { return {p, b, g, group, i * step, std::min((i + 1) * step, long(p.queries))}; }

    template <class Work> void in_stretches(long begin, long end, Work work) const {
        constexpr long stretch = 1024;
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (long s = begin; s < end; s += stretch) work(s, std::min(s + stretch, end), (s - begin) * wide);
    }
};

template <class T, class E> void forward_head(const Problem& p, long index) {
    Head<T, E> head(p, index);
    long wide = head.wide, step = std::max(1L, ROW_BLOCK / head.group), blocks = (p.queries + step - 1) / step;
    long rows = p.queries * head.group, room = (std::min(LAID_OUT, head.to - head.from) + KEY_BLOCK) * wide;
    Buffer<T> panels(room), values(room), S(rows * wide);
    Buffer<Sums<T>> sums(rows);
    zero(S.get(), rows * wide);
    std::fill(sums.get(), sums + rows, Sums<T>{T(-1e30), 0, 0});
    // S, L, Q, M are carried over stretches of LAID_OUT keys, so that the room for keys does not grow with the text.
    for (long base = head.from; base < head.to; base += LAID_OUT) {
        long end = std::min(base + LAID_OUT, head.to);
        head.in_stretches(base, end, [&](long s, long e, long at) {
            // Keys as columns for q kᵀ, values as rows for p V, both widened to T: once for all query blocks.
            transpose<T, E>(head.key(0), p.k_key, s, e, p.width, wide, panels + at);
            copy_rows<T, E>(head.value(0), p.v_key, s, e, p.width, wide, values + at);
        });
        // What lies behind the last key meets p = 0; it must be finite all the same.
        zero(values + (end - base) * wide, KEY_BLOCK * wide);
#pragma omp parallel num_threads(p.threads)
        {
            Buffer<T> q(step * head.group * wide), a(TILE_ROWS * KEY_BLOCK);
#pragma omp for schedule(dynamic)
            // The last block sees most keys: longest first, so that threads end together.
            for (long i = blocks - 1; i >= 0; --i) {
                Block<T> block = head.block(i, step);
                if (block.last(block.rows() - 1) <= base || block.first(0) >= end) continue;
                long at = i * step * head.group;
                gather_queries<T, E>(block, T(LOG2E), q, wide);
                attend<T>(block, q, panels, values, base, end, wide, a, S + at * wide, sums + at);
            }
        }
    }
    put<T>(head.block(0, p.queries), S, sums, wide);
}

// Few query rows, many keys: keys are read once, in splits that threads share; `merge` joins the splits exactly.
template <class T, class E>
void forward_split(const Head<T, E>& head, const E* q, const T* factor, long s, long e, T* a, T* S, Sums<T>* sums) {
    Block<T> block = head.block(0, head.p.queries);
    long rows = block.rows(), wide = head.wide, width = head.p.width, stride = head.p.k_key;
    for (long r = 0; r < rows; r += 4) {
        // Four rows share one pass over the keys; more would not leave a register for the key.
        auto score = score_rows<T, E>(rows - r);
        score(q + r * wide, factor + r, wide, head.key(s), stride, e - s, width, a + r * SPLIT_KEYS, SPLIT_KEYS);
    }
    for (long r = 0; r < rows; ++r) {
        sums[r] = {T(-1e30), 0, 0};
        Span<T> seen(block, r, 1, s, e - s);
        if (seen.from < seen.to) soften(a + r * SPLIT_KEYS, seen.from, seen.to, 0, padded<T>(e - s), sums[r]);
        else zero(a + r * SPLIT_KEYS, e - s);
    }
    for (long r = 0; r < rows; r += TILE_ROWS) {
        long count = std::min<long>(TILE_ROWS, rows - r);
        // Whole vectors: values are read where they lie. Otherwise a copy, filled up with zeros, keeps reads inside the
        // tensor.
        if (wide == width) {
            strip<T>(count, wide, e - s, a + r * SPLIT_KEYS, SPLIT_KEYS, 1, head.value(s), head.p.v_key, S + r * wide, wide, false);
        } else {
            Buffer<T> values((e - s) * wide);
            copy_rows<T, E>(head.value(0), head.p.v_key, s, e, width, wide, values);
            strip<T>(count, wide, e - s, a + r * SPLIT_KEYS, SPLIT_KEYS, 1, values.get(), wide, S + r * wide, wide, false);
        }
    }
}

template <class T> void merge(T* S, Sums<T>& sums, const T* other_S, const Sums<T>& other, long wide) {
    // Two partial results over disjoint keys: both shrink to the larger M, then L, Q and S add.
    T top = std::max(sums.top, other.top), mine = exp2_of_one(sums.top - top), theirs = exp2_of_one(other.top - top);
    for (long d = 0; d < wide; ++d) S[d] = S[d] * mine + other_S[d] * theirs;
    sums = {top, sums.sum * mine + other.sum * theirs, sums.squares * mine * mine + other.squares * theirs * theirs};
}

template <class T, class E> void forward_few(const Problem& p) {
    long heads = p.batch * p.groups, rows = p.queries * p.heads / p.groups, wide = padded<T>(p.width);
    long splits = 1;
    for (long i = 0; i < heads; ++i) {
        Head<T, E> head(p, i);
        splits = std::max(splits, (head.to - head.from + SPLIT_KEYS - 1) / SPLIT_KEYS);
    }
    Buffer<T> S(heads * splits * rows * wide), factors(heads * rows);
    Buffer<E> q(heads * rows * wide);
    Buffer<Sums<T>> sums(heads * splits * rows);
#pragma omp parallel num_threads(p.threads) if (splits * heads > 1)
    {
        Buffer<T> a(rows * SPLIT_KEYS);
#pragma omp for
        for (long i = 0; i < heads; ++i) {
            Block<T> block = Head<T, E>(p, i).block(0, p.queries);
            for (long r = 0; r < rows; ++r) {
                const E* x = query<T, E>(p, block.b, block.g * block.group + r % block.group, r / block.group);
                std::copy(x, x + p.width, q + (i * rows + r) * wide);
                // q stays as stored, so that bfloat16 pairs can be multiplied; t/√K and log₂e are applied to the
                // finished score.
                factors[i * rows + r] = block.scale(r) * T(LOG2E);
            }
        }
#pragma omp for collapse(2) schedule(static)
        for (long i = 0; i < heads; ++i)
            for (long c = 0; c < splits; ++c) {
                Head<T, E> head(p, i);
                // Every split by itself, whatever thread it falls to: its M, L, Q, S depend on its keys alone.
                long s = std::min(head.from + c * SPLIT_KEYS, head.to), e = std::min(s + SPLIT_KEYS, head.to);
                long at = (i * splits + c) * rows;
                forward_split<T, E>(head, q + i * rows * wide, factors + i * rows, s, e, a, S + at * wide, sums + at);
            }
#pragma omp for
        for (long i = 0; i < heads; ++i) {
            long at = i * splits * rows;
            // Joined in the order of the keys, not of the threads: the same bits with any number of them.
            for (long c = 1; c < splits; ++c)
                for (long r = 0; r < rows; ++r)
                    merge<T>(S + (at + r) * wide, sums[at + r], S + (at + c * rows + r) * wide, sums[at + c * rows + r], wide);
            put<T>(Head<T, E>(p, i).block(0, p.queries), S + at * wide, sums + at, wide);
        }
    }
}

// Every key/value head, shared out or each by all threads. Not by a condition of one region: the threads of a region
// inside another, if only of one thread, are made anew each time, which takes milliseconds.
template <class Work> void in_heads(const Problem& p, bool shared, Work work) {
    long heads = p.batch * p.groups;
    if (!shared) {
        for (long i = 0; i < heads; ++i) work(i);
        return;
    }
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
    for (long i = 0; i < heads; ++i) work(i);
}

template <class T, class E> void forward(const Problem& p) {
    if (p.queries * p.heads / p.groups <= FEW_ROWS) return forward_few<T, E>(p);
    in_heads(p, p.batch * p.groups >= p.threads, [&](long i) { forward_head<T, E>(p, i); });
}

template <class T> struct Rows {  // of all queries of one key/value head, gathered once for the backward pass
    Buffer<T> q, grad_S, grad_L, grad_Q, top;
    Rows(const Block<T>& all, long wide)
        : q(all.rows() * wide), grad_S(all.rows() * wide), grad_L(all.rows()), grad_Q(all.rows()), top(all.rows()) {
        const Problem& p = all.p;
        for (long r = 0; r < all.rows(); ++r) {
            long at = all.at(r);
            const T* from = static_cast<const T*>(p.S) + at * p.width;
            for (long d = 0; d < wide; ++d) grad_S[r * wide + d] = d < p.width ? from[d] : T(0);
            grad_L[r] = static_cast<const T*>(p.L)[at];
            // ∂Q/∂p = 2p: the factor 2 is put in once here.
            grad_Q[r] = 2 * static_cast<const T*>(p.Q)[at];
            top[r] = static_cast<const T*>(p.M)[at] * T(LOG2E);
        }
    }
};

// p = 2^(a − top) in place of a, and da = p (dp + grad_L + 2 grad_Q p) in place of dp, zero where the row sees nothing.
template <class T> void differentiate(T* a, T* da, Span<T> seen, long low, long high, T top, T grad_L, T grad_Q) {
    using S = Simd<T>;
    // Hidden before the exponential, so p and da are exactly 0, and no −∞ · 0 becomes NaN.
    for (long j = low; j < std::min(seen.from, high); ++j) a[j] = T(-1e30);
    for (long j = std::max(seen.to, low); j < high; ++j) a[j] = T(-1e30);
    for (long j = low; j < high; j += S::lanes) {
        typename S::V x = exp2_of(S::load(a + j) - top);
        S::store(a + j, x);
        // da_j = p_j (g_S·v_j + g_L + 2 p_j g_Q); dp = g_S·v_j stands in da. M is a constant: it cancels in what
        // follows.
        S::store(da + j, x * (S::load(da + j) + grad_L + grad_Q * x));
    }
}

template <class T> struct Gradients {  // of one block of keys (KEY_BLOCK, wide), and room for a block of scores
    Buffer<T> k, v, weights, da;
    explicit Gradients(long wide)
        : k(KEY_BLOCK * wide), v(KEY_BLOCK * wide), weights(ROW_BLOCK * KEY_BLOCK), da(ROW_BLOCK * KEY_BLOCK) {}
};

template <class T, class E>
void backward_keys(const Head<T, E>& head, const Rows<T>& rows, const T* k_panels, const T* v_panels, const T* keys, long j,
                   Gradients<T>& grads, T* grad_q) {
    constexpr long lanes = Simd<T>::lanes;
    const Problem& p = head.p;
    Block<T> all = head.block(0, p.queries);
    long wide = head.wide, size = std::min(KEY_BLOCK, head.to - j), high_end = padded<T>(size);
    zero<T>(grads.k, KEY_BLOCK * wide), zero<T>(grads.v, KEY_BLOCK * wide);
    const int32_t *first = p.first + head.b * p.queries, *last = p.last + head.b * p.queries;
    // first and last never go back along the queries, so the rows that see this block are one interval.
    long begin = (std::upper_bound(last, last + p.queries, int32_t(j)) - last) * head.group;
    long end = (std::lower_bound(first, first + p.queries, int32_t(j + size)) - first) * head.group;
    for (long r0 = begin; r0 < end; r0 += ROW_BLOCK) {
        long stop = std::min(r0 + ROW_BLOCK, end), least = high_end, most = 0;
        // Columns that any strip of these rows sees: the tables are one rectangle for the two products over rows below.
        for (long r = r0; r < stop; r += TILE_ROWS) {
            long count = std::min<long>(TILE_ROWS, stop - r);
            Span<T> span(all, r, count, j, size);
            least = std::min(least, span.from / lanes * lanes), most = std::max(most, padded<T>(span.to));
        }
        for (long r = r0; r < stop; r += TILE_ROWS) {
            long count = std::min<long>(TILE_ROWS, stop - r);
            Span<T> span(all, r, count, j, size);
            // Scores again from q and k, dp = g_S Vᵀ beside them: two of the five products.
            T *weights = grads.weights + (r - r0) * KEY_BLOCK, *da = grads.da + (r - r0) * KEY_BLOCK;
            score_strip<T>(rows.q + r * wide, count, wide, k_panels + (j - head.from) * wide, span, weights, KEY_BLOCK);
            score_strip<T>(rows.grad_S + r * wide, count, wide, v_panels + (j - head.from) * wide, span, da, KEY_BLOCK);
            long low = span.from / lanes * lanes, high = padded<T>(span.to);
            for (long i = r; i < r + count; ++i) {
                T *w = weights + (i - r) * KEY_BLOCK, *d = da + (i - r) * KEY_BLOCK;
                differentiate<T>(w, d, Span<T>(all, i, 1, j, size), low, high, rows.top[i], rows.grad_L[i], rows.grad_Q[i]);
                // What this strip does not see of the rectangle is 0 in both tables.
                zero(w + least, low - least), zero(d + least, low - least);
                zero(w + high, most - high), zero(d + high, most - high);
            }
            // grad q += da K, not yet times t/√K: the caller does that, and takes from it the gradient of t.
            strip<T>(count, wide, high - low, da + low, KEY_BLOCK, 1, keys + (j - head.from + low) * wide, wide,
                     grad_q + r * wide, wide, true);
        }
        // grad V += pᵀ g_S, and grad K += daᵀ (q t/√K log₂e), whose log₂e is taken out again at the end.
        product<T>(most - least, wide, stop - r0, grads.weights + least, 1, KEY_BLOCK, rows.grad_S + r0 * wide, wide,
                   grads.v + least * wide, wide, true);
        product<T>(most - least, wide, stop - r0, grads.da + least, 1, KEY_BLOCK, rows.q + r0 * wide, wide,
                   grads.k + least * wide, wide, true);
    }
    for (long s = j; s < j + size; ++s) {
        long at = ((head.b * p.groups + head.g) * p.keys + s) * p.width;
        for (long d = 0; d < p.width; ++d) {
            static_cast<T*>(p.grad_k)[at + d] = grads.k[(s - j) * wide + d] / T(LOG2E);
            static_cast<T*>(p.grad_v)[at + d] = grads.v[(s - j) * wide + d];
        }
    }
}

template <class T, class E> void backward_head(const Problem& p, long index, long splits) {
    Head<T, E> head(p, index);
    Block<T> all = head.block(0, p.queries);
    long wide = head.wide, size = all.rows() * wide;
    Rows<T> rows(all, wide);
    gather_queries<T, E>(all, T(LOG2E), rows.q, wide);
    // Both products of scores want columns (k for a, v for dp); da K wants keys as rows.
    Buffer<T> k_panels(head.room()), v_panels(head.room()), keys(head.room()), grad_q(splits * size);
    head.in_stretches(head.from, head.to, [&](long s, long e, long at) {
        transpose<T, E>(head.key(0), p.k_key, s, e, p.width, wide, k_panels + at);
        transpose<T, E>(head.value(0), p.v_key, s, e, p.width, wide, v_panels + at);
        copy_rows<T, E>(head.key(0), p.k_key, s, e, p.width, wide, keys + at);
    });
    zero(keys + (head.to - head.from) * wide, KEY_BLOCK * wide);
    zero<T>(grad_q, splits * size);
#pragma omp parallel for num_threads(p.threads) schedule(static, 1)
    for (long c = 0; c < splits; ++c) {
        Gradients<T> grads(wide);
        for (long j = head.from + c * KEY_BLOCK; j < head.to; j += splits * KEY_BLOCK)
            backward_keys<T, E>(head, rows, k_panels, v_panels, keys, j, grads, grad_q + c * size);
    }
    for (long r = 0; r < all.rows(); ++r)
        for (long d = 0; d < p.width; ++d) {
            T total = 0;
            // Each thread owned every `splits`-th key block; its shares of grad q are added in a fixed order.
            for (long c = 0; c < splits; ++c) total += grad_q[c * size + r * wide + d];
            static_cast<T*>(p.grad_q)[all.at(r) * p.width + d] = total;
        }
}

template <class T, class E> void backward(const Problem& p) {
    // With a head for every thread, heads are shared out; with fewer, the key blocks of each.
    long heads = p.batch * p.groups, splits = heads >= p.threads ? 1 : p.threads;
    in_heads(p, splits == 1, [&](long i) { backward_head<T, E>(p, i, splits); });
}
PROBLEM(Scalars,  // logits' scale and the null's logit (B, H, T) of ops/polar/__init__.py, from the learned numbers (H)
    int64_t batch, heads, queries, width, count_limit;  // count_limit 0: none
    const int32_t *first, *last;
    const void *length_gain, *null_base, *null_slope;
    void *scale, *null;
    double sharpening;
)

template <class T> T softplus(T x) { return x > T(20) ? x : std::log1p(std::exp(x)); }

template <class T> void scalars(const Scalars& p) {
    for (long row = 0; row < p.batch * p.heads * p.queries; ++row) {
        long h = row / p.queries % p.heads, at = row / (p.queries * p.heads) * p.queries + row % p.queries;
        // n, the keys this query sees, itself among them: at least 1.
        T count = T(p.last[at] - p.first[at]), log_count = std::log(count);
        if (p.count_limit > 0) {
            // Beyond m = min(n, limit): ln m + sharpening · ln(n/m) in place of ln n for t, and m in place of n for ν.
            count = std::min(count, T(p.count_limit));
            log_count = std::log(count) + T(p.sharpening) * (log_count - std::log(count));
        }
        // t = 1 + sp(length_gain) ln n; ν = null_base + sp(null_slope) √ln(n + 1): `temperature_and_floor` of
        // ops/polar.
        T temperature = 1 + softplus(static_cast<const T*>(p.length_gain)[h]) * log_count;
        T floor = static_cast<const T*>(p.null_base)[h] +
                  softplus(static_cast<const T*>(p.null_slope)[h]) * std::sqrt(std::log(count + 1));
        static_cast<T*>(p.scale)[row] = temperature / std::sqrt(T(p.width));
        static_cast<T*>(p.null)[row] = temperature * floor;
    }
}

PROBLEM(Fold,  // direction (B, H, T, K) and magnitude (B, H, T): `fold` of ops/polar/__init__.py
    int64_t rows, heads, queries, width;
    const void *S, *L, *Q, *M, *null, *magnitude_slope, *null_value;
    void *direction, *magnitude;
)

template <class T> void fold(const Fold& p) {
    for (long row = 0; row < p.rows; ++row) {
        long h = row / p.queries % p.heads;
        // The null's logit t ν against M: where it is above, everything shrinks to it instead, so e^(tν − M) cannot
        // overflow.
        T above = static_cast<const T*>(p.null)[row] - static_cast<const T*>(p.M)[row], shift = above < T(0) ? T(0) : above;
        T null = std::exp(above - shift), small = std::exp(-shift), sum = static_cast<const T*>(p.L)[row];
        // Z = L + p0.
        T kept = sum * small, total = kept + null, squares = 0;
        const T *S = static_cast<const T*>(p.S) + row * p.width, *value = static_cast<const T*>(p.null_value) + h * p.width;
        T* direction = static_cast<T*>(p.direction) + row * p.width;
        // d = S + p0 · null_value; 1/Z cancels in c = d / ‖d‖, and 1e-6 of the formula stands for Z · 1e-6 here.
        for (long d = 0; d < p.width; ++d) direction[d] = S[d] * small + null * value[d];
        for (long d = 0; d < p.width; ++d) squares += direction[d] * direction[d];
        T length = std::sqrt(squares), factor = T(1) / (length < T(1e-6) * total ? T(1e-6) * total : length);
        for (long d = 0; d < p.width; ++d) direction[d] *= factor;
        // m_eff = n_eff (1 − w_N) = L²/Q · L/Z; μ = tanh(sp(magnitude_slope) log(1 + m_eff)).
        T effective = sum * sum / static_cast<const T*>(p.Q)[row] * (kept / total);
        T slope = softplus(static_cast<const T*>(p.magnitude_slope)[h]);
        static_cast<T*>(p.magnitude)[row] = std::tanh(slope * std::log1p(effective));
    }
}
}  // namespace

#define EXPORT_ROWS(NAME, T)                          \
    KERNEL(polar_scalars_##NAME, Scalars, scalars<T>) \
    KERNEL(polar_fold_##NAME, Fold, fold<T>)
EXPORT_ROWS(float32, float)
EXPORT_ROWS(float64, double)

#define EXPORT(NAME, T, E)                               \
    KERNEL(polar_forward_##NAME, Problem, forward<T, E>) \
    KERNEL(polar_backward_##NAME, Problem, backward<T, E>)
EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, float, bfloat16)

#ifndef ATMA_BUILD
#define ATMA_BUILD ""
#endif
extern "C" const char* build_name() { return ATMA_BUILD; }  // which the loader compares with the file's
extern "C" int64_t vector_bytes() { return VECTOR_BYTES; }
#ifdef _OPENMP
extern "C" int64_t threaded() { return 1; }
#else
extern "C" int64_t threaded() { return 0; }
#endif
