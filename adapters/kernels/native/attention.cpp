#include "attention.h"

#include <initializer_list>
#include <type_traits>

#include "export.h"
#include "pool.h"
#include "tile.h"

namespace {

constexpr int GROUP = 64;      // keys are reduced in groups of this many, aligned to the sequence's start
constexpr int TASK_ROWS = 96;  // about so many (query, head) rows share a task's keys
constexpr int64_t NEAR = 1 << 20;  // bytes of a thread's own cache

struct Rows {  // the (query, head) rows of one task: one request, one kv head, some of its queries
    int count;        // row i is query i / share, query head i % share of the kv head
    int share;        // query heads per kv head
    int first_position;
    float *q, *acc;   // [count, head_dim]
    float *scores;    // [count, GROUP]
    float *top, *total;  // [count]

    int position(int row) const { return first_position + row / share; }
};

// Calls f<M>(m) for rows m .. m + M until all `count` are done, four at a time while it can.
template <class F>
INLINE void by_fours(int count, F&& f) {
    int m = 0;
    for (; m + 4 <= count; m += 4) f.template operator()<4>(m);
    switch (count - m) {
        case 3: return f.template operator()<3>(m);
        case 2: return f.template operator()<2>(m);
        case 1: return f.template operator()<1>(m);
    }
}

// Asks for `floats` numbers that will be read soon; null: nothing will.
INLINE void fetch(const float* at, int64_t floats) {
    for (int64_t i = 0; at && i < floats; i += 16) __builtin_prefetch(at + i);
}

constexpr int VECTORS = W == 16 ? 4 : 2;  // of each row's sums, as registers allow
constexpr int FEW_ROWS = 16;              // whose scores are computed while keys arrive, not when a group is there
constexpr int RUN = 16;                   // keys that are then scored at once
static_assert(GROUP % (VECTORS * W) == 0 && RUN % W == 0);

// Keys [count, dim] as columns: to[d * GROUP + n]. Whole vectors where `room` rows are there to be read: what lies behind
// the last key is turned as well then.
void turn(const float* keys, int count, int room, int dim, float* to) {
    int n = 0;
    for (; n < count && n + W <= room; n += W) {
        const float* rows = keys + (int64_t)n * dim;
        int d = 0;
        for (; d + 4 <= dim; d += 4) {
            vf four[4];
            columns(rows + d, dim, four);
            for (int i = 0; i < 4; i++) store(to + (d + i) * GROUP + n, four[i]);
        }
        for (; d < dim; d++)
            for (int r = 0; r < W; r++) to[d * GROUP + n + r] = rows[r * dim + d];
    }
    for (; n < count; n++)
        for (int d = 0; d < dim; d++) to[d * GROUP + n] = keys[(int64_t)n * dim + d];
}

// `weigh`, which takes its terms one by one where `next` is asked for meanwhile: a line with each, `next_stride` apart.
template <int M, int V, bool PART = false>
INLINE void weigh_on_the_way(vf (&sums)[M][V], const float* weights, int64_t weight_stride, const float* rows, int64_t row_stride,
                             int count, int lanes, const float* next, int64_t next_stride) {
    if (!next) return weigh<M, V, PART>(sums, weights, weight_stride, rows, row_stride, count, lanes);
    for (int n = 0; n < count; n++) {
        __builtin_prefetch(next + n * next_stride);
        weigh<M, V, PART>(sums, weights + n, weight_stride, rows + n * row_stride, row_stride, 1, lanes);
    }
}

// Scores of M rows with keys that were turned; those of a last vector's other lanes are anything.
template <int M, int V>
INLINE void score_keys(const float* q, const float* turned, int keys, int dim, float* scores, const float* next) {
    for (int n = 0; n < keys; n += V * W) {
        vf sums[M][V] = {};
        weigh_on_the_way<M, V>(sums, q, dim, turned + n, GROUP, dim, 0, next, V * W);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) store(scores + m * GROUP + n + v * W, sums[m][v]);
    }
}

template <int M, int V, bool PART>
INLINE void weigh_some(const float* weights, const float* values, int count, int dim, float* acc, int lanes, const float* next) {
    vf sums[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sums[m][v] = PART ? load_part(acc + m * dim, lanes) : load(acc + m * dim + v * W);
    weigh_on_the_way<M, V, PART>(sums, weights, GROUP, values, dim, count, lanes, next, dim);
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++)
            PART ? store_part(acc + m * dim, sums[m][v], lanes) : store(acc + m * dim + v * W, sums[m][v]);
}

