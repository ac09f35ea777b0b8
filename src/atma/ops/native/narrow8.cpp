// y = x · weightᵀ of a weight in 8 bits with a scale an output. A row of x is rounded to 8 bits with one scale; the sum of
// an output is one integer of 32 bits, and then one multiplication: the same bits in any order.
#include "narrow.h"

namespace {
using namespace narrow_rows;

// Inputs of one step that lie beside each other for an output, and how a row's numbers are stored for it.
#if NARROW_DOTS
constexpr long DEPTH = 4;
using Code = uint8_t;  // raised by 128, which `sums` of the weight takes off again
constexpr int RAISED = 128;
#else
constexpr long DEPTH = 2;
using Code = int16_t;
constexpr int RAISED = 0;
#endif
constexpr long PANEL = S::panel, PADDED = 4;  // inputs are filled up to a multiple of PADDED
constexpr long STREAMS = 4;

PROBLEM(Narrow8,  // packed (panels, steps, PANEL, DEPTH), scale and sums (panels · PANEL), sums of an output's weights
    int64_t rows, inputs, outputs;
    const void* x;
    const int8_t* packed;
    const float* scale;
    const int32_t* sums;
    const void* bias;  // or null
    void* y;
    int64_t threads;
)

// sum + Σ w · x over DEPTH inputs of each lane; w at `place`, x the same on all lanes.
inline Words step(Words sum, const int8_t* place, Words x) {
#if defined(__AVX512VNNI__)
    return (Words)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)x, _mm512_loadu_si512(place));
#elif defined(__AVXVNNI__) && defined(__AVX2__)
    return (Words)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)x, _mm256_loadu_si256((const __m256i*)place));
#elif defined(__AVX512BW__)
    __m512i w = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)place));
    return sum + (Words)_mm512_madd_epi16(w, (__m512i)x);
#elif defined(__AVX2__)
    __m256i w = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)place));
    return sum + (Words)_mm256_madd_epi16(w, (__m256i)x);
#else
    int16_t pair[2];
    int32_t word = x[0];
    std::memcpy(pair, &word, 4);
    for (int i = 0; i < S::lanes; ++i) sum[i] += int32_t(place[2 * i]) * pair[0] + int32_t(place[2 * i + 1]) * pair[1];
    return sum;
#endif
}

// Of ROWS rows, the panels n, n + apart, … of STREAMS: as many places of memory as are fetched ahead of at once.
template <class E, int ROWS, int STREAMS>
void tile(const Narrow8& p, const Code* codes, const float* scales, long wide, long row, long n, long apart) {
    const int8_t* w = p.packed + n * wide * PANEL;
    const Code* x = codes + row * wide;
    Words sums[ROWS][STREAMS][TILE_VECTORS] = {};
    for (long d = 0; d < wide; d += DEPTH, w += DEPTH * PANEL)
        for (int r = 0; r < ROWS; ++r) {
            Words four = broadcast(x + r * wide + d);
            for (int s = 0; s < STREAMS; ++s)
                for (int j = 0; j < TILE_VECTORS; ++j)
                    sums[r][s][j] = step(sums[r][s][j], w + s * apart * wide * PANEL + j * DEPTH * S::lanes, four);
        }
    for (int s = 0; s < STREAMS; ++s) {
        long first = (n + s * apart) * PANEL, width = std::min<long>(PANEL, p.outputs - first);
        alignas(64) float bias[PANEL] = {}, whole[PANEL];
        if (p.bias != nullptr)
            for (long o = 0; o < width; ++o) bias[o] = float(static_cast<const E*>(p.bias)[first + o]);
        for (int r = 0; r < ROWS; ++r) {
            for (int j = 0; j < TILE_VECTORS; ++j) {
                long at = first + j * S::lanes;
                Words raised;
                std::memcpy(&raised, p.sums + at, sizeof raised);
                S::V factor = S::load(p.scale + at) * scales[row + r];
                S::store(whole + j * S::lanes,
                         fused(floats(sums[r][s][j] - raised * RAISED), factor, S::load(bias + j * S::lanes)));
            }
            E* y = static_cast<E*>(p.y) + (row + r) * p.outputs + first;
            for (long o = 0; o < width; ++o) y[o] = narrow(whole[o], E());
        }
    }
}

// Of one or two rows, the panels from n to `last`, each weight of which is waited for and read once.
template <class E, int ROWS> void few(const Narrow8& p, const Code* codes, const float* scales, long wide, long n, long last) {
    long apart = (last - n) / STREAMS;
    for (long i = 0; i < apart; ++i) tile<E, ROWS, STREAMS>(p, codes, scales, wide, 0, n + i, apart);
    for (n += apart * STREAMS; n < last; ++n) tile<E, ROWS, 1>(p, codes, scales, wide, 0, n, 0);
}

template <class E> void narrow8(const Narrow8& p) {
    long wide = (p.inputs + PADDED - 1) / PADDED * PADDED, panels = (p.outputs + PANEL - 1) / PANEL;
    Buffer<Code> codes(p.rows * wide);
    Buffer<float> scales(p.rows);
#pragma omp parallel for num_threads(p.threads) schedule(static) if (p.rows * p.inputs > (1 << 16))
    for (long r = 0; r < p.rows; ++r) {
        scales[r] = Row<E>::scaled(static_cast<const E*>(p.x) + r * p.inputs, p.inputs, codes + r * wide, RAISED);
        std::fill(codes + r * wide + p.inputs, codes + (r + 1) * wide, Code(RAISED));
    }
    bool parallel = p.rows * p.inputs * p.outputs > (1 << 17);
    if (p.rows <= 2) {
        auto of = p.rows == 1 ? few<E, 1> : few<E, 2>;
#pragma omp parallel for num_threads(p.threads) schedule(static, 1) if (parallel)
        for (long t = 0; t < p.threads; ++t)
            of(p, codes, scales, wide, panels * t / p.threads, panels * (t + 1) / p.threads);
        return;
    }
    in_blocks(p.rows, panels, parallel ? p.threads : 1, [&](long r, long end, long n) {
        for (; r < end; r += TILE_ROWS)
            by_rows(std::min<long>(TILE_ROWS, end - r),
                    [&](auto count) { tile<E, count.value, 1>(p, codes, scales, wide, r, n, 0); });
    });
}

PROBLEM(Chosen8,  // y (n, inputs): rows of the weight, by output
    int64_t n, inputs;
    const int64_t* index;
    const int8_t* packed;
    const float* scale;
    void* y;
)

template <class E> void chosen8(const Chosen8& p) {
    long wide = (p.inputs + PADDED - 1) / PADDED * PADDED;
    for (long i = 0; i < p.n; ++i) {
        long at = p.index[i];
        const int8_t* from = p.packed + at / PANEL * wide * PANEL + at % PANEL * DEPTH;
        for (long d = 0; d < p.inputs; ++d)
            static_cast<E*>(p.y)[i * p.inputs + d] =
                narrow(float(from[d / DEPTH * DEPTH * PANEL + d % DEPTH]) * p.scale[at], E());
    }
}
}  // namespace

// Outputs of a panel, and inputs of a step: how `pack` lays weights out.
extern "C" int64_t narrow8_panel() { return PANEL; }
extern "C" int64_t narrow8_depth() { return DEPTH; }

#define EXPORT(NAME, E)                       \
    KERNEL(narrow8_##NAME, Narrow8, narrow8<E>) \
    KERNEL(chosen8_##NAME, Chosen8, chosen8<E>)
EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
