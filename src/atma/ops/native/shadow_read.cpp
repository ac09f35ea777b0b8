// Attention over keys and values in 8 bits, with a bound of what that changes, and exact rows where the bound asks for
// them (mixers.md, section 6.7): what is left uncertain must be within the tolerances, or everything is read exactly.
#include "shadow_pass.h"

namespace {

constexpr long BINS = 2048, ROUNDS = 3;
constexpr double CLAMP = 1e-6, UP = 1 + 1.0 / 131072;  // UP: what sums of a split lose, and exponentials

double softplus(double x) { return x > 20 ? x : std::log1p(std::exp(x)); }

// m = L³/(Q (ζ + L)), no cube of which could fall below the least number.
double magnitude(double L, double Q, double null, double kappa) {
    return L > 0 ? std::tanh(kappa * std::log1p(L / (null + L) * L * (L / Q))) : 0;
}

// What a row has read, and its certificate: (6.1)–(6.4) with shadows standing for what is not read.
struct Found {
    Sums sums, whole;  // whole: before anything was read exactly
    Buffer<double> D;  // without the null's value
    long width;
    double null, kappa, length = 0, total = 0, direction_error = 2, low = 0, high = 1;

    Found(long wide, long width, double null, double kappa) : D(wide), width(width), null(null), kappa(kappa) {
        std::fill_n(D.get(), wide, 0.0);
    }
    Found(const Found& plain, long wide) : D(wide), width(plain.width), null(plain.null), kappa(plain.kappa) {
        take(plain, wide), direction_error = plain.direction_error, low = plain.low, high = plain.high, length = plain.length;
    }
    void take(const Found& plain, long wide) {
        sums = whole = plain.sums;
        std::copy_n(plain.D.get(), wide, D.get());
    }
    void judge(const float* null_value, double dropped) {  // dropped: the mass of one that was, at the most
        // What is left of sums after much was taken out of them is as uncertain as the whole was rounded.
        auto at_most = [](double left, double all) { return left * UP + all * (UP - 1); };
        auto at_least = [](double left, double all) { return std::max(0.0, left / UP - all * (UP - 1)); };
        double count = sums.dropped * dropped, squares = 0;
        double most = at_most(sums.most, whole.most) + count, least = at_least(sums.least, whole.least);
        double slack = at_most(sums.slack, whole.slack) + count * sums.longest + sums.turned / 1048576;
        for (long d = 0; d < width; ++d) {
            double x = D[d] + null * null_value[d];
            squares += x * x;
        }
        length = std::sqrt(squares), total = null + sums.L + most;
        low = magnitude(sums.L + least, sums.Q + at_most(sums.most_squares, whole.most_squares) + count * dropped, null, kappa);
        high = magnitude(sums.L + most, sums.Q + at_least(sums.least_squares, whole.least_squares), null, kappa);
        double share = slack / length;
        bool held = length - slack >= CLAMP * total;
        direction_error = slack == 0 && most == 0 ? 0 : held ? share * std::sqrt(2 / (1 + std::sqrt(1 - share * share))) : 2;
    }
    bool within(double direction, double magnitude) const {  // false where anything is NaN
        return direction_error <= direction && (high - low) / 2 <= magnitude;
    }
    // How much of the slack there was may be left, by what is known of D and by how far the magnitude is from its bound.
    double allowed(double direction, double magnitude, const Found& plain) const {
        double most = direction < 1.4 ? direction * std::sqrt(1 - direction * direction / 4) : 1;  // ϱ of this chord
        return std::min(most * length, plain.sums.slack * magnitude / std::max((plain.high - plain.low) / 2, 1e-30));
    }
};

template <class E> struct Exact {
    const Passes<E, true>& passes;
    long r;
    const Row& row;
    Exact(const Passes<E, true>& passes, long r) : passes(passes), r(r), row(passes.rows[r]) {}

    V doubtful(long s) const { return Float::load(passes.slack + r * passes.room + s - passes.base); }

    // How many keys of a split are how doubtful, by the leading bits of it; those below `least` are not counted.
    void count(long c, float least, int32_t* bins) const {
        passes.vectors(row, c, [&](long s, long, long, long) {
            V slack = doubtful(s);
            if (!any(~(slack < least))) return;
            Mask bits = (Mask)slack >> 20;
            for (long i = 0; i < LANES; ++i) ++bins[bits[i] & (BINS - 1)];
        });
    }

    // What changes where the keys of split c that are at least so doubtful are read exactly.
    void correct(long c, float least, float* D, Sums& sums) const {
        Lanes lanes;
        int16_t index[SPLIT + LANES];
        float taken[SPLIT + LANES];
        long n = 0;
        sums = Sums(), std::fill_n(D, passes.wide, 0.0f);
        passes.vectors(row, c, [&](long s, long j, long in, long some) {
            V slack = doubtful(s);
            Mask read = slack >= least;
            if (!any(read)) return;
            Marks known = passes.marks(in, some);
            Weighed w = weigh<true>(row, Float::load(passes.a + r * passes.room + s - passes.base), known, s);
            lanes.add(chosen(read, w.most), chosen(read, w.least), chosen(read, slack));
            V weight = chosen(w.kept, (w.most + w.least) * 0.5f), scaled = weight * known.value_scale;
            sums.turned += Float::sum(chosen(read, weight * known.value_norm));
            for (long i = 0; i < LANES; ++i) index[n] = int16_t(j + i), taken[n] = scaled[i], n += read[i] != 0;
        });
        lanes.into(sums), sums.turn();
        add(passes.base + c * SPLIT, index, taken, n, D, sums);
    }

    void everything(long c, float* D, Sums& sums) const {
        int16_t index[SPLIT + LANES];
        long at = passes.base + c * SPLIT, from = std::max(at, row.first), to = std::min(at + SPLIT, row.last), n = 0;
        for (long s = from; s < to; ++s) index[n++] = int16_t(s - at);
        sums = Sums(), std::fill_n(D, passes.wide, 0.0f);
        add(at, index, nullptr, n, D, sums);
    }

    // The keys of a list of places in a split exactly, less `taken` times the shadows of their values.
    void add(long at, const int16_t* index, const float* taken, long n, float* D, Sums& sums) const {
        Finder<E> ahead{passes.text}, here{passes.text};
        sums.read += n;
        for (long i = 0; i < std::min(n, 2 * LANES); ++i) ahead.fetch(at + index[i]);
        for (long i = 0; i < n; i += LANES) {
            long some = std::min(LANES, n - i);
            for (long l = i + 2 * LANES; l < std::min(n, i + 3 * LANES); ++l) ahead.fetch(at + index[l]);
            V e = masses(here, at, index + i, some);
            for (long l = 0; l < some; ++l) {
                long s = at + index[i + l];
                float mass = e[l];
                sums.L += mass, sums.Q += double(mass) * mass;
                turn(here.value(s), here.shadow(s), mass, taken ? taken[i + l] : 0.0f, D);
            }
        }
    }

    V masses(Finder<E>& here, long at, const int16_t* index, long some) const {
        const Problem& p = passes.p;
        const float* q = passes.q + r * passes.wide;
        V parts[LANES];
        for (long l = 0; l < LANES; ++l) {
            const E* k = here.key(at + index[std::min(l, some - 1)]);
            V sum{};
            long d = 0;
            if (p.k_channel == 1)
                for (; d + LANES <= p.width; d += LANES) sum += Float::load(q + d) * widen(k + d);
            for (; d < p.width; ++d) sum[d % LANES] += q[d] * float(k[d * p.k_channel]);
            parts[l] = sum;
        }
        return exp2_of(Float::sums(parts) * row.factor - row.top);
    }

    // D += mass v − out ṽ.
    void turn(const E* v, const int8_t* shadow, float mass, float out, float* D) const {
        long d = 0, width = passes.p.width;
        for (; d + LANES <= width; d += LANES)
            Float::store(D + d, Float::load(D + d) + (mass * widen(v + d) - out * floats(shadow + d)));
        for (; d < width; ++d) D[d] += mass * float(v[d]) - out * float(shadow[d]);
    }
};

template <class E, bool BOUND> void put(const Passes<E, BOUND>& passes, long r, const Found& found) {
    const Problem& p = passes.p;
    const Row& row = passes.rows[r];
    float* direction = static_cast<float*>(p.direction) + row.at * p.width;
    float* others[] = {static_cast<float*>(p.magnitude), static_cast<float*>(p.direction_error), static_cast<float*>(p.magnitude_error)};
    if (!BOUND) {
        for (long d = 0; d < p.width; ++d) direction[d] = float(found.D[d]);
        others[0][row.at] = float(found.sums.most), others[1][row.at] = float(found.sums.most_squares);
        others[2][row.at] = float(row.top / LOG2E);
        return;
    }
    const float* null_value = static_cast<const float*>(p.null_value) + row.head * p.width;
    double by = 1 / std::max(found.length, CLAMP * found.total);
    for (long d = 0; d < p.width; ++d) direction[d] = float((found.D[d] + found.null * null_value[d]) * by);
    others[0][row.at] = float((found.low + found.high) / 2), others[1][row.at] = float(found.direction_error);
    others[2][row.at] = float((found.high - found.low) / 2);
    p.read[row.at] = int32_t(found.sums.read);
}

template <class E, bool BOUND> struct Reading {
    Passes<E, BOUND> passes;
    const Problem& p;
    long threads;
    Reading(const Problem& p, long index, long from, long count, long threads)
        : passes(p, index, from, count), p(p), threads(threads) {}

    void run() {
        long count = passes.count, wide = passes.wide;
        Buffer<float> tops(passes.span * ROWS);
        passes.in_splits(threads, 0, passes.span, [&](long c) { passes.score(c, tops + c * ROWS); });
        for (long r = 0; r < count; ++r) {
            Row& row = passes.rows[r];
            row.top = HIDDEN;
            for (long c = 0; c < passes.span; ++c) row.top = std::max(row.top, tops[c * ROWS + r]);
            // All that is dropped weighs together at the most 2⁻¹⁰ of what the largest key does; of plain shadows, less
            // than rounding.
            row.bar = row.top - std::log2(float(row.last - row.first)) - (BOUND ? 10.0f : 26.0f);
        }
        std::unique_ptr<Found> found[ROWS];
        for (long r = 0; r < count; ++r) {
            const Row& row = passes.rows[r];
            double null = BOUND ? std::exp2(std::min(static_cast<const float*>(p.null)[row.at] * LOG2E - row.top, 900.0)) : 0;
            double kappa = BOUND ? softplus(static_cast<const float*>(p.magnitude_slope)[row.head]) : 0;
            found[r].reset(new Found(wide, p.width, null, kappa));
        }
        in_waves(count, threads, [&](long c, float* D, Sums* sums) { passes.read(c, D, sums); },
                 [&](long r, const float* D, const Sums& sums) { join(*found[r], D, sums); });
        // Rows are settled side by side, where there are as many as threads: they meet once, and not at every pass.
        auto finish = [&](long r, long threads) {
            if constexpr (BOUND) settle(r, *found[r], threads);
            put<E, BOUND>(passes, r, *found[r]);
        };
        if (threads > 1 && count >= threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
            for (long r = 0; r < count; ++r) finish(r, 1);
        } else {
            for (long r = 0; r < count; ++r) finish(r, threads);
        }
    }

    void join(Found& found, const float* D, const Sums& sums) const {
        found.sums.add(sums);
        for (long d = 0; d < p.width; ++d) found.D[d] += D[d];
    }

    // work(split, D (rows, wide), sums (rows)) of all splits, some at a time, and take(row, D, sums) of each in order.
    template <class Work, class Take> void in_waves(long rows, long threads, Work work, Take take) const {
        long wide = passes.wide, size = std::min(WAVE, passes.span);
        Buffer<float> D(size * rows * wide);
        std::unique_ptr<Sums[]> sums(new Sums[size * rows]);
        for (long wave = 0; wave < passes.span; wave += WAVE) {
            long stop = std::min(wave + WAVE, passes.span);
            passes.in_splits(threads, wave, stop, [&](long c) { work(c, D + (c - wave) * rows * wide, &sums[(c - wave) * rows]); });
            for (long i = 0; i < (stop - wave) * rows; ++i) take(i % rows, D + i * wide, sums[i]);
        }
    }

    double dropped(long r) const { return std::exp2(double(passes.rows[r].bar) - passes.rows[r].top) * UP; }

    void settle(long r, Found& found, long threads) {
        const float* null_value = static_cast<const float*>(p.null_value) + passes.rows[r].head * p.width;
        double direction = p.direction_tolerance, magnitude = p.magnitude_tolerance, share = 0.97;
        bool none = !(direction > 0 && magnitude > 0);
        found.judge(null_value, dropped(r));
        if (!none && found.within(direction, magnitude)) return;
        Found plain(found, passes.wide);
        for (long round = 0; round < ROUNDS && !none; ++round, share /= 2) {
            double left = plain.sums.dropped * dropped(r) * plain.sums.longest;
            float least = bar(r, found.allowed(direction, magnitude, plain) * share - left, threads);
            if (!(least > 0)) break;
            found.take(plain, passes.wide);
            in_waves(1, threads, [&](long c, float* D, Sums* sums) { Exact<E>(passes, r).correct(c, least, D, *sums); },
                     [&](long, const float* D, const Sums& sums) { join(found, D, sums); });
            found.judge(null_value, dropped(r));
            if (found.within(direction, magnitude)) return;
        }
        found.sums = found.whole = Sums(), std::fill_n(found.D.get(), passes.wide, 0.0);
        in_waves(1, threads, [&](long c, float* D, Sums* sums) { Exact<E>(passes, r).everything(c, D, *sums); },
                 [&](long, const float* D, const Sums& sums) { join(found, D, sums); });
        found.judge(null_value, 0);
    }

    // How doubtful a key may be, so that those that are less so are together no more than `budget`; 0: too many would
    // be read. Counts do not depend on the order of counting.
    float bar(long r, double budget, long threads) const {
        const Row& row = passes.rows[r];
        long seen = row.last - row.first, slices = std::max(1L, std::min(threads, passes.span)), read = 0, n = 0;
        float least = float(budget / 16 / seen);
        Buffer<int32_t> bins(slices * BINS);
        std::fill_n(bins.get(), slices * BINS, 0);
#pragma omp parallel for num_threads(slices) schedule(static) if (slices > 1)
        for (long i = 0; i < slices; ++i)
            for (long c = i; c < passes.span; c += slices) Exact<E>(passes, r).count(c, least, bins + i * BINS);
        for (long i = BINS; i < slices * BINS; ++i) bins[i % BINS] += bins[i];
        double spent = 0;
        for (; n < BINS && spent + bins[n] * edge(n + 1) <= budget * 15 / 16; ++n) spent += bins[n] * edge(n + 1);
        for (long i = n; i < BINS; ++i) read += bins[i];
        return n == 0 || n == BINS || read > seen / 2 ? 0.0f : edge(n);
    }
    static double edge(long bin) {
        uint32_t bits = uint32_t(bin) << 20;
        float x;
        std::memcpy(&x, &bits, 4);
        return x;
    }
};

template <class E, bool BOUND> void read(const Problem& p) {
    long rows = p.queries * p.heads / p.groups, blocks = (rows + ROWS - 1) / ROWS, all = p.batch * p.groups * blocks;
    auto work = [&](long i, long threads) {
        long from = (blocks - 1 - i % blocks) * ROWS;  // the last see most keys: longest first
        Reading<E, BOUND>(p, i / blocks, from, std::min(ROWS, rows - from), threads).run();
    };
    // Many blocks are shared out whole, of few the splits are. Not by a condition of one region: threads of a region
    // inside another, if only of one thread, are made anew each time, which takes milliseconds.
    if (p.threads > 1 && all >= 2 * p.threads) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
        for (long i = 0; i < all; ++i) work(i, 1);
    } else {
        for (long i = 0; i < all; ++i) work(i, p.threads);
    }
}
}  // namespace

#define EXPORT(NAME, E)                                        \
    KERNEL(shadow_attention_##NAME, Problem, read<E, true>)    \
    KERNEL(shadow_statistics_##NAME, Problem, read<E, false>)
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
