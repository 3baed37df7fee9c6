#include "attention.h"

#include <initializer_list>
#include <type_traits>

#include "export.h"
#include "pool.h"
#include "tile.h"

namespace {

constexpr int GROUP = 64;      // keys are reduced in groups of this many, aligned to the sequence's start
constexpr int PIECE = 512;     // keys, aligned likewise: each piece has its own softmax, and pieces are joined in order
constexpr int TASK_ROWS = 96;  // about the number of (query, head) rows that share a task's keys
constexpr int64_t NEAR = 1 << 20;  // bytes of a thread's own cache

constexpr int AHEAD = 2;       // distance in blocks from the one being processed to the one prefetched
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
    int end() const { return position(count() - 1) + 1; }  // end of the keys seen by any row
};

struct Softmax {  // over some of the keys, for `count` rows
    int count, dim;
    float *acc, *top, *total;  // [count, dim], [count], [count]

    static int64_t floats(int count, int dim) { return (int64_t)count * (dim + 2); }

    Softmax(float* at, int count, int dim) : count(count), dim(dim), acc(at), top(at + (int64_t)count * dim), total(top + count) {}

    void clear() {
        memset(acc, 0, sizeof(float) * floats(count, dim));
        for (int m = 0; m < count; m++) top[m] = -INFINITY;
    }

    // Joins the softmax over the following keys. A row that sees none of them keeps its bits.
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

// Prefetches a line, into the second-level cache, since that allows more lines in flight.
INLINE void fetch_line(const void* at) { __builtin_prefetch(at, 0, 2); }

// Prefetches `bytes` bytes; nothing for null.
INLINE void fetch(const void* at, int64_t bytes) {
    for (int64_t i = 0; at && i < bytes; i += LINE) fetch_line((const char*)at + i);
}

constexpr int VECTORS = W == 16 ? 4 : 2;  // of each row's sums, as registers allow
constexpr int FEW_ROWS = 16;              // up to this many rows read keys and values in place
constexpr int RUN = 16;                   // keys of a block that can be scored in place
constexpr int BLOCKS = W < RUN ? 1 : 2;   // blocks scored at once, so that sums do not wait for themselves
static_assert(GROUP % (VECTORS * W) == 0 && RUN % W == 0);

template <class Number>
constexpr bool SCALED = std::is_same<Number, int8_t>::value;

// Multiplies `numbers` by their scales, if the cache has scales.
template <class Number>
INLINE vf scaled(vf numbers, const float* scales) {
    if constexpr (SCALED<Number>) return numbers * load(scales);
    return numbers;
}

// Widens some keys of a block to fp32, without scales: to[d * GROUP + n], in whole vectors if the block has enough keys.
template <class Number>
void widen_columns(const Number* keys, int count, int room, int size, int dim, float* to) {
    for (int n = 0; n < count; n += W) {
        const int lanes = least(W, room - n);
        for (int d = 0; d < dim; d++) {
            const Number* from = keys + (int64_t)d * size + n;
            if (lanes == W) store(to + d * GROUP + n, load(from));
            else store_part(to + d * GROUP + n, load_part(from, lanes), lanes);
        }
    }
}

// Scores of M rows with fp32 keys by columns; the unused lanes of the last vector are undefined.
template <int M, class Number>
INLINE void score_keys(const float* q, const float* columns, const float* scales, int keys, int dim, float* scores) {
    constexpr int V = VECTORS;
    for (int n = 0; n < keys; n += V * W) {
        vf sums[M][V] = {};
        weigh(sums, q, dim, columns + n, GROUP, dim);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < V; v++) store(scores + m * GROUP + n + v * W, scaled<Number>(sums[m][v], scales + n + v * W));
    }
}

