// Prefetching of memory needed soon, little by little during computation.
//
// With few rows a step reads memory for about as long as it computes: weights keep the processor busy, adapters and the KV
// cache the memory. Prefetching these while weights are multiplied overlaps both.
#pragma once

#include <cstdint>

// Ranges of memory, in the order in which they will be read.
struct PrefetchList {
    static constexpr int CAPACITY = 512;
    static constexpr int64_t LINE = 64;

    struct {
        const char* from;
        int64_t bytes, stride;
        int32_t rows;
    } parts[CAPACITY];
    int count = 0;
    int64_t bytes = 0;

    // Adds `rows` ranges of `size` bytes, `stride` bytes apart.
    void add(const void* from, int64_t size, int32_t rows = 1, int64_t stride = 0) {
        if (rows == 1 && count && parts[count - 1].rows == 1 && parts[count - 1].from + parts[count - 1].bytes == from) {
            parts[count - 1].bytes += size, bytes += size;
            return;
        }
        if (count == CAPACITY) return;
        parts[count++] = {(const char*)from, size, stride, rows};
        bytes += size * rows;
    }

    // Adds part `share` of `shares` equal parts of another's ranges, which must be single ones.
    void add_share(const PrefetchList& all, int share, int shares) {
        int64_t begin = all.bytes * share / shares, end = all.bytes * (share + 1) / shares;
        for (int i = 0; i < all.count && end > 0; i++) {
            const int64_t size = all.parts[i].bytes, to = end < size ? end : size;
            if (begin < to) add(all.parts[i].from + begin, to - begin);
            begin = begin > size ? begin - size : 0, end -= size;
        }
    }
};

// Prefetches the ranges in proportion to the work done.
class Prefetcher {
  public:
    Prefetcher(const PrefetchList& list, int64_t work)
        : list(list), lines_per_work(list.count ? ((float)list.bytes / PrefetchList::LINE + list.count) / (float)work : 0) {}

    inline __attribute__((always_inline)) void advance(int amount) {
        for (due += lines_per_work * (float)amount; due >= 1 && part < list.count; due -= 1) next();
    }

  private:
    const PrefetchList& list;
    const float lines_per_work;
    float due = 0;
    int part = 0, row = 0;
    int64_t at = 0;

    void next() {
        const auto& here = list.parts[part];
        __builtin_prefetch(here.from + row * here.stride + at, 0, 2);
        if ((at += PrefetchList::LINE) < here.bytes) return;
        at = 0;
        if (++row == here.rows) row = 0, part++;
    }
};
