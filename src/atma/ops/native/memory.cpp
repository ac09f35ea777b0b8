// The neural memory in turn: of every token the gradient at the anchor, a step and a read, in passes that take every number
// of a matrix once. States are overwritten. What one head gives depends on nothing else in the call.
#include "memory_rules.h"

namespace {

template <class T> struct Token {
    const T *q, *k, *v, *step, *keep, *momentum, *delta, *omega;
    Token(const Head<T>& head, long t) {
        const Memory& p = head.p;
        q = head.token(p.q, t, p.inner);
        k = head.shared(p.k, p.k_groups, t, p.inner), v = head.shared(p.v, p.v_groups, t, p.value);
        step = head.token(p.step, t, head.wide_step());
        keep = head.token(p.keep, t, head.wide()), momentum = head.token(p.momentum, t, head.wide());
        delta = head.token(p.delta, t, p.delta_width), omega = head.token(p.omega, t, p.window);
    }
};

template <class T> struct Rooms {
    static long wide(const Memory& p) { return Gradients<T>::padded_to(std::max({p.value, p.hidden, p.inner})); }
    static long window(const Memory& p) { return p.window * wide(p); }
    Buffer<T> all;
    Gradients<T> gradients;
    T *gamma, *eta, *x, *v, *e, *z, *rows, *reads[3], *h;
    explicit Rooms(const Memory& p)
        : all(Gradients<T>::room(p) + (6 + Simd<T>::lanes) * wide(p) + 4 * window(p)), gradients(p, all.get()) {
        T* at = all.get() + Gradients<T>::room(p);
        for (T** one : {&gamma, &eta, &reads[0], &reads[1], &reads[2], &h}) *one = at, at += wide(p);
        for (T** one : {&x, &v, &e, &z}) *one = at, at += window(p);
        rows = at;
    }
};

// The tokens of the window, the oldest first; the tail moves on.
template <class T> void slide(const Head<T>& head, void* tail, const T* own, long width, T* to) {
    T* held = head.own(tail, head.tail() * width);
    std::copy_n(held, head.tail() * width, to);
    std::copy_n(own, width, to + head.tail() * width);
    std::copy_n(to + width, head.tail() * width, held);
}

template <class T>
Gradients<T>& gradients(const Head<T>& head, const Token<T>& token, const T* output, Rooms<T>& rooms) {
    const T *x = token.k, *v = token.v;
    if (head.p.window > 1) {
        slide(head, head.p.k_tail, x, head.p.inner, rooms.x), slide(head, head.p.v_tail, v, head.p.value, rooms.v);
        x = rooms.x, v = rooms.v;
    }
    const T* point[3] = {output, head.anchor(1), head.anchor(2)};
    gradients(head, point, x, v, token.delta, rooms.gradients);
    return rooms.gradients;
}

// A gate as a pass takes it: a number for each row, or with channels each column of all matrices but the first.
template <class T> const T* spread(const Head<T>& head, const T* gate, int i, T* room) {
    if (gate != nullptr && head.p.gates == BY_CHANNEL) return gate;
    return std::fill_n(room, std::max(head.rows(i), head.columns(i)), gate == nullptr ? T(1) : gate[0]), room;
}

// e and z of Σ_j ω_j e_j z_jᵀ as a pass takes them, e times `sign` and, where it is given, θ.
template <class T>
void weigh(const Head<T>& head, const Token<T>& token, const T* step, T sign, int i, Rooms<T>& rooms, Update<T>& p) {
    const Gradients<T>& g = rooms.gradients;
    bool by_row = head.p.gates == BY_CHANNEL && i == 0, by_column = head.p.gates == BY_CHANNEL && i > 0 && step != nullptr;
    p.e = rooms.e, p.z = g.z[i], p.count = g.count;
    for (long j = 0; j < p.count; ++j) {
        T omega = token.omega == nullptr ? sign : sign * token.omega[p.count - 1 - j];
        if (step != nullptr && head.p.gates != BY_CHANNEL) omega *= step[head.p.gates == BY_MATRIX ? i : 0];
        for (long r = 0; r < p.rows; ++r)
            rooms.e[r * p.count + j] = (by_row && step != nullptr ? omega * step[r] : omega) * g.e[i][j * p.rows + r];
    }
    long wide = padded<T>(p.columns);
    if (by_column || p.count > 1) widen_rows(p.z, p.count, p.columns, rooms.z), p.z = rooms.z;
    for (long n = 0; by_column && n < p.count * wide; ++n) rooms.z[n] *= n % wide < p.columns ? step[n % wide] : T(0);
}

template <class T> Update<T> update_of(const Head<T>& head, const Token<T>& token, int i, Rooms<T>& rooms) {
    Update<T> p{};
    p.rows = head.rows(i), p.columns = head.columns(i), p.count = 1, p.room = rooms.rows;
    p.a = head.weights(i), p.s = head.momentum(i), p.out = rooms.reads[i];
    p.initial = head.p.to_initial && token.keep != nullptr ? head.initial(i) : nullptr;
    p.gamma = spread(head, token.keep, i, rooms.gamma), p.eta = spread(head, token.momentum, i, rooms.eta);
    return p;
}

// A₁ ← Γ(A₁) before the gradient is taken there (section 4.5).
template <class T> void forget(const Head<T>& head, const Token<T>& token, Rooms<T>& rooms) {
    Update<T> p = update_of(head, token, 0, rooms);
    std::fill_n(rooms.e, p.rows, T(0)), std::fill_n(rooms.z, p.columns, T(0));
    p.e = rooms.e, p.z = p.x = rooms.z;
    pass<T, Mode::plain>(p, false);
}

// A ← A + θ NS(S).
template <class T> void turn_on(const Head<T>& head, const T* step, int i) {
    long columns = head.columns(i), size = head.size(i);
    Buffer<T> orthogonal(size);
    newton_schulz(head.momentum(i), head.rows(i), columns, head.p.schedule, orthogonal.get());
    T* a = head.weights(i);
    for (long n = 0; n < size; ++n)
        a[n] += step[head.p.gates != BY_CHANNEL ? 0 : i == 0 ? n / columns : n % columns] * orthogonal[n];
}

// S and A of one matrix after the step (4.3)–(4.5), and ρ(A) x, in rooms.reads[i].
template <class T>
void write_token(const Head<T>& head, const Token<T>& token, int i, const T* x, T part, Rooms<T>& rooms) {
    const Memory& p = head.p;
    Update<T> pass_of = update_of(head, token, i, rooms);
    if (i == 0 && p.anchor_hidden) pass_of.initial = nullptr, pass_of.gamma = spread<T>(head, nullptr, i, rooms.gamma);
    weigh(head, token, p.optimiser == MUON ? nullptr : token.step, T(-1), i, rooms, pass_of);
    pass_of.x = x, pass_of.part = part, pass_of.anchor = p.average ? head.anchor(i) : nullptr;
    bool by_columns = p.gates == BY_CHANNEL && i > 0;
    if (p.optimiser == GD) pass<T, Mode::plain>(pass_of, by_columns);
    else if (p.optimiser == MOMENTUM) pass<T, Mode::momentum>(pass_of, by_columns);
    else pass<T, Mode::split>(pass_of, by_columns), turn_on(head, token.step, i);
    if (p.retention == KL) soft_dots(head.weights(i), pass_of.rows, pass_of.columns, x, pass_of.out);
    else if (p.optimiser == MUON) dots<T>(head.weights(i), pass_of.rows, pass_of.columns, x, 1, pass_of.out);
    T scale = p.retention == LQ ? head.own(p.scale, p.matrices)[i] : T(1);
    for (long r = 0; p.retention == LQ && r < pass_of.rows; ++r) pass_of.out[r] *= scale;
}

// f(W; q), of products that `times(i, x)` leaves in rooms.reads[i].
template <class T, class F> void read(const Head<T>& head, const T* q, Rooms<T>& rooms, T* out, F times) {
    const Memory& p = head.p;
    const T* h = q;
    for (int i = 1; i < p.matrices; ++i) times(i, q);
    if (p.matrices > 1) activate<T>(rooms.reads[1], p.hidden, p.activation == GELU, rooms.h, nullptr), h = rooms.h;
    for (long r = 0; p.matrices > 2 && r < p.hidden; ++r) rooms.h[r] *= rooms.reads[2][r];
    times(0, h);
    output(head, rooms.reads[0], q, out);
}

// One token that is written before it is read.
template <class T> void by_token(const Head<T>& head, long t, Rooms<T>& rooms, T* out) {
    const Memory& p = head.p;
    Token<T> token(head, t);
    if (p.anchor_hidden) forget(head, token, rooms);
    gradients(head, token, p.anchor_hidden ? head.weights(0) : head.anchor(0), rooms);
    long place = (p.length[head.b] + t) % p.chunk + 1;
    T part = T(1) / place;
    read(head, token.q, rooms, out, [&](int i, const T* x) { write_token(head, token, i, x, part, rooms); });
    if (place == p.chunk) renew(head);
}

// What a chunk collects of one token: U, Σ η, Π γ and Σ θ.
template <class T> void collect(const Head<T>& head, const Token<T>& token, Rooms<T>& rooms) {
    const Memory& p = head.p;
    for (int i = 0; i < p.matrices; ++i) {
        Update<T> pass_of = update_of(head, token, i, rooms);
        pass_of.a = head.pending(i), pass_of.initial = nullptr, pass_of.gamma = spread<T>(head, nullptr, i, rooms.gamma);
        weigh(head, token, head.step_at_end() ? nullptr : token.step, T(1), i, rooms, pass_of);
        pass_of.x = pass_of.z;
        pass<T, Mode::plain>(pass_of, p.gates == BY_CHANNEL && i > 0);
    }
    T *eta = head.own(p.pending_momentum, head.wide()), *keep = head.own(p.pending_keep, head.wide());
    T* step = head.own(p.pending_step, head.wide_step());
    for (long n = 0; eta != nullptr && n < head.wide(); ++n) eta[n] += token.momentum[n];
    for (long n = 0; token.keep != nullptr && n < head.wide(); ++n) keep[n] *= token.keep[n];
    for (long n = 0; step != nullptr && n < head.wide_step(); ++n) step[n] += token.step[n];
}

template <class T> void write_chunk(const Head<T>& head) {
    const Memory& p = head.p;
    for (int i = 0; i < p.matrices; ++i) write(head, i);
    if (p.pending_momentum != nullptr) std::fill_n(head.own(p.pending_momentum, head.wide()), head.wide(), T(0));
    std::fill_n(head.own(p.pending_keep, head.wide()), head.wide(), T(1));
    if (p.pending_step != nullptr) std::fill_n(head.own(p.pending_step, head.wide_step()), head.wide_step(), T(0));
}

// One token of a memory that is written at the end of a chunk.
template <class T> void by_chunk(const Head<T>& head, long t, Rooms<T>& rooms, T* out) {
    Token<T> token(head, t);
    read(head, token.q, rooms, out, [&](int i, const T* x) {
        dots<T>(head.weights(i), head.rows(i), head.columns(i), x, 1, rooms.reads[i]);
    });
    gradients(head, token, static_cast<const T*>(head.anchor(0)), rooms);
    collect(head, token, rooms);
    if ((head.p.length[head.b] + t + 1) % head.p.chunk == 0) write_chunk(head);
}

template <class T> void in_turn(const Memory& p) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (p.batch * p.heads > 1)
    for (long i = 0; i < p.batch * p.heads; ++i) {
        Head<T> head(p, i);
        Rooms<T> rooms(p);
        for (long t = 0; t < p.tokens; ++t) {
            T* out = static_cast<T*>(p.out) + (i * p.tokens + t) * p.value;
            p.at_end ? by_chunk(head, t, rooms, out) : by_token(head, t, rooms, out);
        }
    }
}
}  // namespace

KERNEL(memory_in_turn_float32, Memory, in_turn<float>)
KERNEL(memory_in_turn_float64, Memory, in_turn<double>)