// The same scores with B blocks of RUN keys in place in the cache. Prefetches the blocks at `next`.
template <int M, int B, class Number>
INLINE void score_blocks(const float* q, const char* const* blocks, int dim, float* scores, const char* const* next) {
    constexpr int V = RUN / W < VECTORS ? RUN / W : VECTORS;
    constexpr int SHARE = RUN * sizeof(Number) < LINE ? LINE / (RUN * sizeof(Number)) : 1;  // columns per line
    for (int n = 0; n < RUN; n += V * W) {
        vf sums[M][B * V] = {}, column[B * V];
        auto multiply = [&](int d) {
            for (int v = 0; v < B * V; v++) column[v] = load((const Number*)blocks[v / V] + d * RUN + n + v % V * W);
            for (int m = 0; m < M; m++)
                for (int v = 0; v < B * V; v++) sums[m][v] = fma(set1(q[m * dim + d]), column[v], sums[m][v]);
        };
        int d = 0;
        for (; d + SHARE <= dim; d += SHARE) {
            for (int b = 0; b < B && !n; b++)
                if (next[b]) fetch_line(next[b] + d * RUN * sizeof(Number));
            for (int i = 0; i < SHARE; i++) multiply(d + i);
        }
        for (; d < dim; d++) multiply(d);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < B * V; v++) {
                const float* scales = (const float*)((const Number*)blocks[v / V] + RUN * dim) + n + v % V * W;
                store(scores + m * GROUP + v / V * RUN + n + v % V * W, scaled<Number>(sums[m][v], scales));
            }
    }
}

struct Values {  // rows of a cache, or widened copies
    const char* rows;
    int64_t row_bytes;
    int count, dim;
    const char* next;  // rows to prefetch, or null
};

// acc[m, d ...] += weights[m, n] * values[n, d ...], for V vectors or some lanes.
template <int M, int V, class Number>
INLINE void weigh_some(const float* weights, const Values& values, int d, int lanes, float* acc) {
    constexpr int WIDTH = V * W * (int)sizeof(Number), LINES = WIDTH > LINE ? WIDTH / LINE : 1;  // of each value's part
    const bool part = lanes < W;
    const int dim = values.dim;
    vf sums[M][V], value[V];
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++) sums[m][v] = part ? load_part(acc + m * dim + d, lanes) : load(acc + m * dim + d + v * W);
    for (int n = 0; n < values.count; n++) {
        const Number* row = (const Number*)(values.rows + n * values.row_bytes);
        for (int line = 0; values.next && line < LINES; line++)
            fetch_line(values.next + n * values.row_bytes + d * sizeof(Number) + line * LINE);
        for (int v = 0; v < V; v++) value[v] = part ? load_part(row + d, lanes) : load(row + d + v * W);
        for (int m = 0; m < M; m++) {
            const vf weight = set1(weights[m * GROUP + n]);
            for (int v = 0; v < V; v++) sums[m][v] = fma(weight, value[v], sums[m][v]);
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < V; v++)
            part ? store_part(acc + m * dim + d, sums[m][v], lanes) : store(acc + m * dim + d + v * W, sums[m][v]);
}

template <int M, class Number>
INLINE void weigh_values(const float* weights, const Values& values, float* acc) {
    constexpr int V = VECTORS;
    int d = 0;
    for (; d + V * W <= values.dim; d += V * W) weigh_some<M, V, Number>(weights, values, d, W, acc);
    for (; d + W <= values.dim; d += W) weigh_some<M, 1, Number>(weights, values, d, W, acc);
    if (d < values.dim) weigh_some<M, 1, Number>(weights, values, d, values.dim - d, acc);
}

// Replaces each score s by limit * tanh(s / limit).
void cap(float* scores, float limit) {
    const vf one = set1(1.f), two = set1(2.f), factor = set1(2.f / limit), most = set1(limit);
    for (int i = 0; i < GROUP; i += W) store(scores + i, most * (one - two / (exp(load(scores + i) * factor) + one)));
}

