// A small persistent thread pool: workers spin for a moment after each job, then sleep.
//
// A job is a number of tasks. Each thread starts with a range of them, in order, so that it reads memory in long runs;
// threads that have finished take tasks from the ends of others' ranges, so a descheduled thread does not delay the job.
// Results must not depend on the thread of a task or on the number of threads.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

void pool_run(int tasks, void (*task)(void* context, int index), void* context);
int pool_threads();
int pool_rank();  // of the calling thread among the pool's

constexpr int LINE = 64;  // bytes of a cache line: data written by different threads must not share a line
constexpr int MAX_THREADS = 256;

// Tasks shared among threads.
class Shares {
  public:
    // Starts `count` new tasks. No thread may still be working on the previous ones.
    void distribute(int tasks);

    // Does tasks until none is left to take: those of the thread's own range from the front, then others' from the back.
    template <class F>
    void run_all(F&& task) {
        const int threads = sharers.load(std::memory_order_relaxed), rank = pool_rank();
        int completed = 0;
        for (int i = 0; i < threads; i++) {
            std::atomic<uint64_t>& left = ranges[(rank + i) % threads].left;
            uint64_t range = left.load(std::memory_order_acquire);
            for (;;) {
                const uint32_t first = range >> 32, last = (uint32_t)range;
                if (first >= last) break;
                if (!left.compare_exchange_weak(range, i ? range - 1 : range + (1ull << 32), std::memory_order_acq_rel)) continue;
                task(i ? last - 1 : first);
                completed++;
                range = left.load(std::memory_order_acquire);
            }
        }
        if (completed) done.fetch_add(completed, std::memory_order_release);
    }

    // Waits until all tasks are done.
    void await() const;

  private:
    struct alignas(LINE) TaskRange {
        std::atomic<uint64_t> left{0};  // the thread's remaining range: first << 32 | last
    };
    TaskRange ranges[MAX_THREADS];
    std::atomic<int> sharers{1};
    int tasks = 0;
    alignas(LINE) std::atomic<int> done{0};
};

// Scratch memory of the calling thread, valid until its next call with the same slot; contents are undefined.
enum ScratchSlot { PACKED_NATURAL, PACKED_INTERLEAVED, PACKED_INT8, SHRUNK, STEP, TILE, SUMS, ATTENTION, SOFTMAX, PIECES, WIDENED, TURNED, SCALES, LOWER_BOUNDS, UPPER_BOUNDS, ROUNDED, STATE, GATED, ROUTED, WEIGHTS, SLOTS };
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
