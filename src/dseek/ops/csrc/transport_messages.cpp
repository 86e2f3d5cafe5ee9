#include "transport_messages.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace dseek {

Messages::Messages(Segment& segment)
    : segment_(segment), sends_(segment.world_size()), arriving_(segment.world_size()), aside_(segment.world_size()) {}

uint64_t Messages::post(Posted posted) {
    posted.start = Clock::now();
    {
        std::lock_guard lock(mutex_);
        posted.id = ++last_id_;
        newly_posted_.push_back(posted);
    }
    segment_.ring_bell(segment_.rank());
    return posted.id;
}

uint64_t Messages::send(const uint8_t* data, size_t num_bytes, int destination, uint32_t tag) {
    Posted posted;
    posted.is_send = true;
    posted.peer = destination;
    posted.tag = tag;
    posted.source = data;
    posted.num_bytes = num_bytes;
    return post(posted);
}

uint64_t Messages::receive(uint8_t* data, size_t num_bytes, int source, uint32_t tag) {
    Posted posted;
    posted.peer = source;
    posted.tag = tag;
    posted.target = data;
    posted.num_bytes = num_bytes;
    return post(posted);
}

std::vector<Finished> Messages::progress(double limit_s) {
    const auto start = Clock::now();
    while (true) {
        const uint32_t seen = segment_.line(segment_.rank()).bell.load();
        take_posted();
        const bool has_moved = step();
        if (!finished_.empty()) return std::exchange(finished_, {});
        if (has_moved) continue;
        segment_.wait_for_bell(seen, true);
        if (segment_.line(segment_.rank()).bell.load() != seen) continue;
        give_up_lost();
        const std::chrono::duration<double> waited = Clock::now() - start;
        if (!finished_.empty() || waited.count() >= limit_s) return std::exchange(finished_, {});
    }
}

void Messages::take_posted() {
    std::vector<Posted> fresh;
    {
        std::lock_guard lock(mutex_);
        fresh.swap(newly_posted_);
    }
    for (Posted& posted : fresh) {
        if (posted.is_send) {
            sends_[posted.peer].push_back(posted);
            continue;
        }
        bool is_delivered = false;
        for (int source = 0; source < segment_.world_size() && !is_delivered; ++source) {
            if (posted.peer != kAnyRank && posted.peer != source) continue;
            auto& waiting = aside_[source];
            const auto found =
                std::find_if(waiting.begin(), waiting.end(), [&](const Aside& one) { return one.tag == posted.tag; });
            if (found == waiting.end()) continue;
            deliver(posted, source, found->content);
            waiting.erase(found);
            is_delivered = true;
        }
        if (!is_delivered) receives_.push_back(posted);
    }
}

bool Messages::step() {
    bool has_moved = false;
    for (int rank = 0; rank < segment_.world_size(); ++rank) {
        if (rank == segment_.rank()) continue;
        has_moved = step_send(rank) || has_moved;
        has_moved = step_receive(rank) || has_moved;
    }
    return has_moved;
}

bool Messages::step_send(int destination) {
    auto& queue = sends_[destination];
    if (queue.empty()) return false;
    RingLine& ring = segment_.ring(segment_.rank(), destination);
    bool has_moved = false;
    while (!queue.empty()) {
        Posted& posted = queue.front();
        const uint64_t written = ring.written.load(std::memory_order_relaxed);
        if (written - ring.read.load(std::memory_order_acquire) >= kCells) break;
        uint8_t* cell = segment_.cell(segment_.rank(), destination, written);
        const size_t size = std::min(kCellBytes, posted.num_bytes - posted.num_done);
        *reinterpret_cast<CellHeader*>(cell) = {posted.num_bytes, posted.tag, static_cast<uint32_t>(size)};
        if (size > 0) std::memcpy(cell + sizeof(CellHeader), posted.source + posted.num_done, size);
        posted.num_done += size;
        ring.written.store(written + 1, std::memory_order_release);
        segment_.ring_bell(destination);
        has_moved = true;
        if (posted.num_done == posted.num_bytes) {
            finished_.push_back({posted.id, segment_.rank(), ""});
            queue.pop_front();
        }
    }
    return has_moved;
}

