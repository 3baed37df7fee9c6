// Grouped LoRA: y[s:e] += scale * ((x[s:e] @ A.T) @ B) for every segment of all linears of one input.
#pragma once

#include <cstdint>

#include "ahead.h"

// One linear's adapters. Mirrored by AdaptersStruct in native.py.
struct Adapters {
    const int16_t* a;      // [units, in]: a rank row is one unit of 16-bit floats or two of fp32
    const int16_t* b;      // [units, out]
    const int32_t* table;  // [segments, 5]: start, end, first unit, rank, dtype
    const float* scale;    // [segments]
    int32_t segments, in, out;
};

// The deltas of linears of one input x [rows, in]. They belong to the calling thread and are valid until its next call;
// the functions below may be called from any thread.
struct Deltas;
Deltas& deltas_of(const Adapters* const* linears, int count, const float* x);

// Adds the memory read by shrinking a linear's segments, or by expanding linear `index` for outputs [first, last).
void prefetch_for_shrink(const Adapters& linear, PrefetchList& prefetch);
void prefetch_for_expand(const Deltas& deltas, int index, int first, int last, PrefetchList& prefetch);

// Takes part in shrinking all segments, which threads share: each thread calls this at the start of a task, and waits for
// the others' part only when it expands.
void shrink(Deltas& deltas);

// Adds the deltas of linear `index` to outputs [first, last): y[m * stride + o]. Waits for shrinking in other threads.
void expand_tile(const Deltas& deltas, int index, int first, int last, float* y, int64_t stride);
