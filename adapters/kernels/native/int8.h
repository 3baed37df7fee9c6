// Optional int8 inputs of a 4-bit linear: rounded to eight bits, block by block, for integer dot products.
//
//   y = sum over blocks of 64 inputs, in order:  fma(float(q . l), output scale * scale, y)
//
// with q = round(x / scale), scale = max |x| / 127 over the block, and l the weights' levels: their codes as integers.
// Sums inside a block are exact, so a result depends neither on other rows nor on the instructions used.
#pragma once

#include "linear.h"

// A block of 16 outputs by 64 inputs, as in Int8Copy of weight.py, group by group of outputs: [groups, blocks].
// Missing outputs of the last group are zeros.
struct Int8Weights {
    uint8_t codes[8][16][4];  // [eight inputs, output, byte]; byte j: input j in its high nibble, j + 4 in its low one
    float scales[16];         // a level times this is a weight
};

// The number of a weight's groups of outputs.
inline int64_t int8_groups(const Weight& w) { return (w.out + 15) / 16; }

// Of one weight, from a group's outputs on.
inline const Int8Weights* int8_group(const Weight& w, int64_t group) { return (const Int8Weights*)w.int8 + group * (w.in / 64); }

// Writes a group of outputs of a 4-bit weight in whole blocks of 64: [blocks]. `unit`: of the levels.
void int8_copy_group(const Weight& w, int group, float unit, Int8Weights* to);

// One row's share of a block.
struct Int8Block {
    int8_t x[64];
    float scale;     // NaN if any input is not finite
    int32_t offset;  // -128 * the sum of x, for weights shifted to l + 128
};

// Rounds a row of whole blocks.
void pack_int8(const float* row, int in, Int8Block* to);

// As linear_tile, for a weight with `int8`.
void int8_tile(const Weight& w, const Int8Block* x, int rows, int first, int last, float* y, int64_t stride);
