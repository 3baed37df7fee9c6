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

constexpr int SPINS = 4000;  // about 100 us: longer than the gaps inside a step, shorter than those between steps

// The current job, written by the caller and read by workers, all in one cache line.
struct alignas(LINE) {
    std::atomic<uint64_t> posted{0};  // number of jobs so far
    std::atomic<int> threads{1};      // number of threads that share jobs
    void (*task)(void*, int) = nullptr;
    void* context = nullptr;
} job;

Shares shares;              // the job's tasks
thread_local int rank = 0;  // of a worker; 0 in a thread that submits jobs
alignas(LINE) std::atomic<int> sleepers{0};
alignas(LINE) std::atomic_flag busy = ATOMIC_FLAG_INIT;  // held by the caller of the running job
int spawned = 0;                                         // workers started so far; guarded by `busy`

// Never destroyed, since workers may still sleep on it when the process exits.
struct IdleWorkers {
    std::mutex mutex;
    std::condition_variable wake;
};
IdleWorkers& idle_workers = *new IdleWorkers;

inline void cpu_pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

// `job` is read after taking a task, since it cannot change before that task is done.
void do_all() {
    shares.run_all([](int task) { job.task(job.context, task); });
}

void work(int own_rank) {
    rank = own_rank;
    for (uint64_t seen = 0;;) {
        for (int idle = 0; rank < pool_threads() && idle < SPINS; idle++) {
            if (const uint64_t now = job.posted.load(std::memory_order_acquire); now != seen) {
                seen = now, idle = 0;
                do_all();
            }
            cpu_pause();
        }
        std::unique_lock<std::mutex> lock(idle_workers.mutex);
        sleepers.fetch_add(1);
        idle_workers.wake.wait(lock, [&] { return rank < pool_threads() && job.posted.load() != seen; });
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
int pool_rank() { return rank; }

void Shares::distribute(int count) {
    tasks = count;
    done.store(0, std::memory_order_relaxed);
    const int64_t threads = pool_threads();
    sharers.store((int)threads, std::memory_order_relaxed);
    for (int64_t i = 0; i < threads; i++)
        ranges[i].left.store((uint64_t)(tasks * i / threads) << 32 | (uint64_t)(tasks * (i + 1) / threads), std::memory_order_release);
}

void Shares::await() const {
    for (int spins = 0; done.load(std::memory_order_acquire) < tasks; spins++) {
        cpu_pause();
        if (spins > 2000) std::this_thread::yield();  // a thread was descheduled in the middle of a task
    }
}

void pool_run(int tasks, void (*task)(void*, int), void* context) {
    if (tasks <= 0) return;
    // A single task is not worth waking workers, and another thread's job, or an enclosing one, cannot be interrupted.
    if (tasks == 1 || busy.test_and_set(std::memory_order_acquire)) {
        for (int i = 0; i < tasks; i++) task(context, i);
        return;
    }
    for (; spawned + 1 < pool_threads(); spawned++) std::thread(work, spawned + 1).detach();
    job.task = task, job.context = context;
    shares.distribute(tasks);
    job.posted.fetch_add(1);
    if (sleepers.load() > 0) {
        std::lock_guard<std::mutex> lock(idle_workers.mutex);
        idle_workers.wake.notify_all();
    }
    do_all();
    shares.await();
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
