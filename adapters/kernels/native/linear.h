// y = x @ W.T for a frozen weight in its library's storage (except for its scales), and dx = dy @ W.
//
// A dot product runs over the inputs in a fixed order: W lanes, one fused multiply-add after another, then a fixed
// sum over lanes. The order does not depend on the number of rows or outputs, so a row's bits do not depend on other rows.
#pragma once

#include <cstdint>

#include "ahead.h"

enum WeightKind { FOUR_BIT = 0, INT8 = 1, FP32 = 2, BF16 = 3, FP16 = 4 };

// Mirrored by WeightStruct in native.py.
struct Weight {
    const void* data;
    const float* scales;   // FOUR_BIT: [out * in / blocksize]; INT8: [out], 127 times the scale; else null
    const float* code;     // FOUR_BIT: [16], else null
    const float* bias;     // [out] or null
    int32_t kind;
    int32_t out, in;
    int32_t blocksize;     // FOUR_BIT: weights under one scale
    const void* int8;      // Int8Weights, for y as in int8.h; else null
    const int8_t* levels;  // [16] with int8, else null
};

struct Int8Block;

// The input rows in the layouts of weights' decoders: [rows, padded inputs], padded with zeros.
struct PackedRows {
    const float* natural;
    const float* interleaved;  // in each 2W inputs, those at even places come first
    const Int8Block* int8;     // [rows, blocks]

    // The rows from m on, for `in` padded inputs.
    PackedRows from(int64_t m, int64_t in) const;
};

// Packs x [rows, in] for these weights, all of the same `in`. Valid until the caller's next call.
PackedRows pack_rows(const Weight* const* weights, int count, const float* x, int rows);

// Computes outputs [first, last) of every row: y[m * stride + o]. Runs on the calling thread, which prefetches `prefetch` if
// there are few rows.
void linear_tile(const Weight& w, const PackedRows& x, int rows, int first, int last, float* y, int64_t stride, const PrefetchList& prefetch = {});

// The number of outputs per task that shares the work evenly among threads.
int outputs_per_task(int out);
