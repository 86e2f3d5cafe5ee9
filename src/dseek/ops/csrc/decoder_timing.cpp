// Switching the decoder's clocks on and off, and reading them.
#include "decoder.h"

namespace dseek {

void Decoder::set_timing(bool on, size_t most_stretches) {
    timing_ = on;
    most_stretches_ = on ? most_stretches : 0;
}

int64_t Decoder::arm_clocks() {
    for (Worker& worker : workers_) worker.clock.arm(timing_, shape_.num_layers, most_stretches_);
    return timing_ ? OperatorClock::now() : 0;
}

std::vector<const OperatorClock*> Decoder::clocks() const {
    std::vector<const OperatorClock*> found;
    for (const Worker& worker : workers_) {
        if (worker.clock.on()) found.push_back(&worker.clock);
    }
    return found;
}

}  // namespace dseek
