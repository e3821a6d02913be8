#include "races.h"

#include <algorithm>
#include <mutex>
#include <sstream>

namespace sim {
namespace {

constexpr size_t kMost = 100;  // reports; one mistake in a loop is no news the second time

struct Order {
    std::mutex mutex;
    // For each stream how far every stream has come, of which it is known that it comes later; the host's is the last.
    Clock clocks[kStreams + 1] = {};
    std::vector<std::string> races;
};

Order& order() {
    static Order* const only = new Order;
    return *only;
}

using Guard = std::lock_guard<std::mutex>;

void join(Clock& clock, const Clock& other) {
    for (int id = 0; id < kStreams; ++id) {
        clock[id] = std::max(clock[id], other[id]);
    }
}

// Work that the host queues comes after all that the host has waited for.
Clock& clock_of_next_work(Order& o, int stream) {
    join(o.clocks[stream], o.clocks[kStreams]);
    ++o.clocks[stream][stream];
    return o.clocks[stream];
}

void report(Order& o, const Access& before, const Access& after, const Block& block) {
    std::ostringstream text;
    text << after.what << " on stream " << after.stream << (after.writes ? " writes" : " reads") << " bytes "
         << after.begin << " to " << after.end << " of " << (block.pinned ? "pinned memory" : "device memory") << " of "
         << block.bytes << ", not ordered after " << before.what << " on stream " << before.stream << ", which "
         << (before.writes ? "writes" : "reads") << " bytes " << before.begin << " to " << before.end;
    std::string race = text.str();
    if (o.races.size() < kMost && std::find(o.races.begin(), o.races.end(), race) == o.races.end()) {
        o.races.push_back(std::move(race));
    }
}

// Compares with the accesses that are remembered, and forgets those of which this one takes the place.
void compare(Order& o, Block& block, const Access& access, const Clock& clock) {
    auto& accesses = block.accesses;
    const auto replaced = [&](const Access& other) {
        const bool overlaps = other.begin < access.end && access.begin < other.end;
        const bool ordered = other.time <= clock[other.stream];
        if (overlaps && !ordered && (other.writes || access.writes)) {
            report(o, other, access, block);
        }
        const bool within = access.begin <= other.begin && other.end <= access.end;
        return within && ordered && (access.writes || (other.stream == access.stream && !other.writes));
    };
    accesses.erase(std::remove_if(accesses.begin(), accesses.end(), replaced), accesses.end());
}

}  // namespace

void order_recorded(int stream, Point& point) {
    Order& o = order();
    const Guard guard(o.mutex);
    join(o.clocks[stream], o.clocks[kStreams]);
    point.clock = o.clocks[stream];
}

void order_stream_waits(int stream, const Point& point) {
    Order& o = order();
    const Guard guard(o.mutex);
    join(o.clocks[stream], point.clock);
}

void order_host_waited(const Point& point) {
    Order& o = order();
    const Guard guard(o.mutex);
    join(o.clocks[kStreams], point.clock);
}

void order_host_waited_for_stream(int stream) {
    Order& o = order();
    const Guard guard(o.mutex);
    join(o.clocks[kStreams], o.clocks[stream]);
}

void note_access(int stream, Block& block, const void* data, size_t bytes, bool writes, const char* what) {
    Order& o = order();
    const Guard guard(o.mutex);
    const Clock& clock = clock_of_next_work(o, stream);
    const size_t begin = static_cast<const char*>(data) - static_cast<const char*>(block.data);
    const Access access{begin, begin + bytes, stream, clock[stream], writes, what};
    compare(o, block, access, clock);
    block.accesses.push_back(access);
}

void note_freed(Block& block) {
    Order& o = order();
    const Guard guard(o.mutex);
    Clock clock = o.clocks[block.stream];
    join(clock, o.clocks[kStreams]);
    for (const int stream : block.recorded) {
        join(clock, o.clocks[stream]);
    }
    const Access access{0, block.bytes, block.stream, 0, true, "freeing"};
    compare(o, block, access, clock);
}

std::vector<std::string> races() {
    Order& o = order();
    const Guard guard(o.mutex);
    return o.races;
}

void clear_races() {
    Order& o = order();
    const Guard guard(o.mutex);
    o.races.clear();
}

}  // namespace sim
