// A step through the decoder layers of a Llama-shaped model, from embedded tokens to the last norm, in one call.
//
// It calls the same kernels that are exported singly, so the numbers are the same; it saves the time between them.
#include <vector>

#include "attention.h"
#include "elementwise.h"
#include "experts.h"
#include "export.h"
#include "linear.h"
#include "lora.h"
#include "pool.h"
#include "tile.h"

enum { Q, K, V, O, GATE, UP, DOWN, SITES };

// Linears that share an input.
template <int N>
using Sites = int[N];
constexpr Sites<3> QKV{Q, K, V};
constexpr Sites<1> OUT{O}, DOWN_ALONE{DOWN}, ROUTER{GATE};
constexpr Sites<2> GATE_UP{GATE, UP};

// Mirrored by the structures of plan.py.
struct Mixture {
    Experts gate_up, down;
    int32_t experts, chosen;  // in total, per token
    int32_t normalised;       // whether the chosen experts' weights add up to 1
};

struct Layer {
    const float *input_norm, *post_norm;  // [hidden]
    const float *q_norm, *k_norm;         // [head_dim] or null
    Weight weights[SITES];
    const int16_t *a[SITES], *b[SITES];  // the adapters' pools, or null
    int32_t linear[SITES];               // each linear's row of the segment tables
    char *k_cache, *v_cache;
    const Mixture* mixture;  // in place of the MLP, with the router at GATE; or null
    int32_t window;
};

struct Decoder {
    const Layer* layers;
    const float* final_norm;
    int32_t count, hidden, heads, kv_heads, head_dim, block_size;
    KvKind kv_kind;
    float eps, scaling;
};

struct Step {
    float* hidden;                // [tokens, hidden], in: embeddings, out: normed hidden states
    const float *cos, *sin;       // [positions, rotary]
    const int64_t* positions;     // [tokens]
    const int64_t* slots;         // [tokens]
    const int32_t* seqs;          // [requests, 3]
    const int32_t* block_tables;  // [requests, max_blocks]
    const int32_t* tables;        // [linears, segments, 5]
    const float* scales;          // [linears, segments]
    int32_t tokens, rotary, requests, max_blocks, segments;
};

namespace {

constexpr int SHARE = 4;  // tokens per task, for work per token

template <class F>
INLINE void over_tokens(int tokens, F&& f) {
    parallel_for((tokens + SHARE - 1) / SHARE, [&](int task) {
        for (int t = task * SHARE; t < least((task + 1) * SHARE, tokens); t++) f(t);
    });
}

struct Run {
    const Decoder& d;
    const Step& s;
    int layer_index;

    const Layer& layer() const { return d.layers[layer_index]; }

    Adapters adapters(const Layer& l, int site) const {
        const Weight& w = l.weights[site];
        const int64_t at = (int64_t)l.linear[site] * s.segments;
        return {l.a[site], l.b[site], s.tables + at * 5, s.scales + at, l.a[site] ? s.segments : 0, w.in, w.out};
    }

    // Computes linears of one input x, with their adapters: ys[i] [tokens, out]. `after(first, last)` runs when outputs
    // first..last of every linear are done (which requires equal widths). Meanwhile `prefetch`, which the next linears read
    // first, is prefetched.
    template <int N, class After>
    void project(const Sites<N>& sites, const float* x, float* const (&ys)[N], After&& after, const PrefetchList& prefetch) const {
        const Weight* weights[N];
        Adapters adapted[N];
        const Adapters* linears[N];
        int width = 0;
        for (int i = 0; i < N; i++) {
            weights[i] = &layer().weights[sites[i]];
            adapted[i] = adapters(layer(), sites[i]);
            linears[i] = &adapted[i];
            width += weights[i]->out;
        }
        const PackedRows packed = pack_rows(weights, N, x, s.tokens);
        Deltas& deltas = deltas_of(linears, N, x);
        const int share = outputs_per_task(width);
        auto tile = [&](int i, int first, int last, int part, int parts) {
            PrefetchList reads;
            prefetch_for_expand(deltas, i, first, last, reads);
            reads.add_share(prefetch, part, parts);
            shrink(deltas);
            linear_tile(*weights[i], packed, s.tokens, first, last, ys[i], weights[i]->out, reads);
            expand_tile(deltas, i, first, last, ys[i], weights[i]->out);
        };
        constexpr bool TOGETHER = !std::is_same<After, std::nullptr_t>::value;
        if constexpr (TOGETHER) {
            const int out = weights[0]->out, tasks = (out + share - 1) / share;
            parallel_for(tasks, [&](int task) {
                const int first = task * share, last = least(first + share, out);
                for (int i = 0; i < N; i++) tile(i, first, last, task * N + i, tasks * N);
                after(first, last);
            });
        } else {
            int ends[N], tasks = 0;
            for (int i = 0; i < N; i++) ends[i] = tasks += (weights[i]->out + share - 1) / share;
            parallel_for(tasks, [&](int task) {
                int i = 0;
                while (task >= ends[i]) i++;
                const int first = (task - (i ? ends[i - 1] : 0)) * share;
                tile(i, first, least(first + share, weights[i]->out), task, tasks);
            });
        }
    }

