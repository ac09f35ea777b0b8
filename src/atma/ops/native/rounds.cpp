// Newton-Schulz rounds on Gram matrices (`newton_schulz` of ops/dense). All matrices are polynomials of one symmetric matrix, so they
// are symmetric and commute, and so are their products: the lower half is computed, the upper is its mirror.
#include "problem.h"
#include "simd.h"

namespace {

PROBLEM(Problem,
    int64_t count, size, turns;
    const void* gram;  // (count, size, size)
    void* factor;      // the same
    double a, b, c;
    int64_t threads;
)

// `row` is no multiple of a page, so that the rows under each other do not share the places of one cache set.
template <class T> struct Matrix {
    long size, row;
    Buffer<T> x;
    explicit Matrix(long size) : size(size), row(padded<T>(size) + Simd<T>::lanes), x(size * row) {
        std::fill(x.get(), x + size * row, T(0));
    }
    void swap(Matrix& other) { x.held.swap(other.x.held); }
};

// to = A B, for which A, B and A B are symmetric, by `threads` threads.
template <class T> void multiply(const Matrix<T>& A, const Matrix<T>& B, Matrix<T>& to, long threads) {
    constexpr long side = 48;  // of mirrored blocks, a multiple of the tile's rows
    long size = A.size, row = A.row;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (long block = (size - 1) / side; block >= 0; --block)
            for (long i = block * side; i < std::min(size, (block + 1) * side); i += TILE_ROWS) {
                // Rows i … of A B up to their own diagonal alone. A is read by its columns, which as it is symmetric
                // are its rows.
                long count = std::min<long>(TILE_ROWS, size - i);
                strip<T>(count, padded<T>(i + count), size, A.x + i, 1, row, B.x.get(), row, to.x + i * row, row, false);
            }
#pragma omp for schedule(static, 1)
        // The upper half mirrors the lower, block by block, so that neither side strides through the cache.
        for (long i0 = 0; i0 < size; i0 += side)
            for (long j0 = 0; j0 <= i0; j0 += side)
                for (long i = i0; i < std::min(size, i0 + side); ++i)
                    for (long j = j0; j < std::min(i, j0 + side); ++j) to.x[j * row + i] = to.x[i * row + j];
    }
}

// F ← P F and G ← P G P with P = a + b G + c G².
template <class T> void rounds(const Problem& p, long index, long threads) {
    long size = p.size;
    Matrix<T> G(size), P(size), F(size), room(size);
    const T* given = static_cast<const T*>(p.gram) + index * size * size;
    for (long i = 0; i < size; ++i) std::copy(given + i * size, given + (i + 1) * size, G.x + i * G.row);
    for (long turn = 0; turn < p.turns; ++turn) {
        // P = a + b G + c G², in place of G².
        multiply(G, G, P, threads);
        for (long i = 0; i < size; ++i) {
            T *to = P.x + i * P.row, *from = G.x + i * G.row;
            for (long j = 0; j < size; ++j) to[j] = T(p.c) * to[j] + T(p.b) * from[j];
            to[i] += T(p.a);
        }
        // F = P in the first round, where F was 1.
        if (turn == 0) {
            std::copy(P.x.get(), P.x + size * P.row, F.x.get());
        } else {
            multiply(P, F, room, threads);
            F.swap(room);
        }
        // The last G is not asked for.
        if (turn + 1 == p.turns) break;
        // G ← P G P; P and G commute, so each product is symmetric.
        multiply(P, G, room, threads);
        multiply(room, P, G, threads);
    }
    T* factor = static_cast<T*>(p.factor) + index * size * size;
    for (long i = 0; i < size; ++i) std::copy(F.x + i * F.row, F.x + i * F.row + size, factor + i * size);
}

template <class T> void rounds(const Problem& p) {
    bool each = p.count >= p.threads;  // a matrix a thread, or all threads on each
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (each)
    for (long i = 0; i < p.count; ++i) rounds<T>(p, i, each ? 1 : p.threads);
}
}  // namespace

KERNEL(newton_schulz_float32, Problem, rounds<float>)
KERNEL(newton_schulz_float64, Problem, rounds<double>)