template <int M>
INLINE void weigh_values(const float* weights, const float* values, int count, int dim, float* acc, const float* next) {
    constexpr int V = VECTORS;
    auto behind = [&](int d) { return next ? next + d : nullptr; };
    int d = 0;
    for (; d + V * W <= dim; d += V * W) weigh_some<M, V, false>(weights, values + d, count, dim, acc + d, 0, behind(d));
    for (; d + W <= dim; d += W) weigh_some<M, 1, false>(weights, values + d, count, dim, acc + d, 0, behind(d));
    if (d < dim) weigh_some<M, 1, true>(weights, values + d, count, dim, acc + d, dim - d, behind(d));
}

// Each score s becomes limit * tanh(s / limit).
void cap(float* scores, float limit) {
    const vf one = set1(1.f), two = set1(2.f), factor = set1(2.f / limit), most = set1(limit);
    for (int i = 0; i < GROUP; i += W) store(scores + i, most * (one - two / (exp(load(scores + i) * factor) + one)));
}

// Turns a row's scores into weights and brings its running maximum, total and sum up to date.
void soften(float* scores, float* top_score, float* total, float* acc, int dim) {
    vf highest = load(scores);
    for (int i = W; i < GROUP; i += W) highest = max(highest, load(scores + i));
    float here = top(highest), before = *top_score;
    float now = here > before ? here : before;
    vf shift = set1(now == -INFINITY ? 0.f : now), sums = {};
    for (int i = 0; i < GROUP; i += W) {
        vf p = exp_below(load(scores + i) - shift);
        store(scores + i, p);
        sums += p;
    }
    vf decay = exp(set1(before) - shift);
    *total = *total * decay[0] + sum(sums);
    *top_score = now;
    if (now == before) return;  // decay is 1
    int d = 0;
    for (; d + W <= dim; d += W) store(acc + d, load(acc + d) * decay);
    for (; d < dim; d++) acc[d] *= decay[0];
}

// Rows of a cache as fp32.
template <class Number>
INLINE void widen_rows(const char* from, int64_t row_bytes, int count, int dim, float* to) {
    for (int r = 0; r < count; r++, from += row_bytes, to += dim) {
        const Number* row = (const Number*)from;
        vf scale = set1(1.f);
        if constexpr (std::is_same<Number, int8_t>::value) {
            float own;
            memcpy(&own, row + dim, sizeof own);
            scale = set1(own);
        }
        int d = 0;
        for (; d + W <= dim; d += W) store(to + d, load(row + d) * scale);
        if (d < dim) store_part(to + d, load_part(row + d, dim - d) * scale, dim - d);
    }
}

void widen(const KvCache& cache, const char* from, int count, int dim, float* to) {
    const int64_t bytes = cache.row_bytes(dim);
    switch (cache.kind) {
        case KV_BF16: return widen_rows<bf16>(from, bytes, count, dim, to);
        case KV_FP16: return widen_rows<fp16>(from, bytes, count, dim, to);
        case KV_FP8: return widen_rows<fp8>(from, bytes, count, dim, to);
        case KV_INT8: return widen_rows<int8_t>(from, bytes, count, dim, to);
        default: memcpy(to, from, bytes * count);
    }
}

