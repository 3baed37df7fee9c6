// y = x @ W.T where each row has the weight of its expert: rows sorted by expert, tiles of all experts shared out at once.
//
// A tile is `linear_tile`'s, so a row's bits are those that its expert's weight would give it as a linear.
#include <vector>

#include "export.h"
#include "linear.h"
#include "pool.h"

namespace {

int least(int a, int b) { return a < b ? a : b; }

// Mirrored by ExpertsStruct in native.py.
struct Experts {
    Weight first;                // the first expert's; doubly quantised scales are null there
    int64_t bytes;               // of an expert's data
    int64_t scales;              // of an expert
    const uint8_t* absmax;       // [experts, scales], doubly quantised; else null
    const float* nested_absmax;  // [experts, scales / nested_blocksize, rounded up]
    const float* nested_code;    // [256]
    const float* offset;         // [experts]
    int64_t nested_blocksize;
};

struct Group {
    int expert, start, rows;
};

// The weight of one expert, whose scales are good for outputs [first, last).
Weight weight_of(const Experts& experts, int expert, int first, int last) {
    Weight w = experts.first;
    w.data = (const char*)w.data + expert * experts.bytes;
    if (w.scales) w.scales += expert * experts.scales;
    if (!experts.absmax) return w;
    const int64_t a_row = experts.scales / w.out, begin = first * a_row, end = last * a_row;
    const int64_t nested = (experts.scales + experts.nested_blocksize - 1) / experts.nested_blocksize;
    const uint8_t* absmax = experts.absmax + expert * experts.scales;
    const float* outer = experts.nested_absmax + expert * nested;
    const float offset = experts.offset[expert];
    float* scales = scratch(SCALES, end - begin);
    for (int64_t i = begin; i < end; i++)
        scales[i - begin] = experts.nested_code[absmax[i]] * outer[i / experts.nested_blocksize] + offset;
    w.scales = scales - begin;
    return w;
}

}  // namespace

EXPORT void lk_grouped_linear(const Experts* experts, const float* x, const int64_t* counts, int count, int rows, float* y) {
    const Weight* const first = &experts->first;
    std::vector<Group> groups;
    int start = 0;
    for (int expert = 0; expert < count; start += (int)counts[expert++])
        if (counts[expert]) groups.push_back({expert, start, (int)counts[expert]});
    const PackedRows packed = pack_rows(&first, 1, x, rows);
    const int out = first->out, in = (first->in + 63) / 64 * 64;
    const int share = least(outputs_per_task(out * (int)groups.size()), (out + 15) / 16 * 16);
    const int tiles = (out + share - 1) / share;
    parallel_for(tiles * (int)groups.size(), [&](int task) {
        const Group& group = groups[task / tiles];
        const int begin = task % tiles * share, end = least(begin + share, out);
        const Weight w = weight_of(*experts, group.expert, begin, end);
        linear_tile(w, packed.from(group.start, in), group.rows, begin, end, y + (int64_t)group.start * out, out);
    });
}
