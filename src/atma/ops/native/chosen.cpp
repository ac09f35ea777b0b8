// Pages of keys chosen by a score of each, and the attention over what is chosen (ops/chosen). Every query is worked on
// by itself: what it chooses and reads has the same bits however a text is cut, and however many threads there are.
#include "chosen.h"
#include "few.h"
#include "problem.h"
#include <limits>
#include <vector>

namespace {

PROBLEM(Choosing,  // strides in elements; pages (B, H, T, slots); summaries as Rows of `row` numbers a token
    int64_t batch, heads, groups, queries, width, page, row, k, window, slots;
    int64_t u_batch, u_head, u_query, s_batch, s_head, pool_page, table_row;
    const void *u, *summaries;
    const int32_t *table, *last;
    int32_t* pages;
    int64_t threads;
)

// So many summaries stay in the second-level cache for all rows of a block; FEW rows share out the pages among threads.
constexpr long TILE_PAGES = 256, ROW_BLOCK = 48, FEW = 16, SPLIT = 4096;

template <class T> struct Best {  // the k largest of what is offered in order, the earlier of equal ones
    long k;
    T bar = -std::numeric_limits<T>::infinity();
    std::vector<std::pair<T, int32_t>> found;

    explicit Best(long k) : k(k) { found.reserve(2 * k + 1); }
    void offer(T score, int32_t page) {
        // No number at all is the least there is.
        if (!(score >= std::numeric_limits<T>::lowest())) score = std::numeric_limits<T>::lowest();
        if (!(score > bar)) return;
        found.emplace_back(score, page);
        if (long(found.size()) == 2 * k) trim();
    }
    void trim() {
        if (long(found.size()) <= k) return;
        std::nth_element(found.begin(), found.begin() + k - 1, found.end(), [](const auto& x, const auto& y) {
            return x.first != y.first ? x.first > y.first : x.second < y.second;
        });
        found.resize(k);
        bar = found[k - 1].first;
    }
    void offer_all(const T* scores, long from, long to) {
        constexpr long lanes = Simd<T>::lanes, stretch = 4 * lanes;
        for (long j = from; j < to; j += stretch, scores += stretch) {
            long count = std::min(stretch, to - j);
            if (count == stretch && bar > std::numeric_limits<T>::lowest()) {
                typename Simd<T>::V most = Simd<T>::load(scores);
                most = most == most ? most : typename Simd<T>::V{} - std::numeric_limits<T>::max();
                for (long i = lanes; i < stretch; i += lanes) {
                    typename Simd<T>::V x = Simd<T>::load(scores + i);
                    most = x > most ? x : most;
                }
                if (!(Simd<T>::max(most) > bar)) continue;
            }
            for (long i = 0; i < count; ++i) offer(scores[i], int32_t(j + i));
        }
    }
};

template <class T, class E> struct Chooser {
    const Choosing& p;
    Rows<E> summaries;
    long group, rows;

    explicit Chooser(const Choosing& p)
        : p(p), summaries(rows_of<E>(p, p.summaries, {p.s_batch, p.s_head, p.row}, p.row)), group(p.heads / p.groups),
          rows(p.queries * group) {}

    long last(long b, long r) const { return p.last[b * p.queries + r / group]; }
    long first(long b, long r) const { return std::max(0L, last(b, r) - p.window) / p.page; }  // page of the window

    // Rows [from, to) of one key/value head over the pages [begin, end) that come before their windows.
    void search(long b, long g, long from, long to, long begin, long end, Best<T>* best) const {
        long wide = padded<T>(p.width);
        Buffer<E> u((to - from) * wide);
        Buffer<T> a(4 * TILE_PAGES);
        T one[4] = {1, 1, 1, 1};
        for (long r = from; r < to; ++r) {
            long h = g * group + r % group;
            const E* x = static_cast<const E*>(p.u) + b * p.u_batch + h * p.u_head + r / group * p.u_query;
            std::copy(x, x + p.width, u + (r - from) * wide);
        }
        end = std::min(end, first(b, to - 1));
        for (long j = begin; j < end; j += TILE_PAGES) {
            long until = std::min(j + TILE_PAGES, end);
            for (long r = from; r < to; r += 4) {
                long count = std::min(4L, to - r);
                if (first(b, r + count - 1) <= j) continue;
                auto score = score_rows<T, E>(count);
                for (long s = j; s < until;) {
                    long run = summaries.run(s * p.page, until * p.page) / p.page;
                    const E* x = summaries.at(b, g, s * p.page);
                    score(u + (r - from) * wide, one, wide, x, p.page * p.row, run, p.width, a + s - j, TILE_PAGES);
                    s += run;
                }
                for (long i = 0; i < count; ++i)
                    best[r - from + i].offer_all(a + i * TILE_PAGES, j, std::min(until, first(b, r + i)));
            }
        }
    }
    void put(long b, long g, long r, Best<T>& best) const {
        best.trim();
        auto& found = best.found;
        std::sort(found.begin(), found.end(), [](const auto& x, const auto& y) { return x.second < y.second; });
        int32_t* out = p.pages + ((b * p.heads + g * group + r % group) * p.queries + r / group) * p.slots;
        int32_t* end = out + p.slots;
        for (const auto& one : found) *out++ = one.second;
        for (long n = first(b, r); n * p.page < last(b, r) && out < end; ++n) *out++ = int32_t(n);
        std::fill(out, end, -1);
    }
};

template <class T, class E> void choose(const Choosing& p) {
    Chooser<T, E> all(p);
    long block = all.rows <= FEW ? all.rows : ROW_BLOCK, blocks = (all.rows + block - 1) / block, splits = 1;
    if (all.rows <= FEW)
        for (long b = 0; b < p.batch; ++b) splits = std::max(splits, (all.first(b, all.rows - 1) + SPLIT - 1) / SPLIT);
    long heads = p.batch * p.groups;
    if (p.k == 0) splits = 0;
    std::vector<Best<T>> best(heads * all.rows * std::max(splits, 1L), Best<T>(std::max<long>(p.k, 1)));
#pragma omp parallel for collapse(3) num_threads(p.threads) schedule(dynamic) if (heads * blocks * splits > 1)
    for (long i = 0; i < heads; ++i)
        for (long n = 0; n < blocks; ++n)
            for (long c = 0; c < splits; ++c) {
                long from = n * block, to = std::min(from + block, all.rows);
                long begin = c * SPLIT, end = splits == 1 ? std::numeric_limits<long>::max() : begin + SPLIT;
                Best<T>* own = best.data() + (i * splits + c) * all.rows + from;
                all.search(i / p.groups, i % p.groups, from, to, begin, end, own);
            }
    for (long i = 0; i < heads; ++i)
        for (long r = 0; r < all.rows; ++r) {
            Best<T>& own = best[i * std::max(splits, 1L) * all.rows + r];
            for (long c = 1; c < splits; ++c)
                for (const auto& one : best[(i * splits + c) * all.rows + r].found) own.found.push_back(one);
            all.put(i / p.groups, i % p.groups, r, own);
        }
}

PROBLEM(Reading,  // q (B, H, T, K), keys and values as Rows, scale, bias and pages (B, H, T, ·)
    int64_t batch, heads, groups, queries, width, page, slots;
    int64_t q_batch, q_head, q_query, q_slot;  // q_slot: 0 where a query is the same for all its pages
    int64_t k_batch, k_head, k_row, v_batch, v_head, v_row, pool_page, table_row;
    const void *q, *keys, *values, *scale, *bias;
    const int32_t *table, *pages, *last;
    void *S, *L, *Q, *M;
    int64_t threads;
)

constexpr double LOG2E = 1.4426950408889634;

struct Run {  // keys side by side that are read: from which row on, how many
    long from, count, slot;
};

template <class T, class E> struct Reader {
    const Reading& p;
    Rows<E> keys, values;
    long wide = padded<T>(p.width);
    Buffer<T> a{p.slots * p.page + Simd<T>::lanes}, S{wide}, copied{p.page * wide};
    Buffer<E> q{wide};
    std::vector<Run> runs;

    explicit Reader(const Reading& p)
        : p(p), keys(rows_of<E>(p, p.keys, {p.k_batch, p.k_head, p.k_row}, p.width)),
          values(rows_of<E>(p, p.values, {p.v_batch, p.v_head, p.v_row}, p.width)) {}

    // Scores of all that is chosen, one behind the other, to base 2; how many there are.
    long score(long b, long g, const E* x, long row, long last) {
        const int32_t* pages = p.pages + row * p.slots;
        T factor = static_cast<const T*>(p.scale)[row] * T(LOG2E);
        long filled = 0;
        runs.clear();
        for (long n = 0; n < p.slots && pages[n] >= 0; ++n) {
            long from = pages[n] * p.page, end = std::min(from + p.page, last);
            if (end <= from) break;
            const E* k = keys.at(b, g, from);
            if (n == 0 || p.q_slot != 0) std::copy_n(x + n * p.q_slot, p.width, q.get());
            score_few<T, E, 1>(q, &factor, wide, k, keys.stride(), end - from, p.width, a + filled, 0);
            if (p.bias != nullptr) {
                T add = static_cast<const T*>(p.bias)[row * p.slots + n] * T(LOG2E);
                for (long j = 0; j < end - from; ++j) a[filled + j] += add;
            }
            runs.push_back({from, end - from, n});
            filled += end - from;
        }
        return filled;
    }
    void read(long b, long g) {
        long at = 0;
        std::fill(S.get(), S + wide, T(0));
        for (const Run& run : runs) {
            const E* x = values.at(b, g, run.from);
            if (wide == p.width) {
                strip<T>(1, wide, run.count, a + at, 0, 1, x, values.stride(), S, wide, true);
            } else {
                for (long j = 0; j < run.count; ++j, x += values.stride())
                    for (long d = 0; d < wide; ++d) copied[j * wide + d] = d < p.width ? T(x[d]) : T(0);
                strip<T>(1, wide, run.count, a + at, 0, 1, copied.get(), wide, S, wide, true);
            }
            at += run.count;
        }
    }
    void attend(long b, long h, long i) {
        using V = Simd<T>;
        long g = h / (p.heads / p.groups), row = (b * p.heads + h) * p.queries + i;
        const E* x = static_cast<const E*>(p.q) + b * p.q_batch + h * p.q_head + i * p.q_query;
        long count = score(b, g, x, row, p.last[b * p.queries + i]);
        long high = padded<T>(count);
        // Where no key is seen at all, M is the least there is and the sums are 0.
        for (long j = count; j < std::max<long>(high, V::lanes); ++j) a[j] = T(-1e30);
        typename V::V best = V::load(a);
        for (long j = V::lanes; j < high; j += V::lanes) {
            typename V::V y = V::load(a + j);
            best = y > best ? y : best;
        }
        T top = V::max(best);
        typename V::V sum{}, squares{};
        for (long j = 0; j < high; j += V::lanes) {
            typename V::V y = exp2_of(V::load(a + j) - top);
            V::store(a + j, y);
            sum += y;
            squares += y * y;
        }
        read(b, g);
        std::copy(S.get(), S + p.width, static_cast<T*>(p.S) + row * p.width);
        static_cast<T*>(p.L)[row] = V::sum(sum);
        static_cast<T*>(p.Q)[row] = V::sum(squares);
        static_cast<T*>(p.M)[row] = T(top / LOG2E);
    }
};

template <class T, class E> void attend(const Reading& p) {
    long rows = p.batch * p.heads * p.queries;
#pragma omp parallel num_threads(p.threads) if (rows > 1)
    {
        Reader<T, E> reader(p);
#pragma omp for schedule(dynamic, 4)
        for (long n = 0; n < rows; ++n) reader.attend(n / p.queries / p.heads, n / p.queries % p.heads, n % p.queries);
    }
}

PROBLEM(Boxing,  // least and most of every page that `tokens` new keys make full, into its summary (2K numbers)
    int64_t batch, groups, tokens, width, page, row;
    int64_t k_batch, k_head, k_row, s_batch, s_head, pool_page, table_row;
    const void *keys, *summaries;
    const int32_t *table, *length;
)

template <class E> void box(const Boxing& p) {
    auto keys = rows_of<E>(p, p.keys, {p.k_batch, p.k_head, p.k_row}, p.width);
    auto into = rows_of<E>(p, p.summaries, {p.s_batch, p.s_head, p.row}, p.row);
    for (long b = 0; b < p.batch; ++b)
        for (long n = p.length[b] / p.page; (n + 1) * p.page <= p.length[b] + p.tokens; ++n)
            for (long g = 0; g < p.groups; ++g) {
                E* low = const_cast<E*>(into.at(b, g, n * p.page));
                E* high = low + p.width;
                const E* x = keys.at(b, g, n * p.page);
                std::copy(x, x + p.width, low);
                std::copy(x, x + p.width, high);
                for (long j = 1; j < p.page; ++j) {
                    x += keys.stride();
                    for (long d = 0; d < p.width; ++d) {
                        // What is no number stays, on either side.
                        low[d] = x[d] < low[d] || x[d] != x[d] ? x[d] : low[d];
                        high[d] = x[d] > high[d] || x[d] != x[d] ? x[d] : high[d];
                    }
                }
            }
}

PROBLEM(Holding,  // rows of bytes of new tokens (B, G, T, ·) to their places in pages of a pool
    int64_t batch, groups, tokens, row_bytes, page, table_row, x_batch, x_head, x_token;
    const char* x;
    char* pool;
    const int32_t *table, *length;
)

void hold(const Holding& p) {
    for (long b = 0; b < p.batch; ++b)
        for (long t = 0; t < p.tokens; ++t) {
            long s = p.length[b] + t, place = p.table[b * p.table_row + s / p.page % p.table_row];
            for (long g = 0; g < p.groups; ++g)
                std::memcpy(p.pool + ((place * p.groups + g) * p.page + s % p.page) * p.row_bytes,
                            p.x + b * p.x_batch + g * p.x_head + t * p.x_token, p.row_bytes);
        }
}
}  // namespace

#define EXPORT(NAME, T, E)                              \
    KERNEL(choose_pages_##NAME, Choosing, choose<T, E>) \
    KERNEL(chosen_read_##NAME, Reading, attend<T, E>)   \
    KERNEL(page_boxes_##NAME, Boxing, box<E>)
EXPORT(float32, float, float)
EXPORT(float64, double, double)
EXPORT(bfloat16, float, bfloat16)
KERNEL(hold_rows, Holding, hold)
