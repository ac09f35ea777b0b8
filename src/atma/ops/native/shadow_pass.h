// The passes over the shadows of a text for up to four rows of queries (ops/certified/reference.py): scores, sums and
// what bounds them, and the keys that are read exactly. Logits are to base 2. Every pass is in splits of the text at
// absolute places, each by itself, joined in their order: the same bits whatever is read beside, and by whom.
#pragma once
#include "shadow.h"

namespace {

PROBLEM(Problem,  // row s of a text lies in its page s / page; contiguous keys are one page a text
    int64_t batch, heads, groups, queries, width, page, table_row, threads;
    int64_t q_batch, q_head, q_query;                     // strides in elements
    int64_t k_block, k_head, k_key, k_channel, v_block, v_head, v_key;  // of exact keys and values; block: a page, or a text
    const void *q, *scale, *null, *magnitude_slope, *null_value;        // scale and null (B, H, T); (H); (H, K)
    const int32_t *table, *first, *last;                  // (B, table_row); (B, T) twice
    const void *keys, *values, *key_scale, *key_error, *value_scale, *value_error, *value_norm;
    const void *k, *v;
    void *direction, *magnitude, *direction_error, *magnitude_error;    // of plain shadows: S, L, Q and M
    int32_t *read;                                        // keys read exactly
    double direction_tolerance, magnitude_tolerance;
)

// A wave is how many splits threads hold results of at once: so many that meeting after each costs little.
constexpr long ROWS = 4, SPLIT = 512, WAVE = 2048;
constexpr float HIDDEN = -1e30f;
constexpr double LOG2E = 1.4426950408889634;

// Masses relative to the largest logit of a row, `top`.
struct Sums {
    double most = 0, least = 0, most_squares = 0, least_squares = 0, slack = 0;  // Λ, Λ₀, Θ, Θ₀ and Σ_S of shadows
    double L = 0, Q = 0, turned = 0;  // of keys read exactly; turned: how long what stood for them is, taken out again
    double longest = 0;               // value among the dropped
    long dropped = 0, read = 0;
    void turn() { most = -most, least = -least, most_squares = -most_squares, least_squares = -least_squares, slack = -slack; }
    void add(const Sums& x) {
        most += x.most, least += x.least, most_squares += x.most_squares, least_squares += x.least_squares;
        slack += x.slack, L += x.L, Q += x.Q, turned += x.turned, longest = std::max(longest, x.longest);
        dropped += x.dropped, read += x.read;
    }
};

struct Row {
    long first, last, at, head;        // keys seen; its places in (B, H, T), in (H)
    float unit, per_error, per_scale;  // logit of one unit of q · k / key scale; uncertainty by key error and key scale
    float top, bar, factor;            // keys below the bar are dropped; factor: logit of one unit of the exact q · k
};

// What is known of as many rows of a split as a vector has lanes.
struct Marks {
    V key_scale, key_error, value_scale, value_error, value_norm;
};

// The weights of a row over a split: of the most and least that they can be; which lanes are seen, and which kept.
struct Weighed {
    V most, least;
    Mask seen, kept;
};

inline V chosen(Mask mask, V x) { return (V)(mask & (Mask)x); }

template <class E> struct Text {  // one key head of one text
    const Problem& p;
    long b, g;
    long page(long s) const { return p.table[b * p.table_row + s / p.page % p.table_row]; }
    long row(long s) const { return (page(s) * p.groups + g) * p.page + s % p.page; }
    // Stretches of [from, to) that lie in one page: work(first, last, the row of the first).
    template <class Work> void stretches(long from, long to, Work work) const {
        while (from < to) {
            long end = std::min(to, (from / p.page + 1) * p.page);
            work(from, end, row(from));
            from = end;
        }
    }
    // The numbers of rows at, at + 1, … of a leaf, of which `some` are there.
    V mark(const void* of, long at, long some) const {
        const bfloat16* x = static_cast<const bfloat16*>(of) + at;
        if (some >= LANES) return widen(x);
        V found{};
        for (long i = 0; i < some; ++i) found[i] = x[i];
        return found;
    }
    const int8_t* shadow(const void* of, long at) const { return static_cast<const int8_t*>(of) + at * p.width; }
};

// Where the keys and values of a text lie, asked for in the order of their places: a division a page, not a key.
template <class E> struct Finder {
    const Text<E>& text;
    long from = 0, to = 0;
    const E *keys = nullptr, *values = nullptr;
    const int8_t* shadows = nullptr;
    void seek(long s) {
        if (s >= from && s < to) return;
        const Problem& p = text.p;
        from = s / p.page * p.page, to = from + p.page;
        long block = text.page(s);
        keys = static_cast<const E*>(p.k) + block * p.k_block + text.g * p.k_head;
        values = static_cast<const E*>(p.v) + block * p.v_block + text.g * p.v_head;
        shadows = text.shadow(p.values, text.row(from));
    }
    const E* key(long s) { return seek(s), keys + (s - from) * text.p.k_key; }
    const E* value(long s) { return seek(s), values + (s - from) * text.p.v_key; }
    const int8_t* shadow(long s) { return seek(s), shadows + (s - from) * text.p.width; }
    void fetch(long s) {  // all that is read of a key, on its way from memory
        const char *k = reinterpret_cast<const char*>(key(s)), *v = reinterpret_cast<const char*>(value(s));
        for (size_t d = 0; d < text.p.width * sizeof(E); d += 64) {
            if (text.p.k_channel == 1) __builtin_prefetch(k + d);
            __builtin_prefetch(v + d);
        }
        __builtin_prefetch(shadow(s));
    }
};

// How uncertain a logit a is: the key's error along q, the query's in 16 bits, and what rounding may do.
inline V doubt(const Row& row, V a, V error, V scale) {
    V size = a < 0.0f ? -a : a;
    return row.per_error * error + row.per_scale * scale + size * 4.76837158203125e-7f;
}

template <bool BOUND>
inline __attribute__((always_inline)) Weighed weigh(const Row& row, V x, const Marks& marks, long s) {
    Weighed found;
    Mask place = lanes_from(s);
    found.seen = (place >= int32_t(row.first)) & (place < int32_t(row.last));
    V u = BOUND ? doubt(row, x, marks.key_error, marks.key_scale) : V{};
    found.kept = found.seen & ~(x + u < row.bar);  // NaN is kept
    if (!any(found.kept)) return found;
    found.most = chosen(found.seen, exp2_of(x + u - row.top));
    found.least = BOUND ? chosen(found.seen, exp2_of(x - u - row.top)) : found.most;
    return found;
}

// What the two sums of squares and their like cannot do without: lane-wise sums of a split.
struct Lanes {
    V most{}, least{}, most_squares{}, least_squares{}, slack{}, longest{};
    Mask dropped{};
    void add(V E, V F, V doubtful) {
        most += E, least += F, most_squares += E * E, least_squares += F * F, slack += doubtful;
    }
    void drop(Mask seen, V length) {
        dropped -= seen;  // a lane that is seen is −1
        length = chosen(seen, length);
        longest = length > longest ? length : longest;
    }
    void into(Sums& sums) const {
        sums.dropped += Simd<int32_t>::sum((Simd<int32_t>::V)dropped), sums.longest = std::max(sums.longest, double(Float::max(longest)));
        sums.most += Float::sum(most), sums.least += Float::sum(least);
        sums.most_squares += Float::sum(most_squares), sums.least_squares += Float::sum(least_squares);
        sums.slack += Float::sum(slack);
    }
};

// How far e v can be from what stands for it: half the range and the value's own error; all of it where it is dropped.
inline __attribute__((always_inline)) V slack_of(const Weighed& w, const Marks& marks) {
    V half = (w.most - w.least) * 0.5f * marks.value_norm + w.most * marks.value_error;
    V all = w.most * (marks.value_norm + marks.value_error);
    return chosen(w.kept, half) + chosen(w.seen & ~w.kept, all);  // behind the last key there may be anything
}

template <class E, bool BOUND> struct Passes {
    const Problem& p;
    Text<E> text;
    long count, wide, padded_q, begin, end, base, span, room;
    Row rows[ROWS];
    Buffer<int16_t> q16;
    Buffer<float> q, a, slack;  // (rows, room): logits, and how far what stands for a key may be from it; 0 of the dropped

    Passes(const Problem& p, long index, long from, long count)
        : p(p), text{p, index / p.groups, index % p.groups}, count(count), wide(padded<float>(p.width)),
          padded_q((p.width + SHORTS - 1) / SHORTS * SHORTS), begin(bounds(from, count, true)), end(bounds(from, count, false)),
          base(begin / SPLIT * SPLIT), span((end - base + SPLIT - 1) / SPLIT), room(span * SPLIT), q16(count * padded_q),
          q(count * wide), a(count * room), slack(BOUND ? count * room : 0) {
        for (long r = 0; r < count; ++r) prepare(from + r, r);
    }

    long bounds(long from, long count, bool low) const {
        long group = p.heads / p.groups, b = text.b * p.queries;
        return low ? p.first[b + from / group] : p.last[b + (from + count - 1) / group];
    }

    // One row: query × group + head.
    void prepare(long index, long r) {
        long group = p.heads / p.groups, h = text.g * group + index % group, i = index / group;
        const E* x = static_cast<const E*>(p.q) + text.b * p.q_batch + h * p.q_head + i * p.q_query;
        Row& row = rows[r];
        row.first = p.first[text.b * p.queries + i], row.last = p.last[text.b * p.queries + i];
        row.at = (text.b * p.heads + h) * p.queries + i, row.head = h;
        float* own = q + r * wide;
        for (long d = 0; d < wide; ++d) own[d] = d < p.width ? float(x[d]) : 0.0f;
        float most = 0, length = 0, lost = 0;
        for (long d = 0; d < p.width; ++d) most = std::max(most, std::abs(own[d])), length += own[d] * own[d];
        float unit = most / 32767.0f, inverse = unit > 0 ? 1 / unit : 0.0f;
        for (long d = 0; d < padded_q; ++d) {
            float whole = d < p.width ? std::nearbyint(std::min(std::max(own[d] * inverse, -32767.0f), 32767.0f)) : 0.0f;
            q16[r * padded_q + d] = whole == whole ? int16_t(whole) : int16_t(0);
            if (d < p.width) lost += (own[d] - unit * whole) * (own[d] - unit * whole);
        }
        constexpr float up = 1 + 1.0f / 32768;
        length = std::sqrt(length) * up, lost = std::sqrt(lost) * up;
        row.factor = static_cast<const float*>(p.scale)[row.at] * float(LOG2E);
        row.unit = length == length ? row.factor * unit : length;  // NaN reaches every score
        // No shadow is longer than 127 √K scales; rounding takes (K + 2) 2⁻²⁴ of a product of lengths.
        float longest = 127 * std::sqrt(float(p.width)) * up, size = std::abs(row.factor);
        row.per_error = size * length * up;
        row.per_scale = size * longest * (lost + length * float(p.width + 2) / 16777216.0f);
    }

    template <class Work> void in_splits(long threads, long from, long to, Work work) const {
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1 && to - from > 4)
        for (long c = from; c < to; ++c) work(c);
    }

