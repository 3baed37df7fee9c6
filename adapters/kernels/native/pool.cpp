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

constexpr int LINE = 64;     // bytes of a cache line: threads wait for lines, so what one writes has lines of its own
constexpr int SPINS = 4000;  // some 100 us: longer than the gaps inside a step, shorter than those between steps
constexpr int MAX_THREADS = 256;

// What the caller writes and workers read, all in one line.
struct alignas(LINE) {
    std::atomic<uint64_t> posted{0};  // jobs so far
    std::atomic<int> sharers{1};      // threads that the job is shared out to
    std::atomic<int> threads{1};      // threads that jobs are to be shared out to
    void (*task)(void*, int) = nullptr;
    void* context = nullptr;
} job;

// The tasks that a thread has to itself until it is through: first << 32 | last.
struct alignas(LINE) Stretch {
    std::atomic<uint64_t> left{0};
};
Stretch stretches[MAX_THREADS];

alignas(LINE) std::atomic<int> finished{0};  // tasks of this job
alignas(LINE) std::atomic<int> sleepers{0};
alignas(LINE) std::atomic_flag busy = ATOMIC_FLAG_INIT;  // held by the caller whose job runs
int spawned = 0;                                         // workers ever started; guarded by `busy`

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

// Does tasks until none is left: those of the thread's own stretch from the front, then others' from the back. `job` is
// read after taking one: it cannot change before that task is counted.
void do_all(int rank) {
    const int threads = job.sharers.load(std::memory_order_relaxed);
    int done = 0;
    for (int i = 0; i < threads; i++) {
        std::atomic<uint64_t>& left = stretches[(rank + i) % threads].left;
        uint64_t range = left.load(std::memory_order_acquire);
        for (;;) {
            const uint32_t first = range >> 32, last = (uint32_t)range;
            if (first >= last) break;
            if (!left.compare_exchange_weak(range, i ? range - 1 : range + (1ull << 32), std::memory_order_acq_rel)) continue;
            job.task(job.context, i ? last - 1 : first);
            done++;
            range = left.load(std::memory_order_acquire);
        }
    }
    if (done) finished.fetch_add(done, std::memory_order_release);
}

void work(int rank) {
    for (uint64_t seen = 0;;) {
        for (int idle = 0; rank < pool_threads() && idle < SPINS; idle++) {
            if (const uint64_t now = job.posted.load(std::memory_order_acquire); now != seen) {
                seen = now, idle = 0;
                do_all(rank);
            }
            breathe();
        }
        std::unique_lock<std::mutex> lock(bed.mutex);
        sleepers.fetch_add(1);
        bed.wake.wait(lock, [&] { return rank < pool_threads() && job.posted.load() != seen; });
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

int pool_threads() { return job.threads.load(std::memory_order_relaxed); }

void pool_run(int tasks, void (*task)(void*, int), void* context) {
    if (tasks <= 0) return;
    // A single task is not worth waking anybody; nor can another thread's job, or a job inside a job, be interrupted.
    if (tasks == 1 || busy.test_and_set(std::memory_order_acquire)) {
        for (int i = 0; i < tasks; i++) task(context, i);
        return;
    }
    const int64_t threads = pool_threads();
    for (; spawned + 1 < threads; spawned++) std::thread(work, spawned + 1).detach();
    job.task = task, job.context = context;
    finished.store(0, std::memory_order_relaxed);
    job.sharers.store((int)threads, std::memory_order_relaxed);
    for (int64_t i = 0; i < threads; i++)
        stretches[i].left.store((uint64_t)(tasks * i / threads) << 32 | (uint64_t)(tasks * (i + 1) / threads), std::memory_order_release);
    job.posted.fetch_add(1);
    if (sleepers.load() > 0) {
        std::lock_guard<std::mutex> lock(bed.mutex);
        bed.wake.notify_all();
    }
    do_all(0);
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

EXPORT void lk_set_threads(int threads) { job.threads.store(threads < 1 ? 1 : threads < MAX_THREADS ? threads : MAX_THREADS); }
EXPORT int lk_threads() { return pool_threads(); }
