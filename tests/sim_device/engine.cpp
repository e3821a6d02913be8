#include "engine.h"

#include "races.h"

#include <array>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <limits>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>

namespace sim {
namespace {

constexpr uint64_t kAll = std::numeric_limits<uint64_t>::max();

struct Stream {
    std::deque<Task> queue;  // a task stays at the front while it runs
    uint64_t submitted = 0;
    uint64_t completed = 0;
    uint64_t allowed = kAll;  // tasks up to this number may run
    bool running = false;
    bool has_thread = false;
};

// One lock and one condition for all: a handful of streams, and a test has no use for speed here.
struct Engine {
    std::mutex mutex;
    std::condition_variable changed;
    std::array<Stream, kStreams> streams;
    bool held = false;
    bool ended = false;
    int last_pool_stream = 0;
    std::string error;  // of a task, thrown at the next wait

    std::array<Delay, 2> delays;
    std::mt19937_64 random{0};
    std::vector<Copy> log;
    int64_t copies_until_loss = -1;

};

// Never destroyed: the streams' threads live as long as the process.
Engine& engine() {
    static Engine* const only = new Engine;
    return *only;
}

using Lock = std::unique_lock<std::mutex>;

// Lets the stream run up to a task, and the others as far as that needs. What a stream may run never waits for what
// another may not: that would be a deadlock.
void allow(Engine& e, int id, uint64_t sequence) {
    Stream& stream = e.streams[id];
    if (stream.allowed >= sequence) {
        return;
    }
    stream.allowed = sequence;
    for (const Task& task : stream.queue) {
        if (task.sequence <= sequence && task.wait && !task.wait->done) {
            allow(e, task.wait->stream, task.wait->sequence);
        }
    }
    e.changed.notify_all();
}

// The work itself, without the lock.
void work(Engine& e, Lock& lock, Task& task) {
    if (task.copy >= 0) {
        e.log[task.copy].begin = now();
    }
    lock.unlock();
    std::string error;
    if (task.delay > 0) {
        std::this_thread::sleep_for(std::chrono::duration<double>(task.delay));
    }
    try {
        if (task.run) {
            task.run();
        }
    } catch (const std::exception& failure) {
        error = failure.what();
    }
    task.run = nullptr;
    lock.lock();
    if (!error.empty()) {
        e.error = error;
    }
    if (task.copy >= 0 && task.copy < static_cast<int64_t>(e.log.size())) {
        e.log[task.copy].end = now();
    }
    if (task.reach) {
        task.reach->done = true;
        task.reach->time = now();
    }
}

void run_stream(int id) {
    Engine& e = engine();
    Stream& stream = e.streams[id];
    Lock lock(e.mutex);
    for (;;) {
        e.changed.wait(lock, [&] {
            if (e.ended || stream.running || stream.queue.empty()) {
                return false;
            }
            const Task& next = stream.queue.front();
            return next.sequence <= stream.allowed && (!next.wait || next.wait->done);
        });
        stream.running = true;
        work(e, lock, stream.queue.front());
        stream.completed = stream.queue.front().sequence;
        std::vector<BlockPtr> blocks = std::move(stream.queue.front().blocks);
        stream.queue.pop_front();
        stream.running = false;
        e.changed.notify_all();
        lock.unlock();
        blocks.clear();  // what ends here is poisoned, which may take a while
        lock.lock();
    }
}

void push(Engine& e, int id, Task task) {
    Stream& stream = e.streams[id];
    task.sequence = ++stream.submitted;
    if (task.reach) {
        task.reach->sequence = task.sequence;
    }
    stream.queue.push_back(std::move(task));
    if (!stream.has_thread) {
        stream.has_thread = true;
        std::thread(run_stream, id).detach();
    }
    e.changed.notify_all();
}

PointPtr push_point(Engine& e, int id) {
    Task task;
    task.reach = std::make_shared<Point>(Point{id, 0});
    PointPtr point = task.reach;
    push(e, id, std::move(task));
    return point;
}

void raise_error(Engine& e) {
    if (!e.error.empty()) {
        std::string error;
        error.swap(e.error);
        throw std::runtime_error("sim: queued work failed: " + error);
    }
}

void drain(Engine& e, Lock& lock, int id) {
    Stream& stream = e.streams[id];
    const uint64_t last = stream.submitted;
    allow(e, id, last);
    e.changed.wait(lock, [&] { return stream.completed >= last; });
}

bool has_work_on(const Stream& stream, const BlockPtr& block) {
    for (const Task& task : stream.queue) {
        for (const BlockPtr& used : task.blocks) {
            if (used == block) {
                return true;
            }
        }
    }
    return false;
}

void throw_if_lost(const Engine& e) {
    if (e.copies_until_loss == 0) {
        throw std::runtime_error("sim: the device is lost");
    }
}

}  // namespace

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void submit(int id, Task task, bool at_once) {
    Engine& e = engine();
    Lock lock(e.mutex);
    Stream& stream = e.streams[id];
    const bool ready = !task.wait || task.wait->done;
    if (!(at_once && ready && !e.held && !stream.running && stream.queue.empty() && stream.allowed == kAll)) {
        push(e, id, std::move(task));
        return;
    }
    task.sequence = ++stream.submitted;
    if (task.reach) {
        task.reach->sequence = task.sequence;
    }
    stream.running = true;
    work(e, lock, task);
    stream.completed = task.sequence;
    stream.running = false;
    e.changed.notify_all();
    lock.unlock();
}

PointPtr record(int id) {
    Task task;
    task.reach = std::make_shared<Point>(Point{id, 0});
    PointPtr point = task.reach;
    order_recorded(id, *point);
    submit(id, std::move(task), true);
    return point;
}

void wait_for(int id, const PointPtr& point) {
    Task task;
    task.wait = point;
    order_stream_waits(id, *point);
    submit(id, std::move(task), true);
}

// Whoever asks is waiting, so the work goes on: a loop that asks until the answer is yes ends in hold mode too.
bool reached(const PointPtr& point) {
    Engine& e = engine();
    const Lock lock(e.mutex);
    throw_if_lost(e);
    const bool done = point->done;
    if (done) {
        order_host_waited(*point);
    }
    allow(e, point->stream, point->sequence);
    return done;
}

void synchronize(const PointPtr& point) {
    Engine& e = engine();
    Lock lock(e.mutex);
    throw_if_lost(e);
    allow(e, point->stream, point->sequence);
    e.changed.wait(lock, [&] { return point->done; });
    order_host_waited(*point);
    raise_error(e);
}

bool stream_idle(int id) {
    Engine& e = engine();
    const Lock lock(e.mutex);
    throw_if_lost(e);
    const Stream& stream = e.streams[id];
    const bool idle = stream.completed >= stream.submitted;
    if (idle) {
        order_host_waited_for_stream(id);
    }
    allow(e, id, stream.submitted);
    return idle;
}

void synchronize_stream(int id) {
    drain_stream(id);
    order_host_waited_for_stream(id);
}

void drain_stream(int id) {
    Engine& e = engine();
    Lock lock(e.mutex);
    throw_if_lost(e);
    drain(e, lock, id);
    raise_error(e);
}

void synchronize_device() {
    Engine& e = engine();
    Lock lock(e.mutex);
    throw_if_lost(e);
    for (int id = 0; id < kStreams; ++id) {
        drain(e, lock, id);
        order_host_waited_for_stream(id);
    }
    raise_error(e);
}

int next_pool_stream() {
    Engine& e = engine();
    const Lock lock(e.mutex);
    e.last_pool_stream = e.last_pool_stream % (kStreams - 1) + 1;
    return e.last_pool_stream;
}

void set_hold(bool on) {
    Engine& e = engine();
    const Lock lock(e.mutex);
    e.held = on;
    for (Stream& stream : e.streams) {
        stream.allowed = on ? stream.submitted : kAll;
    }
    e.changed.notify_all();
}

void submit_copy(int direction, size_t bytes, int id, bool blocking, Task task) {
    Engine& e = engine();
    Lock lock(e.mutex);
    throw_if_lost(e);
    if (e.copies_until_loss > 0) {
        --e.copies_until_loss;
    }
    const Delay& delay = e.delays[direction];
    task.delay = delay.seconds;
    if (delay.bytes_per_second > 0) {
        task.delay += static_cast<double>(bytes) / delay.bytes_per_second;
    }
    if (delay.random_seconds > 0) {
        task.delay += delay.random_seconds * (static_cast<double>(e.random() >> 11) * 0x1p-53);
    }
    task.copy = static_cast<int64_t>(e.log.size());
    e.log.push_back({direction, bytes, id, blocking, task.delay, now()});
    push(e, id, std::move(task));
    if (blocking) {
        drain(e, lock, id);
        order_host_waited_for_stream(id);
        raise_error(e);
    }
}

void set_delay(int direction, Delay delay) {
    Engine& e = engine();
    const Lock lock(e.mutex);
    e.delays[direction] = delay;
}

void seed_delays(uint64_t seed) {
    Engine& e = engine();
    const Lock lock(e.mutex);
    e.random.seed(seed);
}

std::vector<Copy> copies() {
    Engine& e = engine();
    const Lock lock(e.mutex);
    return e.log;
}

// Copies that are still queued keep their places: only a log of finished ones is cleared.
void clear_copies() {
    Engine& e = engine();
    const Lock lock(e.mutex);
    for (const Copy& copy : e.log) {
        if (copy.end < 0) {
            throw std::runtime_error("sim: the log is not cleared while copies are queued: synchronize first");
        }
    }
    e.log.clear();
}

void set_loss(int64_t after_copies) {
    Engine& e = engine();
    const Lock lock(e.mutex);
    e.copies_until_loss = after_copies < 0 ? -1 : after_copies;
}

void check_not_lost() {
    Engine& e = engine();
    const Lock lock(e.mutex);
    throw_if_lost(e);
}

// As with torch's caching allocators, device memory may be handed out again to the stream it was made on, after what
// is queued there; other streams must be recorded. So that stream poisons it: at once, where it has no work on it.
void poison_in_order(const BlockPtr& block) {
    Engine& e = engine();
    const Lock lock(e.mutex);
    bool queued = has_work_on(e.streams[block->stream], block);
    for (const int id : block->recorded) {
        if (has_work_on(e.streams[id], block)) {
            Task wait;
            wait.wait = push_point(e, id);
            push(e, block->stream, std::move(wait));
            queued = true;
        }
    }
    if (!queued) {
        poison(*block);
        return;
    }
    Task task;
    task.run = [target = block.get()] { poison(*target); };
    task.blocks = {block};
    push(e, block->stream, std::move(task));
}

void shut_down() {
    set_hold(false);
    Engine& e = engine();
    Lock lock(e.mutex);
    for (int id = 0; id < kStreams; ++id) {
        drain(e, lock, id);
    }
    e.ended = true;
}

}  // namespace sim