    // The part of split c that anybody sees, from a whole vector on.
    long low(long c) const { return std::max(base + c * SPLIT, begin / LANES * LANES); }
    long high(long c) const { return std::min(base + (c + 1) * SPLIT, end); }
    // The vectors of split c that a row sees any of: work(place, place in the split, row of the leaves, how many it has).
    template <class Work> void vectors(const Row& row, long c, Work work) const {
        long from = std::max(low(c), row.first / LANES * LANES), to = std::min(high(c), row.last), at = base + c * SPLIT;
        if (from >= to) return;
        text.stretches(from, to, [&](long s, long e, long in) {
            long room = p.page - s % p.page;
            for (long i = 0; i < e - s; i += LANES) work(s + i, s + i - at, in + i, room - i);
        });
    }
    Marks marks(long at, long some) const {
        if (!BOUND) return {text.mark(p.key_scale, at, some), V{}, text.mark(p.value_scale, at, some), V{}, V{}};
        return {text.mark(p.key_scale, at, some), text.mark(p.key_error, at, some), text.mark(p.value_scale, at, some),
                text.mark(p.value_error, at, some), text.mark(p.value_norm, at, some)};
    }

    // a of split c, and the largest that each row's logits can be.
    void score(long c, float* tops) {
        alignas(64) int32_t products[ROWS * (SPLIT + LANES)];
        long at = base + c * SPLIT;
        text.stretches(low(c), high(c), [&](long s, long e, long row) {
            for_rows(count, [&](auto R) {
                dots<R>(text.shadow(p.keys, row), e - s, p.width, q16, padded_q, products + (s - at), SPLIT + LANES);
            });
        });
        for (long r = 0; r < count; ++r) {
            V best = V{} + HIDDEN;
            const Row& row = rows[r];
            vectors(row, c, [&](long s, long j, long in, long some) {
                Ints whole = (Ints)Simd<int32_t>::load(products + r * (SPLIT + LANES) + j);
                V scale = text.mark(p.key_scale, in, some), x = __builtin_convertvector(whole, V) * (row.unit * scale);
                Mask place = lanes_from(s), seen = (place >= int32_t(row.first)) & (place < int32_t(row.last));
                x = seen ? x : V{} + HIDDEN;
                Float::store(a + r * room + s - base, x);
                if (BOUND) x += chosen(seen, doubt(row, x, text.mark(p.key_error, in, some), scale));
                best = x > best ? x : best;
            });
            tops[r] = Float::max(best);
        }
    }

