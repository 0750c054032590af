// A ring: how it is made and proven, and what wakes the thread that sleeps on it.
#pragma once

#include <liburing.h>

namespace dualblade {

// The first two answer 0 or a positive errno. The thread that makes a ring is the only one that may
// use it. `polled`: completions are polled for (IORING_SETUP_IOPOLL); such a ring carries direct
// reads, writes and commands only.
int setup_ring(unsigned entries, bool polled, io_uring& ring);
// Setup alone does not prove that the ring can be used: the operations are younger (5.6), and
// seccomp can forbid io_uring_enter alone.
int prove_ring(io_uring& ring);
bool ring_carries_nvme(io_uring& ring);
// Kernels from 6.1 on take a command from registered memory, but those before 6.12 refuse it
// (EINVAL) where the registered memory behind it has more pages than a command has segments.
bool commands_take_registered_memory();

// Wakes the engine's thread out of io_uring_enter, where it polls the descriptor.
class Event {
  public:
    Event();
    Event(const Event&) = delete;
    Event& operator=(const Event&) = delete;
    ~Event();

    int fd() const { return fd_; }
    void signal() const;
    void clear() const;
    // Blocks until it is signalled.
    void wait() const;

  private:
    const int fd_;
};

}  // namespace dualblade