// Turns a row's scores into weights, times the values' scales, and updates its running maximum, total and sum.
template <class Number>
INLINE void softmax_step(float* scores, const float* scales, float* top_score, float* total, float* acc, int dim) {
    vf highest = load(scores);
    for (int i = W; i < GROUP; i += W) highest = max(highest, load(scores + i));
    float group_top = top(highest), old_top = *top_score;
    float new_top = group_top > old_top ? group_top : old_top;
    vf shift = set1(new_top == -INFINITY ? 0.f : new_top), sums = {};
    for (int i = 0; i < GROUP; i += W) {
        vf p = exp_below(load(scores + i) - shift);
        store(scores + i, scaled<Number>(p, scales + i));
        sums += p;
    }
    if (new_top == old_top) {  // the decay is 1
        *total += sum(sums);
        return;
    }
    vf decay = exp(set1(old_top) - shift);
    *total = *total * decay[0] + sum(sums);
    *top_score = new_top;
    int d = 0;
    for (; d + W <= dim; d += W) store(acc + d, load(acc + d) * decay);
    for (; d < dim; d++) acc[d] *= decay[0];
}

// Widens rows of a cache to fp32, without their scales.
template <class Number>
void widen_rows(const Values& from, float* to) {
    const int dim = from.dim;
    for (int n = 0; n < from.count; n++, to += dim) {
        const Number* row = (const Number*)(from.rows + n * from.row_bytes);
        int d = 0;
        for (; d + W <= dim; d += W) store(to + d, load(row + d));
        if (d < dim) store_part(to + d, load_part(row + d, dim - d), dim - d);
    }
}

template <class Number>
void attend_group(const Attention& a, const Rows& rows, int begin, const Softmax& sums) {
    const int dim = a.head_dim, size = a.cache.block_size, row_count = rows.count();
    const int32_t* blocks = a.block_tables + (int64_t)rows.request * a.max_blocks;
    const int keys = least(GROUP, rows.kv_len - begin);  // later slots hold stale numbers and are never read
    const int64_t row_bytes = dim * sizeof(Number), block_bytes = size * a.cache.row_bytes(dim);
    auto block = [&](const char* cache, int at) { return cache + ((int64_t)blocks[at / size] * a.kv_heads + rows.kv_head) * block_bytes; };
    // Visits the blocks, or parts of them, each with the address of the block AHEAD later, which is in `behind` from key
    // `from` on after this group's blocks. Blocks are pages apart, so the hardware does not prefetch them.
    auto spans = [&](const char* cache, const char* behind, int from, auto&& visit) {
        for (int n = 0; n < keys;) {
            const int at = begin + n, count = least(keys - n, size - at % size), then = n + AHEAD * size;
            const int later = then < keys ? begin + then : from + then - (keys + size - 1) / size * size;
            const char* next = size == RUN && later < rows.kv_len ? block(then < keys ? cache : behind, later) : nullptr;
            if (SCALED<Number> && next) fetch_line(next + size * row_bytes);
            visit(n, count, at % size, block(cache, at), next);
            n += count;
        }
    };
    float scales[GROUP];  // of keys until they are scored, then of values; lanes without a scale are masked or have no value
    auto collect = [&](int n, int count, int first, const char* block, const char*) {
        memcpy(scales + n, block + size * row_bytes + first * sizeof(float), count * sizeof(float));
    };
    if (row_count <= FEW_ROWS && size == RUN) {
        const char *here[BLOCKS], *soon[BLOCKS];
        int waiting = 0;
        auto score = [&]<int B>(int first_key) {
            in_fours(row_count, [&]<int M>(int m) {
                score_blocks<M, B, Number>(rows.q + m * dim, here, dim, rows.scores + m * GROUP + first_key, soon);
                for (const char*& next : soon) next = nullptr;
            });
            waiting = 0;
        };
        spans(a.cache.k, a.cache.v, begin, [&](int n, int, int, const char* at, const char* next) {
            here[waiting] = at, soon[waiting++] = next;
            if (waiting == BLOCKS) score.template operator()<BLOCKS>(n - (BLOCKS - 1) * RUN);
            else if (n + RUN >= keys) score.template operator()<1>(n);
        });
    } else {
        float* columns = scratch(TURNED, (size_t)GROUP * dim);
        spans(a.cache.k, a.cache.v, begin, [&](int n, int count, int first, const char* here, const char* next) {
            widen_columns((const Number*)here + first, count, size - first, size, dim, columns + n);
            if (SCALED<Number>) collect(n, count, first, here, next);
            fetch(next, count * row_bytes);
        });
        in_fours(row_count, [&]<int M>(int m) {
            score_keys<M, Number>(rows.q + m * dim, columns, scales, keys, dim, rows.scores + m * GROUP);
        });
    }
    if (SCALED<Number>) spans(a.cache.v, a.cache.v, rows.kv_len, collect);
    for (int m = 0; m < row_count; m++) {
        float* scores = rows.scores + m * GROUP;
        if (a.softcap > 0) cap(scores, a.softcap);
        const int last = rows.position(m) - begin, first = a.window ? last - a.window + 1 : 0;
        for (int n = 0; n < first && n < GROUP; n++) scores[n] = -INFINITY;
        for (int n = last < 0 ? 0 : last + 1; n < GROUP; n++) scores[n] = -INFINITY;
        softmax_step<Number>(scores, scales, sums.top + m, sums.total + m, sums.acc + m * dim, dim);
    }
    float* wide = scratch(WIDENED, (size_t)GROUP * dim);
    const bool as_they_lie = std::is_same<Number, float>::value || row_count <= FEW_ROWS;
    spans(a.cache.v, a.cache.k, begin + GROUP, [&](int n, int count, int first, const char* here, const char* next) {
        Values values{here + first * row_bytes, row_bytes, count, dim, next};
        if (!as_they_lie) {
            fetch(next, count * row_bytes);
            widen_rows<Number>(values, wide);
            values = {(const char*)wide, dim * (int64_t)sizeof(float), count, dim, nullptr};
        }
        in_fours(row_count, [&]<int M>(int m) {
            const float* weights = rows.scores + m * GROUP + n;
            if (as_they_lie) weigh_values<M, Number>(weights, values, sums.acc + m * dim);
            else weigh_values<M, float>(weights, values, sums.acc + m * dim);
            values.next = nullptr;
        });
    });
}

