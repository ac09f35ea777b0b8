// y = x · weightᵀ of a weight in 4 bits with a scale for each 32 inputs of an output, of rows rounded to 8 bits by a scale
// for each 32 too. Within a group sums are integers; the groups follow one another: the same bits for any rows.
#include "narrow.h"

namespace {
using namespace narrow_rows;

constexpr long GROUP = 32, TIMES = 4;  // TIMES vectors hold a group of `lanes` outputs: 8 inputs of each, two a byte
constexpr int ZERO = 8;                // what a weight of 0 is stored as
constexpr int MOST_ROWS = 4, STREAMS = 2;

PROBLEM(Narrow4,  // packed (panels, groups, TIMES, lanes, 4) of two numbers a byte, scale (panels, groups, lanes)
    int64_t rows, inputs, outputs;
    const void* x;
    const uint8_t* packed;
    const bfloat16* scale;
    const void* bias;  // or null
    void* y;
    int64_t threads;
)

struct Rows {  // in 8 bits: codes (rows, groups, GROUP), of each group its scale, and ZERO times its sum
    const int8_t* codes;
    const float* scales;
    const int32_t* zeros;
    long groups;
};

typedef uint8_t Bytes __attribute__((vector_size(VECTOR_BYTES)));

// Σ of 8 × 4 products of a group, each lane its own output; w[2 i] are inputs 8 i to 8 i + 3, w[2 i + 1] the next four. A
// product is at most 15 · 127, so eight pairs of them fit 16 bits.
inline Words dots(const Bytes (&w)[2 * TIMES], const int8_t* x) {
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && defined(__AVX2__))
    Words sum{};
    for (int i = 0; i < 2 * TIMES; ++i)
#if defined(__AVX512VNNI__)
        sum = (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w[i], (__m512i)broadcast(x + 4 * i));
#else
        sum = (Words)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w[i], (__m256i)broadcast(x + 4 * i));
#endif
    return sum;
#elif defined(__AVX512BW__)
    __m512i sum = _mm512_maddubs_epi16((__m512i)w[0], (__m512i)broadcast(x));
    for (int i = 1; i < 2 * TIMES; ++i)
        sum = _mm512_add_epi16(sum, _mm512_maddubs_epi16((__m512i)w[i], (__m512i)broadcast(x + 4 * i)));
    return (Words)_mm512_madd_epi16(sum, _mm512_set1_epi16(1));
#elif defined(__AVX2__)
    __m256i sum = _mm256_maddubs_epi16((__m256i)w[0], (__m256i)broadcast(x));
    for (int i = 1; i < 2 * TIMES; ++i)
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)w[i], (__m256i)broadcast(x + 4 * i)));
    return (Words)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
#else
    Words sum{};
    for (int i = 0; i < 2 * TIMES; ++i)
        for (int lane = 0; lane < S::lanes; ++lane)
            for (int b = 0; b < 4; ++b) sum[lane] += int32_t(w[i][4 * lane + b]) * x[4 * i + b];
    return sum;
#endif
}

inline void unpack(const uint8_t* packed, Bytes (&w)[2 * TIMES]) {
    for (int i = 0; i < TIMES; ++i) {
        Bytes both;
        std::memcpy(&both, packed + i * VECTOR_BYTES, VECTOR_BYTES);
        w[2 * i] = both & 15;
        typedef uint16_t Pairs __attribute__((vector_size(VECTOR_BYTES)));
        w[2 * i + 1] = (Bytes)((Pairs)both >> 4) & 15;  // there are no shifts of bytes
    }
}

// Of ROWS rows, the panels n, n + apart, … of STREAMS: as many places of memory as are fetched ahead of at once.
template <class E, int ROWS, int STREAMS> void tile(const Narrow4& p, const Rows& rows, long row, long n, long apart) {
    constexpr long lanes = S::lanes;
    long place = rows.groups * TIMES * VECTOR_BYTES;
    const uint8_t* packed = p.packed + n * place;
    const bfloat16* scale = p.scale + n * rows.groups * lanes;
    S::V sums[ROWS][STREAMS] = {};
    for (long g = 0; g < rows.groups; ++g, packed += TIMES * VECTOR_BYTES, scale += lanes)
        for (int s = 0; s < STREAMS; ++s) {
            Bytes w[2 * TIMES];
            unpack(packed + s * apart * place, w);
            S::V by = widen(scale + s * apart * rows.groups * lanes);
            for (int r = 0; r < ROWS; ++r) {
                long at = (row + r) * rows.groups + g;
                Words whole = dots(w, rows.codes + at * GROUP) - rows.zeros[at];
                sums[r][s] = fused(floats(whole), by * rows.scales[at], sums[r][s]);
            }
        }
    for (int r = 0; r < ROWS; ++r)
        for (int s = 0; s < STREAMS; ++s) {
            long first = (n + s * apart) * lanes, width = std::min<long>(lanes, p.outputs - first);
            E* y = static_cast<E*>(p.y) + (row + r) * p.outputs + first;
            for (long o = 0; o < width; ++o) {
                float bias = p.bias == nullptr ? 0.0f : float(static_cast<const E*>(p.bias)[first + o]);
                y[o] = narrow(float(sums[r][s][o]) + bias, E());
            }
        }
}

