// y = x @ W.T with the weight of each row's expert: rows sorted by expert, tiles of all experts in one parallel loop.
//
// Tiles are computed by `linear_tile`, so a row has the same bits as with its expert's weight as a linear.
#pragma once

#include "linear.h"

// Mirrored by ExpertsStruct in native.py.
struct Experts {
    Weight first;                // the first expert's: scales null with double quantisation, `int8` of all experts
    int64_t bytes;               // of an expert's data
    int64_t scales;              // per expert
    const uint8_t* absmax;       // [experts, scales] with double quantisation, else null
    const float* nested_absmax;  // [experts, scales / nested_blocksize, rounded up]
    const float* nested_code;    // [256]
    const float* offset;         // [experts]
    int64_t nested_blocksize;
};

// counts [count]: rows of each expert. y [rows, out], or with `gated` [rows, out / 2]: silu of the outputs' first half
// times the second.
void grouped_linear(const Experts& experts, const float* x, const int64_t* counts, int count, int rows, float* y, bool gated);