// Computes a softmax over the keys from `begin` to the end of their piece.
template <class Number>
void attend_keys(const Attention& a, const Rows& rows, int begin, const Softmax& sums) {
    const int end = least((begin / PIECE + 1) * PIECE, rows.end());
    for (; begin < end; begin += GROUP) attend_group<Number>(a, rows, begin, sums);
}

void attend_piece(const Attention& a, const Rows& rows, int begin, Softmax sums) {
    sums.clear();
    switch (a.cache.kind) {
        case KV_BF16: return attend_keys<bf16>(a, rows, begin, sums);
        case KV_FP16: return attend_keys<fp16>(a, rows, begin, sums);
        case KV_FP8: return attend_keys<fp8>(a, rows, begin, sums);
        case KV_INT8: return attend_keys<int8_t>(a, rows, begin, sums);
        default: return attend_keys<float>(a, rows, begin, sums);
    }
}

// The first key of the first group seen by any of the rows.
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

// The rows of some queries of a request and one kv head, without their q and scores.
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

// For few tasks, each piece is a task of its own: `most` for each request and kv head, [requests, kv_heads, most].
void attend_split(const Attention& a, int most) {
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
    if (longest == 1 && most > 1 && share <= TASK_ROWS && tasks < 4 * pool_threads()) return attend_split(a, most);
    parallel_for(tasks, [&](int task) {
        int r = 0;
        for (; task >= chunks(r) * a.kv_heads; r++) task -= chunks(r) * a.kv_heads;
        const int first = a.seqs[r * 3] + task / a.kv_heads * chunk;
        attend_rows(a, rows_of(a, r, task % a.kv_heads, first, least(first + chunk, a.seqs[r * 3 + 1])));
    });
}

