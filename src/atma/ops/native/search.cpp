// Which keys a query reads (ops/search): the search that halves intervals of blocks, and the pages of the largest scores.
// A row's choice is computed from its own query and keys, in the same order whatever else is in the call.
#include <limits>

#include "chosen.h"
#include "few.h"
#include "problem.h"

namespace {

PROBLEM(Problem,  // q (B, H, T, K) by strides, keys as Rows, last (B, T), chosen (B, H, T, slots)
    int64_t batch, heads, groups, queries, width;
    int64_t q_batch, q_head, q_query, k_batch, k_head, k_row, pool_page, table_row;
    const void *q, *keys;
    const int32_t *table, *last;
    int64_t block, kept, sinks, window, share, least, most;  // tokens, but for share: of the visible keys one in so many
    int32_t* chosen;
    int64_t slots, threads;
)

// Query rows that read a key at once, and keys whose scores are held at once.
constexpr long FEW = 4, TILE = 2048;

template <class T> T most_of(const T* scores, long count) {  // no number at all is the least there is
    T most = std::numeric_limits<T>::lowest();
    for (long j = 0; j < count; ++j) most = scores[j] > most ? scores[j] : most;
    return most;
}

// kept[i]: whether scores[i] is among the `wanted` largest; of equal ones the first are. `room` (count).
template <class T> void best_of(const T* scores, long count, long wanted, T* room, bool* kept) {
    if (count <= wanted) {
        std::fill(kept, kept + count, true);
        return;
    }
    std::copy(scores, scores + count, room);
    std::nth_element(room, room + wanted - 1, room + count, [](T a, T b) { return a > b; });
    T least = room[wanted - 1];
    long equal = wanted;
    for (long i = 0; i < count; ++i) equal -= scores[i] > least;
    for (long i = 0; i < count; ++i) kept[i] = scores[i] > least || (scores[i] == least && equal-- > 0);
}

template <class T, class E> struct Head {  // the queries of one head of keys: row = query × group + head
    const Problem& p;
    long b, g;
    Rows<E> keys = rows_of<E>(p, p.keys, {p.k_batch, p.k_head, p.k_row}, p.width);

    long group() const { return p.heads / p.groups; }
    long last(long row) const { return p.last[b * p.queries + row / group()]; }
    long before(long row) const { return std::max<long>(last(row) - p.window, 0); }  // keys that no window covers
    int32_t* chosen(long row) const {
        return p.chosen + ((b * p.heads + g * group() + row % group()) * p.queries + row / group()) * p.slots;
    }
    const E* query(long row) const {
        return static_cast<const E*>(p.q) + b * p.q_batch + (g * group() + row % group()) * p.q_head + row / group() * p.q_query;
    }
    // Behind those chosen: the blocks from `from` up to the query's own, and −1 in what is left.
    void finish(long row, long count, long from) const {
        int32_t* out = chosen(row);
        for (long n = from; n * p.block < last(row); ++n)
            if (count < p.slots && (count == 0 || out[count - 1] < n)) out[count++] = int32_t(n);
        std::fill(out + count, out + p.slots, -1);
    }
};

template <class T> struct Interval {
    long from, size;  // blocks
    T score;          // the largest of its first block's keys
};

template <class T, class E> struct Search {  // room for one row after another
    const Problem& p;
    long count, wide;
    Buffer<Interval<T>> intervals, parts;
    Buffer<T> scores, sorted, block;
    Buffer<bool> kept;

    explicit Search(const Problem& p)
        : p(p), count(p.kept / p.block), wide(padded<T>(p.width)), intervals(count), parts(2 * count), scores(2 * count),
          sorted(2 * count), block(p.block), kept(2 * count) {}

    T score(const Head<T, E>& head, long row, long n, long end) const {
        long from = p.sinks + n * p.block, size = std::min<long>(p.block, end - from);
        T one = 1;
        score_few<T, E, 1>(head.query(row), &one, wide, head.keys.at(head.b, head.g, from), head.keys.stride(), size, p.width, block, 0);
        return most_of<T>(block, size);
    }
    // Halves every interval and keeps the best `count` parts, until each is one block.
    void halve(const Head<T, E>& head, long row, long end) {
        long blocks = (end - p.sinks + p.block - 1) / p.block;
        for (long j = 0; j < count; ++j) {
            long from = j * blocks / count;
            intervals[j] = {from, (j + 1) * blocks / count - from, score(head, row, from, end)};
        }
        for (bool longer = true; longer;) {
            long made = 0;
            for (long i = 0; i < count; ++i) {  // the left part's first block is the whole's: its score is known
                long ahead = std::min(i + 2, count - 1), middle = intervals[ahead].from + intervals[ahead].size / 2;
                __builtin_prefetch(head.keys.at(head.b, head.g, p.sinks + middle * p.block));
                auto [from, size, known] = intervals[i];
                if (size > 1) parts[made++] = {from, size / 2, known};
                parts[made++] = {from + size / 2, size - size / 2, size > 1 ? score(head, row, from + size / 2, end) : known};
            }
            for (long i = 0; i < made; ++i) scores[i] = parts[i].score;
            best_of<T>(scores, made, count, sorted, kept);
            longer = false;
            for (long i = 0, n = 0; i < made; ++i)
                if (kept[i]) intervals[n++] = parts[i], longer |= parts[i].size > 1;
        }
    }
    void run(const Head<T, E>& head, long row) {
        long end = head.before(row), sinks = p.sinks / p.block;
        if (end - p.sinks <= p.kept) return head.finish(row, 0, 0);
        halve(head, row, end);
        int32_t* out = head.chosen(row);
        for (long n = 0; n < sinks; ++n) out[n] = int32_t(n);
        for (long j = 0; j < count; ++j) out[sinks + j] = int32_t(sinks + intervals[j].from);
        head.finish(row, sinks + count, end / p.block);
    }
};

template <class T, class E> void search_blocks(const Problem& p) {
    long count = p.queries * p.heads / p.groups;
#pragma omp parallel num_threads(p.threads) if (p.batch * p.groups * count > 1)
    {
        Search<T, E> search(p);
#pragma omp for collapse(2) schedule(dynamic)
        for (long i = 0; i < p.batch * p.groups; ++i)
            for (long row = 0; row < count; ++row) search.run({p, i / p.groups, i % p.groups}, row);
    }
}

// The largest scores (count, pages) of rows [row, row + count) among the keys of the pages [begin, end).
template <class T, class E>
void score_pages(const Head<T, E>& head, long row, long count, long begin, long end, long pages, T* best) {
    const Problem& p = head.p;
    long wide = padded<T>(p.width);
    Buffer<E> q(FEW * wide);
    Buffer<T> a(FEW * TILE);
    T one[FEW] = {1, 1, 1, 1};
    for (long r = 0; r < count; ++r) std::copy(head.query(row + r), head.query(row + r) + p.width, q + r * wide);
    for (long s = begin * p.block; s < end * p.block;) {
        long run = head.keys.run(s, std::min(end * p.block, s + TILE / p.block * p.block));
        score_rows<T, E>(count)(q, one, wide, head.keys.at(head.b, head.g, s), head.keys.stride(), run, p.width, a, TILE);
        for (long r = 0; r < count; ++r)
            for (long j = 0; j < run; j += p.block) best[r * pages + (s + j) / p.block] = most_of<T>(a + r * TILE + j, p.block);
        s += run;
    }
}

// Rows [row, row + count): of the pages before each one's window those of the largest scores. `beside`: by all threads.
template <class T, class E> void choose_rows(const Head<T, E>& head, long row, long count, bool beside) {
    const Problem& p = head.p;
    constexpr long STRETCH = 1024;
    long pages = head.before(row + count - 1) / p.block;
    Buffer<T> best(count * pages), sorted(pages);
    Buffer<bool> kept(pages);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (beside && pages > STRETCH)
    for (long n = 0; n < pages; n += STRETCH)
        score_pages<T, E>(head, row, count, n, std::min(n + STRETCH, pages), pages, best);
    for (long r = 0; r < count; ++r) {
        long own = head.before(row + r) / p.block, tokens = std::clamp<long>(head.last(row + r) / p.share, p.least, p.most);
        long found = 0;
        best_of<T>(best + r * pages, own, (tokens + p.block - 1) / p.block, sorted, kept);
        for (long n = 0; n < own; ++n)
            if (kept[n]) head.chosen(row + r)[found++] = int32_t(n);
        head.finish(row + r, found, own);
    }
}

template <class T, class E> void heaviest_pages(const Problem& p) {
    long count = p.queries * p.heads / p.groups, strips = (count + FEW - 1) / FEW, all = p.batch * p.groups;
    auto choose = [&](long i, bool beside) {
        long head = i / strips, n = strips - 1 - i % strips;
        choose_rows<T, E>({p, head / p.groups, head % p.groups}, n * FEW, std::min(FEW, count - n * FEW), beside);
    };
    if (all * strips < p.threads) {  // no region around those that share out the pages
        for (long i = 0; i < all * strips; ++i) choose(i, true);
        return;
    }
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
    for (long i = 0; i < all * strips; ++i) choose(i, false);
}
}  // namespace

#define EXPORT(NAME, T, E)                                     \
    KERNEL(search_blocks_##NAME, Problem, search_blocks<T, E>) \
    KERNEL(heaviest_pages_##NAME, Problem, heaviest_pages<T, E>)
EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, float, bfloat16)
