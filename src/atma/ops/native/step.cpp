// One decoding step without Python: `replay` makes the calls of a recorded list (ops/native/recorder.py), and the small
// tensor operations between the mixers' kernels are one kernel here, as is the writing of new keys and values.
#include "simd.h"

namespace {

constexpr int RANK = 4;
constexpr long BLOCK = 512;  // numbers that one pass of `pointwise` holds at a time

enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16, INT32, INT64 };  // as TYPES of recorder.py
enum Operation : int64_t { COPY, ADD, SUB, MUL, DIV, MINIMUM, MAXIMUM, SIGMOID, LOG_SIGMOID, RSQRT, COS, SIN };

struct Operand {  // a strided tensor, broadcast by strides of 0; or, without a place, one number
    char* place;
    int64_t type, number_bits, strides[RANK];  // strides in bytes
};

struct Pointwise {  // y = operation(a, b), the last dimension the longest
    int64_t operation, sizes[RANK];
    Operand y, a, b;
};

template <class T> constexpr Type type_of() {
    if (std::is_same_v<T, float>) return FLOAT32;
    return std::is_same_v<T, double> ? FLOAT64 : INT64;
}

template <class T> bool as_it_lies(const Operand& x) {  // numbers of T side by side need not be moved
    return x.place != nullptr && x.type == type_of<T>() && x.strides[RANK - 1] == sizeof(T);
}

template <class T, class E> void read(const char* from, long stride, long n, T* into) {
    if (stride == sizeof(E))
        for (long i = 0; i < n; ++i) into[i] = T(reinterpret_cast<const E*>(from)[i]);
    else
        for (long i = 0; i < n; ++i) into[i] = T(*reinterpret_cast<const E*>(from + i * stride));
}

template <class T> void fetch(const Operand& x, const char* from, long n, T* into) {
    long stride = x.strides[RANK - 1];
    switch (x.type) {
        case FLOAT32: return read<T, float>(from, stride, n, into);
        case FLOAT64: return read<T, double>(from, stride, n, into);
        case BFLOAT16: return read<T, bfloat16>(from, stride, n, into);
        case INT32: return read<T, int32_t>(from, stride, n, into);
        case INT64: return read<T, int64_t>(from, stride, n, into);
    }
}

template <class T, class E> void write(char* to, long stride, long n, const T* from) {
    if (stride == sizeof(E))
        for (long i = 0; i < n; ++i) reinterpret_cast<E*>(to)[i] = E(from[i]);
    else
        for (long i = 0; i < n; ++i) *reinterpret_cast<E*>(to + i * stride) = E(from[i]);
}

template <class T> void put(const Operand& y, char* to, long n, const T* from) {
    long stride = y.strides[RANK - 1];
    switch (y.type) {
        case FLOAT32: return write<T, float>(to, stride, n, from);
        case FLOAT64: return write<T, double>(to, stride, n, from);
        case INT32: return write<T, int32_t>(to, stride, n, from);
        case INT64: return write<T, int64_t>(to, stride, n, from);
        case BFLOAT16:
            for (long i = 0; i < n; ++i) *reinterpret_cast<bfloat16*>(to + i * stride) = narrow(float(from[i]), bfloat16());
    }
}

inline float exp_below(float x) { return exp2_of_one(1.442695041f * x); }  // e^x for x ≤ 0
inline double exp_below(double x) { return std::exp(x); }

template <class T> T sigmoid(T x) {
    T e = exp_below(-std::abs(x));
    return (x >= T(0) ? T(1) : e) / (1 + e) + (x - x);  // NaN stays NaN
}

// y[i] = make(a[i], b[i]); y may be a or b, which the compiler is told not to mind.
template <class T, class F> void each(long n, const T* a, const T* b, T* y, F make) {
#pragma GCC ivdep
    for (long i = 0; i < n; ++i) y[i] = make(a[i], b[i]);
}

template <class T> void apply(int64_t operation, long n, const T* a, const T* b, T* y) {
    switch (operation) {
        case COPY: std::memmove(y, a, n * sizeof(T)); return;
        case ADD: return each(n, a, b, y, [](T a, T b) { return a + b; });
        case SUB: return each(n, a, b, y, [](T a, T b) { return a - b; });
        case MUL: return each(n, a, b, y, [](T a, T b) { return a * b; });
        case MINIMUM: return each(n, a, b, y, [](T a, T b) { return a > b ? b : a; });
        case MAXIMUM: return each(n, a, b, y, [](T a, T b) { return a < b ? b : a; });
    }
    if constexpr (!std::is_integral_v<T>) switch (operation) {
        case DIV: return each(n, a, b, y, [](T a, T b) { return a / b; });
        case SIGMOID: return each(n, a, a, y, [](T a, T) { return sigmoid(a); });
        case LOG_SIGMOID: return each(n, a, a, y, [](T a, T) { return std::min(a, T(0)) - std::log1p(std::exp(-std::abs(a))); });
        case RSQRT: return each(n, a, a, y, [](T a, T) { return 1 / std::sqrt(a); });
        case COS: return each(n, a, a, y, [](T a, T) { return std::cos(a); });
        case SIN: return each(n, a, a, y, [](T a, T) { return std::sin(a); });
    }
}

