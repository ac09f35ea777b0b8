// Numbers of tokens that lie as rows, in one piece or in pages of a pool.
#pragma once
#include <algorithm>
#include <cstdint>

template <class E> struct Rows {  // (B, G, S, width); with a table (pages, G, page, width), row b's pages a ring
    const E* base;
    struct {
        int64_t batch, head, row;
    } step;  // strides in elements, of what lies in one piece
    const int32_t* table;
    int64_t table_row, page, groups, width;

    const E* at(long b, long g, long s) const {
        if (table == nullptr) return base + b * step.batch + g * step.head + s * step.row;
        long place = table[b * table_row + s / page % table_row];
        return base + ((place * groups + g) * page + s % page) * width;
    }
    long stride() const { return table == nullptr ? step.row : width; }
    long run(long s, long end) const {  // rows from s on, to `end` at the most, that lie behind one another
        return table == nullptr ? end - s : std::min(end - s, page - s % page);
    }
};

// What a problem with a table tells of rows at x.
template <class E, class P> Rows<E> rows_of(const P& p, const void* x, decltype(Rows<E>::step) step, int64_t width) {
    return {static_cast<const E*>(x), step, p.table, p.table_row, p.pool_page, p.groups, width};
}
