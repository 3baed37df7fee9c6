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

// Shrinks every segment of the given linears, all of input x [rows, in]. The result belongs to the calling thread and
// lasts until its next call; `expand_tile` may read it from any thread.
struct Shrunk;
const Shrunk* shrink(const Adapters* const* linears, int count, const float* x);

// What shrinking a linear's segments will read, and what expanding linear `index` will, for outputs [first, last).
void shrink_ahead(const Adapters& linear, Ahead& ahead);
void expand_ahead(const Shrunk& shrunk, int index, int first, int last, Ahead& ahead);

// Adds the deltas of linear `index` to outputs [first, last): y[m * stride + o]. Runs on the calling thread.
void expand_tile(const Shrunk& shrunk, int index, int first, int last, float* y, int64_t stride);
