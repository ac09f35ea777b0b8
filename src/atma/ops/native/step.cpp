// One decoding step without Python: `replay` makes the calls of a recorded list (ops/native/recorder.py). Here too is what
// reads and writes at places that are computed: new keys and values, and tensors indexed by tensors.
#include "problem.h"
#include "simd.h"

namespace {

constexpr int RANK = 4;

PROBLEM(Hold,  // new keys and values (B, G, T, row) at each row's own place in those held (B, G, S, row); strides in bytes
    int64_t batch, groups, tokens, row_bytes;
    int64_t new_keys[3], new_values[3], held_keys[3], held_values[3];
    const char *keys, *values;
    char *into_keys, *into_values;
    const int32_t* start;
)

struct Index {  // numbers that say where along one dimension of a table, as `size` long; negative ones count from its end
    const char* place;
    int64_t wide, lowest, size, step, strides[RANK];  // wide: int64, else int32; strides and the table's step in bytes
};

PROBLEM(Indexed,  // dense[…] = table[index…], or with `write` the other way, over `sizes`
    int64_t write, item, sizes[4], dense_strides[4], table_strides[4];
    char *dense, *table;
    Index indices[3];  // without a place beyond the last
)

thread_local int64_t missed;  // numbers of an Index since `replay` began that were beyond its table

// The table's offset that the indices say at `at`; −1, and a miss, where one is beyond it.
long offset(const Indexed& p, const long* at) {
    long total = 0;
    for (const Index& index : p.indices) {
        if (index.place == nullptr) break;
        const char* from = index.place;
        for (int d = 0; d < RANK; ++d) from += at[d] * index.strides[d];
        int64_t i = index.wide ? *reinterpret_cast<const int64_t*>(from) : *reinterpret_cast<const int32_t*>(from);
        if (i < index.lowest || i >= index.size) {
            ++missed;
            return -1;
        }
        total += (i < 0 ? i + index.size : i) * index.step;
    }
    return total;
}

bool in_one_piece(const Indexed& p) {  // the last dimension, which no index follows
    for (const Index& index : p.indices)
        if (index.place != nullptr && index.strides[RANK - 1] != 0) return false;
    return p.dense_strides[RANK - 1] == p.item && p.table_strides[RANK - 1] == p.item;
}

struct Call {
    void (*kernel)(const void*);
    const void* arguments;
};
}  // namespace

extern "C" void indexed(const Indexed* p) {
    bool piece = in_one_piece(*p);
    long bytes = piece ? p->item * p->sizes[3] : p->item, last = piece ? 1 : p->sizes[3], at[RANK];
    for (at[0] = 0; at[0] < p->sizes[0]; ++at[0])
        for (at[1] = 0; at[1] < p->sizes[1]; ++at[1])
            for (at[2] = 0; at[2] < p->sizes[2]; ++at[2])
                for (at[3] = 0; at[3] < last; ++at[3]) {
                    char *dense = p->dense, *table = p->table;
                    for (int d = 0; d < RANK; ++d) dense += at[d] * p->dense_strides[d], table += at[d] * p->table_strides[d];
                    long found = offset(*p, at);
                    if (found >= 0) std::memcpy(p->write ? table + found : dense, p->write ? dense : table + found, bytes);
                }
}
TELLS(indexed, Indexed)

extern "C" void hold(const Hold* p) {
    for (long b = 0; b < p->batch; ++b)
        for (long g = 0; g < p->groups; ++g)
            for (long t = 0; t < p->tokens; ++t) {
                auto from = [&](const int64_t* s) { return b * s[0] + g * s[1] + t * s[2]; };
                auto to = [&](const int64_t* s) { return b * s[0] + g * s[1] + (p->start[b] + t) * s[2]; };
                std::memcpy(p->into_keys + to(p->held_keys), p->keys + from(p->new_keys), p->row_bytes);
                std::memcpy(p->into_values + to(p->held_values), p->values + from(p->new_values), p->row_bytes);
            }
}
TELLS(hold, Hold)

// Returns how many indices were beyond their table: nothing was read or written there.
extern "C" int64_t replay(const Call* calls, int64_t count) {
    missed = 0;
    for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].arguments);
    return missed;
}

// Lists that have nothing to do with one another, a thread for each; the kernels of a single one have all threads.
extern "C" int64_t replay_beside(const Call* const* lists, const int64_t* counts, int64_t number) {
    if (number == 1) return replay(lists[0], counts[0]);
    int64_t total = 0;
#pragma omp parallel for num_threads(number) schedule(static, 1) reduction(+ : total)
    for (int64_t i = 0; i < number; ++i) total += replay(lists[i], counts[i]);
    return total;
}