void attend_group(const Attention& a, const Rows& rows, int kv_head, const int32_t* blocks, int begin, int kv_len) {
    const int dim = a.head_dim, size = a.cache.block_size;
    const int keys = least(GROUP, kv_len - begin);  // slots beyond hold stale numbers: never read
    const int64_t row_bytes = a.cache.row_bytes(dim);
    const bool exact = a.cache.kind == KV_FP32;
    auto place = [&](int at) { return (((int64_t)blocks[at / size] * a.kv_heads + kv_head) * size + at % size) * row_bytes; };
    // Visits runs of keys that lie together; each is told where the next one lies, the last one `behind`. Runs are pages
    // apart, so the hardware does not see them coming. Of a cache that is not fp32, the group is widened before, as one run.
    auto spans = [&](const char* cache, const char* behind, auto&& visit) {
        float* wide = exact ? nullptr : scratch(WIDENED, (size_t)GROUP * dim);
        for (int n = 0; n < keys;) {
            const int at = begin + n, count = least(keys - n, size - at % size);
            const char *here = cache + place(at), *next = n + count < keys ? cache + place(at + count) : behind;
            if (exact) visit(n, count, (const float*)here, (const float*)next);
            else widen(a.cache, here, count, dim, wide + (int64_t)n * dim);
            n += count;
        }
        if (!exact) visit(0, keys, (const float*)wide, (const float*)nullptr);
    };
    float* turned = scratch(TURNED, (size_t)GROUP * dim);
    const bool at_once = rows.count <= FEW_ROWS && size % RUN == 0;
    spans(a.cache.k, a.cache.v + place(begin), [&](int n, int count, const float* here, const float* next) {
        turn(here, count, exact ? size - (begin + n) % size : GROUP - n, dim, turned + n);
        if (at_once)
            by_fours(rows.count, [&]<int M>(int m) {
                score_keys<M, RUN / W>(rows.q + m * dim, turned + n, count, dim, rows.scores + m * GROUP + n, m ? nullptr : next);
            });
        else fetch(next, (int64_t)count * dim);
    });
    if (!at_once)
        by_fours(rows.count, [&]<int M>(int m) {
            score_keys<M, VECTORS>(rows.q + m * dim, turned, keys, dim, rows.scores + m * GROUP, nullptr);
        });
    for (int m = 0; m < rows.count; m++) {
        float* scores = rows.scores + m * GROUP;
        if (a.softcap > 0) cap(scores, a.softcap);
        const int last = rows.position(m) - begin, first = a.window ? last - a.window + 1 : 0;
        for (int n = 0; n < first && n < GROUP; n++) scores[n] = -INFINITY;
        for (int n = last < 0 ? 0 : last + 1; n < GROUP; n++) scores[n] = -INFINITY;
        soften(scores, rows.top + m, rows.total + m, rows.acc + m * dim, dim);
    }
    const char* const next_group = begin + GROUP < kv_len ? a.cache.k + place(begin + GROUP) : nullptr;
    spans(a.cache.v, next_group, [&](int n, int count, const float* here, const float* next) {
        by_fours(rows.count, [&]<int M>(int m) {
            weigh_values<M>(rows.scores + m * GROUP + n, here, count, dim, rows.acc + m * dim, m ? nullptr : next);
        });
    });
}

// Queries [first, last) of the step, all of one request, for one kv head.
void attend_rows(const Attention& a, int request, int kv_head, int first, int last) {
    const int dim = a.head_dim, share = a.heads / a.kv_heads;
    const int32_t* seq = a.seqs + request * 3;
    const int kv_len = seq[2], count = (last - first) * share;
    float* floats = scratch(ATTENTION, (size_t)count * (2 * dim + GROUP + 2));
    Rows rows{count, share, kv_len - (seq[1] - first), floats, floats + count * dim, floats + 2 * count * dim, nullptr, nullptr};
    rows.top = rows.scores + count * GROUP;
    rows.total = rows.top + count;
    for (int m = 0; m < count; m++) {
        const float* q = a.q + ((int64_t)(first + m / share) * a.heads + kv_head * share + m % share) * dim;
        for (int d = 0; d < dim; d++) rows.q[m * dim + d] = q[d] * a.scaling;
        rows.top[m] = -INFINITY;
        rows.total[m] = 0;
    }
    memset(rows.acc, 0, sizeof(float) * count * dim);
    const int last_position = rows.position(count - 1);
    const int first_key = a.window ? rows.first_position - a.window + 1 : 0;
    const int32_t* blocks = a.block_tables + (int64_t)request * a.max_blocks;
    for (int begin = first_key > 0 ? first_key / GROUP * GROUP : 0; begin <= last_position; begin += GROUP)
        attend_group(a, rows, kv_head, blocks, begin, kv_len);
    for (int m = 0; m < count; m++) {
        const int head = kv_head * share + m % share;
        float* out = a.out + ((int64_t)(first + m / share) * a.heads + head) * dim;
        const float total = a.sinks ? rows.total[m] + exp(set1(a.sinks[head] - rows.top[m]))[0] : rows.total[m];
        for (int d = 0; d < dim; d++) out[d] = rows.acc[m * dim + d] / total;
    }
}

}  // namespace

