// Draws one token of each row from the tokens kept by temperature, min_p, top_k and top_p.
#include <cmath>

#include "blocks.h"
#include "export.h"
#include "pool.h"
#include "tile.h"

namespace {

constexpr int DROPPED = 19;    // low bits of a float that its bucket ignores; four bits of the mantissa are left
constexpr int BUCKETS = 2048;  // of weights up to 1

// exp((score - peak) / temperature) of a row, 0 for NaN, and every block's sum and maximum.
struct Weights {
    float* const all;      // [blocks, BLOCK], zeros at the end
    float* const sums;     // [blocks]
    float* const tops;     // [blocks]
    float* const found;    // [blocks * BLOCK]: gathered weights
    const int64_t blocks;
    float floor = 0;       // smaller weights count as 0

    void compute(const float* scores, int64_t n, float temperature) {
        vf greatest = set1(-INFINITY);
        int64_t i = 0;
        for (; i + W <= n; i += W) greatest = max(load(scores + i), greatest);  // ignores NaN
        float peak = top(greatest);
        for (; i < n; i++) peak = scores[i] > peak ? scores[i] : peak;
        const vf inverse = set1(1 / temperature), at = set1(peak);
        for (i = 0; i + W <= n; i += W) store(all + i, max(exp_below((load(scores + i) - at) * inverse), set1(0)));
        if (i < n) {
            store(all + i, max(exp_below((load_part(scores + i, n - i) - at) * inverse), set1(0)));
            for (int64_t rest = n; rest < i + W; rest++) all[rest] = 0;
            i += W;
        }
        for (; i < blocks * BLOCK; i += W) store(all + i, set1(0));
        for (int64_t b = 0; b < blocks; b++) {
            vf most = set1(0);
            for (int j = 0; j < BLOCK; j += W) most = max(most, load(all + b * BLOCK + j));
            tops[b] = top(most);
            sums[b] = sum_of(b);
        }
    }

    float sum_of(int64_t block) const {  // of the weights from the floor on
        const vf least = set1(floor);
        vf total = set1(0);
        for (int j = 0; j < BLOCK; j += W) {
            const vf weight = load(all + block * BLOCK + j);
            total += (vf)(weight >= least ? weight : set1(0));
        }
        return sum(total);
    }

    void raise(float least) {
        if (!(least > floor)) return;
        floor = least;
        for (int64_t b = 0; b < blocks; b++) sums[b] = tops[b] >= floor ? sum_of(b) : 0.f;
    }

    double total() const {
        double total = 0;
        for (int64_t b = 0; b < blocks; b++) total += sums[b];
        return total;
    }

    // Gathers all weights of at least `least` in `found`. Returns their number.
    int64_t gather(float least) const {
        int64_t count = 0;
        for (int64_t b = 0; b < blocks; b++) {
            if (tops[b] < least) continue;
            const float* const block = all + b * BLOCK;
            for (int j = 0; j < BLOCK; j += W) {
                if (!any((vi)(load(block + j) >= set1(least)))) continue;
                for (int lane = 0; lane < W; lane++) {
                    found[count] = block[j + lane];
                    count += block[j + lane] >= least;
                }
            }
        }
        return count;
    }

    float greatest(int64_t k) const {  // the k-th
        const int64_t count = gather(least_of_greatest(tops, blocks, k, 0, found));
        std::nth_element(found, found + k - 1, found + count, std::greater<float>());
        return found[k - 1];
    }

    // The smallest weight in the smallest set of greatest weights with a share `p` of all.
    float nucleus(double p) const {
        const double all_of_them = total(), goal = p * all_of_them;
        // Weights below this have at most 1 - p together, so none of them is needed.
        const float least = std::max(floor, (float)((1 - p) * all_of_them / (blocks * BLOCK)));
        const int64_t count = gather(least);
        double held[BUCKETS] = {};
        int last = BUCKETS;
        for (int64_t i = 0; i < count; i++) {
            const int bucket = bits_of(found[i]) >> DROPPED;
            held[bucket] += found[i];
            last = bucket < last ? bucket : last;
        }
        double reached = 0;
        int bucket = BUCKETS - 1;
        while (bucket > last && reached + held[bucket] < goal) reached += held[bucket--];
        float* const end = std::partition(found, found + count, [&](float weight) { return (int)(bits_of(weight) >> DROPPED) == bucket; });
        std::sort(found, end, std::greater<float>());
        float edge = least;  // in case rounding makes the goal unreachable
        for (float* at = found; at < end; at++) {
            edge = *at;
            if ((reached += edge) >= goal) break;
        }
        return edge;
    }

    // The index at which the running sum passes this share of the total; if there is none by rounding, the last increase.
    int64_t at(double share) const {
        const double goal = share * total();
        double before = 0;
        int64_t block = 0, grew = 0;
        for (double reached = 0; block < blocks; block++) {
            if (!(sums[block] > 0)) continue;
            before = reached, grew = block;
            reached += sums[block];
            if (reached > goal) break;
        }
        int64_t place = grew * BLOCK;
        double reached = 0;
        for (int64_t i = place; i < (grew + 1) * BLOCK; i++) {
            if (!(all[i] > 0) || all[i] < floor) continue;
            place = i;
            reached += all[i];
            if (reached > goal - before) break;
        }
        return place;
    }
};

}  // namespace

// scores [rows, n], and per row a `Truncation` of native.py and a number in [0, 1) -> drawn [rows].
EXPORT void lk_draw(const float* scores, int rows, int64_t n, const float* temperature, const float* min_p, const int32_t* top_k,
                    const double* top_p, const double* uniform, int64_t* drawn) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    parallel_for(rows, [&](int m) {
        float* const weights = scratch(WEIGHTS, 2 * blocks * (BLOCK + 1));
        float* const sums = weights + 2 * blocks * BLOCK;
        Weights row{weights, sums, sums + blocks, weights + blocks * BLOCK, blocks};
        row.compute(scores + m * n, n, temperature[m]);
        row.raise(min_p[m]);
        if (top_k[m] > 0 && top_k[m] < n) row.raise(row.greatest(top_k[m]));
        if (top_p[m] < 1) row.raise(row.nucleus(top_p[m]));
        drawn[m] = row.at(uniform[m]);
    });
}