template <class E> void in_8_bits(const Narrow4& p, long r, long groups, int8_t* codes, float* scales, int32_t* zeros) {
    const E* x = static_cast<const E*>(p.x) + r * p.inputs;
    for (long g = 0; g < groups; ++g) {
        long count = std::min<long>(GROUP, p.inputs - g * GROUP);
        int8_t* to = codes + (r * groups + g) * GROUP;
        scales[r * groups + g] = Row<E>::scaled(x + g * GROUP, count, to, 0);
        std::fill(to + count, to + GROUP, int8_t(0));
        int32_t sum = 0;
        for (long d = 0; d < GROUP; ++d) sum += to[d];
        zeros[r * groups + g] = ZERO * sum;
    }
}

// Of one or two rows, the panels from n to `last`, each weight of which is waited for and read once.
template <class E, int ROWS> void few(const Narrow4& p, const Rows& rows, long n, long last) {
    long apart = (last - n) / STREAMS;
    for (long i = 0; i < apart; ++i) tile<E, ROWS, STREAMS>(p, rows, 0, n + i, apart);
    for (n += apart * STREAMS; n < last; ++n) tile<E, ROWS, 1>(p, rows, 0, n, 0);
}

template <class E> void narrow4(const Narrow4& p) {
    constexpr long lanes = S::lanes;
    long groups = (p.inputs + GROUP - 1) / GROUP, panels = (p.outputs + lanes - 1) / lanes;
    Buffer<int8_t> codes(p.rows * groups * GROUP);
    Buffer<float> scales(p.rows * groups);
    Buffer<int32_t> zeros(p.rows * groups);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.inputs > (1 << 16))
    for (long r = 0; r < p.rows; ++r) in_8_bits<E>(p, r, groups, codes, scales, zeros);
    Rows rows{codes, scales, zeros, groups};
    bool parallel = p.rows * p.inputs * p.outputs > (1 << 17);
    if (p.rows == 1) {
#pragma omp parallel for num_threads(p.threads) schedule(static, 1) if (parallel)
        for (long t = 0; t < p.threads; ++t) few<E, 1>(p, rows, panels * t / p.threads, panels * (t + 1) / p.threads);
        return;
    }
    in_blocks(p.rows, panels, parallel ? p.threads : 1, [&](long r, long end, long n) {
        for (; r < end; r += MOST_ROWS)
            by_rows(std::min<long>(MOST_ROWS, end - r), [&](auto count) {
                if constexpr (count.value <= MOST_ROWS) tile<E, count.value, 1>(p, rows, r, n, 0);
            });
    });
}

PROBLEM(Chosen4,  // y (n, inputs): rows of the weight, by output
    int64_t n, inputs;
    const int64_t* index;
    const uint8_t* packed;
    const bfloat16* scale;
    void* y;
)

template <class E> void chosen4(const Chosen4& p) {
    constexpr long lanes = S::lanes;
    long groups = (p.inputs + GROUP - 1) / GROUP;
    for (long i = 0; i < p.n; ++i) {
        long first = p.index[i] / lanes * groups, lane = p.index[i] % lanes;
        for (long d = 0; d < p.inputs; ++d) {
            long group = first + d / GROUP, of = d % GROUP, half = of % 8 / 4;
            uint8_t both = p.packed[(group * TIMES + of / 8) * VECTOR_BYTES + 4 * lane + of % 4];
            float scale = float(p.scale[group * lanes + lane]);
            static_cast<E*>(p.y)[i * p.inputs + d] = narrow(float((both >> 4 * half & 15) - ZERO) * scale, E());
        }
    }
}
}  // namespace

extern "C" int64_t narrow4_panel() { return S::lanes; }  // outputs of a panel

#define EXPORT(NAME, E)                         \
    KERNEL(narrow4_##NAME, Narrow4, narrow4<E>) \
    KERNEL(chosen4_##NAME, Chosen4, chosen4<E>)
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
