#include "pool.h"

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>

#include "export.h"

namespace {

struct Job {
    void (*task)(void*, int) = nullptr;
    void* context = nullptr;
    int tasks = 0;
};

constexpr int SPINS = 4000;  // some 100 us: longer than the gaps inside a step, shorter than those between steps

Job job;
std::atomic<uint64_t> ticket{0};  // job number << 32 | tasks not yet taken
std::atomic<int> finished{0};
std::atomic<int> sleepers{0};
std::atomic_flag busy = ATOMIC_FLAG_INIT;  // held by the caller whose job runs
std::atomic<int> thread_count{1};
int spawned = 0;  // workers ever started; guarded by `busy`

// Never destroyed: workers may still sleep on it when the process exits.
struct Bed {
    std::mutex mutex;
    std::condition_variable wake;
};
Bed& bed = *new Bed;

inline void breathe() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// Takes one task if any is left. `job` may be read after taking: it cannot change before the task is done.
bool take_one() {
    uint64_t t = ticket.load(std::memory_order_acquire);
    while ((uint32_t)t != 0) {
        if (ticket.compare_exchange_weak(t, t - 1, std::memory_order_acq_rel)) {
            job.task(job.context, job.tasks - (int)(uint32_t)t);
            finished.fetch_add(1, std::memory_order_release);
            return true;
        }
    }
    return false;
}

void work(int rank) {
    for (;;) {
        bool active = rank < thread_count.load(std::memory_order_relaxed);
        for (int idle = 0; active && idle < SPINS; idle++) {
            if (take_one()) idle = 0;
            breathe();
        }
        std::unique_lock<std::mutex> lock(bed.mutex);
        sleepers.fetch_add(1);
        bed.wake.wait(lock, [&] { return rank < thread_count.load() && (uint32_t)ticket.load() != 0; });
        sleepers.fetch_sub(1);
    }
}

struct Arena {
    float* data[SLOTS] = {};
    size_t floats[SLOTS] = {};
    ~Arena() {
        for (float* p : data) free(p);
    }
};

}  // namespace

int pool_threads() { return thread_count.load(std::memory_order_relaxed); }

void pool_run(int tasks, void (*task)(void*, int), void* context) {
    if (tasks <= 0) return;
    // A single task is not worth waking anybody; nor can another thread's job, or a job inside a job, be interrupted.
    if (tasks == 1 || busy.test_and_set(std::memory_order_acquire)) {
        for (int i = 0; i < tasks; i++) task(context, i);
        return;
    }
    for (; spawned + 1 < pool_threads(); spawned++) std::thread(work, spawned + 1).detach();
    job = {task, context, tasks};
    finished.store(0, std::memory_order_relaxed);
    uint64_t number = (ticket.load(std::memory_order_relaxed) >> 32) + 1;
    ticket.store(number << 32 | (uint32_t)tasks);
    if (sleepers.load() > 0) {
        std::lock_guard<std::mutex> lock(bed.mutex);
        bed.wake.notify_all();
    }
    while (take_one()) {
    }
    for (int spins = 0; finished.load(std::memory_order_acquire) < tasks; spins++) {
        breathe();
        if (spins > 2000) std::this_thread::yield();  // a worker was parked in the middle of its task
    }
    busy.clear(std::memory_order_release);
}

float* scratch(ScratchSlot slot, size_t floats) {
    static thread_local Arena arena;
    if (arena.floats[slot] < floats) {
        free(arena.data[slot]);
        size_t bytes = (floats * sizeof(float) + 4095) / 4096 * 4096;
        arena.data[slot] = static_cast<float*>(aligned_alloc(4096, bytes));
        if (!arena.data[slot]) throw std::bad_alloc();
        arena.floats[slot] = floats;
    }
    return arena.data[slot];
}

EXPORT void lk_set_threads(int threads) { thread_count.store(threads < 1 ? 1 : threads); }
EXPORT int lk_threads() { return pool_threads(); }
