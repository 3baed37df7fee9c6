// This machine's peak bandwidth and arithmetic, for comparison in the benchmark.
#include <atomic>

#include "export.h"
#include "pool.h"
#include "simd.h"

// Reads `floats` numbers once, on all threads.
EXPORT void lk_read(const float* data, int64_t floats) {
    constexpr int64_t SHARE = 1 << 18;
    static std::atomic<float> sink;
    parallel_for((int)(floats / SHARE), [&](int task) {
        vf sums[4] = {};
        for (const float *p = data + task * SHARE, *end = p + SHARE; p < end; p += 4 * W)
            for (int i = 0; i < 4; i++) sums[i] += load(p + i * W);
        sink = sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    });
}

// Does `tasks` million fused multiply-adds (counting lanes) in registers.
EXPORT void lk_multiply_add(int tasks) {
    static std::atomic<float> sink;
    parallel_for(tasks, [&](int) {
        constexpr int CHAINS = 12;  // enough to hide the latency
        vf acc[CHAINS], factor = set1(0.999f), term = set1(1e-3f);
        for (int i = 0; i < CHAINS; i++) acc[i] = set1((float)i);
        for (int n = 0; n < 1000000 / (CHAINS * W); n++)
            for (int i = 0; i < CHAINS; i++) acc[i] = fma(acc[i], factor, term);
        for (int i = 1; i < CHAINS; i++) acc[0] += acc[i];
        sink = sum(acc[0]);
    });
}
