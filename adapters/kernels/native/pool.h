// A small persistent thread pool: workers spin for a moment after each job, then sleep.
//
// Work is a count of tasks. Each thread begins with a stretch of them, in order, so that it reads memory in long runs;
// whoever is through takes tasks from the ends of others' stretches, so a thread that the system has parked delays
// nobody. No result may depend on which thread ran a task, nor on how many threads there are.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>

void pool_run(int tasks, void (*task)(void* context, int index), void* context);
int pool_threads();
int pool_rank();  // of the calling thread among the pool's

constexpr int LINE = 64;  // bytes of a cache line: threads wait for lines, so what one writes has lines of its own
constexpr int MAX_THREADS = 256;

// Tasks that threads share out among themselves.
class Shares {
  public:
    // So many anew, when nobody is at the last ones any more.
    void deal(int tasks);

    // Does tasks until none is left to take: those of the thread's own stretch from the front, then others' from the back.
    template <class F>
    void take_all(F&& task) {
        const int among = sharers.load(std::memory_order_relaxed), rank = pool_rank();
        int did = 0;
        for (int i = 0; i < among; i++) {
            std::atomic<uint64_t>& left = stretches[(rank + i) % among].left;
            uint64_t range = left.load(std::memory_order_acquire);
            for (;;) {
                const uint32_t first = range >> 32, last = (uint32_t)range;
                if (first >= last) break;
                if (!left.compare_exchange_weak(range, i ? range - 1 : range + (1ull << 32), std::memory_order_acq_rel)) continue;
                task(i ? last - 1 : first);
                did++;
                range = left.load(std::memory_order_acquire);
            }
        }
        if (did) done.fetch_add(did, std::memory_order_release);
    }

    // Waits for those who are still at tasks that they took.
    void await() const;

  private:
    struct alignas(LINE) Stretch {
        std::atomic<uint64_t> left{0};  // what a thread has to itself until it is through: first << 32 | last
    };
    Stretch stretches[MAX_THREADS];
    std::atomic<int> sharers{1};
    int tasks = 0;
    alignas(LINE) std::atomic<int> done{0};
};

// Scratch of the calling thread, alive until its next call with the same slot; contents are undefined.
enum ScratchSlot { PACKED_NATURAL, PACKED_INTERLEAVED, PACKED_INT8, SHRUNK, STEP, TILE, SUMS, ATTENTION, SOFTMAX, PIECES, WIDENED, TURNED, SCALES, CERTAIN, AT_MOST, ROUNDED, STATE, GATED, ROUTED, WEIGHTS, SLOTS };
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
