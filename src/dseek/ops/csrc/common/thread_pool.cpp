#include "thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <memory>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dseek {
namespace {

constexpr int kSpinsBeforeYield = 2000;  // some 0.1 ms; a wait beyond that means that another process has the processor
constexpr auto kIdleBeforeSleep = std::chrono::milliseconds(3);  // longer than the gap between two decode steps

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
}

}  // namespace

ThreadPool::ThreadPool(int num_threads) : num_threads_(std::max(1, num_threads)) {
    for (int thread_idx = 1; thread_idx < num_threads_; ++thread_idx) {
        threads_.emplace_back([this, thread_idx] { work(thread_idx); });
    }
}

ThreadPool::~ThreadPool() {
    {
        std::lock_guard lock(sleep_mutex_);
        stop_.store(true);
    }
    wake_.notify_all();
    for (auto& thread : threads_) thread.join();
}

void ThreadPool::run(const std::function<void(int)>& body) {
    std::lock_guard run_lock(run_mutex_);
    if (num_threads_ == 1) {
        body(0);
        return;
    }
    body_ = &body;
    num_running_.store(num_threads_ - 1, std::memory_order_relaxed);
    // Sequentially consistent on both sides: either the sleeper sees the new generation, or we see the sleeper.
    generation_.fetch_add(1);
    if (num_sleeping_.load() > 0) {
        { std::lock_guard lock(sleep_mutex_); }
        wake_.notify_all();
    }
    body(0);
    for (int spins = 0; num_running_.load(std::memory_order_acquire) != 0; ++spins) {
        if (spins < kSpinsBeforeYield) relax();
        else sched_yield();
    }
}

void ThreadPool::work(int thread_idx) {
    uint64_t seen = 0;
    while (true) {
        auto idle_since = std::chrono::steady_clock::now();
        for (int spins = 1; generation_.load(std::memory_order_acquire) == seen && !stop_.load(); ++spins) {
            relax();
            if (spins % 1024 != 0) continue;
            sched_yield();
            if (std::chrono::steady_clock::now() - idle_since < kIdleBeforeSleep) continue;
            std::unique_lock lock(sleep_mutex_);
            num_sleeping_.fetch_add(1);
            wake_.wait(lock, [&] { return generation_.load() != seen || stop_.load(); });
            num_sleeping_.fetch_sub(1);
        }
        if (stop_.load()) return;
        seen = generation_.load(std::memory_order_acquire);
        (*body_)(thread_idx);
        num_running_.fetch_sub(1, std::memory_order_release);
    }
}

void ThreadPool::barrier() {
    if (num_threads_ == 1) return;
    const uint32_t phase = barrier_phase_.load(std::memory_order_relaxed);
    if (num_arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
        num_arrived_.store(0, std::memory_order_relaxed);
        barrier_phase_.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int spins = 0; barrier_phase_.load(std::memory_order_acquire) == phase; ++spins) {
        if (spins < kSpinsBeforeYield) relax();
        else sched_yield();
    }
}

namespace {

std::mutex pool_mutex;
std::unique_ptr<ThreadPool> pool;
int wanted_threads = 0;

}  // namespace

ThreadPool& thread_pool() {
    std::lock_guard lock(pool_mutex);
    if (!pool) {
        if (wanted_threads == 0) wanted_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
        pool = std::make_unique<ThreadPool>(wanted_threads);
    }
    return *pool;
}

void set_num_threads(int num_threads) {
    std::lock_guard lock(pool_mutex);
    if (num_threads == wanted_threads && pool) return;
    pool.reset();
    wanted_threads = num_threads;
}

int num_threads() {
    std::lock_guard lock(pool_mutex);
    if (wanted_threads == 0) wanted_threads = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
    return wanted_threads;
}

}  // namespace dseek
