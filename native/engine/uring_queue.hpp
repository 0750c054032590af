// A queue on a ring: one thread owns it, keeps queue_depth pieces in flight, and sleeps in one
// place, io_uring_enter, for completions and new work alike.
#pragma once

#include <memory>

#include "queue.hpp"

namespace dualblade {

// `polled`: the thread polls the device for completions instead of sleeping until it interrupts;
// takes O_DIRECT reads and writes, and commands that move bytes, on devices with poll queues.
// Throws std::system_error with what io_uring answered.
std::unique_ptr<Queue> open_uring_queue(EngineOptions options, bool polled);

}  // namespace dualblade