void prefetch_for_attention(const Attention& a, PrefetchList& prefetch) {
    const int size = a.cache.block_size;
    const int64_t block = a.kv_heads * size * a.cache.row_bytes(a.head_dim);  // bytes: a block's keys of all heads are adjacent
    const int most = a.requests ? (int)(NEAR * pool_threads() / a.requests / (2 * block)) : 0;
    for (int r = 0; r < a.requests; r++) {
        const int32_t *seq = a.seqs + r * 3, *blocks = a.block_tables + (int64_t)r * a.max_blocks;
        const int first_key = a.window ? seq[2] - (seq[1] - seq[0]) - a.window + 1 : 0;
        const int first = first_key > 0 ? first_key / size : 0, last = least((seq[2] + size - 1) / size, first + most);
        for (const char* cache : {a.cache.k, a.cache.v})
            for (int b = first; b < last; b++) prefetch.add(cache + blocks[b] * block, block);
    }
}

template <class Number>
INLINE Number rounded(float f) {
    if constexpr (std::is_same<Number, bf16>::value) return rounded_bf16(f);
    else if constexpr (std::is_same<Number, fp16>::value) return rounded_fp16(f);
    else if constexpr (std::is_same<Number, fp8>::value) return rounded_fp8(f);
    else return f;
}

// Stores a row in a cache, its numbers `stride` apart and the scale at `scale_at`, rounded as in `cache_rows` of reference.py.
template <class Number>
void narrow(const float* from, int dim, Number* to, int64_t stride, float* scale_at) {
    if constexpr (SCALED<Number>) {
        float top = 0;
        for (int d = 0; d < dim; d++) {
            const float size = fabsf(from[d]);
            if (size > top || size != size) top = size;  // NaN stays
        }
        const float scale = top / 127.f;
        for (int d = 0; d < dim; d++) {
            const float code = scale > 0 && scale < INFINITY ? nearbyintf(from[d] / scale) : 0.f;
            to[d * stride] = (int8_t)code;
        }
        memcpy(scale_at, &scale, sizeof scale);
    } else {
        for (int d = 0; d < dim; d++) to[d * stride] = rounded<Number>(from[d]);
    }
}

template <class Number>
void write_rows(const float* k, const float* v, const int64_t* slots, int tokens, int kv_heads, int dim, const KvCache& cache) {
    const int64_t size = cache.block_size, bytes = cache.row_bytes(dim);
    for (int t = 0; t < tokens; t++) {
        const int64_t block = slots[t] / size, offset = slots[t] % size;
        for (int h = 0; h < kv_heads; h++, k += dim, v += dim) {
            const int64_t at = (block * kv_heads + h) * size * bytes;
            Number *keys = (Number*)(cache.k + at), *values = (Number*)(cache.v + at);
            narrow(k, dim, keys + offset, size, (float*)(keys + size * dim) + offset);
            narrow(v, dim, values + offset * dim, 1, (float*)(values + size * dim) + offset);
        }
    }
}

void write_kv(const float* k, const float* v, const int64_t* slots, int tokens, int kv_heads, int head_dim, const KvCache& cache) {
    auto write = [&]<class Number>(Number) { write_rows<Number>(k, v, slots, tokens, kv_heads, head_dim, cache); };
    switch (cache.kind) {
        case KV_BF16: return write(bf16{});
        case KV_FP16: return write(fp16{});
        case KV_FP8: return write(fp8{});
        case KV_INT8: return write(int8_t{});
        default: return write(float{});
    }
}

EXPORT void lk_attention(const Attention* a) { attend(*a); }

EXPORT void lk_write_kv(const float* k, const float* v, const int64_t* slots, int tokens, int kv_heads, int head_dim,
                            const KvCache* cache) {
    write_kv(k, v, slots, tokens, kv_heads, head_dim, *cache);
}
