// The argmax of a wide linear's outputs, most of which are ruled out by a sketch (screening copy) of its weight.
//
// The sketch is the weight rounded to eight bits: half of a bf16 weight's bytes, and integer arithmetic. It gives an output
// up to the two roundings, the weight's and the input's (by the Cauchy-Schwarz inequality):
//
//   |w . x - v . u|  <=  |w - v| |x|  +  |v| |x - u|
//
// Outputs that may still be the greatest are computed from the weight itself, as everywhere else. So the result is the
// argmax of all exact outputs.
#include <vector>

#include "dot8.h"
#include "export.h"
#include "linear.h"
#include "pool.h"
#include "tile.h"

// Mirrored by SketchStruct in native.py; see `Sketch` of weight.py.
struct Sketch {
    const int8_t* data;   // [groups, in / 4, GROUP, 4]
    const float* scale;   // [groups * GROUP], as the next two
    const float* norm;    // |v|
    const float* error;   // |w - v| and more: see `Sketch`
    float greatest_norm;  // of w
};

namespace {

constexpr int GROUP = 16;                  // outputs
constexpr int MAX_ROWS = W == 16 ? 8 : 4;  // rows at once
constexpr float BASE = 254.f;              // an input is scale * (BASE * high + low), both within [-127, 127]
constexpr float STEPS = 127.f * BASE;      // the greatest input over the scale
constexpr float TINY = 1e-30f;             // rows without a greater input are not screened: a scale's inverse must be finite
constexpr float SAFE = 1e37f;              // a bound on outputs up to which all sums are finite
constexpr float NORM_MARGIN = 1.0001f;     // factor on norms, which makes up for their own rounding

// The number of rows from m on that are processed at once.
int rows_at_once(int m, int rows) {
    int count = MAX_ROWS;
    while (m + count > rows) count /= 2;
    return count;
}

// A rounded row of inputs.
struct Rounded {
    int32_t high_sum, low_sum;
    float scale;
    float norm;   // |x|
    float error;  // |x - u|
    bool finite;
};

// Rounds a row. Every four inputs are written to `to`, their high parts and then their low ones; the next four follow
// `stride` bytes later.
Rounded round_row(const float* x, int in, int8_t* to, int64_t stride) {
    double squares = 0;
    float top = 0;
    for (int i = 0; i < in; i++) squares += (double)x[i] * x[i], top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    Rounded r{0, 0, top / STEPS, (float)std::sqrt(squares) * NORM_MARGIN, INFINITY, std::isfinite(squares)};
    const bool numbers = top > TINY && r.norm < INFINITY;
    const float per_unit = numbers ? 1.f / r.scale : 0.f;
    for (int i = 0; i < in; i++) {
        const float q = numbers ? std::nearbyint(x[i] * per_unit) : 0.f, high = std::nearbyint(q / BASE), low = q - BASE * high;
        int8_t* const four = to + i / 4 * stride + i % 4;
        four[0] = (int8_t)high, four[4] = (int8_t)low;
        r.high_sum += (int)high, r.low_sum += (int)low;
    }
    if (numbers) r.error = 0.51f * NORM_MARGIN * r.scale * std::sqrt((float)in) + 0x1p-22f * r.norm;
    return r;
}

// Rows for which each output's lower and upper bounds are computed.
struct Rows {
    const Sketch& sketch;
    const int in;
    const Rounded* x;     // [rows]
    const int8_t* bytes;  // for each `rows_at_once`: [in / 4, rows, high and low, 4]
    vf* lower;            // [rows]: the greatest lower bound
    float* upper;         // [rows, stride]: the outputs' upper bounds
    const int64_t stride;

    // Bounds M rows from m on for the W outputs from o on, of which `outputs` exist.
    template <class Arithmetic, int M>
    INLINE void bound(int m, int64_t o, int outputs) const {
        const int8_t* at = sketch.data + o / GROUP * GROUP * in + o % GROUP * 4;
        const vb shift = (vb)(vi{} + (Arithmetic::SHIFT ? (int)0x80808080 : 0));
        const Rounded* const rows = x + m;
        vi high[M], low[M];
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            high[i] = vi{} - Arithmetic::SHIFT * rows[i].high_sum;
            low[i] = vi{} - Arithmetic::SHIFT * rows[i].low_sum;
        }
        const int8_t* inputs = bytes + (int64_t)m * 2 * in;
        for (int n = 0; n < in; n += 4, at += GROUP * 4, inputs += M * 8) {
            __builtin_prefetch(at + 4096);
            const auto weights = Arithmetic::operand(load_bytes(at) ^ shift);
#pragma GCC unroll 8
            for (int i = 0; i < M; i++) {
                high[i] = Arithmetic::dot(high[i], weights, inputs + i * 8);
                low[i] = Arithmetic::dot(low[i], weights, inputs + i * 8 + 4);
            }
        }
        vi valid;
        for (int n = 0; n < W; n++) valid[n] = n < outputs ? -1 : 0;
        const vf scale = load(sketch.scale + o), norm = load(sketch.norm + o), error = load(sketch.error + o);
#pragma GCC unroll 8
        for (int i = 0; i < M; i++) {
            const vf sum = fma(set1(BASE), __builtin_convertvector(high[i], vf), __builtin_convertvector(low[i], vf));
            const vf estimate = sum * scale * set1(rows[i].scale);
            const vf margin = fma(error, set1(rows[i].norm), norm * set1(rows[i].error));
            store(upper + (m + i) * stride + o, estimate + margin);
            lower[m + i] = max(lower[m + i], (vf)(valid ? estimate - margin : set1(-INFINITY)));
        }
    }

