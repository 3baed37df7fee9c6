// y = x @ W.T where each row has the weight of its expert: rows sorted by expert, tiles of all experts shared out at once.
//
// A tile is `linear_tile`'s, so a row's bits are those that its expert's weight would give it as a linear.
#pragma once

#include "linear.h"

// Mirrored by ExpertsStruct in native.py.
struct Experts {
    Weight first;                // the first expert's; doubly quantised scales are null there, and `int8` holds all experts
    int64_t bytes;               // of an expert's data
    int64_t scales;              // of an expert
    const uint8_t* absmax;       // [experts, scales], doubly quantised; else null
    const float* nested_absmax;  // [experts, scales / nested_blocksize, rounded up]
    const float* nested_code;    // [256]
    const float* offset;         // [experts]
    int64_t nested_blocksize;
};

// counts [count]: rows of each expert. y [rows, out], or with `gated` [rows, out / 2]: silu of the first half of the
// outputs times the second.
void grouped_linear(const Experts& experts, const float* x, const int64_t* counts, int count, int rows, float* y, bool gated);