void attend(const Attention& a) {
    memset(a.out, 0, sizeof(float) * a.tokens * a.heads * a.head_dim);  // rows of no request
    const int share = a.heads / a.kv_heads, chunk = share < TASK_ROWS ? TASK_ROWS / share : 1;
    auto chunks = [&](int r) { return (a.seqs[r * 3 + 1] - a.seqs[r * 3] + chunk - 1) / chunk; };
    int tasks = 0;
    for (int r = 0; r < a.requests; r++) tasks += chunks(r) * a.kv_heads;
    parallel_for(tasks, [&](int task) {
        int r = 0;
        for (; task >= chunks(r) * a.kv_heads; r++) task -= chunks(r) * a.kv_heads;
        const int first = a.seqs[r * 3] + task / a.kv_heads * chunk;
        attend_rows(a, r, task % a.kv_heads, first, least(first + chunk, a.seqs[r * 3 + 1]));
    });
}

void attend_ahead(const Attention& a, Ahead& ahead) {
    const int size = a.cache.block_size;
    const int64_t block = a.kv_heads * size * a.cache.row_bytes(a.head_dim);  // bytes: all heads' keys of one lie together
    const int most = a.requests ? (int)(NEAR * pool_threads() / a.requests / (2 * block)) : 0;
    for (int r = 0; r < a.requests; r++) {
        const int32_t *seq = a.seqs + r * 3, *blocks = a.block_tables + (int64_t)r * a.max_blocks;
        const int first_key = a.window ? seq[2] - (seq[1] - seq[0]) - a.window + 1 : 0;
        const int first = first_key > 0 ? first_key / size : 0, last = least((seq[2] + size - 1) / size, first + most);
        for (const char* cache : {a.cache.k, a.cache.v})
            for (int b = first; b < last; b++) ahead.add(cache + blocks[b] * block, block);
    }
}

// One row into a cache, rounded as `cache_rows` of reference.py does.
void narrow(const float* from, KvKind kind, int dim, char* to) {
    switch (kind) {
        case KV_BF16:
            for (int d = 0; d < dim; d++) ((bf16*)to)[d] = rounded_bf16(from[d]);
            return;
        case KV_FP16:
            for (int d = 0; d < dim; d++) ((fp16*)to)[d] = rounded_fp16(from[d]);
            return;
        case KV_FP8:
            for (int d = 0; d < dim; d++) ((fp8*)to)[d] = rounded_fp8(from[d]);
            return;
        case KV_INT8: {
            float top = 0;
            for (int d = 0; d < dim; d++) {
                const float size = fabsf(from[d]);
                if (size > top || size != size) top = size;  // NaN stays
            }
            const float scale = top / 127.f;
            for (int d = 0; d < dim; d++) {
                const float code = scale > 0 && scale < INFINITY ? nearbyintf(from[d] / scale) : 0.f;
                ((int8_t*)to)[d] = (int8_t)code;
            }
            memcpy(to + dim, &scale, sizeof scale);
            return;
        }
        default: memcpy(to, from, sizeof(float) * dim);
    }
}

void write_kv(const float* k, const float* v, const int64_t* slots, int tokens, int kv_heads, int head_dim, const KvCache& cache) {
    const int64_t bytes = cache.row_bytes(head_dim);
    for (int t = 0; t < tokens; t++) {
        const int64_t block = slots[t] / cache.block_size, offset = slots[t] % cache.block_size;
        for (int h = 0; h < kv_heads; h++) {
            const int64_t to = ((block * kv_heads + h) * cache.block_size + offset) * bytes;
            const int64_t from = ((int64_t)t * kv_heads + h) * head_dim;
            narrow(k + from, cache.kind, head_dim, cache.k + to);
            narrow(v + from, cache.kind, head_dim, cache.v + to);
        }
    }
}

EXPORT void lk_attention(const Attention* a) { attend(*a); }

EXPORT void lk_write_kv(const float* k, const float* v, const int64_t* slots, int tokens, int kv_heads, int head_dim,
                            const KvCache* cache) {
    write_kv(k, v, slots, tokens, kv_heads, head_dim, *cache);
}
