#include "lora.h"

#include <vector>

#include "export.h"
#include "pool.h"
#include "tile.h"

namespace {

enum Dtype { FP32 = 0, BF16 = 1, FP16 = 2 };

constexpr int ROWS = 64, RANKS = 8;  // per shrink task

struct Segment {
    const Adapters* linear;
    int start, end, unit, rank, dtype;
    float scale;
    int64_t down;  // offset of its [end - start, rank] in the shrunk rows
    int tasks;     // shrink tasks up to and including this segment

    template <class Number>
    const Number* rows(const int16_t* pool, int width) const {
        return reinterpret_cast<const Number*>(pool + (int64_t)unit * width);
    }
};

template <class F>
INLINE void with_number(int dtype, F&& f) {
    switch (dtype) {
        case FP32: return f.template operator()<float>();
        case BF16: return f.template operator()<bf16>();
        default: return f.template operator()<fp16>();
    }
}

template <int M, int N, class Number>
INLINE void shrink_some(const float* x, const Number* a, int in, float scale, float* down, int rank) {
    float sums[M][N];
    dot<M, N>(x, in, a, in, in, sums);
    for (int m = 0; m < M; m++)
        for (int n = 0; n < N; n++) down[m * rank + n] = scale * sums[m][n];
}

template <int M, class Number>
INLINE void shrink_rows(const Segment& s, const float* x, const Number* a, int first, int last, float* down) {
    const int64_t in = s.linear->in;
    int r = first;
    for (; r + 4 <= last; r += 4) {
        for (int64_t i = 0; i < 4 * in; i += 64 / sizeof(Number)) __builtin_prefetch(a + (r + 4) * in + i);
        shrink_some<M, 4>(x, a + r * in, in, s.scale, down + r, s.rank);
    }
    for (; r < last; r++) shrink_some<M, 1>(x, a + r * in, in, s.scale, down + r, s.rank);
}

void shrink_task(const Segment& s, int task, const float* x, float* down) {
    const int blocks = (s.rank + RANKS - 1) / RANKS;
    const int first = task % blocks * RANKS, last = least(first + RANKS, s.rank);
    int m = s.start + task / blocks * ROWS;
    const int end = least(m + ROWS, s.end);
    const int64_t in = s.linear->in;
    down += s.down - (int64_t)s.start * s.rank;  // indexed by token from here
    with_number(s.dtype, [&]<class Number>() {
        const Number* a = s.rows<Number>(s.linear->a, in);
        for (; m + 4 <= end; m += 4) shrink_rows<4>(s, x + m * in, a, first, last, down + (int64_t)m * s.rank);
        for (; m < end; m++) shrink_rows<1>(s, x + m * in, a, first, last, down + (int64_t)m * s.rank);
    });
}

template <int M, int V, bool PART, class Number>
INLINE void expand_some(const float* down, int rank, const Number* b, int64_t out, float* y, int64_t stride, int lanes) {
    vf acc[M][V] = {};
    weigh<M, V, PART>(acc, down, rank, b, out, rank, lanes);
    for (int m = 0; m < M; m++) {
        for (int v = 0; v < V; v++) {
            float* p = y + m * stride + v * W;
            if (PART) {
                store_part(p, load_part(p, lanes) + acc[m][v], lanes);
            } else {
                store(p, load(p) + acc[m][v]);
            }
        }
    }
}

template <int M, class Number>
INLINE void expand_rows(const float* down, int rank, const Number* b, int64_t out, int first, int last, float* y, int64_t stride) {
    constexpr int V = W == 16 ? 3 : 2;
    int o = first;
    for (; o + V * W <= last; o += V * W) expand_some<M, V, false>(down, rank, b + o, out, y + o, stride, 0);
    for (; o + W <= last; o += W) expand_some<M, 1, false>(down, rank, b + o, out, y + o, stride, 0);
    if (o < last) expand_some<M, 1, true>(down, rank, b + o, out, y + o, stride, last - o);
}

}  // namespace

struct Deltas {
    std::vector<Segment> segments;
    std::vector<int> ends;  // the end of each linear's segments
    const float* x;
    float* down;
    Shares shrinking;
};

Deltas& deltas_of(const Adapters* const* linears, int count, const float* x) {
    static thread_local Deltas all;
    all.segments.clear();
    all.ends.clear();
    int64_t floats = 0;
    int tasks = 0;
    for (int i = 0; i < count; i++) {
        const Adapters& linear = *linears[i];
        for (int s = 0; s < linear.segments; s++) {
            const int32_t* row = linear.table + s * 5;
            const int n = row[1] - row[0], rank = row[3];
            if (n <= 0 || rank == 0) continue;
            tasks += (n + ROWS - 1) / ROWS * ((rank + RANKS - 1) / RANKS);
            all.segments.push_back({&linear, row[0], row[1], row[2], rank, row[4], linear.scale[s], floats, tasks});
            floats += (int64_t)n * rank;
        }
        all.ends.push_back((int)all.segments.size());
    }
    all.x = x, all.down = scratch(SHRUNK, floats);
    all.shrinking.distribute(tasks);
    return all;
}

void shrink(Deltas& all) {
    all.shrinking.run_all([&](int task) {
        const Segment* s = all.segments.data();
        while (task >= s->tasks) s++;
        shrink_task(*s, task - (s == all.segments.data() ? 0 : s[-1].tasks), all.x, all.down);
    });
}

void prefetch_for_shrink(const Adapters& linear, PrefetchList& prefetch) {
    for (int s = 0; s < linear.segments; s++) {
        const int32_t* row = linear.table + s * 5;
        if (row[0] < row[1] && row[3] > 0)
            prefetch.add(linear.a + (int64_t)row[2] * linear.in, (int64_t)row[3] * linear.in * (row[4] == FP32 ? 4 : 2));
    }
}

void prefetch_for_expand(const Deltas& all, int index, int first, int last, PrefetchList& prefetch) {
    for (int i = index ? all.ends[index - 1] : 0; i < all.ends[index]; i++) {
        const Segment& s = all.segments[i];
        const int64_t out = s.linear->out;
        with_number(s.dtype, [&]<class Number>() {
            const Number* b = s.rows<Number>(s.linear->b, out);
            prefetch.add(b + first, (last - first) * sizeof(Number), s.rank, out * sizeof(Number));
        });
    }
}

void expand_tile(const Deltas& all, int index, int first, int last, float* y, int64_t stride) {
    all.shrinking.await();
    for (int i = index ? all.ends[index - 1] : 0; i < all.ends[index]; i++) {
        const Segment& s = all.segments[i];
        const int64_t out = s.linear->out;
        with_number(s.dtype, [&]<class Number>() {
            const Number* b = s.rows<Number>(s.linear->b, out);
            const float* down = all.down + s.down;
            int m = s.start;
            for (; m + 4 <= s.end; m += 4, down += 4 * s.rank) expand_rows<4>(down, s.rank, b, out, first, last, y + m * stride, stride);
            for (; m < s.end; m++, down += s.rank) expand_rows<1>(down, s.rank, b, out, first, last, y + m * stride, stride);
        });
    }
}

EXPORT void lk_lora_add(const Adapters* linear, const float* x, float* y) {
    Deltas& all = deltas_of(&linear, 1, x);
    if (all.segments.empty()) return;
    constexpr int SHARE = 64;
    parallel_for((linear->out + SHARE - 1) / SHARE, [&](int task) {
        shrink(all);
        expand_tile(all, 0, task * SHARE, least((task + 1) * SHARE, linear->out), y, linear->out);
    });
}
