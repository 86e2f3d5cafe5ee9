// Where a run's time goes, by layer and operator, for a profiler that asks for it.
//
// Every thread has a clock of its own. `mark` gives the time since the last mark to one operator, less what the thread
// waited for others in between, so that a thread's figures add up to the time of the run. Switched off, a mark is a
// branch; switched on, a reading of the clock. Memory is taken before the run.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <vector>

namespace dseek {

// The names in bind_decoder.cpp are in this order.
enum class Operator : uint8_t {
    embed,
    qkv_input,  // norm, and rows as the kernel takes them
    qkv,
    cache,  // rotation, and keys and values to their pages
    select,  // the pyramid; choosing blocks counts as attention
    attention,
    output_input,
    output,
    gate_up_input,
    gate_up,  // with the activation
    down_input,
    down,
    exchange,
    wait,
    head_input,
    head,
    count
};

constexpr int kNumOperators = static_cast<int>(Operator::count);

// A stretch of one thread's time: `waited_ns` of it for other threads.
struct Stretch {
    int64_t begin_ns, end_ns, waited_ns;
    int32_t layer, operator_idx;
};

class alignas(64) OperatorClock {
public:
    static int64_t now() {
        return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
            .count();
    }

    // Before a run: switches on or off, and clears.
    void arm(bool on, int num_layers, size_t most_stretches) {
        on_ = on;
        if (!on) return;
        ns_.assign(static_cast<size_t>(num_layers + 1) * kNumOperators, 0);
        num_stretches_ = 0;
        lost_ = 0;
        if (stretches_.size() != most_stretches) stretches_.resize(most_stretches);
    }

    // At the start of a thread's work; what passed since `run_began_ns` is waiting.
    void begin(int64_t run_began_ns) {
        if (!on_) return;
        last_ns_ = run_began_ns;
        waited_ns_ = std::max<int64_t>(0, now() - run_began_ns);
    }

    void mark(int layer, Operator done) {
        if (on_) add(layer, done);
    }

    bool on() const { return on_; }
    void add_wait(int64_t ns) { waited_ns_ += ns; }

    const std::vector<int64_t>& ns() const { return ns_; }
    const Stretch* stretches() const { return stretches_.data(); }
    size_t num_stretches() const { return num_stretches_; }
    size_t num_lost() const { return lost_; }

private:
    void add(int layer, Operator done) {
        const int64_t time = now();
        int64_t* counts = ns_.data() + static_cast<size_t>(layer) * kNumOperators;
        counts[static_cast<int>(done)] += time - last_ns_ - waited_ns_;
        counts[static_cast<int>(Operator::wait)] += waited_ns_;
        if (num_stretches_ < stretches_.size()) {
            stretches_[num_stretches_++] = {last_ns_, time, waited_ns_, layer, static_cast<int32_t>(done)};
        } else {
            ++lost_;
        }
        last_ns_ = time;
        waited_ns_ = 0;
    }

    bool on_ = false;
    int64_t last_ns_ = 0, waited_ns_ = 0;
    std::vector<int64_t> ns_;  // [layers + 1][operators]; the last row is of what belongs to no layer
    std::vector<Stretch> stretches_;
    size_t num_stretches_ = 0, lost_ = 0;
};

}  // namespace dseek
