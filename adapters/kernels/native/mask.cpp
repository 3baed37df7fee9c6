// Sets the scores of tokens that are not allowed to -inf.
#include <cmath>

#include "export.h"
#include "tile.h"

// scores [n]: bit i % 32 of word i / 32 allows score i; missing words allow nothing.
EXPORT void lk_mask(float* scores, int64_t n, const uint32_t* allowed, int64_t words) {
    vi place;
    for (int lane = 0; lane < W; lane++) place[lane] = 1 << lane;
    const int64_t known = words * 32 < n ? words * 32 : n;
    int64_t i = 0;
    for (; i + W <= known; i += W) {
        const vi bits = place & ((int)(allowed[i / 32] >> i % 32) + vi{});
        store(scores + i, (vf)(bits != 0 ? load(scores + i) : set1(-INFINITY)));
    }
    for (; i < n; i++)
        if (i >= known || !(allowed[i / 32] >> i % 32 & 1)) scores[i] = -INFINITY;
}