    // The memory that these linears of layer `index`, if it exists, read first.
    template <int N>
    PrefetchList reads_of(int index, const Sites<N>& sites) const {
        PrefetchList found;
        for (int i = 0; i < N && index < d.count; i++) prefetch_for_shrink(adapters(d.layers[index], sites[i]), found);
        return found;
    }

    void attend_layer(const float* normed, float* q, float* k, float* v, float* attended, float* y) const {
        const Layer& l = layer();
        const int head_dim = d.head_dim;
        const Attention attention{q, attended, s.seqs, s.block_tables, s.tokens, d.heads, d.kv_heads, head_dim, s.requests,
                                  s.max_blocks, d.scaling, l.window, 0.f, nullptr, {l.k_cache, l.v_cache, d.block_size, d.kv_kind}};
        PrefetchList reads;
        prefetch_for_attention(attention, reads);
        prefetch_for_shrink(adapters(l, O), reads);
        project(QKV, normed, {q, k, v}, nullptr, reads);
        over_tokens(s.tokens, [&](int t) {
            float *queries = q + (int64_t)t * d.heads * head_dim, *keys = k + (int64_t)t * d.kv_heads * head_dim;
            for (int h = 0; l.q_norm && h < d.heads; h++) rms_norm(queries + h * head_dim, l.q_norm, d.eps, head_dim, queries + h * head_dim);
            for (int h = 0; l.k_norm && h < d.kv_heads; h++) rms_norm(keys + h * head_dim, l.k_norm, d.eps, head_dim, keys + h * head_dim);
            const float *cos = s.cos + s.positions[t] * s.rotary, *sin = s.sin + s.positions[t] * s.rotary;
            rope(queries, d.heads, head_dim, cos, sin, s.rotary);
            rope(keys, d.kv_heads, head_dim, cos, sin, s.rotary);
        });
        write_kv(k, v, s.slots, s.tokens, d.kv_heads, head_dim, attention.cache);
        attend(attention);
        project(OUT, attended, {y}, [&](int first, int last) { add(y, first, last); }, reads_of(layer_index, GATE_UP));
    }

    void mlp(const float* normed, float* gate, float* up, float* y) const {
        const int64_t width = layer().weights[GATE].out;
        auto activate = [&](int first, int last) {
            for (int64_t t = 0; t < s.tokens; t++) silu_mul(gate + t * width + first, up + t * width + first, last - first);
        };
        project(GATE_UP, normed, {gate, up}, activate, reads_of(layer_index, DOWN_ALONE));
        project(DOWN_ALONE, gate, {y}, [&](int first, int last) { add(y, first, last); }, reads_of(layer_index + 1, QKV));
    }

    // Chooses a token's experts, the likeliest first, and their weights. Overwrites the router's logits.
    static void route(const Mixture& m, float* logits, int* experts, float* weights) {
        float top = logits[0], total = 0.f, chosen = 0.f;
        for (int e = 1; e < m.experts; e++) top = logits[e] > top ? logits[e] : top;
        for (int e = 0; e < m.experts; e++) total += logits[e] = expf(logits[e] - top);
        for (int i = 0; i < m.chosen; i++) {
            int best = 0;
            for (int e = 1; e < m.experts; e++)
                if (logits[e] > logits[best]) best = e;
            experts[i] = best;
            chosen += weights[i] = logits[best] / total;
            logits[best] = -1.f;
        }
        for (int i = 0; m.normalised && i < m.chosen; i++) weights[i] /= chosen;
    }

