// PyTorch's own operations, as a recorded step makes them again: element by element, and along one dimension. Strides are
// any, and numbers are converted as they are read and written.
#include "problem.h"
#include "simd.h"

namespace {

constexpr int RANK = 4;
constexpr long BLOCK = 512;  // numbers that one pass of `pointwise` holds at a time

enum Type : int64_t { FLOAT32, FLOAT64, BFLOAT16, INT32, INT64, BOOL };  // as TYPES of strided.py
enum Operation : int64_t {  // as OPERATIONS of strided.py: of one tensor, of two from ADD on, of three from WHERE on
    COPY, ABS, FLOOR, SQRT, RSQRT, EXP, EXP2, EXPM1, LOG, LOG1P, TANH, COS, SIN, ERF,
    SIGMOID, LOG_SIGMOID, SILU, GELU, SOFTPLUS, ELU,
    ADD, SUB, MUL, DIV, POWER, REMAINDER, FLOOR_DIVIDE, MINIMUM, MAXIMUM, LT, LE, GT, GE, EQ, NE,
    WHERE
};
enum Form : int64_t { SUM, MEAN, LARGEST, SMALLEST, LENGTH, LOGSUMEXP, CUMSUM, SOFTMAX, LOG_SOFTMAX };  // as FORMS

struct Operand {  // a strided tensor, broadcast by strides of 0; or, without a place, one number
    char* place;
    int64_t type, number_bits, strides[RANK];  // strides in bytes
};

PROBLEM(Pointwise,  // y = operation(a, b, c) computed in the type `work`, the last dimension the longest
    int64_t operation, work, sizes[4];
    Operand y, a, b, c;
)

PROBLEM(Along,  // y = form(x) along the last dimension: one number a row, whose stride is then of no meaning, or a row
    int64_t form, work, sizes[4];
    Operand y, x;
    int64_t threads;
)

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
        case BOOL: return read<T, bool>(from, stride, n, into);
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
        case BOOL: return write<T, bool>(to, stride, n, from);
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

template <class T> T remainder(T a, T b) {  // of the sign of b
    if constexpr (std::is_integral_v<T>) {
        T r = b == 0 ? 0 : a % b;
        return r != 0 && (r < 0) != (b < 0) ? r + b : r;
    } else {
        T r = std::fmod(a, b);
        return r != 0 && (r < 0) != (b < 0) ? r + b : r;
    }
}

// What integers have too.
template <class T> void apply(int64_t operation, long n, const T* a, const T* b, const T* c, T* y) {
    switch (operation) {
        case COPY: std::memmove(y, a, n * sizeof(T)); return;
        case ABS: return each(n, a, a, y, [](T a, T) { return a < 0 ? -a : a + 0; });
        case ADD: return each(n, a, b, y, [](T a, T b) { return a + b; });
        case SUB: return each(n, a, b, y, [](T a, T b) { return a - b; });
        case MUL: return each(n, a, b, y, [](T a, T b) { return a * b; });
        case REMAINDER: return each(n, a, b, y, [](T a, T b) { return remainder(a, b); });
        case MINIMUM: return each(n, a, b, y, [](T a, T b) { return a > b || b != b ? b : a; });
        case MAXIMUM: return each(n, a, b, y, [](T a, T b) { return a < b || b != b ? b : a; });
        case LT: return each(n, a, b, y, [](T a, T b) { return T(a < b); });
        case LE: return each(n, a, b, y, [](T a, T b) { return T(a <= b); });
        case GT: return each(n, a, b, y, [](T a, T b) { return T(a > b); });
        case GE: return each(n, a, b, y, [](T a, T b) { return T(a >= b); });
        case EQ: return each(n, a, b, y, [](T a, T b) { return T(a == b); });
        case NE: return each(n, a, b, y, [](T a, T b) { return T(a != b); });
        case WHERE:
            for (long i = 0; i < n; ++i) y[i] = a[i] != 0 ? b[i] : c[i];
            return;
        case FLOOR_DIVIDE: if constexpr (std::is_integral_v<T>)
            return each(n, a, b, y, [](T a, T b) { return b == 0 ? 0 : (a - remainder(a, b)) / b; });
    }
    if constexpr (!std::is_integral_v<T>) switch (operation) {
        case DIV: return each(n, a, b, y, [](T a, T b) { return a / b; });
        case POWER: return each(n, a, b, y, [](T a, T b) { return std::pow(a, b); });
        case FLOOR_DIVIDE: return each(n, a, b, y, [](T a, T b) { return std::floor(a / b); });
        case FLOOR: return each(n, a, a, y, [](T a, T) { return std::floor(a); });
        case SQRT: return each(n, a, a, y, [](T a, T) { return std::sqrt(a); });
        case RSQRT: return each(n, a, a, y, [](T a, T) { return 1 / std::sqrt(a); });
        case EXP: return each(n, a, a, y, [](T a, T) { return std::exp(a); });
        case EXP2: return each(n, a, a, y, [](T a, T) { return std::exp2(a); });
        case EXPM1: return each(n, a, a, y, [](T a, T) { return std::expm1(a); });
        case LOG: return each(n, a, a, y, [](T a, T) { return std::log(a); });
        case LOG1P: return each(n, a, a, y, [](T a, T) { return std::log1p(a); });
        case TANH: return each(n, a, a, y, [](T a, T) { return std::tanh(a); });
        case COS: return each(n, a, a, y, [](T a, T) { return std::cos(a); });
        case SIN: return each(n, a, a, y, [](T a, T) { return std::sin(a); });
        case ERF: return each(n, a, a, y, [](T a, T) { return std::erf(a); });
        case SIGMOID: return each(n, a, a, y, [](T a, T) { return sigmoid(a); });
        case LOG_SIGMOID: return each(n, a, a, y, [](T a, T) { return std::min(a, T(0)) - std::log1p(std::exp(-std::abs(a))); });
        case SILU: return each(n, a, a, y, [](T a, T) { return a * sigmoid(a); });
        case GELU: return each(n, a, a, y, [](T a, T) { return a * T(0.5) * (1 + std::erf(a * T(0.70710678118654752440))); });
        case SOFTPLUS: return each(n, a, a, y, [](T a, T) { return std::max(a, T(0)) + std::log1p(std::exp(-std::abs(a))); });
        case ELU: return each(n, a, a, y, [](T a, T) { return a > 0 ? a : std::expm1(a); });
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
    T a[BLOCK], b[BLOCK], c[BLOCK], y[BLOCK];
    long sizes[RANK], index[RANK] = {};
    std::copy(p.sizes, p.sizes + RANK, sizes);
    bool two = p.operation >= ADD, three = p.operation >= WHERE, direct = as_it_lies<T>(p.y);
    fill(p.a, std::min(BLOCK, sizes[3]), a);
    if (two) fill(p.b, std::min(BLOCK, sizes[3]), b);
    if (three) fill(p.c, std::min(BLOCK, sizes[3]), c);
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
                    const T* first = values(p.a, start(p.a), n, a);
                    const T* second = two ? values(p.b, start(p.b), n, b) : first;
                    const T* third = three ? values(p.c, start(p.c), n, c) : first;
                    apply<T>(p.operation, n, first, second, third, direct ? reinterpret_cast<T*>(start(p.y)) : y);
                    if (!direct) put<T>(p.y, start(p.y), n, y);
                }
}

// Eight sums side by side, of integers exactly, of others in double.
template <class T> auto total(long n, const T* x) {
    using Wide = std::conditional_t<std::is_integral_v<T>, int64_t, double>;
    Wide sums[8] = {}, all = 0;
    long i = 0;
    for (; i + 8 <= n; i += 8)
        for (int j = 0; j < 8; ++j) sums[j] += x[i + j];
    for (; i < n; ++i) all += x[i];
    for (Wide sum : sums) all += sum;
    return all;
}

template <class T> T length(long n, const T* x) {
    using S = Simd<T>;
    typename S::V squares{};
    long d = 0;
    for (; d + S::lanes <= n; d += S::lanes) squares += S::load(x + d) * S::load(x + d);
    T total = S::sum(squares);
    for (; d < n; ++d) total += x[d] * x[d];
    return std::sqrt(total);
}

template <class T> T extreme(long n, const T* x, bool largest) {  // NaN if there is one
    T best = x[0];
    for (long i = 1; i < n; ++i) best = (largest ? x[i] > best : x[i] < best) || x[i] != x[i] ? x[i] : best;
    return best;
}

// y (n) = exp(x − top) / sum, or its logarithm; y null: only the logarithm of the sum of e^x, which is returned.
template <class T> T softmax(long n, const T* x, bool logarithm, T* y) {
    T top = extreme(n, x, true), base = std::isinf(top) && y == nullptr ? T(0) : top;
    double sum = 0;
    for (long i = 0; i < n; ++i) {
        T e = std::exp(x[i] - base);
        sum += e;
        if (y != nullptr) y[i] = logarithm ? x[i] - base : e;
    }
    T all = logarithm ? T(std::log(sum)) : T(1 / sum);
    for (long i = 0; y != nullptr && i < n; ++i) y[i] = logarithm ? y[i] - all : y[i] * all;
    return base + all;
}

// Returns whether y is a row rather than one number.
template <class T> bool along(int64_t form, long n, const T* x, T* y) {
    switch (form) {
        case SUM: y[0] = T(total(n, x)); return false;
        case LARGEST: y[0] = extreme(n, x, true); return false;
        case SMALLEST: y[0] = extreme(n, x, false); return false;
        case CUMSUM: {
            decltype(total(n, x)) sum = 0;
            for (long i = 0; i < n; ++i) y[i] = T(sum += x[i]);
            return true;
        }
    }
    if constexpr (!std::is_integral_v<T>) switch (form) {
        case MEAN: y[0] = T(total(n, x) / n); return false;
        case LENGTH: y[0] = length(n, x); return false;
        case LOGSUMEXP: y[0] = softmax<T>(n, x, true, nullptr); return false;
        case SOFTMAX: softmax(n, x, false, y); return true;
        case LOG_SOFTMAX: softmax(n, x, true, y); return true;
    }
    return true;
}

template <class T> void along(const Along& p, long first, long last) {
    long n = p.sizes[3];
    Buffer<T> x(n), y(n);
    for (long row = first; row < last; ++row) {
        long at[3] = {row / p.sizes[2] / p.sizes[1], row / p.sizes[2] % p.sizes[1], row % p.sizes[2]};
        auto start = [&](const Operand& x) {
            char* place = x.place;
            for (int i = 0; i < 3; ++i) place += at[i] * x.strides[i];
            return place;
        };
        put<T>(p.y, start(p.y), along<T>(p.form, n, values(p.x, start(p.x), n, x.get()), y.get()) ? n : 1, y.get());
    }
}

template <class T> void along(const Along& p) {
    long count = p.sizes[0] * p.sizes[1] * p.sizes[2];
    if (p.threads == 1 || count * p.sizes[3] <= (1 << 16)) return along<T>(p, 0, count);
#pragma omp parallel for num_threads(p.threads) schedule(static, 1)
    for (long i = 0; i < p.threads; ++i) along<T>(p, count * i / p.threads, count * (i + 1) / p.threads);
}
}  // namespace

extern "C" void pointwise(const Pointwise* p) {
    switch (p->work) {
        case FLOAT64: return rows<double>(*p);
        case INT64: return rows<int64_t>(*p);
        default: return rows<float>(*p);
    }
}
TELLS(pointwise, Pointwise)

extern "C" void along(const Along* p) {
    switch (p->work) {
        case FLOAT64: return along<double>(*p);
        case INT64: return along<int64_t>(*p);
        default: return along<float>(*p);
    }
}
TELLS(along, Along)
