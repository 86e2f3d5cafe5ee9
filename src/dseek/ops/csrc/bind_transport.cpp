// The Python face of transport.h: numbers checked, addresses taken as they are
// (`dseek.parallel.transport.shared_memory` is their only source and keeps the tensors alive).
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "transport_messages.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace dseek {
namespace {

using Addresses = std::vector<uint64_t>;
using Sizes = std::vector<size_t>;

constexpr size_t kMostBytes = size_t{1} << 46;

uint8_t* pointer(uint64_t address) { return reinterpret_cast<uint8_t*>(address); }

std::vector<uint8_t*> pointers(const Addresses& addresses) {
    std::vector<uint8_t*> found;
    for (const uint64_t address : addresses) found.push_back(pointer(address));
    return found;
}

std::vector<const uint8_t*> read_pointers(const Addresses& addresses) {
    std::vector<const uint8_t*> found;
    for (const uint64_t address : addresses) found.push_back(pointer(address));
    return found;
}

Element element_of(int number) {
    require(number >= 0 && number <= static_cast<int>(Element::int64), "no such element type");
    return static_cast<Element>(number);
}

Reduction reduction_of(int number, Element element) {
    require(number >= 0 && number <= static_cast<int>(Reduction::bit_xor), "no such reduction");
    const auto reduction = static_cast<Reduction>(number);
    const bool is_float = element <= Element::float16;
    require(is_float ? reduction < Reduction::bit_and : reduction != Reduction::average,
            "this element type has no such reduction");
    return reduction;
}

void check_rank(const Segment& segment, int rank) { require(rank >= 0 && rank < segment.world_size(), "no such rank"); }

// Python's signal handlers run where the main thread waits here; what they raise ends the wait.
void check_signals() {
    nb::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw nb::python_error();
}

// The call of `operation` without the interpreter's lock, with a deadline of its own.
template <class Operation>
void run(Segment& segment, double timeout_s, bool checks_signals, const Operation& operation) {
    require(timeout_s > 0., "the timeout is not positive");
    nb::gil_scoped_release release;
    segment.timeout_s = timeout_s;
    segment.on_tick = checks_signals ? &check_signals : nullptr;
    operation();
}

}  // namespace

