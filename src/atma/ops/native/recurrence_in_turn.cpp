// Linear recurrences for serving: each token by itself, in order, the memory in place (`after` may be `memory`). What one
// gives depends neither on how a text was cut into calls, nor on what is beside it, nor on the number of threads.
#include "turns.h"

namespace {

template <class T, Axis AXIS> void in_turn(const Problem& p) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (p.batch * p.heads * p.length > 8)
    for (long i = 0; i < p.batch * p.heads; ++i) turns_of_head<T>(p, i, AXIS);
}
}  // namespace

#define EXPORT(NAME, T)                                                \
    KERNEL(recurrence_in_turn_##NAME, Problem, in_turn<T, Axis::key>)   \
    KERNEL(recurrence_by_value_in_turn_##NAME, Problem, in_turn<T, Axis::value>)
EXPORT(float32, float)
EXPORT(float64, double)
