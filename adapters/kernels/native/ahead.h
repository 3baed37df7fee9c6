// Memory that is wanted soon, asked for while the processor has something else to do.
//
// With few rows a step is a chain of short bursts of reading, each of which would begin by waiting for memory.
#pragma once

#include <cstddef>
#include <cstdint>

namespace {

constexpr int64_t LINE = 64;

inline void fetch(const void* from, int64_t bytes) {
    const char* p = (const char*)((uintptr_t)from & ~(uintptr_t)(LINE - 1));
    for (const char* end = (const char*)from + bytes; p < end; p += LINE) __builtin_prefetch(p, 0, 2);
}

}  // namespace

// Stretches of memory, one after another, that threads will read in shares.
struct Ahead {
    static constexpr int MOST = 32;
    static constexpr int64_t ENOUGH = 256 << 10;  // a good part of a core's cache

    struct {
        const char* from;
        int64_t bytes;
    } parts[MOST];
    int count = 0;
    int64_t bytes = 0;

    void add(const void* from, int64_t size) {
        if (count == MOST || bytes + size > ENOUGH) return;
        parts[count++] = {(const char*)from, size};
        bytes += size;
    }

    // The share'th of so many equal shares.
    void fetch_share(int share, int shares) const {
        int64_t begin = bytes * share / shares, end = bytes * (share + 1) / shares;
        for (int i = 0; i < count && end > 0; i++) {
            const int64_t size = parts[i].bytes, to = end < size ? end : size;
            if (begin < to) fetch(parts[i].from + begin, to - begin);
            begin = begin > size ? begin - size : 0, end -= size;
        }
    }
};
