// Causal attention over a paged key/value cache.
#pragma once

#include <cstdint>

#include "ahead.h"

struct KvCache {
    float *k, *v;  // [blocks, kv_heads, block_size, head_dim]
    int32_t block_size;
};

// What a step asks of attention; `paged_attention` in reference.py says what each means. Mirrored in native.py.
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

// Adds what attending will read first, as much as caches nearby are sure to keep until then.
void attend_ahead(const Attention& a, Ahead& ahead);
void write_kv(const float* k, const float* v, const int64_t* slots, int tokens, int kv_heads, int head_dim, const KvCache& cache);
