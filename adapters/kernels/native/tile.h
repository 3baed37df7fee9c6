// The two inner loops of all kernels, over M rows at a time.
//
// `dot`: rows against rows, lanes along the inputs. `weigh`: weighted sums of rows, lanes along the outputs. Both add their
// terms in index order, so a row's result never depends on M.
#pragma once

#include "simd.h"

namespace {

INLINE int least(int a, int b) { return a < b ? a : b; }

// Lane sums of M x N accumulators.
template <int M, int N>
INLINE void lane_sums(const vf (&acc)[M][N], float (&sums)[M][N]) {
    const vf* from = &acc[0][0];
    float* to = &sums[0][0];
    int i = 0;
    for (; i + 4 <= M * N; i += 4) {
        v4 s = sum4(from[i], from[i + 1], from[i + 2], from[i + 3]);
        memcpy(to + i, &s, sizeof s);
    }
    for (; i < M * N; i++) to[i] = sum(from[i]);
}

// sums[m][n] = x row m . w row n, over `in` numbers.
template <int M, int N, class Number>
INLINE void dot(const float* x, int64_t x_stride, const Number* w, int64_t w_stride, int in, float (&sums)[M][N]) {
    vf acc[M][N] = {};
    int i = 0;
    for (; i + W <= in; i += W) {
        vf row[N];
        for (int n = 0; n < N; n++) row[n] = load(w + n * w_stride + i);
        for (int m = 0; m < M; m++) {
            vf v = load(x + m * x_stride + i);
            for (int n = 0; n < N; n++) acc[m][n] = fma(row[n], v, acc[m][n]);
        }
    }
    if (i < in) {
        for (int n = 0; n < N; n++) {
            vf row = load_part(w + n * w_stride + i, in - i);
            for (int m = 0; m < M; m++) acc[m][n] = fma(row, load_part(x + m * x_stride + i, in - i), acc[m][n]);
        }
    }
    lane_sums(acc, sums);
}

// acc[m][v] += sum over r < count of weights[m, r] * rows[r, v * W ...]; with PART, V is 1 and only `lanes` lanes are read.
template <int M, int V, bool PART = false, class Number>
INLINE void weigh(vf (&acc)[M][V], const float* weights, int64_t weight_stride, const Number* rows, int64_t row_stride,
                  int count, int lanes = 0) {
    for (int r = 0; r < count; r++) {
        vf row[V];
        for (int v = 0; v < V; v++) row[v] = PART ? load_part(rows + r * row_stride, lanes) : load(rows + r * row_stride + v * W);
        for (int m = 0; m < M; m++) {
            vf g = set1(weights[m * weight_stride + r]);
            for (int v = 0; v < V; v++) acc[m][v] = fma(g, row[v], acc[m][v]);
        }
    }
}

// Calls f<M>(m) for rows m .. m + M until all `count` are done, four at a time as long as possible.
template <class F>
INLINE void in_fours(int count, F&& f) {
    int m = 0;
    for (; m + 4 <= count; m += 4) f.template operator()<4>(m);
    switch (count - m) {
        case 3: return f.template operator()<3>(m);
        case 2: return f.template operator()<2>(m);
        case 1: return f.template operator()<1>(m);
    }
}

// Calls f<M>() with M = count, from 1 to MAX.
template <int MAX, class F>
INLINE void with_count(int count, F&& f) {
    if constexpr (MAX > 1)
        if (count < MAX) return with_count<MAX - 1>(count, f);
    f.template operator()<MAX>();
}

}  // namespace
