// Products of small matrices of any strides, as a recorded step makes PyTorch's.
#include "problem.h"
#include "simd.h"

namespace {

// y (rows, columns) = add + a (rows, depth) · b (depth, columns), `batch` times; strides in numbers.
PROBLEM(Product,
    int64_t batch, rows, columns, depth;
    int64_t y_strides[3], a_strides[3], b_strides[3], add_strides[3];  // of a batch, a row and a column each
    void* y;
    const void *a, *b, *add;  // add: null for nothing
    int64_t threads;
)
constexpr long COLUMNS = 64;  // of one piece of work

template <class T, class E> T dot(long n, const T* a, const E* b) {
    using S = Simd<T>;
    typename S::V sums{};
    long d = 0;
    for (; d + S::lanes <= n; d += S::lanes) sums += S::load(a + d) * widen(b + d);
    T rest = S::sum(sums);
    for (; d < n; ++d) rest += a[d] * T(b[d]);
    return rest;
}

// sums (columns) of one row, b walked through in the order it lies in.
template <class T, class E> void row_times(const Product& p, const T* a, const E* b, long columns, T* sums) {
    const int64_t *s = p.b_strides;
    if (s[1] == 1) {
        for (long j = 0; j < columns; ++j) sums[j] = dot(p.depth, a, b + j * s[2]);
        return;
    }
    std::fill(sums, sums + columns, T(0));
    for (long d = 0; d < p.depth; ++d) {
        const E* from = b + d * s[1];
        if (s[2] == 1)
            for (long j = 0; j < columns; ++j) sums[j] += a[d] * T(from[j]);
        else
            for (long j = 0; j < columns; ++j) sums[j] += a[d] * T(from[j * s[2]]);
    }
}

template <class T, class E> void product(const Product& p, long piece, long last) {
    long pieces = (p.columns + COLUMNS - 1) / COLUMNS;
    Buffer<T> a(p.depth);
    T sums[COLUMNS];
    for (; piece < last; ++piece) {
        long n = piece / pieces, first = piece % pieces * COLUMNS, columns = std::min(COLUMNS, long(p.columns) - first);
        auto at = [&](const int64_t* s, long row, long column) { return n * s[0] + row * s[1] + column * s[2]; };
        for (long r = 0; r < p.rows; ++r) {
            const E* from = static_cast<const E*>(p.a) + at(p.a_strides, r, 0);
            for (long d = 0; d < p.depth; ++d) a[d] = T(from[d * p.a_strides[2]]);
            row_times<T, E>(p, a, static_cast<const E*>(p.b) + at(p.b_strides, 0, first), columns, sums);
            for (long j = 0; j < columns; ++j) {
                T add = p.add == nullptr ? T(0) : T(static_cast<const E*>(p.add)[at(p.add_strides, r, first + j)]);
                static_cast<E*>(p.y)[at(p.y_strides, r, first + j)] = narrow(T(sums[j] + add), E());
            }
        }
    }
}

template <class T, class E> void product(const Product& p) {
    long count = p.batch * ((p.columns + COLUMNS - 1) / COLUMNS);
    if (p.threads == 1 || count * COLUMNS * p.rows * p.depth <= (1 << 17)) return product<T, E>(p, 0, count);
#pragma omp parallel for num_threads(p.threads) schedule(static, 1)
    for (long i = 0; i < p.threads; ++i) product<T, E>(p, count * i / p.threads, count * (i + 1) / p.threads);
}
}  // namespace

KERNEL(product_float32, Product, product<float, float>)
KERNEL(product_float64, Product, product<double, double>)
KERNEL(product_bfloat16, Product, product<float, bfloat16>)
