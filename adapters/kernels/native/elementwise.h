// Elementwise functions: normalisation, rotation, activation. One row or part of a row at a time.
#pragma once

#include "simd.h"

namespace {

// y = x / sqrt(mean(x^2) + eps) * weight; y may be x.
inline void rms_norm(const float* x, const float* weight, float eps, int n, float* y) {
    vf squares = {};
    int i = 0;
    for (; i + W <= n; i += W) squares = fma(load(x + i), load(x + i), squares);
    if (i < n) squares = fma(load_part(x + i, n - i), load_part(x + i, n - i), squares);
    const float inverse = 1.f / sqrtf(sum(squares) / (float)n + eps);
    for (int j = 0; j < n; j++) y[j] = x[j] * inverse * weight[j];
}

// gate = silu(gate) * up
inline void silu_mul(float* gate, const float* up, int n) {
    auto silu = [](vf g, vf u) { return g / (set1(1.f) + exp(-g)) * u; };
    int i = 0;
    for (; i + W <= n; i += W) store(gate + i, silu(load(gate + i), load(up + i)));
    if (i < n) store_part(gate + i, silu(load_part(gate + i, n - i), load_part(up + i, n - i)), n - i);
}

// Rotates the first `rotary` numbers of each head of one token: pairs (i, i + rotary / 2).
inline void rope(float* heads, int count, int head_dim, const float* cos, const float* sin, int rotary) {
    const int half = rotary / 2;
    for (int h = 0; h < count; h++) {
        float *low = heads + h * head_dim, *high = low + half;
        for (int i = 0; i < half; i++) {
            const float a = low[i], b = high[i];
            low[i] = a * cos[i] - b * sin[i];
            high[i] = b * cos[half + i] + a * sin[half + i];
        }
    }
}

}  // namespace
