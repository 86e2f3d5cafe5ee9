// A fixed team of threads that runs one function together, with a barrier inside it.
//
// One decode step of a small model takes about a millisecond and crosses some 150 barriers, so the team spins: waiting
// in the kernel would cost more than the work. A worker that has had nothing to do for a while sleeps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace dseek {

class ThreadPool {
public:
    explicit ThreadPool(int num_threads);
    ~ThreadPool();
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int size() const { return num_threads_; }

    // Runs body(thread_idx) on every thread, the caller being thread 0, and returns when all have finished.
    // The body must not throw. One run at a time: callers queue.
    void run(const std::function<void(int)>& body);

    // Inside a body: returns when every thread of the team has arrived.
    void barrier();

    // Inside a body: the next index of [0, count) nobody has taken, or count. `reset_counter` starts a new count and
    // must stand between two barriers.
    int claim(int slot) { return counters_[slot].value.fetch_add(1, std::memory_order_relaxed); }
    void reset_counter(int slot) { counters_[slot].value.store(0, std::memory_order_relaxed); }

    static constexpr int kCounters = 4;

private:
    void work(int thread_idx);

    struct alignas(64) Counter {
        std::atomic<int> value{0};
    };

    const int num_threads_;
    std::vector<std::thread> threads_;
    std::mutex run_mutex_;
    std::mutex sleep_mutex_;
    std::condition_variable wake_;
    const std::function<void(int)>* body_ = nullptr;
    alignas(64) std::atomic<uint64_t> generation_{0};
    alignas(64) std::atomic<int> num_running_{0};
    alignas(64) std::atomic<int> num_arrived_{0};
    alignas(64) std::atomic<uint32_t> barrier_phase_{0};
    alignas(64) std::atomic<int> num_sleeping_{0};
    std::atomic<bool> stop_{false};
    Counter counters_[kCounters];
};

// The process-wide team; created on first use with the wanted size.
ThreadPool& thread_pool();
void set_num_threads(int num_threads);
int num_threads();

}  // namespace dseek