    template <class Arithmetic, int M = MAX_ROWS>
    void bound_rows(int count, int m, int64_t o, int outputs) const {
        if (count == M) return bound<Arithmetic, M>(m, o, outputs);
        if constexpr (M > 1) bound_rows<Arithmetic, M / 2>(count, m, o, outputs);
    }
};

// The first of the greatest outputs seen.
struct Best {
    float value = -INFINITY;
    int64_t output = 0;
    bool finite = true;

    void take(float v, int64_t o) {
        finite &= std::isfinite(v);
        if (v > value) value = v, output = o;
    }
};

template <class Arithmetic>
void output_argmax(const Weight& w, const Sketch& sketch, const float* x, int rows, int64_t* found) {
    const int64_t in = w.in, stride = (w.out + GROUP - 1) / GROUP * GROUP;
    const int share = outputs_per_task(w.out), tasks = (w.out + share - 1) / share;
    vf* const lower = (vf*)scratch(LOWER_BOUNDS, (size_t)tasks * rows * W);
    float* const upper = scratch(UPPER_BOUNDS, rows * stride);
    int8_t* const bytes = (int8_t*)scratch(ROUNDED, rows * 2 * in / sizeof(float));
    std::vector<Rounded> x_rounded(rows);
    for (int m = 0; m < rows; m += rows_at_once(m, rows))
        for (int i = 0, count = rows_at_once(m, rows); i < count; i++)
            x_rounded[m + i] = round_row(x + (m + i) * in, w.in, bytes + m * 2 * in + i * 8, count * 8);

    parallel_for(tasks, [&](int task) {
        const Rows part{sketch, w.in, x_rounded.data(), bytes, lower + (int64_t)task * rows, upper, stride};
        for (int m = 0; m < rows; m++) part.lower[m] = set1(-INFINITY);
        const int64_t last = least((task + 1) * share, w.out);
        for (int64_t o = (int64_t)task * share; o < last; o += W) {
            const int count = (int)(last - o < W ? last - o : W);
            for (int m = 0; m < rows; m += rows_at_once(m, rows)) part.bound_rows<Arithmetic>(rows_at_once(m, rows), m, o, count);
        }
    });

    // Outputs with an upper bound below this are not computed. NaN: all are computed, since they may not be finite.
    std::vector<float> floor(rows);
    for (int m = 0; m < rows; m++) {
        vf greatest = lower[m];
        for (int task = 1; task < tasks; task++) greatest = max(greatest, lower[(int64_t)task * rows + m]);
        floor[m] = x_rounded[m].norm * sketch.greatest_norm < SAFE ? top(greatest) : NAN;
    }
    const Weight* const only = &w;
    const PackedRows packed = pack_rows(&only, 1, x, rows);
    std::vector<Best> best((size_t)tasks * rows);
    parallel_for(tasks, [&](int task) {
        const int64_t last = least((task + 1) * share, w.out);
        for (int m = 0; m < rows; m++) {
            if (!x_rounded[m].finite) continue;
            const PackedRows row = packed.from(m, w.in);
            float* const outputs = upper + m * stride;
            for (int64_t o = (int64_t)task * share; o < last; o += W) {
                const vi possible = ~(vi)(load(outputs + o) < set1(floor[m]));
                if (!any(possible)) continue;
                for (int64_t n = o; n < o + W && n < last; n++) {
                    if (!possible[n - o]) continue;
                    linear_tile(w, row, 1, (int)n, (int)n + 1, outputs, stride);
                    best[(size_t)task * rows + m].take(outputs[n], n);
                }
            }
        }
    });
    for (int m = 0; m < rows; m++) {
        Best all;
        for (int task = 0; task < tasks; task++) {
            const Best& part = best[(size_t)task * rows + m];
            all.finite &= part.finite;
            if (part.value > all.value) all.value = part.value, all.output = part.output;
        }
        found[m] = x_rounded[m].finite && all.finite ? all.output : -1;
    }
}

}  // namespace

// x [rows, in] -> found [rows]; see `output_argmax` of reference.py.
EXPORT void lk_output_argmax(const Weight* weight, const Sketch* sketch, const float* x, int rows, int64_t* found) {
    with_arithmetic([&]<class Arithmetic>() { output_argmax<Arithmetic>(*weight, *sketch, x, rows, found); });
}

// The most rows for which a sketch is faster than the weight itself: unlimited with VNNI instructions.
EXPORT int lk_sketch_max_rows() { return has_vnni() ? INT32_MAX : 2; }
