// An engine's queue: a scheduler and the threads that work it off, whatever they do it with.
#pragma once

#include <fcntl.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "engine.hpp"
#include "scheduler.hpp"

namespace dualblade {

constexpr unsigned kSyncFlags =
    SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;

class Queue : public Engine {
  public:
    explicit Queue(EngineOptions options)
        : scheduler_(options.queue_depth),
          piece_bytes_(options.chunk_bytes),
          write_piece_bytes_min_(options.write_piece_bytes_min) {}
    // Derived classes call close() in their destructors: their threads must be gone before their
    // members.

    std::shared_ptr<Ticket> submit(std::vector<Transfer> transfers) override;
    bool drain(Clock::time_point deadline) override { return scheduler_.wait_idle(deadline); }
    Counters counters() override;
    void begin_close() override;
    void close() override;
    void limit_direct_pieces(std::uint64_t size_bytes) override {
        piece_bytes_ = std::min(piece_bytes_.load(), size_bytes);
    }

  protected:
    virtual void wake() = 0;
    virtual void join() = 0;
    virtual double thread_cpu_seconds() = 0;
    // Whether commands may carry `transfer` as memory in huge pages.
    virtual bool in_huge_pages(const Transfer&) const { return false; }

    // Any thread that holds the scheduler's lock.
    void add_space(int fd, const NvmeNamespace& space);
    void remove_space(int fd);
    // The namespace behind `fd`; null: a file or block device. The thread that changes them, or
    // with the scheduler's lock.
    const NvmeNamespace* space_of(int fd) const;

    Scheduler scheduler_;

  private:
    std::uint64_t piece_bytes_max(const std::vector<Transfer>& transfers);

    std::atomic<std::uint64_t> piece_bytes_;
    const std::uint64_t write_piece_bytes_min_;
    // Changed under the scheduler's lock.
    std::vector<std::pair<int, NvmeNamespace>> spaces_;
    // Without it two threads that close at once would join the same thread twice.
    std::mutex closing_;
};

}  // namespace dualblade
