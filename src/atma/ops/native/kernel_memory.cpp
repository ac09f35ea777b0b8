// Kernel memories in turn (ops/fast_weights/kernel.py, mixers.md section 4.7): a token writes at the last c keys, then reads
// every one. States are overwritten where they lie. What one head gives depends on nothing else in the call.
#include "memory_passes.h"

namespace {

PROBLEM(KernelMemory,  // contiguous, what is not there null
    int64_t batch, heads, tokens, width, value, k_groups, v_groups, window, room, delta, normalise, threads;
    const void *q, *k, *v, *omega, *sharpness;  // (B, H or G, T, K or V), ω (B, H, T, c), (H,)
    const int32_t* length;                      // (B,), before the call
    void *keys, *written, *v_tail, *open;       // `KernelState`
    void* out;                                  // (B, H, T, V)
)

constexpr long SOME = 64;  // keys whose scores are taken at once

template <class T> struct One {
    const KernelMemory& p;
    long index, tail, held;  // tokens in the keys
    T sharp, *keys, *written, *v_tail, *open;
    Buffer<T> values, scores;
    One(const KernelMemory& p, long index)
        : p(p), index(index), tail(p.window - 1), held(p.length[index / p.heads]),
          sharp(static_cast<const T*>(p.sharpness)[index % p.heads]), keys(own(p.keys, p.room * p.width)),
          written(own(p.written, p.room * p.value)), v_tail(own(p.v_tail, tail * p.value)),
          open(own(p.open, tail * p.value)), values(2 * p.window * p.value),
          scores(SOME + Simd<T>::lanes) {}
    T* own(void* base, long each) const { return base == nullptr ? nullptr : static_cast<T*>(base) + index * each; }
    const T* token(const void* base, long t, long each) const {
        return static_cast<const T*>(base) + (index * p.tokens + t) * each;
    }
    const T* shared(const void* base, long groups, long t, long each) const {
        long group = index % p.heads / (p.heads / groups);
        return static_cast<const T*>(base) + ((index / p.heads * groups + group) * p.tokens + t) * each;
    }

    // out (V) += Σ κ(x, k_i) u_i over keys [first, end), whose u lie from u on; returns Σ κ.
    T gather(const T* x, long first, long end, const T* u, T* out) {
        using S = Simd<T>;
        constexpr T log2e = 1.4426950408889634;
        T total = 0;
        for (long i = first; i < end; i += SOME) {
            long count = std::min(SOME, end - i);
            dots<T>(keys + i * p.width, count, p.width, x, 1, scores.get());
            for (long n = 0; n < count; n += S::lanes)
                S::store(scores + n, exp2_of((S::load(scores + n) - T(1)) * (sharp * log2e)));
            for (long n = 0; n < count; ++n, u += p.value) {
                total += scores[n];
                for (long d = 0; d < p.value; ++d) out[d] += scores[n] * u[d];
            }
        }
        return total;
    }

    void step(long t) {
        T* out = static_cast<T*>(p.out) + (index * p.tokens + t) * p.value;
        // What a recorded step is given is not looked at before: without room it reads no number and writes nothing.
        if (held < 0 || held >= p.room) return void(std::fill_n(out, p.value, T(NAN)));
        long n = held++, last = std::min(n + 1, p.window), closed = n + 1 - last, V = p.value;
        std::copy_n(shared(p.k, p.k_groups, t, p.width), p.width, keys + n * p.width);
        // Of the last tokens, the oldest first: v, and u, of which the newest is 0.
        T *v = values.get(), *u = v + p.window * V;
        for (long j = 0; j < last; ++j) {
            bool own = j == last - 1;
            const T* given = own ? shared(p.v, p.v_groups, t, V) : v_tail + (tail - (last - 1) + j) * V;
            std::copy_n(given, V, v + j * V);
            if (own) std::fill_n(u + j * V, V, T(0));
            else std::copy_n(open + (tail - (last - 1) + j) * V, V, u + j * V);
        }
        if (tail > 0) {
            std::copy(v_tail + V, v_tail + tail * V, v_tail);
            std::copy_n(v + (last - 1) * V, V, v_tail + (tail - 1) * V);
        }
        const T *omega = token(p.omega, t, p.window), *far = written + tail * V;
        if (p.delta) {  // every error is of the memory before the token
            Buffer<T> known(last * V);
            std::fill_n(known.get(), last * V, T(0));
            for (long j = 0; j < last; ++j) {
                const T* key = keys + (closed + j) * p.width;
                gather(key, 0, closed, far, known + j * V), gather(key, closed, n + 1, u, known + j * V);
            }
            for (long d = 0; d < last * V; ++d) v[d] -= known[d];
        }
        for (long j = 0; j < last; ++j)
            for (long d = 0; d < V; ++d) u[j * V + d] += omega[last - 1 - j] * v[j * V + d];
        std::fill_n(out, V, T(0));
        T total = gather(token(p.q, t, p.width), 0, closed, far, out);
        total += gather(token(p.q, t, p.width), closed, n + 1, u, out);
        for (long d = 0; p.normalise && d < V; ++d) out[d] /= total;
        // The oldest u changes no more; the others stay open.
        if (last == p.window) std::copy_n(u, V, written + n * V);
        else std::fill_n(written + n * V, V, T(0));
        long keep = std::min(last, tail);
        if (tail > 0) {
            std::copy(open + V, open + tail * V, open);
            std::copy_n(u + (last - keep) * V, keep * V, open + (tail - keep) * V);
        }
    }
};

template <class T> void in_turn(const KernelMemory& p) {
#pragma omp parallel for num_threads(p.threads) schedule(dynamic) if (p.batch * p.heads > 1)
    for (long i = 0; i < p.batch * p.heads; ++i) {
        One<T> one(p, i);
        for (long t = 0; t < p.tokens; ++t) one.step(t);
    }
}
}  // namespace

KERNEL(kernel_memory_in_turn_float32, KernelMemory, in_turn<float>)
KERNEL(kernel_memory_in_turn_float64, KernelMemory, in_turn<double>)
