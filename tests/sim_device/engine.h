// The simulated device without torch's operators: streams, events, memory, delays and the log of copies.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace sim {

constexpr int kStreams = 33;  // the default stream, and as many as the pool of a CUDA device has
constexpr int kDefaultStream = 0;

enum Direction { kToHost = 0, kToDevice = 1 };

// How far each stream has come.
using Clock = std::array<uint64_t, kStreams>;

struct Access {
    size_t begin;  // bytes within the block
    size_t end;
    int stream;
    uint64_t time;  // on the stream's clock
    bool writes;
    const char* what;
};

// An allocation. Whoever still has work to do on it holds it, so that freed memory is poisoned but never unmapped
// under a copy: a mistake shows as NaN in a tensor, not as a crash.
struct Block {
    void* data;
    size_t bytes;
    bool pinned;
    int stream;              // the current one where it was made
    std::set<int> recorded;  // further streams that use it, by Tensor.record_stream
    std::vector<Access> accesses;  // see races.h
    ~Block();
};
using BlockPtr = std::shared_ptr<Block>;

// A point on a stream. An event is the last one that was recorded with it.
struct Point {
    int stream;
    uint64_t sequence;
    bool done = false;
    double time = 0;
    Clock clock = {};  // see races.h
};
using PointPtr = std::shared_ptr<Point>;

struct Task {
    std::function<void()> run;
    std::vector<BlockPtr> blocks;  // what it reads and writes
    PointPtr wait;                 // not before this one is reached
    PointPtr reach;                // reached when the task is done
    double delay = 0;              // seconds that it takes before its work is seen
    int64_t copy = -1;             // its place in the log
    uint64_t sequence = 0;
};

struct Copy {
    int direction;
    size_t bytes;
    int stream;
    bool blocking;
    double delay;
    double queued;
    double begin = -1;
    double end = -1;
};

struct Delay {
    double seconds = 0;
    double bytes_per_second = 0;  // 0: no limit
    double random_seconds = 0;    // uniform between 0 and this
};

struct Memory {
    size_t current = 0;
    size_t peak = 0;
    size_t allocated = 0;  // ever
    size_t freed = 0;      // ever
};

double now();

// Streams. `submit` leaves work to the stream's thread; with `at_once` the caller does it where the stream has
// nothing to do, which is what the thread would do next.
void submit(int stream, Task task, bool at_once = false);
PointPtr record(int stream);
void wait_for(int stream, const PointPtr& point);
bool reached(const PointPtr& point);
void synchronize(const PointPtr& point);
bool stream_idle(int stream);
void synchronize_stream(int stream);
void drain_stream(int stream);  // what an operator does, which only looks as if the host waited
void synchronize_device();
int next_pool_stream();

// In hold mode queued work stays where it is until something waits for it.
void set_hold(bool on);

// Copies between host and device.
void submit_copy(int direction, size_t bytes, int stream, bool blocking, Task task);
void set_delay(int direction, Delay delay);
void seed_delays(uint64_t seed);
std::vector<Copy> copies();
void clear_copies();

// The device is lost after so many further copies; negative: never.
void set_loss(int64_t after_copies);
void check_not_lost();

// Memory (memory.cpp).
void poison(const Block& block);
void poison_in_order(const BlockPtr& block);  // of freed device memory, behind the work that its streams have on it
void* allocate(size_t bytes, bool pinned, int stream);
void release(void* data);
BlockPtr find(const void* data);
void use_on(const BlockPtr& block, int stream);
Memory memory(bool pinned);
void reset_peak(bool pinned);
void set_pinned_limit(int64_t bytes);
bool poisoned(uintptr_t data, size_t bytes);

// At the end of the process: everything is done, and no thread starts anything any more.
void shut_down();

}  // namespace sim
