// Products of any number of rows with a weight laid out for them: what a row's result is, bit for bit, does not depend on
// how many rows there are, or on the number of threads. A sum runs over the inputs one after the other. T computes, E is
// how tensors are stored.
#include "panels.h"
#include "problem.h"
#include "simd.h"

namespace {

template <class E> struct Compute { using T = E; };
template <> struct Compute<bfloat16> { using T = float; };

PROBLEM(Product,  // y (rows, outputs) = x (rows, inputs) · packed + bias; packed (panels, inputs, panel), bias or null
    int64_t rows, inputs, outputs;
    const void *x, *packed, *bias;
    void* y;
    int64_t threads;
)

// ROWS rows from `row` on of panel n, which has `width` outputs; bias is filled up to a panel.
template <class E, int ROWS>
void product_tile(const Product& p, const typename Compute<E>::T* x, long row, long n, long width, const E* bias) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    const E* packed = static_cast<const E*>(p.packed) + n * p.inputs * S::panel;
    typename S::V sums[ROWS][TILE_VECTORS] = {};
    accumulate<T, ROWS, TILE_VECTORS>(x + row * p.inputs, p.inputs, 1, packed, S::panel, p.inputs, sums);
    E* y = static_cast<E*>(p.y) + row * p.outputs + n * S::panel;
    alignas(64) E whole[S::panel];
    for (int r = 0; r < ROWS; ++r, y += p.outputs) {
        E* to = width == S::panel ? y : whole;
        for (int j = 0; j < TILE_VECTORS; ++j) put(to + j * S::lanes, sums[r][j] + widen(bias + j * S::lanes));
        if (width < S::panel) std::copy(whole, whole + width, y);
    }
}

// Rows [row, end) of panel n.
template <class E> void product_panel(const Product& p, const typename Compute<E>::T* x, long row, long end, long n) {
    constexpr long panel = Simd<typename Compute<E>::T>::panel;
    long width = std::min<long>(panel, p.outputs - n * panel);
    alignas(64) E bias[panel] = {};
    if (p.bias != nullptr) std::copy_n(static_cast<const E*>(p.bias) + n * panel, width, bias);
    for (; end - row >= TILE_ROWS; row += TILE_ROWS) product_tile<E, TILE_ROWS>(p, x, row, n, width, bias);
    switch (end - row) {
        case 5: return product_tile<E, 5>(p, x, row, n, width, bias);
        case 4: return product_tile<E, 4>(p, x, row, n, width, bias);
        case 3: return product_tile<E, 3>(p, x, row, n, width, bias);
        case 2: return product_tile<E, 2>(p, x, row, n, width, bias);
        case 1: return product_tile<E, 1>(p, x, row, n, width, bias);
    }
}

// Of ROWS rows, the panels n, n + apart, … of STREAMS: the sums of one are too few to hide their latency, and one place
// of memory is fetched ahead of more slowly than several. The sums of each run in the order of `product_tile`.
template <class E, int ROWS, int STREAMS>
void product_tiles(const Product& p, const typename Compute<E>::T* x, long n, long apart) {
    using T = typename Compute<E>::T;
    using S = Simd<T>;
    long stride = apart * p.inputs * S::panel;
    const E* packed = static_cast<const E*>(p.packed) + n * p.inputs * S::panel;
    typename S::V sums[STREAMS][ROWS][TILE_VECTORS] = {};
    for (long d = 0; d < p.inputs; ++d, packed += S::panel)
        for (int s = 0; s < STREAMS; ++s)
            accumulate<T, ROWS, TILE_VECTORS>(x + d, p.inputs, 1, packed + s * stride, S::panel, 1, sums[s]);
    for (int s = 0; s < STREAMS; ++s)
        for (int r = 0; r < ROWS; ++r) {
            long first = (n + s * apart) * S::panel, width = std::min<long>(S::panel, p.outputs - first);
            alignas(64) E held[S::panel] = {}, whole[S::panel];
            if (p.bias != nullptr) std::copy_n(static_cast<const E*>(p.bias) + first, width, held);
            const E* bias = held;
            for (int j = 0; j < TILE_VECTORS; ++j)
                put(whole + j * S::lanes, sums[s][r][j] + widen(bias + j * S::lanes));
            std::copy_n(whole, width, static_cast<E*>(p.y) + r * p.outputs + first);
        }
}

// One row or two of the panels from n to `last`, in streams as long as they can be.
template <class E, int ROWS, int STREAMS>
void few_rows(const Product& p, const typename Compute<E>::T* x, long n, long last) {
    long apart = (last - n) / STREAMS;
    for (long i = 0; i < apart; ++i) product_tiles<E, ROWS, STREAMS>(p, x, n + i, apart);
    for (n += apart * STREAMS; n < last; ++n) product_tiles<E, ROWS, 1>(p, x, n, 0);
}

template <class E> void product_rows(const Product& p) {
    using T = typename Compute<E>::T;
    constexpr long panel = Simd<T>::panel;
    const T* x = static_cast<const T*>(p.x);
    Buffer<T> wide(std::is_same_v<E, T> ? 0 : p.rows * p.inputs);
    if constexpr (!std::is_same_v<E, T>) {
        for (long i = 0; i < p.rows * p.inputs; ++i) wide[i] = T(static_cast<const E*>(p.x)[i]);
        x = wide;
    }
    long panels = (p.outputs + panel - 1) / panel;
    bool parallel = p.rows * p.inputs * p.outputs > (1 << 17);
    if (p.rows <= 2) {
        auto of = p.rows == 1 ? few_rows<E, 1, 4> : few_rows<E, 2, 2>;
        long parts = parallel ? p.threads : 1;
#pragma omp parallel for num_threads(parts) schedule(static, 1) if (parts > 1)
        for (long t = 0; t < parts; ++t) of(p, x, panels * t / parts, panels * (t + 1) / parts);
        return;
    }
    in_blocks(p.rows, panels, parallel ? p.threads : 1,
              [&](long row, long end, long n) { product_panel<E>(p, x, row, end, n); });
}

PROBLEM(Choice,  // y (n, inputs): rows of packed (panels, inputs, panel), by output
    int64_t n, inputs;
    const int64_t* index;
    const void* packed;
    void* y;
)

template <class E> void packed_rows(const Choice& p) {
    constexpr long panel = Simd<typename Compute<E>::T>::panel;
    for (long i = 0; i < p.n; ++i) {
        const E* from = static_cast<const E*>(p.packed) + p.index[i] / panel * p.inputs * panel + p.index[i] % panel;
        for (long d = 0; d < p.inputs; ++d) static_cast<E*>(p.y)[i * p.inputs + d] = from[d * panel];
    }
}
}  // namespace

extern "C" int64_t panel_bytes() { return TILE_VECTORS * VECTOR_BYTES; }

#define EXPORT(NAME, E)                                   \
    KERNEL(product_rows_##NAME, Product, product_rows<E>) \
    KERNEL(packed_rows_##NAME, Choice, packed_rows<E>)
EXPORT(float32, float)
EXPORT(float64, double)
EXPORT(bfloat16, bfloat16)
