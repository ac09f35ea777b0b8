// Which keys a query reads (ops/search): the search that halves intervals of blocks, and the pages of the largest scores.
// A row's choice is computed from its own query and keys, in the same order whatever else is in the call.
#include "search.h"

namespace {

PROBLEM(Problem,  // q (B, H, T, K) and keys (B, G, S, K) by strides, or pages (pages, G, K, page); last (B, T); all else dense
    int64_t batch, heads, groups, queries, width, page, table_row;
    int64_t q_batch, q_head, q_query, k_batch, k_head, k_key;
    const void *q, *keys;
    const int32_t *table, *last;
    int64_t block, kept, sinks, window, share, least, most;  // tokens, but for share: of the visible keys one in so many
    int32_t* chosen;
    int64_t slots, threads;
)

template <class T, class E> struct Rows {
    const Problem& p;
    long b, g;
    long group() const { return p.heads / p.groups; }
    Keys<T, E> keys() const {
        const E* first = static_cast<const E*>(p.keys);
        if (p.page == 0) return {first + b * p.k_batch + g * p.k_head, p.k_key, p.width, 0, nullptr, 1, 0};
        long size = p.width * p.page;
        return {first + g * size, 0, p.width, p.page, p.table + b * p.table_row, p.table_row, p.groups * size};
    }
    long head(long row) const { return g * group() + row % group(); }
    long query(long row) const { return row / group(); }
    long last(long row) const { return p.last[b * p.queries + query(row)]; }
    int32_t* chosen(long row) const { return p.chosen + ((b * p.heads + head(row)) * p.queries + query(row)) * p.slots; }
    void gather(long row, T* q, long wide) const {
        const E* x = static_cast<const E*>(p.q) + b * p.q_batch + head(row) * p.q_head + query(row) * p.q_query;
        for (long d = 0; d < wide; ++d) q[d] = d < p.width ? T(x[d]) : T(0);
    }
    // Behind those chosen: the blocks from `from` up to the query's own, and −1 in what is left.
    void finish(long row, long count, long from) const {
        int32_t* out = chosen(row);
        for (long n = from; n * p.block < last(row); ++n)
            if (count < p.slots && (count == 0 || out[count - 1] < n)) out[count++] = n;
        std::fill(out + count, out + p.slots, -1);
    }
};

template <class T> struct Interval {
    long from, size;  // blocks
    T score;          // the largest of its first block's keys
};

// Room for the search of one row: `count` intervals, and twice as many parts of them.
template <class T> struct Room {
    Buffer<Interval<T>> intervals, parts;
    Buffer<T> scores, sorted;
    Buffer<bool> kept;
    explicit Room(long count) : intervals(count), parts(2 * count), scores(2 * count), sorted(2 * count), kept(2 * count) {}
};

template <class T, class E> struct Search {
    const Problem& p;
    const Keys<T, E>& keys;
    const T* q;
    long end;  // of the keys that are searched

    T score(long block) const {
        T best = -std::numeric_limits<T>::infinity();
        for (long s = p.sinks + block * p.block, to = std::min<long>(s + p.block, end); s < to; ++s)
            best = std::max(best, ordered(keys.score(q, s)));
        return best;
    }
    // Halves every interval and keeps the best `count` parts, until each is one block.
    void run(long count, Room<T>& room) const {
        Interval<T>*intervals = room.intervals, *parts = room.parts;
        long blocks = (end - p.sinks + p.block - 1) / p.block;
        for (long j = 0; j < count; ++j) {
            long from = j * blocks / count;
            intervals[j] = {from, (j + 1) * blocks / count - from, score(from)};
        }
        for (bool longer = true; longer;) {
            long made = 0;
            for (long i = 0; i < count; ++i) {  // the left part's first block is the whole's: its score is known
                if (i + 1 < count) keys.fetch(p.sinks + (intervals[i + 1].from + intervals[i + 1].size / 2) * p.block);
                auto [from, size, known] = intervals[i];
                if (size > 1) parts[made++] = {from, size / 2, known};
                parts[made++] = {from + size / 2, size - size / 2, size > 1 ? score(from + size / 2) : known};
            }
            for (long i = 0; i < made; ++i) room.scores[i] = parts[i].score;
            best_of<T>(room.scores, made, count, room.sorted, room.kept);
            longer = false;
            for (long i = 0, n = 0; i < made; ++i)
                if (room.kept[i]) intervals[n++] = parts[i], longer |= parts[i].size > 1;
        }
    }
};

template <class T, class E> void search_row(const Rows<T, E>& rows, long row, T* q, long wide, Room<T>& room) {
    const Problem& p = rows.p;
    long end = std::max<long>(rows.last(row) - p.window, 0), count = p.kept / p.block;
    if (end - p.sinks <= p.kept) return rows.finish(row, 0, 0);
    rows.gather(row, q, wide);
    Keys<T, E> keys = rows.keys();
    Search<T, E>{p, keys, q, end}.run(count, room);
    int32_t* out = rows.chosen(row);
    long sinks = p.sinks / p.block;
    for (long n = 0; n < sinks; ++n) out[n] = n;
    for (long j = 0; j < count; ++j) out[sinks + j] = sinks + room.intervals[j].from;
    rows.finish(row, sinks + count, end / p.block);
}

template <class T, class E> void search_blocks(const Problem& p) {
    long group = p.heads / p.groups, count = p.queries * group, wide = padded<T>(p.width);
#pragma omp parallel num_threads(p.threads) if (p.batch * p.groups * count > 1)
    {
        Buffer<T> q(wide);
        Room<T> room(p.kept / p.block);
#pragma omp for collapse(2) schedule(dynamic)
        for (long i = 0; i < p.batch * p.groups; ++i)
            for (long row = 0; row < count; ++row) search_row<T, E>({p, i / p.groups, i % p.groups}, row, q, wide, room);
    }
}

// Rows [row, row + count) of one head of keys: of the pages before each one's window those of the largest scores.
template <class T, class E> void pages_of_rows(const Rows<T, E>& rows, long row, long count, bool beside) {
    const Problem& p = rows.p;
    long wide = padded<T>(p.width);
    auto before = [&](long r) { return std::max<long>(rows.last(r) - p.window, 0) / p.block; };
    long pages = before(row + count - 1);
    Buffer<T> q(count * wide), best(count * pages), scores(pages), sorted(pages);
    Buffer<bool> kept(pages);
    for (long r = 0; r < count; ++r) rows.gather(row + r, q + r * wide, wide);
    Keys<T, E> keys = rows.keys();
#pragma omp parallel for num_threads(p.threads) schedule(static) if (beside && pages > 64)
    for (long n = 0; n < pages; ++n) keys.largest(q, wide, count, n * p.block, p.block, best + n * count);
    for (long r = 0; r < count; ++r) {
        long own = before(row + r), tokens = std::clamp<long>(rows.last(row + r) / p.share, p.least, p.most), found = 0;
        for (long n = 0; n < own; ++n) scores[n] = best[n * count + r];
        best_of<T>(scores, own, (tokens + p.block - 1) / p.block, sorted, kept);
        int32_t* out = rows.chosen(row + r);
        for (long n = 0; n < own; ++n)
            if (kept[n]) out[found++] = n;
        rows.finish(row + r, found, own);
    }
}

template <class T, class E> void heaviest_pages(const Problem& p) {
    long count = p.queries * p.heads / p.groups, strips = (count + TILE_ROWS - 1) / TILE_ROWS, all = p.batch * p.groups;
    bool few = all * strips < p.threads;
#pragma omp parallel for collapse(2) num_threads(p.threads) schedule(dynamic) if (!few)
    for (long i = 0; i < all; ++i)
        for (long n = strips - 1; n >= 0; --n)
            pages_of_rows<T, E>({p, i / p.groups, i % p.groups}, n * TILE_ROWS, std::min<long>(TILE_ROWS, count - n * TILE_ROWS), few);
}
}  // namespace

#define EXPORT(NAME, T, E)                                      \
    KERNEL(search_blocks_##NAME, Problem, search_blocks<T, E>)   \
    KERNEL(heaviest_pages_##NAME, Problem, heaviest_pages<T, E>)
EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, float, bfloat16)
