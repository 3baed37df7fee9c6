#include "experts.h"

#include <vector>

#include "elementwise.h"
#include "export.h"
#include "int8.h"
#include "pool.h"

namespace {

int least(int a, int b) { return a < b ? a : b; }

struct Group {
    int expert, start, rows;
};

// to[i] = code[at[i]] * scale + offset
void decode_nested(const float* code, const uint8_t* at, int64_t count, float scale, float offset, float* to) {
    int64_t i = 0;
#if defined(__AVX512F__)
    __m512 parts[16];
    for (int n = 0; n < 16; n++) parts[n] = _mm512_loadu_ps(code + 16 * n);
    for (; i + 16 <= count; i += 16) {
        const __m512i index = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(at + i)));
        __m512 found[8];  // looked up by the lowest five bits, in each of the eight parts chosen from by the other bits
        for (int n = 0; n < 8; n++) found[n] = _mm512_permutex2var_ps(parts[2 * n], index, parts[2 * n + 1]);
        for (int bit = 5, left = 4; left; bit++, left /= 2) {
            const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(1 << bit));
            for (int n = 0; n < left; n++) found[n] = _mm512_mask_blend_ps(upper, found[2 * n], found[2 * n + 1]);
        }
        store(to + i, (vf)found[0] * set1(scale) + set1(offset));
    }
#endif
    for (; i < count; i++) to[i] = code[at[i]] * scale + offset;
}

// The weight of one expert, with scales valid for outputs [first, last).
Weight weight_of(const Experts& experts, int expert, int first, int last) {
    Weight w = experts.first;
    w.data = (const char*)w.data + expert * experts.bytes;
    if (w.int8) w.int8 = int8_group(w, (int64_t)expert * int8_groups(w));
    if (w.scales) w.scales += expert * experts.scales;
    if (!experts.absmax || w.int8) return w;
    const int64_t a_row = experts.scales / w.out, begin = first * a_row, end = last * a_row, size = experts.nested_blocksize;
    const uint8_t* absmax = experts.absmax + expert * experts.scales;
    const float* outer = experts.nested_absmax + expert * ((experts.scales + size - 1) / size);
    const float offset = experts.offset[expert];
    float* scales = scratch(SCALES, end - begin);
    for (int64_t i = begin, block = begin / size; i < end; block++) {  // by nested blocks, without a division per scale
        const int64_t stop = end < (block + 1) * size ? end : (block + 1) * size;
        decode_nested(experts.nested_code, absmax + i, stop - i, outer[block], offset, scales + i - begin);
        i = stop;
    }
    w.scales = scales - begin;
    return w;
}

// Adds the memory that products of these outputs of an expert read before their own prefetching: scales and a page of weights.
void prefetch_for_expert(const Experts& experts, int expert, int first, int last, PrefetchList& prefetch) {
    constexpr int64_t PAGE = 4096;
    if (experts.first.int8) {
        const int64_t before = (int64_t)expert * int8_groups(experts.first) + first / 16;
        const char* const from = (const char*)int8_group(experts.first, before);
        return prefetch.add(from, PAGE);
    }
    const int64_t a_row = experts.bytes / experts.first.out, size = a_row * (last - first);
    const int64_t scales = experts.scales / experts.first.out, at = expert * experts.scales + first * scales;
    prefetch.add((const char*)experts.first.data + expert * experts.bytes + first * a_row, size < PAGE ? size : PAGE);
    if (experts.absmax) prefetch.add(experts.absmax + at, (last - first) * scales);
    else if (experts.first.scales) prefetch.add(experts.first.scales + at, (last - first) * scales * (int64_t)sizeof(float));
}

}  // namespace

void grouped_linear(const Experts& experts, const float* x, const int64_t* counts, int count, int rows, float* y, bool gated) {
    const Weight* const first = &experts.first;
    std::vector<Group> groups;
    int start = 0;
    for (int expert = 0; expert < count; start += (int)counts[expert++])
        if (counts[expert]) groups.push_back({expert, start, (int)counts[expert]});
    const PackedRows packed = pack_rows(&first, 1, x, rows);
    const int out = first->out / (gated ? 2 : 1), in = (first->in + 63) / 64 * 64;
    const int share = least(outputs_per_task(out * (int)groups.size()), (out + 15) / 16 * 16);
    const int tiles = (out + share - 1) / share;
    float* const second = gated ? scratch(GATED, (size_t)rows * out) : nullptr;
    const int tasks = tiles * (int)groups.size();
    parallel_for(tasks, [&](int task) {
        const Group& group = groups[task / tiles];
        const int begin = task % tiles * share, end = least(begin + share, out);
        const PackedRows own = packed.from(group.start, in);
        float *to = y + (int64_t)group.start * out, *with = second + (int64_t)group.start * out;
        PrefetchList prefetch;
        if (task + 1 < tasks) {  // most likely this thread's next: experts are far apart, so nothing else prefetches it
            const int expert = groups[(task + 1) / tiles].expert, next = (task + 1) % tiles * share, stop = least(next + share, out);
            prefetch_for_expert(experts, expert, next, stop, prefetch);
            if (gated) prefetch_for_expert(experts, expert, out + next, out + stop, prefetch);
        }
        linear_tile(weight_of(experts, group.expert, begin, end), own, group.rows, begin, end, to, out, prefetch);
        if (!gated) return;
        linear_tile(weight_of(experts, group.expert, out + begin, out + end), own, group.rows, out + begin, out + end, with - out, out);
        for (int64_t m = 0; m < group.rows; m++) silu_mul(to + m * out + begin, with + m * out + begin, end - begin);
    });
}

EXPORT void lk_grouped_linear(const Experts* experts, const float* x, const int64_t* counts, int count, int rows, float* y) {
    grouped_linear(*experts, x, counts, count, rows, y, false);
}

// The int8 copies of all experts, side by side.
EXPORT void lk_int8_experts(const Experts* experts, int count, float unit, Int8Weights* to) {
    const int groups = (int)int8_groups(experts->first), out = experts->first.out;
    parallel_for(count * groups, [&](int task) {
        const int expert = task / groups, group = task % groups, first = group * 16;
        const Weight w = weight_of(*experts, expert, first, least(first + 16, out));
        int8_copy_group(w, group, unit, to + (int64_t)task * (w.in / 64));
    });
}