bool Messages::step_receive(int source) {
    RingLine& ring = segment_.ring(source, segment_.rank());
    Arriving& arriving = arriving_[source];
    bool has_moved = false;
    while (true) {
        const uint64_t read = ring.read.load(std::memory_order_relaxed);
        if (read == ring.written.load(std::memory_order_acquire)) break;
        const uint8_t* cell = segment_.cell(source, segment_.rank(), read);
        const CellHeader header = *reinterpret_cast<const CellHeader*>(cell);
        if (!arriving.is_active && !begin(source, header)) break;
        if (header.num_bytes > std::min<uint64_t>(kCellBytes, arriving.num_bytes - arriving.num_done)) {
            segment_.fail("a message of rank " + std::to_string(source) + " is longer than it says");
        }
        if (!arriving.is_discarded && header.num_bytes > 0) {
            uint8_t* target = arriving.has_receiver ? arriving.posted.target : arriving.content.data();
            std::memcpy(target + arriving.num_done, cell + sizeof(CellHeader), header.num_bytes);
        }
        arriving.num_done += header.num_bytes;
        ring.read.store(read + 1, std::memory_order_release);
        segment_.ring_bell(source);
        has_moved = true;
        if (arriving.num_done == arriving.num_bytes) finish_arrived(source);
    }
    return has_moved;
}

std::list<Messages::Posted>::iterator Messages::receiver_of(int source, uint32_t tag) {
    return std::find_if(receives_.begin(), receives_.end(), [&](const Posted& posted) {
        return posted.tag == tag && (posted.peer == kAnyRank || posted.peer == source);
    });
}

// Decides where a message that begins goes; false leaves it in the ring.
bool Messages::begin(int source, const CellHeader& header) {
    Arriving arriving;
    arriving.is_active = true;
    arriving.tag = header.tag;
    arriving.num_bytes = header.message_bytes;
    const auto receiver = receiver_of(source, header.tag);
    if (receiver != receives_.end()) {
        arriving.has_receiver = true;
        arriving.posted = *receiver;
        arriving.is_discarded = receiver->num_bytes != header.message_bytes;
        receives_.erase(receiver);
    } else {
        const bool is_waited_for = std::any_of(receives_.begin(), receives_.end(), [&](const Posted& posted) {
            return posted.peer == kAnyRank || posted.peer == source;
        });
        if (!is_waited_for) return false;
        arriving.content.resize(header.message_bytes);
    }
    arriving_[source] = std::move(arriving);
    return true;
}

void Messages::finish_arrived(int source) {
    Arriving arriving = std::exchange(arriving_[source], {});
    if (arriving.has_receiver && !arriving.is_discarded) {
        finished_.push_back({arriving.posted.id, source, ""});
    } else if (arriving.has_receiver) {
        arriving.content.resize(arriving.num_bytes);
        deliver(arriving.posted, source, arriving.content);
    } else if (const auto receiver = receiver_of(source, arriving.tag); receiver != receives_.end()) {
        deliver(*receiver, source, arriving.content);
        receives_.erase(receiver);
    } else {
        aside_[source].push_back({arriving.tag, std::move(arriving.content)});
    }
}

void Messages::deliver(Posted& receiver, int source, const std::vector<uint8_t>& content) {
    std::string error;
    if (content.size() == receiver.num_bytes) {
        if (!content.empty()) std::memcpy(receiver.target, content.data(), content.size());
    } else {
        error = "rank " + std::to_string(source) + " sent " + std::to_string(content.size()) + " bytes with tag " +
                std::to_string(receiver.tag) + " where " + std::to_string(receiver.num_bytes) + " were expected";
    }
    finished_.push_back({receiver.id, source, error});
}

// Ends what waits for a rank that is gone, or has waited too long.
void Messages::give_up_lost() {
    std::vector<std::string> losses(segment_.world_size());
    std::string any_loss;
    for (int rank = 0; rank < segment_.world_size(); ++rank) {
        if (rank == segment_.rank()) continue;
        losses[rank] = segment_.loss_of(rank);
        if (any_loss.empty()) any_loss = losses[rank];
    }
    // What a rank sent before it went counts.
    if (!any_loss.empty()) step();
    const auto now = Clock::now();
    const auto reason = [&](const Posted& posted) -> std::string {
        const std::string& loss = posted.peer == kAnyRank ? any_loss : losses[posted.peer];
        if (!loss.empty()) return loss;
        const std::chrono::duration<double> waited = now - posted.start;
        if (waited.count() <= segment_.message_timeout_s) return "";
        return (posted.peer == kAnyRank ? "no rank" : "rank " + std::to_string(posted.peer) + " did not") +
               std::string(posted.is_send ? " take" : " send") + " a message with tag " + std::to_string(posted.tag) +
               " within " + std::to_string(segment_.message_timeout_s) + " s";
    };
    const auto give_up = [&](const Posted& posted) {
        const std::string text = reason(posted);
        if (!text.empty()) finished_.push_back({posted.id, posted.peer, text});
        return !text.empty();
    };
    for (auto& queue : sends_) std::erase_if(queue, give_up);
    std::erase_if(receives_, give_up);
    for (Arriving& arriving : arriving_) {
        if (arriving.is_active && arriving.has_receiver && give_up(arriving.posted)) arriving = {};
    }
}

}  // namespace dseek
