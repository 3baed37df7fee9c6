// Layers that keep a state of fixed size per sequence: short causal convolutions, and linear attention with decay.
//
// A run is consecutive tokens of one sequence: it reads the state in one slot and writes it to another. Each task has its
// own channels and processes all runs in order, token by token, so results do not depend on the cuts into runs; an empty
// run copies.
#include "export.h"
#include "pool.h"
#include "simd.h"

namespace {

constexpr int CHANNELS = 256;    // per task of a convolution
constexpr int COLUMNS = 2 * W;   // of a state, per task
constexpr int MOST_KEYS = 1024;  // most numbers of a key

struct Run {
    int32_t begin, end, read, write;
};

// Mirrored by ConvolutionStruct in recurrence.py.
struct Convolution {
    const float *x, *taps, *bias;  // [tokens, channels], [kernel, channels], [channels] or null
    float *out, *states;           // [tokens, channels], [slots, kernel - 1, channels]
    const Run* runs;
    int32_t count, channels, kernel, silu;
};

// Mirrored by RecurrenceStruct in recurrence.py.
struct Recurrence {
    const float *q, *k, *v, *a, *b;  // [tokens, key heads, keys] twice, [tokens, heads, values], [tokens, heads]; b or null
    const float *a_log, *dt_bias;    // [heads]
    float *out, *states;             // [tokens, heads, values], [slots, heads, keys, values]
    const Run* runs;
    int32_t count, key_heads, heads, keys, values;
    float gain, low, high;
};

int least(int a, int b) { return a < b ? a : b; }

void convolve(const Convolution& c, int first, int width) {
    const int kept = c.kernel - 1;
    const int64_t slot = (int64_t)kept * c.channels;
    for (int r = 0; r < c.count; r++) {
        const Run& run = c.runs[r];
        const float* old = c.states + run.read * slot + first;
        float* next = c.states + run.write * slot + first;
        const float* x = c.x + (int64_t)run.begin * c.channels + first;
        float* out = c.out + (int64_t)run.begin * c.channels + first;
        const int tokens = run.end - run.begin;
        auto input = [&](int t) { return t < 0 ? old + (int64_t)(kept + t) * c.channels : x + (int64_t)t * c.channels; };
        for (int t = 0; t < tokens; t++) {
            for (int i = 0; i < width; i += W) {
                const int n = least(W, width - i);
                vf y = c.bias ? load_part(c.bias + first + i, n) : vf{};
                for (int j = 0; j < c.kernel; j++)
                    y = fma(load_part(c.taps + (int64_t)j * c.channels + first + i, n), load_part(input(t - kept + j) + i, n), y);
                if (c.silu) y = y / (set1(1.f) + exp(-y));
                store_part(out + (int64_t)t * c.channels + i, y, n);
            }
        }
        for (int j = 0; j < kept; j++)  // ascending, since one slot may be both read and written
            memmove(next + (int64_t)j * c.channels, input(tokens - kept + j), sizeof(float) * width);
    }
}

// Calls body(i, i % 2) with a constant second argument, so that two independent sums do not wait for each other.
template <class F>
INLINE void in_twos(int n, F&& body) {
    int i = 0;
    for (; i + 2 <= n; i += 2) body(i, 0), body(i + 1, 1);
    if (i < n) body(i, 0);
}

// x / |x| * scale, for keys of the delta rule
void normalise(const float* x, int n, float scale, float* y) {
    float squares = 0.f;
    for (int i = 0; i < n; i++) squares += x[i] * x[i];
    const float inverse = scale / sqrtf(squares + 1e-6f);
    for (int i = 0; i < n; i++) y[i] = x[i] * inverse;
}

float softplus(float x) { return x > 20.f ? x : log1pf(expf(x)); }

// Computes some columns of one head's state, which is in scratch memory during a run.
void recur(const Recurrence& l, int head, int first, int width) {
    float* const state = scratch(STATE, (int64_t)l.keys * COLUMNS);
    float q[MOST_KEYS], k[MOST_KEYS], v[COLUMNS] = {}, y[COLUMNS];
    const int key_head = head / (l.heads / l.key_heads);
    const float rate = -expf(l.a_log[head]);
    const int64_t slot = (int64_t)l.heads * l.keys * l.values, at = (int64_t)head * l.keys * l.values + first;
    for (int r = 0; r < l.count; r++) {
        const Run& run = l.runs[r];
        const float* old = l.states + run.read * slot + at;
        float* next = l.states + run.write * slot + at;
        memset(state, 0, sizeof(float) * l.keys * COLUMNS);
        for (int i = 0; i < l.keys; i++) memcpy(state + i * COLUMNS, old + (int64_t)i * l.values, sizeof(float) * width);
        for (int t = run.begin; t < run.end; t++) {
            const int64_t row = (int64_t)t * l.heads + head, key_row = ((int64_t)t * l.key_heads + key_head) * l.keys;
            float step = softplus(l.a[row] + l.dt_bias[head]);
            step = step < l.low ? l.low : step > l.high ? l.high : step;
            const vf decay = set1(expf(rate * step));
            memcpy(v, l.v + row * l.values + first, sizeof(float) * width);
            vf d0 = load(v), d1 = load(v + W);
            if (l.b) {  // the delta rule: the state's present value for the key is subtracted
                normalise(l.q + key_row, l.keys, 1.f / sqrtf((float)l.keys), q);
                normalise(l.k + key_row, l.keys, 1.f, k);
                vf m0[2] = {}, m1[2] = {};
                in_twos(l.keys, [&](int i, int turn) {
                    float* row = state + i * COLUMNS;
                    const vf key = set1(k[i]), s0 = load(row) * decay, s1 = load(row + W) * decay;
                    store(row, s0);
                    store(row + W, s1);
                    m0[turn] = fma(s0, key, m0[turn]);
                    m1[turn] = fma(s1, key, m1[turn]);
                });
                const vf beta = set1(l.gain / (1.f + expf(-l.b[row])));
                d0 = (d0 - (m0[0] + m0[1])) * beta;
                d1 = (d1 - (m1[0] + m1[1])) * beta;
            } else {
                memcpy(q, l.q + key_row, sizeof(float) * l.keys);
                memcpy(k, l.k + key_row, sizeof(float) * l.keys);
                d0 = d0 * set1(step);
                d1 = d1 * set1(step);
            }
            vf y0[2] = {}, y1[2] = {};
            in_twos(l.keys, [&](int i, int turn) {
                float* row = state + i * COLUMNS;
                const vf key = set1(k[i]), query = set1(q[i]);
                vf s0 = load(row), s1 = load(row + W);
                if (!l.b) s0 = s0 * decay, s1 = s1 * decay;
                s0 = fma(key, d0, s0);
                s1 = fma(key, d1, s1);
                store(row, s0);
                store(row + W, s1);
                y0[turn] = fma(s0, query, y0[turn]);
                y1[turn] = fma(s1, query, y1[turn]);
            });
            store(y, y0[0] + y0[1]);
            store(y + W, y1[0] + y1[1]);
            memcpy(l.out + row * l.values + first, y, sizeof(float) * width);
        }
        for (int i = 0; i < l.keys; i++) memcpy(next + (int64_t)i * l.values, state + i * COLUMNS, sizeof(float) * width);
    }
}

}  // namespace

EXPORT void lk_convolve(const Convolution* c) {
    parallel_for((c->channels + CHANNELS - 1) / CHANNELS, [&](int task) {
        convolve(*c, task * CHANNELS, least(CHANNELS, c->channels - task * CHANNELS));
    });
}

EXPORT void lk_recur(const Recurrence* l) {
    const int parts = (l->values + COLUMNS - 1) / COLUMNS;
    parallel_for(parts * l->heads, [&](int task) {
        const int first = task % parts * COLUMNS;
        recur(*l, task / parts, first, least(COLUMNS, l->values - first));
    });
}
