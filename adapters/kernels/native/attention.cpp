#include "attention.h"

#include <initializer_list>
#include <type_traits>

#include "export.h"
#include "pool.h"
#include "tile.h"

namespace {

constexpr int GROUP = 64;      // keys are reduced in groups of this many, aligned to the sequence's start
constexpr int PIECE = 512;     // keys, aligned likewise: a piece has a softmax of its own, and pieces are joined in order
constexpr int TASK_ROWS = 96;  // about so many (query, head) rows share a task's keys
constexpr int64_t NEAR = 1 << 20;  // bytes of a thread's own cache

constexpr int AHEAD = 2;       // runs of keys or values between the one at work and the one asked for
constexpr int LINE = 64;       // bytes of a cache line

static_assert(PIECE % GROUP == 0);

struct Rows {  // the (query, head) rows of one task: one request, one kv head, some of its queries
    int request, kv_head;
    int first, last;  // queries of the step
    int share;        // query heads per kv head: row i is query first + i / share, query head i % share of the kv head
    int first_position, kv_len;
    float *q, *scores;  // [count, head_dim], [count, GROUP]

    int count() const { return (last - first) * share; }
    int position(int row) const { return first_position + row / share; }
    int end() const { return position(count() - 1) + 1; }  // of the keys that any of them sees
};

struct Softmax {  // over some of the keys, for so many rows
    int count, dim;
    float *acc, *top, *total;  // [count, dim], [count], [count]

    static int64_t floats(int count, int dim) { return (int64_t)count * (dim + 2); }

    Softmax(float* at, int count, int dim) : count(count), dim(dim), acc(at), top(at + (int64_t)count * dim), total(top + count) {}

    void clear() {
        memset(acc, 0, sizeof(float) * floats(count, dim));
        for (int m = 0; m < count; m++) top[m] = -INFINITY;
    }