    // D (rows, wide) and sums of split c by its shadows.
    void read(long c, float* D, Sums* sums) {
        alignas(64) float weights[ROWS * SPLIT];
        long at = base + c * SPLIT, from = low(c), to = high(c);
        std::fill_n(D, count * wide, 0.0f), std::fill_n(weights, count * SPLIT, 0.0f);
        for (long r = 0; r < count; ++r) {
            Lanes lanes;
            sums[r] = Sums();
            vectors(rows[r], c, [&](long s, long j, long in, long some) {
                Marks known = marks(in, some);
                Weighed w = weigh<BOUND>(rows[r], Float::load(a + r * room + s - base), known, s);
                V doubtful{};
                if (any(w.kept)) lanes.add(w.most, w.least, doubtful = BOUND ? slack_of(w, known) : V{});
                else lanes.drop(w.seen, known.value_norm + known.value_error);
                if (BOUND) Float::store(slack + r * room + s - base, doubtful);
                if (!any(w.kept)) return;
                Float::store(weights + r * SPLIT + j, chosen(w.kept, (w.most + w.least) * 0.5f * known.value_scale));
            });
            lanes.into(sums[r]);
        }
        const int8_t* places[SPLIT + 1];
        int16_t index[SPLIT + 1];
        long n = 0;
        text.stretches(from, to, [&](long s, long e, long row) {
            const int8_t* x = text.shadow(p.values, row);
            for (long j = s - at; j < e - at; ++j, x += p.width) {
                int32_t some = 0, bits;
                for (long r = 0; r < count; ++r) std::memcpy(&bits, weights + r * SPLIT + j, 4), some |= bits;
                places[n] = x, index[n] = int16_t(j), n += some != 0;
            }
        });
        if (n) add(places, index, n, weights, D);
    }

    void add(const int8_t* const* places, const int16_t* index, long n, const float* weights, float* D) const {
        for_rows(count, [&](auto R) {
            if (wide == p.width) return add_values<R>(places, index, n, weights, SPLIT, D, wide);
            Buffer<int8_t> copied(n * wide);  // filled up, so that no vector ends behind a leaf
            Buffer<const int8_t*> at(n);
            for (long i = 0; i < n; ++i) {
                std::fill_n(copied + i * wide, wide, int8_t(0)), std::copy_n(places[i], p.width, copied + i * wide);
                at[i] = copied + i * wide;
            }
            add_values<R>(at, index, n, weights, SPLIT, D, wide);
        });
    }
};
}  // namespace
