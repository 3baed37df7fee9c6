// Log-probabilities of given outputs, with ranks, and of the likeliest outputs.
#include <cmath>

#include "blocks.h"
#include "export.h"
#include "pool.h"
#include "tile.h"

namespace {

struct Candidate {
    float score;
    int32_t id;
    bool operator<(const Candidate& other) const { return score > other.score || (score == other.score && id < other.id); }
};

struct Scores {
    const float* const x;
    const int64_t n;
    float* const tops;  // [blocks], the blocks' maxima

    int64_t blocks() const { return (n + BLOCK - 1) / BLOCK; }

    template <class F>
    INLINE void each(int64_t block, F&& f) const {  // calls f with vectors, the last one filled up with -inf
        const int64_t end = std::min(n, (block + 1) * BLOCK);
        int64_t i = block * BLOCK;
        for (; i + W <= end; i += W) f(load(x + i));
        if (i == end) return;
        vf last = set1(-INFINITY);
        memcpy(&last, x + i, sizeof(float) * (end - i));
        f(last);
    }

    float greatest() {
        for (int64_t b = 0; b < blocks(); b++) {
            vf most = set1(-INFINITY);
            each(b, [&](vf v) { most = max(v, most); });
            tops[b] = top(most);
        }
        return *std::max_element(tops, tops + blocks());
    }

    // log of the sum of exp; NaN if that is undefined.
    double log_total(float peak) const {
        double total = 0;
        for (int64_t b = 0; b < blocks(); b++) {
            vf part = set1(0);
            each(b, [&](vf v) { part += exp(v - set1(peak)); });
            total += sum(part);
        }
        return peak + std::log(total);
    }

    int64_t greater_than(float score) const {
        int64_t count = 0;
        for (int64_t b = 0; b < blocks(); b++) {
            if (!(tops[b] > score)) continue;
            vi found = {};
            each(b, [&](vf v) { found -= (vi)(v > set1(score)); });
            for (int lane = 0; lane < W; lane++) count += found[lane];
        }
        return count;
    }

    // Finds the `most` greatest, ties in order of id.
    void best(int64_t most, Candidate* found, float* order) const {
        const float least = least_of_greatest(tops, blocks(), most, -INFINITY, order);
        int64_t count = 0;
        for (int64_t b = 0; b < blocks(); b++) {
            if (tops[b] < least) continue;
            for (int64_t i = b * BLOCK; i < std::min(n, (b + 1) * BLOCK); i++) {
                found[count] = {x[i], (int32_t)i};
                count += x[i] >= least;
            }
        }
        std::partial_sort(found, found + most, found + count);
    }
};

}  // namespace

// logits [rows, n], tokens [rows] -> values and ranks [rows], ids and likeliest [rows, most]; see `_logprobs` of sampling.py.
EXPORT void lk_logprobs(const float* logits, int rows, int64_t n, const int64_t* tokens, int most, double* values, int64_t* ranks,
                        int64_t* ids, double* likeliest) {
    const int64_t blocks = (n + BLOCK - 1) / BLOCK;
    parallel_for(rows, [&](int m) {
        float* const tops = scratch(WEIGHTS, 2 * (blocks + n + 1));
        Scores row{logits + m * n, n, tops};
        const float peak = row.greatest();
        const double total = row.log_total(peak);
        const float own = row.x[tokens[m]];
        values[m] = own - total;
        ranks[m] = row.greater_than(own) + 1;
        int64_t* const which = ids + (int64_t)m * most;
        double* const scores = likeliest + (int64_t)m * most;
        if (!std::isfinite(total)) {  // with NaN, comparisons may not be an order
            for (int i = 0; i < most; i++) which[i] = i, scores[i] = NAN;
            return;
        }
        Candidate* const found = (Candidate*)(tops + 2 * blocks);
        if (most) row.best(most, found, tops + blocks);
        for (int i = 0; i < most; i++) which[i] = found[i].id, scores[i] = found[i].score - total;
    });
}
