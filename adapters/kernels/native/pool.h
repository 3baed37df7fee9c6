// A small persistent thread pool: workers spin for a moment after each job, then sleep.
//
// Work is a count of tasks. Each thread begins with a stretch of them, in order, so that it reads memory in long runs;
// whoever is through takes tasks from the ends of others' stretches, so a thread that the system has parked delays
// nobody. No result may depend on which thread ran a task, nor on how many threads there are.
#pragma once

#include <cstddef>

void pool_run(int tasks, void (*task)(void* context, int index), void* context);
int pool_threads();

// Scratch of the calling thread, alive until its next call with the same slot; contents are undefined.
enum ScratchSlot { PACKED_NATURAL, PACKED_INTERLEAVED, PACKED_INT8, SHRUNK, STEP, TILE, SUMS, ATTENTION, CERTAIN, AT_MOST, ROUNDED, SLOTS };
float* scratch(ScratchSlot slot, size_t floats);

namespace {

template <class F>
inline void parallel_for(int tasks, F&& body) {
    if (tasks == 1 || pool_threads() == 1) {
        for (int i = 0; i < tasks; i++) body(i);
        return;
    }
    pool_run(tasks, [](void* context, int index) { (*static_cast<F*>(context))(index); }, &body);
}

}  // namespace
