#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "engine.h"
#include "races.h"

namespace sim {
namespace {

constexpr int kPoison = 0xFF;  // NaN in every floating-point format, -1 in every signed integer
constexpr size_t kKept = 16 << 20;

struct Heap {
    std::mutex mutex;
    std::map<const char*, BlockPtr> blocks;  // by address
    std::array<Memory, 2> memories;          // of the device, pinned
    int64_t pinned_limit = -1;
    std::deque<std::pair<void*, size_t>> kept;  // freed
    size_t kept_bytes = 0;
};

Heap& heap() {
    static Heap* const only = new Heap;
    return *only;
}

using Guard = std::lock_guard<std::mutex>;

// Memory that was freed and poisoned is kept a while: whoever still has its address reads the poison.
void keep_freed(Heap& heap, void* data, size_t bytes) {
    heap.kept.emplace_back(data, bytes);
    heap.kept_bytes += bytes;
    while (heap.kept_bytes > kKept) {
        std::free(heap.kept.front().first);
        heap.kept_bytes -= heap.kept.front().second;
        heap.kept.pop_front();
    }
}

void count(Memory& memory, size_t bytes) {
    memory.current += bytes;
    memory.allocated += bytes;
    memory.peak = std::max(memory.peak, memory.current);
}

void uncount(Memory& memory, size_t bytes) {
    memory.current -= bytes;
    memory.freed += bytes;
}

}  // namespace

void poison(const Block& block) { std::memset(block.data, kPoison, block.bytes); }

// A pinned block ends when it is freed and no copy uses it any more: torch's own allocator of pinned memory does not
// hand memory out again before that either.
Block::~Block() {
    poison(*this);
    const Guard guard(heap().mutex);
    if (pinned) {
        uncount(heap().memories[1], bytes);
    }
    keep_freed(heap(), data, bytes);
}

void* allocate(size_t bytes, bool pinned, int stream) {
    Heap& h = heap();
    const Guard guard(h.mutex);
    Memory& memory = h.memories[pinned];
    if (pinned && h.pinned_limit >= 0 && memory.current + bytes > static_cast<size_t>(h.pinned_limit)) {
        throw std::runtime_error("sim: no pinned memory to be had: " + std::to_string(bytes) + " bytes asked for, " +
                                 std::to_string(memory.current) + " of " + std::to_string(h.pinned_limit) + " in use");
    }
    constexpr size_t kAlignment = 64;
    void* const data = std::aligned_alloc(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    if (data == nullptr) {
        throw std::runtime_error("sim: out of memory");
    }
    const BlockPtr block(new Block{data, bytes, pinned, stream, {}, {}});
    poison(*block);
    count(memory, bytes);
    h.blocks[static_cast<char*>(data)] = block;
    return data;
}

void release(void* data) {
    Heap& h = heap();
    BlockPtr block;
    {
        const Guard guard(h.mutex);
        const auto found = h.blocks.find(static_cast<char*>(data));
        block = std::move(found->second);
        h.blocks.erase(found);
        if (!block->pinned) {
            uncount(h.memories[0], block->bytes);
        }
    }
    if (!block->pinned) {
        note_freed(*block);
        poison_in_order(block);
    }
}

BlockPtr find(const void* data) {
    Heap& h = heap();
    const Guard guard(h.mutex);
    const char* const address = static_cast<const char*>(data);
    const auto next = h.blocks.upper_bound(address);
    if (next == h.blocks.begin()) {
        return nullptr;
    }
    const BlockPtr& block = std::prev(next)->second;
    return address < static_cast<char*>(block->data) + block->bytes ? block : nullptr;
}

void use_on(const BlockPtr& block, int stream) {
    const Guard guard(heap().mutex);
    block->recorded.insert(stream);
}

Memory memory(bool pinned) {
    const Guard guard(heap().mutex);
    return heap().memories[pinned];
}

void reset_peak(bool pinned) {
    const Guard guard(heap().mutex);
    heap().memories[pinned].peak = heap().memories[pinned].current;
}

void set_pinned_limit(int64_t bytes) {
    const Guard guard(heap().mutex);
    heap().pinned_limit = bytes;
}

bool poisoned(uintptr_t data, size_t bytes) {
    const unsigned char* const first = reinterpret_cast<const unsigned char*>(data);
    return std::all_of(first, first + bytes, [](unsigned char byte) { return byte == kPoison; });
}

}  // namespace sim