    // Adds the one over the keys that come next. A row that sees none of them keeps its bits.
    void join(const Softmax& next) {
        for (int m = 0; m < count; m++) {
            if (next.total[m] == 0) continue;
            const float now = next.top[m] > top[m] ? next.top[m] : top[m];
            const vf shift = set1(now == -INFINITY ? 0.f : now);
            const vf keep = exp(set1(top[m]) - shift), take = exp(set1(next.top[m]) - shift);
            top[m] = now;
            total[m] = total[m] * keep[0] + next.total[m] * take[0];
            float* to = acc + (int64_t)m * dim;
            const float* from = next.acc + (int64_t)m * dim;
            int d = 0;
            for (; d + W <= dim; d += W) store(to + d, load(to + d) * keep + load(from + d) * take);
            for (; d < dim; d++) to[d] = to[d] * keep[0] + from[d] * take[0];
        }
    }
};

// Asks for a line that will be read soon. Into the second-level cache, for more lines can be on their way there at once.
INLINE void fetch_line(const void* at) { __builtin_prefetch(at, 0, 2); }

// Asks for so many bytes; null: none.
INLINE void fetch(const void* at, int64_t bytes) {
    for (int64_t i = 0; at && i < bytes; i += LINE) fetch_line((const char*)at + i);
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

// `weigh`, which takes its terms one by one where `next` is asked for meanwhile: LINES with each, `next_stride` apart.
template <int M, int V, bool PART = false, int LINES = 1>
INLINE void weigh_on_the_way(vf (&sums)[M][V], const float* weights, int64_t weight_stride, const float* rows, int64_t row_stride,
                             int count, int lanes, const float* next, int64_t next_stride) {
    if (!next) return weigh<M, V, PART>(sums, weights, weight_stride, rows, row_stride, count, lanes);
    for (int n = 0; n < count; n++) {
        for (int line = 0; line < LINES; line++) fetch_line((const char*)(next + n * next_stride) + line * LINE);
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

// The same scores of a whole run, whose keys are turned in registers: for few rows. Asks for the run at `next` meanwhile.
template <int M>
INLINE void score_run(const float* q, const float* keys, int dim, float* scores, const float* next) {
    for (int n = 0; n < RUN; n += W) {
        vf sums[M] = {};
        for (int d = 0; d < dim; d += 4) {
            vf four[4];
            columns(keys + (int64_t)n * dim + d, dim, four);
            for (int line = 0; next && line < 4 * W; line += LINE / sizeof(float)) fetch_line(next + n * dim + d * W + line);
            for (int i = 0; i < 4; i++)
                for (int m = 0; m < M; m++) sums[m] = fma(set1(q[m * dim + d + i]), four[i], sums[m]);
        }
        for (int m = 0; m < M; m++) store(scores + m * GROUP + n, sums[m]);
    }
}

template <int M, int V, bool PART>
INLINE void weigh_some(const float* weights, const float* values, int count, int dim, float* acc, int lanes, const float* next) {
    vf sums[M][V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sums[m][v] = PART ? load_part(acc + m * dim, lanes) : load(acc + m * dim + v * W);
    constexpr int LINES = V * W * (int)sizeof(float) > LINE ? V * W * (int)sizeof(float) / LINE : 1;  // of each value's part
    weigh_on_the_way<M, V, PART, LINES>(sums, weights, GROUP, values, dim, count, lanes, next, dim);
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

void attend_group(const Attention& a, const Rows& rows, int begin, const Softmax& sums) {
    const int dim = a.head_dim, size = a.cache.block_size, row_count = rows.count();
    const int32_t* blocks = a.block_tables + (int64_t)rows.request * a.max_blocks;
    const int keys = least(GROUP, rows.kv_len - begin);  // slots beyond hold stale numbers: never read
    const int64_t row_bytes = a.cache.row_bytes(dim);
    const bool exact = a.cache.kind == KV_FP32;
    auto place = [&](int at) { return (((int64_t)blocks[at / size] * a.kv_heads + rows.kv_head) * size + at % size) * row_bytes; };
    // Visits runs of keys that lie together; each is told where one lies that is visited AHEAD runs later, in `behind` from
    // key `from` on when this group's have ended. Runs are pages apart, so the hardware does not see them coming. A run of a
    // cache that is not fp32 is widened before.
    auto spans = [&](const char* cache, const char* behind, int from, auto&& visit) {
        float* wide = exact ? nullptr : scratch(WIDENED, (size_t)GROUP * dim);
        for (int n = 0; n < keys;) {
            const int at = begin + n, count = least(keys - n, size - at % size), then = n + AHEAD * size;
            const int later = then < keys ? begin + then : from + then - (keys + size - 1) / size * size;
            const char *here = cache + place(at), *next = later < rows.kv_len ? (then < keys ? cache : behind) + place(later) : nullptr;
            if (exact) {
                visit(n, count, (const float*)here, (const float*)next);
            } else {
                fetch(next, count * row_bytes);
                widen(a.cache, here, count, dim, wide);
                visit(n, count, (const float*)wide, (const float*)nullptr);
            }
            n += count;
        }
    };
    float* turned = scratch(TURNED, (size_t)GROUP * dim);
    const bool at_once = row_count <= FEW_ROWS && size % RUN == 0, in_registers = row_count <= 4 && size == RUN && dim % 4 == 0;
    spans(a.cache.k, a.cache.v, begin, [&](int n, int count, const float* here, const float* next) {
        if (in_registers) {
            by_fours(row_count, [&]<int M>(int) { score_run<M>(rows.q, here, dim, rows.scores + n, next); });
            return;
        }
        turn(here, count, exact ? size - (begin + n) % size : GROUP, dim, turned + n);
        if (at_once)
            by_fours(row_count, [&]<int M>(int m) {
                score_keys<M, RUN / W>(rows.q + m * dim, turned + n, count, dim, rows.scores + m * GROUP + n, m ? nullptr : next);
            });
        else fetch(next, count * row_bytes);
    });
    if (!at_once)
        by_fours(row_count, [&]<int M>(int m) {
            score_keys<M, VECTORS>(rows.q + m * dim, turned, keys, dim, rows.scores + m * GROUP, nullptr);
        });
    for (int m = 0; m < row_count; m++) {
        float* scores = rows.scores + m * GROUP;
        if (a.softcap > 0) cap(scores, a.softcap);
        const int last = rows.position(m) - begin, first = a.window ? last - a.window + 1 : 0;
        for (int n = 0; n < first && n < GROUP; n++) scores[n] = -INFINITY;
        for (int n = last < 0 ? 0 : last + 1; n < GROUP; n++) scores[n] = -INFINITY;
        soften(scores, sums.top + m, sums.total + m, sums.acc + m * dim, dim);
    }
    spans(a.cache.v, a.cache.k, begin + GROUP, [&](int n, int count, const float* here, const float* next) {
        by_fours(row_count, [&]<int M>(int m) {
            weigh_values<M>(rows.scores + m * GROUP + n, here, count, dim, sums.acc + m * dim, m ? nullptr : next);
        });
    });
}

// A softmax over the keys from `begin` to the end of their piece.
void attend_piece(const Attention& a, const Rows& rows, int begin, Softmax sums) {
    sums.clear();
    const int end = least((begin / PIECE + 1) * PIECE, rows.end());
    for (; begin < end; begin += GROUP) attend_group(a, rows, begin, sums);
}

// The first key that any of the rows sees, or one of its group.
int first_key(const Attention& a, const Rows& rows) {
    const int first = a.window ? rows.first_position - a.window + 1 : 0;
    return first > 0 ? first / GROUP * GROUP : 0;
}

int pieces(const Attention& a, const Rows& rows) {
    return rows.count() == 0 ? 0 : (rows.end() - 1) / PIECE - first_key(a, rows) / PIECE + 1;
}

int piece_begin(const Attention& a, const Rows& rows, int piece) {
    const int first = first_key(a, rows);
    return piece ? (first / PIECE + piece) * PIECE : first;
}

// Rows of some queries of a request and one kv head, without their numbers.
Rows rows_of(const Attention& a, int request, int kv_head, int first, int last) {
    const int32_t* seq = a.seqs + request * 3;
    return {request, kv_head, first, last, a.heads / a.kv_heads, seq[2] - (seq[1] - first), seq[2], nullptr, nullptr};
}

void gather(const Attention& a, Rows& rows) {
    const int dim = a.head_dim, count = rows.count();
    rows.q = scratch(ATTENTION, (size_t)count * (dim + GROUP));
    rows.scores = rows.q + (int64_t)count * dim;
    for (int m = 0; m < count; m++) {
        const int head = rows.kv_head * rows.share + m % rows.share;
        const float* q = a.q + ((int64_t)(rows.first + m / rows.share) * a.heads + head) * dim;
        for (int d = 0; d < dim; d++) rows.q[m * dim + d] = q[d] * a.scaling;
    }
}

void write_out(const Attention& a, const Rows& rows, const Softmax& sums) {
    const int dim = a.head_dim;
    for (int m = 0; m < sums.count; m++) {
        const int head = rows.kv_head * rows.share + m % rows.share;
        float* out = a.out + ((int64_t)(rows.first + m / rows.share) * a.heads + head) * dim;
        const float total = a.sinks ? sums.total[m] + exp(set1(a.sinks[head] - sums.top[m]))[0] : sums.total[m];
        for (int d = 0; d < dim; d++) out[d] = sums.acc[m * dim + d] / total;
    }
}

void attend_rows(const Attention& a, Rows rows) {
    gather(a, rows);
    const int count = rows.count(), dim = a.head_dim;
    float* floats = scratch(SOFTMAX, 2 * Softmax::floats(count, dim));
    Softmax sums(floats, count, dim), next(floats + Softmax::floats(count, dim), count, dim);
    attend_piece(a, rows, piece_begin(a, rows, 0), sums);
    for (int i = 1; i < pieces(a, rows); i++) {
        attend_piece(a, rows, piece_begin(a, rows, i), next);
        sums.join(next);
    }
    write_out(a, rows, sums);
}

// Where tasks are few, pieces are tasks of their own: `most` of them for each request and kv head, [requests, kv_heads, most].
void attend_apart(const Attention& a, int most) {
    const int dim = a.head_dim;
    auto rows_at = [&](int i) {
        const int r = i / a.kv_heads;
        return rows_of(a, r, i % a.kv_heads, a.seqs[r * 3], a.seqs[r * 3 + 1]);
    };
    const int64_t part = Softmax::floats(TASK_ROWS, dim);
    float* parts = scratch(PIECES, part * a.requests * a.kv_heads * most);
    auto softmax = [&](int i, const Rows& rows, int piece) {
        return Softmax(parts + (i * most + piece) * part, rows.count(), dim);
    };
    parallel_for(a.requests * a.kv_heads * most, [&](int task) {
        const int i = task / most, piece = task % most;
        Rows rows = rows_at(i);
        if (piece >= pieces(a, rows)) return;
        gather(a, rows);
        attend_piece(a, rows, piece_begin(a, rows, piece), softmax(i, rows, piece));
    });
    for (int i = 0; i < a.requests * a.kv_heads; i++) {
        const Rows rows = rows_at(i);
        Softmax sums = softmax(i, rows, 0);
        for (int piece = 1; piece < pieces(a, rows); piece++) sums.join(softmax(i, rows, piece));
        write_out(a, rows, sums);
    }
}

}  // namespace

void attend(const Attention& a) {
    memset(a.out, 0, sizeof(float) * a.tokens * a.heads * a.head_dim);  // rows of no request
    const int share = a.heads / a.kv_heads, chunk = share < TASK_ROWS ? TASK_ROWS / share : 1;
    auto chunks = [&](int r) { return (a.seqs[r * 3 + 1] - a.seqs[r * 3] + chunk - 1) / chunk; };
    int tasks = 0, longest = 0, most = 0;
    for (int r = 0; r < a.requests; r++) {
        tasks += chunks(r) * a.kv_heads;
        longest = chunks(r) > longest ? chunks(r) : longest;
        const int here = chunks(r) ? pieces(a, rows_of(a, r, 0, a.seqs[r * 3], a.seqs[r * 3 + 1])) : 0;
        most = here > most ? here : most;
    }
    if (longest == 1 && most > 1 && share <= TASK_ROWS && tasks < 4 * pool_threads()) return attend_apart(a, most);
    parallel_for(tasks, [&](int task) {
        int r = 0;
        for (; task >= chunks(r) * a.kv_heads; r++) task -= chunks(r) * a.kv_heads;
        const int first = a.seqs[r * 3] + task / a.kv_heads * chunk;
        attend_rows(a, rows_of(a, r, task % a.kv_heads, first, least(first + chunk, a.seqs[r * 3 + 1])));
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