// The numbers of an operand from `from` on, where they lie or copied into `room`, which already holds a single number.
template <class T> const T* values(const Operand& x, const char* from, long n, T* room) {
    if (as_it_lies<T>(x)) return reinterpret_cast<const T*>(from);
    if (x.place != nullptr) fetch<T>(x, from, n, room);
    return room;
}

template <class T> void fill(const Operand& x, long n, T* room) {
    double number;
    std::memcpy(&number, &x.number_bits, 8);
    if (x.place == nullptr) std::fill(room, room + n, T(number));
}

template <class T> void rows(const Pointwise& p) {
    T a[BLOCK], b[BLOCK], y[BLOCK];
    long sizes[RANK], index[RANK] = {};
    std::copy(p.sizes, p.sizes + RANK, sizes);
    bool two = p.operation >= ADD && p.operation <= MAXIMUM, direct = as_it_lies<T>(p.y);
    fill(p.a, std::min(BLOCK, sizes[3]), a);
    if (two) fill(p.b, std::min(BLOCK, sizes[3]), b);
    for (index[0] = 0; index[0] < sizes[0]; ++index[0])
        for (index[1] = 0; index[1] < sizes[1]; ++index[1])
            for (index[2] = 0; index[2] < sizes[2]; ++index[2])
                for (long at = 0; at < sizes[3]; at += BLOCK) {
                    long n = std::min(BLOCK, sizes[3] - at);
                    auto start = [&](const Operand& x) {
                        char* place = x.place + at * x.strides[3];
                        for (int i = 0; i < 3; ++i) place += index[i] * x.strides[i];
                        return place;
                    };
                    const T* left = values(p.a, start(p.a), n, a);
                    const T* right = two ? values(p.b, start(p.b), n, b) : left;
                    apply<T>(p.operation, n, left, right, direct ? reinterpret_cast<T*>(start(p.y)) : y);
                    if (!direct) put<T>(p.y, start(p.y), n, y);
                }
}

struct Gather {  // y (n, row_bytes): the chosen rows of a table
    int64_t n, row_bytes;
    const char* table;
    const int64_t* index;
    char* y;
};

struct Lengths {  // y (rows) = Euclidean length of each row of x (rows, width)
    int64_t rows, width, x_row;
    const void* x;
    void* y;
};

template <class E, class T> void lengths(const Lengths& p) {
    using S = Simd<T>;
    for (long r = 0; r < p.rows; ++r) {
        const E* x = static_cast<const E*>(p.x) + r * p.x_row;
        typename S::V squares{};
        long d = 0;
        for (; d + S::lanes <= p.width; d += S::lanes) squares += widen(x + d) * widen(x + d);
        T total = S::sum(squares);
        for (; d < p.width; ++d) total += T(x[d]) * T(x[d]);
        static_cast<E*>(p.y)[r] = narrow(std::sqrt(total), E());
    }
}

struct Hold {  // new keys and values (B, G, T, row) at each row's own place in those held (B, G, S, row); strides in bytes
    int64_t batch, groups, tokens, row_bytes;
    int64_t new_keys[3], new_values[3], held_keys[3], held_values[3];
    const char *keys, *values;
    char *into_keys, *into_values;
    const int32_t* start;
};

struct Call {
    void (*kernel)(const void*);
    const void* arguments;
};
}  // namespace

extern "C" void pointwise(const Pointwise* p) {
    switch (p->y.type) {
        case FLOAT64: return rows<double>(*p);
        case INT32: case INT64: return rows<int64_t>(*p);
        default:  // to a lower precision from double: through double, as a conversion; else in float
            return p->operation == COPY && p->a.type == FLOAT64 ? rows<double>(*p) : rows<float>(*p);
    }
}

extern "C" void gather(const Gather* p) {
    for (long i = 0; i < p->n; ++i) std::memcpy(p->y + i * p->row_bytes, p->table + p->index[i] * p->row_bytes, p->row_bytes);
}

extern "C" void lengths_float32(const Lengths* p) { lengths<float, float>(*p); }
extern "C" void lengths_float64(const Lengths* p) { lengths<double, double>(*p); }
extern "C" void lengths_bfloat16(const Lengths* p) { lengths<bfloat16, float>(*p); }

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

extern "C" void replay(const Call* calls, int64_t count) {
    for (int64_t i = 0; i < count; ++i) calls[i].kernel(calls[i].arguments);
}

// Lists that have nothing to do with one another, a thread for each; the kernels of a single one have all threads.
extern "C" void replay_beside(const Call* const* lists, const int64_t* counts, int64_t number) {
    if (number == 1) return replay(lists[0], counts[0]);
#pragma omp parallel for num_threads(number) schedule(static, 1)
    for (int64_t i = 0; i < number; ++i) replay(lists[i], counts[i]);
}
