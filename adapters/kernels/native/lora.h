// Grouped LoRA: y[s:e] += scale * ((x[s:e] @ A.T) @ B) for every segment of every linear that shares an input.
#pragma once

#include <cstdint>

#include "ahead.h"

// One linear's adapters. Mirrored by AdaptersStruct in native.py.
struct Adapters {
    const int16_t* a;      // [units, in]: a rank-row is one unit of 16-bit floats or two of fp32
    const int16_t* b;      // [units, out]
    const int32_t* table;  // [segments, 5]: start, end, first unit, rank, dtype
    const float* scale;    // [segments]
    int32_t segments, in, out;
};

// The deltas of linears that share input x [rows, in]. They belong to the calling thread and last until its next call;
// the functions below may be called from any thread.
struct Deltas;
Deltas& deltas_of(const Adapters* const* linears, int count, const float* x);

// What shrinking a linear's segments will read, and what expanding linear `index` will, for outputs [first, last).
void shrink_ahead(const Adapters& linear, Ahead& ahead);
void expand_ahead(const Deltas& deltas, int index, int first, int last, Ahead& ahead);

// Takes part in shrinking all segments, which threads share out among themselves: each begins its first task with this,
// and none waits for the others' part before it expands.
void shrink(Deltas& deltas);

// Adds the deltas of linear `index` to outputs [first, last): y[m * stride + o]. Waits for what other threads shrink.
void expand_tile(const Deltas& deltas, int index, int first, int last, float* y, int64_t stride);
