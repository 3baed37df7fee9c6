// The argmax of each row of logits, and whether the row is valid.
#include <cmath>

#include "export.h"
#include "pool.h"
#include "tile.h"

namespace {

constexpr int PART = 1024;  // numbers per part: the maximum is found by parts, then the index within its part

struct Row {
    float top = -INFINITY, low = INFINITY;
    bool nan = false;
    int64_t part = 0;  // start of the first part with the maximum

    void take(const float* x, int64_t begin, int64_t end) {
        vf tops = set1(-INFINITY), lows = set1(INFINITY);
        vi nans = {};
        int64_t i = begin;
        for (; i + W <= end; i += W) {
            const vf v = load(x + i);
            tops = (vf)(v > tops ? v : tops), lows = (vf)(v < lows ? v : lows), nans |= v != v;
        }
        float greatest = -INFINITY;
        for (int lane = 0; lane < W; lane++) {
            greatest = tops[lane] > greatest ? tops[lane] : greatest;
            low = lows[lane] < low ? lows[lane] : low;
            nan |= nans[lane] != 0;
        }
        for (; i < end; i++) {
            greatest = x[i] > greatest ? x[i] : greatest;
            low = x[i] < low ? x[i] : low;
            nan |= x[i] != x[i];
        }
        if (greatest > top) top = greatest, part = begin;
    }
};

}  // namespace

// x [rows, n] -> found [rows]; see `argmax` of reference.py.
EXPORT void lk_argmax(const float* x, int rows, int64_t n, int masked, int64_t* found) {
    parallel_for(rows, [&](int m) {
        const float* const numbers = x + m * n;
        Row row;
        for (int64_t i = 0; i < n; i += PART) row.take(numbers, i, i + PART < n ? i + PART : n);
        const bool drawable = !row.nan && std::isfinite(row.top) && (masked || row.low > -INFINITY);
        int64_t at = row.part;
        while (drawable && numbers[at] != row.top) at++;
        found[m] = drawable ? at : -1;
    });
}