void bind_transport(nb::module_& module) {
    // A process group that nobody destroyed is still alive when the interpreter ends; that is no leak worth a warning.
    nb::set_leak_warnings(false);
    module.def(
        "reduce",
        [](int element_number, int reduction_number, const Addresses& sources, uint64_t out, size_t count) {
            const Element element = element_of(element_number);
            require(!sources.empty() && sources.size() <= 1024, "reduce needs between 1 and 1024 sources");
            const auto inputs = read_pointers(sources);
            std::vector<const void*> typed(inputs.begin(), inputs.end());
            void* outs[1] = {pointer(out)};
            const ReduceCall call{
                element, reduction_of(reduction_number, element), static_cast<int>(typed.size()), 1, typed.data(), outs,
                count};
            nb::gil_scoped_release release;
            kernels().reduce(call);
        },
        "element"_a, "reduction"_a, "sources"_a, "out"_a, "count"_a);
    module.def(
        "segment_bytes",
        [](int world_size, size_t slot_bytes) {
            require(world_size >= 1 && world_size <= kMostRanks, "a segment has between 1 and 64 ranks");
            require(slot_bytes >= kSmallestSlot && slot_bytes <= size_t{1} << 30 && slot_bytes % 4096 == 0,
                    "a slot has between 16 KiB and 1 GiB, in whole pages");
            return SegmentLayout(world_size, slot_bytes).num_bytes;
        },
        "world_size"_a, "slot_bytes"_a);

    nb::class_<Segment>(module, "Segment")
        .def(
            "__init__",
            [](Segment* self, int descriptor, int rank, int world_size, size_t slot_bytes, uint64_t token,
               const std::vector<int>& peers) {
                require(world_size >= 1 && world_size <= kMostRanks && rank >= 0 && rank < world_size &&
                            peers.size() == static_cast<size_t>(world_size),
                        "a segment has between 1 and 64 ranks and a descriptor for each");
                require(slot_bytes >= kSmallestSlot && slot_bytes <= size_t{1} << 30 && slot_bytes % 4096 == 0,
                        "a slot has between 16 KiB and 1 GiB, in whole pages");
                new (self) Segment(descriptor, rank, world_size, slot_bytes, token, peers);
            },
            "descriptor"_a, "rank"_a, "world_size"_a, "slot_bytes"_a, "token"_a, "peers"_a)
        .def(
            "barrier",
            [](Segment& segment, double timeout_s, bool signals) {
                run(segment, timeout_s, signals, [&] { segment.barrier(); });
            },
            "timeout_s"_a, "checks_signals"_a)
        .def(
            "all_reduce",
            [](Segment& segment, uint64_t data, size_t count, int element_number, int reduction_number,
               double timeout_s, bool signals) {
                const Element element = element_of(element_number);
                const Reduction reduction = reduction_of(reduction_number, element);
                require(count <= kMostBytes, "the tensor is too long");
                run(segment, timeout_s, signals, [&] { segment.all_reduce(pointer(data), count, element, reduction); });
            },
            "data"_a, "count"_a, "element"_a, "reduction"_a, "timeout_s"_a, "checks_signals"_a)
        .def(
            "reduce",
            [](Segment& segment, uint64_t data, size_t count, int element_number, int reduction_number, int root,
               double timeout_s, bool signals) {
                const Element element = element_of(element_number);
                const Reduction reduction = reduction_of(reduction_number, element);
                require(count <= kMostBytes, "the tensor is too long");
                check_rank(segment, root);
                run(segment, timeout_s, signals,
                    [&] { segment.reduce(pointer(data), count, element, reduction, root); });
            },
            "data"_a, "count"_a, "element"_a, "reduction"_a, "root"_a, "timeout_s"_a, "checks_signals"_a)
        .def(
            "reduce_scatter",
            [](Segment& segment, const Addresses& inputs, uint64_t out, size_t count, int element_number,
               int reduction_number, double timeout_s, bool signals) {
                const Element element = element_of(element_number);
                const Reduction reduction = reduction_of(reduction_number, element);
                require(count <= kMostBytes && inputs.size() == static_cast<size_t>(segment.world_size()),
                        "reduce_scatter needs one input a rank");
                const auto sources = read_pointers(inputs);
                run(segment, timeout_s, signals,
                    [&] { segment.reduce_scatter(sources, pointer(out), count, element, reduction); });
            },
            "inputs"_a, "out"_a, "count"_a, "element"_a, "reduction"_a, "timeout_s"_a, "checks_signals"_a)
        .def(
            "all_gather",
            [](Segment& segment, uint64_t input, const Addresses& outs, const Sizes& num_bytes, double timeout_s,
               bool signals) {
                const size_t ranks = static_cast<size_t>(segment.world_size());
                require(outs.size() == ranks && num_bytes.size() == ranks, "all_gather needs one output a rank");
                const auto targets = pointers(outs);
                run(segment, timeout_s, signals, [&] { segment.all_gather(pointer(input), targets, num_bytes); });
            },
            "input"_a, "outs"_a, "num_bytes"_a, "timeout_s"_a, "checks_signals"_a)
        .def(
            "broadcast",
            [](Segment& segment, uint64_t data, size_t num_bytes, int root, double timeout_s, bool signals) {
                check_rank(segment, root);
                run(segment, timeout_s, signals, [&] { segment.broadcast(pointer(data), num_bytes, root); });
            },
            "data"_a, "num_bytes"_a, "root"_a, "timeout_s"_a, "checks_signals"_a)
        .def(
            "all_to_all",
            [](Segment& segment, const Addresses& inputs, const Sizes& input_bytes, const Addresses& outs,
               const Sizes& out_bytes, double timeout_s, bool signals) {
                const size_t ranks = static_cast<size_t>(segment.world_size());
                require(inputs.size() == ranks && input_bytes.size() == ranks && outs.size() == ranks &&
                            out_bytes.size() == ranks,
                        "all_to_all needs one input and one output a rank");
                const auto sources = read_pointers(inputs);
                const auto targets = pointers(outs);
                run(segment, timeout_s, signals, [&] { segment.all_to_all(sources, input_bytes, targets, out_bytes); });
            },
            "inputs"_a, "input_bytes"_a, "outs"_a, "out_bytes"_a, "timeout_s"_a, "checks_signals"_a)
        .def(
            "add_region",
            [](Segment& segment, const Addresses& of_rank, size_t num_bytes) {
                require(of_rank.size() == static_cast<size_t>(segment.world_size()), "a region has a place a rank");
                segment.add_region({pointers(of_rank), num_bytes});
            },
            "of_rank"_a, "num_bytes"_a)
        .def_rw("message_timeout_s", &Segment::message_timeout_s)
        .def("leave", [](Segment& segment) { segment.leave(); });

    nb::class_<Messages>(module, "Messages")
        .def(nb::init<Segment&>(), "segment"_a, nb::keep_alive<1, 2>())
        .def(
            "send",
            [](Messages& messages, uint64_t data, size_t num_bytes, int destination, uint32_t tag) {
                return messages.send(pointer(data), num_bytes, destination, tag);
            },
            "data"_a, "num_bytes"_a, "destination"_a, "tag"_a)
        .def(
            "receive",
            [](Messages& messages, uint64_t data, size_t num_bytes, int source, uint32_t tag) {
                return messages.receive(pointer(data), num_bytes, source, tag);
            },
            "data"_a, "num_bytes"_a, "source"_a, "tag"_a)
        .def(
            "progress",
            [](Messages& messages, double limit_s) {
                std::vector<Finished> finished;
                {
                    nb::gil_scoped_release release;
                    finished = messages.progress(limit_s);
                }
                std::vector<std::tuple<uint64_t, int, std::string>> entries;
                for (Finished& one : finished) entries.emplace_back(one.id, one.source, std::move(one.error));
                return entries;
            },
            "limit_s"_a);
}

}  // namespace dseek
