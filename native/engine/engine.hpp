// What an engine offers, whatever carries its I/O. Knows nothing of Python.
#pragma once

#include <memory>
#include <vector>

#include "nvme.hpp"
#include "ticket.hpp"
#include "types.hpp"

namespace dualblade {

// queue_depth: pieces in flight; with io_uring for each door. poll_direct: io_uring polls for the
// completions of direct reads and writes, which must then be on devices with poll queues.
// write_piece_bytes_min: batches without a read are cut no finer.
struct EngineOptions {
    std::uint32_t queue_depth;
    std::uint64_t chunk_bytes;
    bool poll_direct = false;
    std::uint64_t write_piece_bytes_min = 0;
};

// submit, counters, drain and close may be called by any thread. A forked child must not call
// anything but abandon(): its engine threads do not exist and its locks may be held for ever.
class Engine {
  public:
    Engine() = default;
    Engine(const Engine&) = delete;
    Engine& operator=(const Engine&) = delete;
    virtual ~Engine() = default;

    // Returns at once; null when closed.
    virtual std::shared_ptr<Ticket> submit(std::vector<Transfer> transfers) = 0;
    // True when all submitted tickets ended before `deadline`.
    virtual bool drain(Clock::time_point deadline) = 0;
    virtual Counters counters() = 0;
    // From here on submit() refuses; what of a ticket has not started is dropped, and fails it
    // with ECANCELED.
    virtual void begin_close() = 0;
    // Waits for what is in flight and joins the threads. Idempotent; any thread.
    virtual void close() = 0;

    // 0 or a positive errno. Registered memory must stay mapped until the engine is closed; twice
    // is once. `huge`: it is in huge pages, so that a command may carry more of it than of
    // scattered pages.
    virtual int register_buffer(std::uint64_t address, std::uint64_t size_bytes, bool huge) = 0;
    // 0 or a positive errno. A registered descriptor must be unregistered before it is closed:
    // a new file under the same number would be taken for the old one.
    virtual int register_file(int fd) = 0;
    virtual int unregister_file(int fd) = 0;
    // 0 or a positive errno; EOPNOTSUPP: this ring has no passthrough. From then on transfers on
    // `fd`, a namespace's character device, are NVMe commands; unregister_file() ends it.
    virtual int register_namespace(int fd, const NvmeNamespace& space) = 0;
    // From now on pieces of direct transfers (posix: of all) are at most this long. The block layer
    // splits what is longer than its limit, and does not poll for what it split.
    virtual void limit_direct_pieces(std::uint64_t size_bytes) = 0;
    // In a forked child, instead of destruction: lets go of inherited descriptors, locks nothing.
    virtual void abandon() = 0;
};

std::unique_ptr<Engine> open_posix_engine(EngineOptions options);
#ifdef DUALBLADE_HAVE_URING
// Throws std::system_error with what io_uring answered.
std::unique_ptr<Engine> open_uring_engine(EngineOptions options);
#endif

}  // namespace dualblade
