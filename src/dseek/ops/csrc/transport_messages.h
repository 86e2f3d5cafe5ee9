// Messages from one rank to another over the rings of a segment, any number of them under way at a time.
//
// A message travels in cells of its pair's ring, and messages of one pair follow each other. A receiver takes a message
// that it has asked for straight from the ring to its place; one that it has not asked for stays in the ring, unless
// the receiver waits for another tag from the same rank: then it is put aside.
#pragma once

#include <chrono>
#include <deque>
#include <list>
#include <mutex>
#include <string>
#include <vector>

#include "transport.h"

namespace dseek {

constexpr int kAnyRank = -1;

// A message that is done with: where it came from (for a receiver), and why it failed, if it did.
struct Finished {
    uint64_t id;
    int source;
    std::string error;
};

class Messages {
public:
    explicit Messages(Segment& segment);

    // Start a message; the memory must live until the message is among the finished ones. Any thread may call these.
    uint64_t send(const uint8_t* data, size_t num_bytes, int destination, uint32_t tag);
    uint64_t receive(uint8_t* data, size_t num_bytes, int source, uint32_t tag);

    // Moves messages until some are finished, at most for `limit_s`. One thread at a time.
    std::vector<Finished> progress(double limit_s);

private:
    using Clock = std::chrono::steady_clock;

    struct Posted {
        uint64_t id = 0;
        bool is_send = false;
        int peer = 0;
        uint32_t tag = 0;
        const uint8_t* source = nullptr;
        uint8_t* target = nullptr;
        size_t num_bytes = 0, num_done = 0;
        Clock::time_point start;
    };
    // A message that was put aside.
    struct Aside {
        uint32_t tag = 0;
        std::vector<uint8_t> content;
    };
    // What is arriving from a rank: for `posted`, else put aside, else thrown away because its size was wrong.
    struct Arriving {
        bool is_active = false;
        uint32_t tag = 0;
        uint64_t num_bytes = 0, num_done = 0;
        bool has_receiver = false, is_discarded = false;
        Posted posted;
        std::vector<uint8_t> content;
    };

    uint64_t post(Posted posted);
    void take_posted();
    bool step();
    bool step_send(int destination);
    bool step_receive(int source);
    bool begin(int source, const CellHeader& header);
    void finish_arrived(int source);
    void deliver(Posted& receiver, int source, const std::vector<uint8_t>& content);
    std::list<Posted>::iterator receiver_of(int source, uint32_t tag);
    void give_up_lost();

    Segment& segment_;
    std::mutex mutex_;
    uint64_t last_id_ = 0;
    std::vector<Posted> newly_posted_;  // guarded by mutex_
    std::vector<std::deque<Posted>> sends_;  // by destination
    std::list<Posted> receives_;
    std::vector<Arriving> arriving_;  // by source
    std::vector<std::list<Aside>> aside_;  // by source
    std::vector<Finished> finished_;
};

}  // namespace dseek
