#include "experts.h"

#include <vector>

#include "elementwise.h"
#include "export.h"
#include "pool.h"

namespace {

int least(int a, int b) { return a < b ? a : b; }

struct Group {
    int expert, start, rows;
};

// The weight of one expert, whose scales are good for outputs [first, last).
Weight weight_of(const Experts& experts, int expert, int first, int last) {
    Weight w = experts.first;
    w.data = (const char*)w.data + expert * experts.bytes;
    if (w.scales) w.scales += expert * experts.scales;
    if (!experts.absmax) return w;
    const int64_t a_row = experts.scales / w.out, begin = first * a_row, end = last * a_row, size = experts.nested_blocksize;
    const uint8_t* absmax = experts.absmax + expert * experts.scales;
    const float* outer = experts.nested_absmax + expert * ((experts.scales + size - 1) / size);
    const float offset = experts.offset[expert];
    float* scales = scratch(SCALES, end - begin);
    for (int64_t i = begin, block = begin / size; i < end; block++) {  // no division for each of them
        const float scale = outer[block];
        for (const int64_t stop = end < (block + 1) * size ? end : (block + 1) * size; i < stop; i++)
            scales[i - begin] = experts.nested_code[absmax[i]] * scale + offset;
    }
    w.scales = scales - begin;
    return w;
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
    parallel_for(tiles * (int)groups.size(), [&](int task) {
        const Group& group = groups[task / tiles];
        const int begin = task % tiles * share, end = least(begin + share, out);
        const PackedRows own = packed.from(group.start, in);
        float *to = y + (int64_t)group.start * out, *with = second + (int64_t)group.start * out;
        linear_tile(weight_of(experts, group.expert, begin, end), own, group.rows, begin, end, to, out);
        if (!gated) return;
        linear_tile(weight_of(experts, group.expert, out + begin, out + end), own, group.rows, out + begin, out + end, with - out, out);
        for (int64_t m = 0; m < group.rows; m++) silu_mul(to + m * out + begin, with + m * out + begin, end - begin);
    });
}

EXPORT void lk_grouped_linear(const Experts* experts, const float* x, const int64_t* counts, int count, int rows, float* y) {
    grouped_linear(*experts, x, counts, count, rows, y, false);
}
