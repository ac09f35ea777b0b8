// Streamed attention statistics (ops/polar/reference.py) over keys in pages. Each query's sums are those of every page
// by itself, joined in the order of the pages: the same bits however many queries a call has and however many threads.
// Keys lie in a page as (K, page), so that neighbouring keys are neighbouring numbers; values as (page, K).
#include "problem.h"
#include "simd.h"

namespace {

PROBLEM(Problem,  // strides in elements; keys (pages, G, K, page), values (pages, G, page, K), all else contiguous
    int64_t batch, heads, groups, queries, width, page, table_row;
    int64_t q_batch, q_head, q_query;
    const void *q, *keys, *values, *scale;        // q and scale (B, H, T, ·)
    const int32_t *table, *first, *last;          // (B, table_row), a ring of pages; (B, T) twice
    void *S, *L, *Q, *M;
    int64_t threads;
)

// ROW_BLOCK rows share the reading of a page; a wave is how many pages threads hold results of at once.
constexpr long ROW_BLOCK = 48, WAVE = 32;
constexpr double LOG2E = 1.4426950408889634;

template <class T> struct Sums {
    T top, sum, squares;
};

// In place a → 2^(a − top) over the columns [from, to) of a page, zero elsewhere in [low, high).
template <class T> Sums<T> soften(T* a, long from, long to, long low, long high) {
    using S = Simd<T>;
    for (long j = low; j < from; ++j) a[j] = T(-1e30);
    for (long j = to; j < high; ++j) a[j] = T(-1e30);
    // M of this page, then p = 2^(a − M), L and Q; no maximum is carried on, so a page's sums are its own.
    typename S::V best = S::load(a + low);
    for (long j = low + S::lanes; j < high; j += S::lanes) {
        typename S::V x = S::load(a + j);
        best = x > best ? x : best;
    }
    T top = S::max(best);
    typename S::V sum{}, squares{};
    for (long j = low; j < high; j += S::lanes) {
        typename S::V x = exp2_of(S::load(a + j) - top);
        S::store(a + j, x);
        sum += x;
        squares += x * x;
    }
    return {top, S::sum(sum), S::sum(squares)};
}

template <class E> bool finite(const E* x, long size) {
    // x − x is 0 for a finite number and NaN for any other.
    bool all = true;
    for (long i = 0; i < size; ++i) all &= float(x[i]) - float(x[i]) == 0.0f;
    return all;
}

template <class T> __attribute__((noinline)) void merge(T* S, Sums<T>& sums, const T* other_S, const Sums<T>& other, long wide) {
    // Pages join as any two disjoint sets of keys: L by 2^(M − M_new), Q by its square. Not inlined, so that it is the
    // same code, and rounding, wherever it is called from.
    T top = std::max(sums.top, other.top), mine = exp2_of_one(sums.top - top), theirs = exp2_of_one(other.top - top);
    for (long d = 0; d < wide; ++d) S[d] = S[d] * mine + other_S[d] * theirs;
    sums = {top, sums.sum * mine + other.sum * theirs, sums.squares * mine * mine + other.squares * theirs * theirs};
}

// Rows [from, from + count) of one key/value head; row = query × group + head, so that what they see never moves back.
template <class T, class E> struct Strip {
    const Problem& p;
    long b, g, from, count;
    long group() const { return p.heads / p.groups; }
    long query(long r) const { return (from + r) / group(); }
    long at(long r) const { return (b * p.heads + g * group() + (from + r) % group()) * p.queries + query(r); }
    long first(long r) const { return p.first[b * p.queries + query(r)]; }
    long last(long r) const { return p.last[b * p.queries + query(r)]; }
    long page(long n) const { return (p.table[b * p.table_row + n % p.table_row] * p.groups + g) * p.width * p.page; }

    void gather(T* q, long wide) const {
        for (long r = 0; r < count; ++r) {
            const E* x = static_cast<const E*>(p.q) + b * p.q_batch + (g * group() + (from + r) % group()) * p.q_head +
                         query(r) * p.q_query;
            // t/√K and log₂e go into q, in T: scores are then logits to base 2.
            T scale = static_cast<const T*>(p.scale)[at(r)] * T(LOG2E);
            for (long d = 0; d < wide; ++d) q[r * wide + d] = d < p.width ? T(x[d]) * scale : T(0);
        }
    }
    // S (count, wide) and sums of page n alone; a (6, page) is room. A row that sees nothing of it has sum 0.
    __attribute__((noinline)) void attend(long n, const T* q, long wide, T* a, T* S, Sums<T>* sums) const {
        constexpr long lanes = Simd<T>::lanes;
        long base = n * p.page, low = std::max(0L, first(0) - base) / lanes * lanes;
        long end = std::min<long>(p.page, last(count - 1) - base), high = padded<T>(end);
        const E* keys = static_cast<const E*>(p.keys) + page(n) + low;
        // a = q kᵀ: keys lie as (K, page), which is how a product wants its right side.
        strip<T>(count, high - low, p.width, q, wide, 1, keys, p.page, a + low, p.page, false);
        // Tokens that every row of the strip sees are [seen_by_all, seen_until).
        long seen_by_all = low, seen_until = end;
        for (long r = 0; r < count; ++r) {
            long from = std::max(0L, first(r) - base), to = std::min(end, last(r) - base);
            if (from < to) {
                // A row's own columns of the page; what it does not see has p = 0.
                sums[r] = soften(a + r * p.page, from, to, low, high);
            } else {
                std::fill(a + r * p.page + low, a + r * p.page + high, T(0));
                sums[r] = {T(-1e30), 0, 0};
            }
            seen_by_all = std::max(seen_by_all, std::min(from, end));
            seen_until = std::min(seen_until, std::max(to, low));
        }
        seen_until = std::max(seen_until, low);
        const E* values = static_cast<const E*>(p.values) + page(n);
        // 0 · NaN is NaN: where a token that some row does not see is not finite, each row reads only what it sees.
        if (finite(values + low * p.width, (seen_by_all - low) * p.width) && finite(values + seen_until * p.width, (end - seen_until) * p.width)) {
            read(values, 0, count, low, end, wide, a, S);
            return;
        }
        for (long r = 0; r < count; ++r) {  // a hidden value that is not finite would spoil a row in spite of its weight 0
            long from = std::max(0L, first(r) - base), to = std::min(end, last(r) - base);
            if (from < to) read(values, r, 1, from, to, wide, a, S);
        }
    }
    // Rows [r, r + rows) of S = a · the values of a page's tokens [from, to).
    void read(const E* values, long r, long rows, long from, long to, long wide, const T* a, T* S) const {
        values += from * p.width, a += r * p.page + from, S += r * wide;
        if (wide == p.width) {
            strip<T>(rows, wide, to - from, a, p.page, 1, values, p.width, S, wide, false);
            return;
        }
        Buffer<T> copied((to - from) * wide);
        for (long j = 0; j < to - from; ++j)
            for (long d = 0; d < wide; ++d) copied[j * wide + d] = d < p.width ? T(values[j * p.width + d]) : T(0);
        strip<T>(rows, wide, to - from, a, p.page, 1, copied.get(), wide, S, wide, false);
    }
    void put(const T* S, const Sums<T>* sums, long wide) const {
        for (long r = 0; r < count; ++r) {
            std::copy(S + r * wide, S + r * wide + p.width, static_cast<T*>(p.S) + at(r) * p.width);
            static_cast<T*>(p.L)[at(r)] = sums[r].sum;
            static_cast<T*>(p.Q)[at(r)] = sums[r].squares;
            static_cast<T*>(p.M)[at(r)] = T(sums[r].top / LOG2E);
        }
    }
};

// A block of rows, page after page: a page stays in the cache for all its strips.
template <class T, class E> void attend_block(const Problem& p, long b, long g, long from, long to) {
    long wide = padded<T>(p.width), rows = to - from;
    Buffer<T> q(rows * wide), S(rows * wide), a(TILE_ROWS * p.page), part(TILE_ROWS * wide);
    Buffer<Sums<T>> sums(rows);
    std::fill(S.get(), S + rows * wide, T(0));
    std::fill(sums.get(), sums + rows, Sums<T>{T(-1e30), 0, 0});
    Sums<T> of_page[TILE_ROWS];
    Strip<T, E> all{p, b, g, from, rows};
    all.gather(q, wide);
    for (long n = all.first(0) / p.page; n * p.page < all.last(rows - 1); ++n)
        for (long r = 0; r < rows; r += TILE_ROWS) {
            Strip<T, E> strip{p, b, g, from + r, std::min<long>(TILE_ROWS, rows - r)};
            if (strip.last(strip.count - 1) <= n * p.page || strip.first(0) >= (n + 1) * p.page) continue;
            strip.attend(n, q + r * wide, wide, a, part, of_page);
            for (long i = 0; i < strip.count; ++i)
                // A page of which a row sees nothing must not touch its sums, not even by a factor of 1 at M = −1e30.
                if (of_page[i].sum != T(0)) merge<T>(S + (r + i) * wide, sums[r + i], part + i * wide, of_page[i], wide);
        }
    all.put(S, sums, wide);
}

// One strip whose pages the threads share, a wave of them at a time.
template <class T, class E> void attend_strip(const Problem& p, const Strip<T, E>& strip) {
    long wide = padded<T>(p.width), size = TILE_ROWS * wide;
    Buffer<T> q(size), S(size), parts(WAVE * size);
    Buffer<Sums<T>> of_pages(WAVE * TILE_ROWS);
    Sums<T> sums[TILE_ROWS];
    std::fill(S.get(), S + size, T(0));
    std::fill(sums, sums + TILE_ROWS, Sums<T>{T(-1e30), 0, 0});
    strip.gather(q, wide);
    long begin = strip.first(0) / p.page, end = (strip.last(strip.count - 1) + p.page - 1) / p.page;
    for (long wave = begin; wave < end; wave += WAVE) {
        // Pages side by side, each into its own place, then joined in their order: the same bits as one after the
        // other.
        long count = std::min(WAVE, end - wave);
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (long i = 0; i < count; ++i) {
            Buffer<T> a(TILE_ROWS * p.page);
            strip.attend(wave + i, q, wide, a, parts + i * size, of_pages + i * TILE_ROWS);
        }
        for (long i = 0; i < count; ++i)
            for (long r = 0; r < strip.count; ++r) {
                const Sums<T>& other = of_pages[i * TILE_ROWS + r];
                if (other.sum != T(0)) merge<T>(S + r * wide, sums[r], parts + i * size + r * wide, other, wide);
            }
    }
    strip.put(S, sums, wide);
}

template <class T, class E> void forward(const Problem& p) {
    long rows = p.queries * p.heads / p.groups, blocks = (rows + ROW_BLOCK - 1) / ROW_BLOCK;
    long longest = 0;
    for (long b = 0; b < p.batch; ++b) longest = std::max<long>(longest, p.last[b * p.queries + p.queries - 1]);
    // One long text and few queries: the pages are what there is to share out. Either way a row has the same bits.
    if (rows <= TILE_ROWS && p.threads > 1 && p.batch * p.groups < p.threads && longest > 4 * p.page) {
        for (long i = 0; i < p.batch * p.groups; ++i) attend_strip<T, E>(p, {p, i / p.groups, i % p.groups, 0, rows});
        return;
    }
#pragma omp parallel for collapse(2) num_threads(p.threads) schedule(dynamic) if (longest * rows * p.batch > 512)
    for (long i = 0; i < p.batch * p.groups; ++i)
        for (long n = blocks - 1; n >= 0; --n)
            attend_block<T, E>(p, i / p.groups, i % p.groups, n * ROW_BLOCK, std::min((n + 1) * ROW_BLOCK, rows));
}

PROBLEM(Writing,  // new keys and values (B, G, T, K) into the pages of their positions, from length (B) on
    int64_t batch, groups, tokens, width, page, table_row;
    int64_t k_batch, k_head, k_token, v_batch, v_head, v_token;
    const void *k, *v;
    const int32_t *table, *length;
    void *keys, *values;
)

template <class E> void write(const Writing& p) {
    for (long b = 0; b < p.batch; ++b)
        for (long t = 0; t < p.tokens; ++t) {
            // The page by the row's table, keys turned to (K, page) on the way in.
            long position = p.length[b] + t, slot = position % p.page;
            long page = p.table[b * p.table_row + position / p.page % p.table_row];
            for (long g = 0; g < p.groups; ++g) {
                const E* k = static_cast<const E*>(p.k) + b * p.k_batch + g * p.k_head + t * p.k_token;
                const E* v = static_cast<const E*>(p.v) + b * p.v_batch + g * p.v_head + t * p.v_token;
                long at = (page * p.groups + g) * p.width * p.page;
                E *keys = static_cast<E*>(p.keys) + at + slot, *values = static_cast<E*>(p.values) + at + slot * p.width;
                for (long d = 0; d < p.width; ++d) keys[d * p.page] = k[d];
                std::copy(v, v + p.width, values);
            }
        }
}
}  // namespace

#define EXPORT(NAME, T, E)                               \
    KERNEL(paged_forward_##NAME, Problem, forward<T, E>) \
    KERNEL(paged_write_##NAME, Writing, write<E>)
EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, float, bfloat16)
