// Which accesses to the same memory are ordered by nothing: vector clocks over the streams and the host.
#pragma once

#include <string>
#include <vector>

#include "engine.h"

namespace sim {

// What the host and the streams do to the order. The host is one: threads of it are taken to know of one another.
void order_recorded(int stream, Point& point);
void order_stream_waits(int stream, const Point& point);
void order_host_waited(const Point& point);
void order_host_waited_for_stream(int stream);

// The next work of a stream reads or writes some bytes of a block; what is a string that is never freed.
void note_access(int stream, Block& block, const void* data, size_t bytes, bool writes, const char* what);
// The block's own stream may use its memory anew, after the streams that were recorded.
void note_freed(Block& block);

std::vector<std::string> races();
void clear_races();

}  // namespace sim
