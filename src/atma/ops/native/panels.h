// Products of many rows with weights laid out as panels of neighbouring outputs: which thread has which of them.
#pragma once
#include <algorithm>
#include "simd.h"

constexpr long ROW_BLOCK = 48;  // rows worked on together, so that weights are read from the cache

// Calls of(row, end, n) for all blocks of rows and all panels n, each thread with as much work as the next: so many
// panels of all rows, or, where that comes out more evenly, so many rows of all panels.
template <class F> void in_blocks(long rows, long panels, long threads, F&& of) {
    long tiles = (rows + TILE_ROWS - 1) / TILE_ROWS;
    auto most = [&](long count) { return double((count + threads - 1) / threads) / double(std::max(count, 1L)); };
    bool by_panel = most(panels) <= most(tiles);
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (threads > 1)
    for (long t = 0; t < threads; ++t) {
        long n = by_panel ? panels * t / threads : 0, last = by_panel ? panels * (t + 1) / threads : panels;
        long row = by_panel ? 0 : tiles * t / threads * TILE_ROWS;
        long end = by_panel ? rows : std::min(rows, tiles * (t + 1) / threads * TILE_ROWS);
        for (; row < end; row += ROW_BLOCK)
            for (long i = n; i < last; ++i) of(row, std::min(row + ROW_BLOCK, end), i);
    }
}
