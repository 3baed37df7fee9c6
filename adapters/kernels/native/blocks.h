// A long row in blocks with known maxima.
#pragma once

#include <algorithm>
#include <functional>

#include "simd.h"

namespace {

constexpr int BLOCK = 128;  // numbers that are summed together, and skipped together

// A lower bound of the k greatest numbers of a row: the k-th greatest of the blocks' maxima, or `lowest` with fewer blocks.
// order [blocks] is scratch.
inline float least_of_greatest(const float* tops, int64_t blocks, int64_t k, float lowest, float* order) {
    if (k > blocks) return lowest;
    std::copy(tops, tops + blocks, order);
    std::nth_element(order, order + k - 1, order + blocks, std::greater<float>());
    return order[k - 1];
}

}  // namespace
