// Causal attention over a paged key/value cache.
#pragma once

#include <cstdint>

#include "ahead.h"

enum KvKind : int32_t { KV_FP32, KV_BF16, KV_FP16, KV_FP8, KV_INT8 };

struct KvCache {
    // Per block and kv head block_size * head_dim numbers: keys by columns [head_dim, block_size], since many of them are
    // multiplied by one number of a query; values by rows [block_size, head_dim]. Scales [block_size] follow int8 numbers.
    char *k, *v;
    int32_t block_size;
    KvKind kind;

    int64_t row_bytes(int head_dim) const {
        return kind == KV_FP32 ? 4 * head_dim : kind == KV_FP8 ? head_dim : kind == KV_INT8 ? head_dim + 4 : 2 * head_dim;
    }
};

// The arguments of attention, as in `paged_attention` of reference.py. Mirrored in native.py.
struct Attention {
    const float* q;   // [tokens, heads, head_dim]
    float* out;       // [tokens, heads, head_dim]
    const int32_t* seqs;          // [requests, 3]
    const int32_t* block_tables;  // [requests, max_blocks]
    int32_t tokens, heads, kv_heads, head_dim, requests, max_blocks;
    float scaling;
    int32_t window;
    float softcap;       // 0 for none
    const float* sinks;  // [heads] or null
    KvCache cache;
};

void attend(const Attention& a);

// Adds the memory that attention reads first, as much as the threads' caches can keep until then.
void prefetch_for_attention(const Attention& a, PrefetchList& prefetch);
void write_kv(const float* k, const float* v, const int64_t* slots, int tokens, int kv_heads, int head_dim, const KvCache& cache);