    void mixture(const Mixture& m, const float* normed) const {
        const int tokens = s.tokens, rows = tokens * m.chosen, hidden = d.hidden, inner = m.down.first.in;
        float* const logits = scratch(ROUTED, (int64_t)tokens * m.experts + (int64_t)rows * (1 + 2 * hidden + inner));
        float *weights = logits + (int64_t)tokens * m.experts, *x = weights + rows, *gated = x + (int64_t)rows * hidden, *y = gated + (int64_t)rows * inner;
        project(ROUTER, normed, {logits}, nullptr, {});
        std::vector<int> experts(rows), places(rows);
        over_tokens(tokens, [&](int t) { route(m, logits + (int64_t)t * m.experts, &experts[t * m.chosen], weights + t * m.chosen); });
        std::vector<int64_t> counts(m.experts + 1), next(m.experts + 1);
        for (int expert : experts) counts[expert]++;
        for (int e = 0; e < m.experts; e++) next[e + 1] = next[e] + counts[e];
        for (int i = 0; i < rows; i++) places[i] = (int)next[experts[i]]++;
        over_tokens(tokens, [&](int t) {
            for (int i = t * m.chosen; i < (t + 1) * m.chosen; i++) memcpy(x + (int64_t)places[i] * hidden, normed + (int64_t)t * hidden, sizeof(float) * hidden);
        });
        grouped_linear(m.gate_up, x, counts.data(), m.experts, rows, gated, true);
        grouped_linear(m.down, gated, counts.data(), m.experts, rows, y, false);
        over_tokens(tokens, [&](int t) {  // in the router's order
            float* const to = s.hidden + (int64_t)t * hidden;
            const float* const weight = weights + t * m.chosen;
            const int* const place = &places[t * m.chosen];
            auto total = [&](int j, auto&& read) {
                vf sum = {};
                for (int i = 0; i < m.chosen; i++) sum += set1(weight[i]) * read(y + (int64_t)place[i] * hidden + j);
                return read(to + j) + sum;
            };
            int j = 0;
            for (; j + W <= hidden; j += W) store(to + j, total(j, [](const float* p) { return load(p); }));
            const int left = hidden - j;
            if (left) store_part(to + j, total(j, [&](const float* p) { return load_part(p, left); }), left);
        });
    }

    void norm(const float* weight, float* to) const {
        over_tokens(s.tokens, [&](int t) { rms_norm(s.hidden + (int64_t)t * d.hidden, weight, d.eps, d.hidden, to + (int64_t)t * d.hidden); });
    }

    void add(const float* y, int first, int last) const {  // the residual
        for (int64_t t = 0; t < s.tokens; t++)
            for (int i = first; i < last; i++) s.hidden[t * d.hidden + i] += y[t * d.hidden + i];
    }
};

}  // namespace

EXPORT void lk_decode(const Decoder* decoder, const Step* step) {
    const Decoder& d = *decoder;
    const int64_t tokens = step->tokens, wide = (int64_t)d.heads * d.head_dim, narrow = (int64_t)d.kv_heads * d.head_dim;
    int64_t inner = 0;
    for (int i = 0; i < d.count; i++)
        if (!d.layers[i].mixture && d.layers[i].weights[GATE].out > inner) inner = d.layers[i].weights[GATE].out;
    const int64_t attention = 2 * wide + 2 * narrow, mlp = 2 * inner;  // never used at the same time
    float* normed = scratch(STEP, tokens * (2 * d.hidden + (attention > mlp ? attention : mlp)));
    float *y = normed + tokens * d.hidden, *rest = y + tokens * d.hidden;
    Run run{d, *step, 0};
    for (; run.layer_index < d.count; run.layer_index++) {
        run.norm(run.layer().input_norm, normed);
        float *q = rest, *k = q + tokens * wide, *v = k + tokens * narrow, *attended = v + tokens * narrow;
        run.attend_layer(normed, q, k, v, attended, y);
        run.norm(run.layer().post_norm, normed);
        if (const Mixture* mixture = run.layer().mixture) run.mixture(*mixture, normed);
        else run.mlp(normed, rest, rest + tokens * inner, y);
    }
    run.norm(d.final_norm, step->hidden);
}

EXPORT void lk_rms_norm(const float* x, const float* weight, float eps, int rows, int n, float* y) {
    over_tokens(rows, [=](int t) { rms_norm(x + (int64_t)t * n, weight, eps, n, y + (int64_t)t * n); });
}

EXPORT void lk_silu_mul(const float* gate, const float* up, int64_t n, float* y) {
    memcpy(y, gate, sizeof(float) * n);
    silu_mul(y, up, n);
}

EXPORT void lk_rope(float* q, float* k, const float* cos, const float* sin, int tokens, int heads, int kv_heads, int head_dim, int rotary) {
    over_tokens(tokens, [=](int t) {
        rope(q + (int64_t)t * heads * head_dim, heads, head_dim, cos + (int64_t)t * rotary, sin + (int64_t)t * rotary, rotary);
        rope(k + (int64_t)t * kv_heads * head_dim, kv_heads, head_dim, cos + (int64_t)t * rotary, sin + (int64_t)t * rotary, rotary);
    });
}
