// A started batch of transfers: how it is cut into pieces, what has landed, and who waits for it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "types.hpp"

namespace dualblade {

class Ticket;

// One piece in flight. `rest` shrinks as short transfers are resumed.
struct Request {
    std::shared_ptr<Ticket> ticket;
    std::uint64_t piece = 0;
    Transfer rest{};
    std::uint32_t retries = 0;
    std::uint64_t sync = 0;  // the scheduler's number of it, where it is one
};

// Two sides share a ticket. The scheduler's side (next, issue, land, fail, drop_rest, settle) is
// called under the scheduler's lock. The waiters' side may be called by any thread.
class Ticket {
  public:
    enum class Outcome { Landed, Failed, TimedOut };
    enum class Next { Ready, AtBarrier, Nothing };
    static constexpr std::uint64_t kAll = UINT64_MAX;

    // chunk_bytes: the largest piece, a multiple of the block so that pieces of an aligned transfer
    // are aligned too.
    Ticket(std::vector<Transfer> transfers, std::uint64_t chunk_bytes);

    // Waiters' side.
    std::uint64_t size_bytes() const { return size_bytes_; }
    bool done() const { return done_.load(std::memory_order_acquire); }
    std::uint64_t landed_bytes() const { return landed_.load(std::memory_order_acquire); }
    // When the ticket ended, nanoseconds of CLOCK_MONOTONIC; 0 before.
    std::int64_t ended_ns() const { return done() ? ended_ns_ : 0; }
    // The failure of the lowest piece that failed; empty until the ticket ended.
    std::optional<Failure> failure() const;
    // Blocks until the first `bytes` landed (kAll: until the ticket ended), or `deadline`.
    // Failed is only answered once nothing is in flight: the caller may then free the memory.
    Outcome wait_until(std::uint64_t bytes, Clock::time_point deadline);

    // Scheduler's side.
    std::uint64_t epoch = 0;  // syncs that had failed when it was submitted
    Next next() const;
    Request issue(const std::shared_ptr<Ticket>& self);
    void land(std::uint64_t piece, std::uint64_t bytes);
    void fail(const Request& request, int error_number);
    // The pieces that have not started will not start: the ticket fails with `error_number`.
    void drop_rest(int error_number);
    // Takes note that one piece is no longer in flight.
    void retire();
    // Ends the ticket if nothing of it is in flight and nothing more will start; true if it did.
    bool settle();

  private:
    struct Piece {
        std::uint64_t size_bytes;
        std::uint64_t done_bytes;
    };

    void skip_empty();
    Transfer cut() const;
    void note_failure(std::uint64_t piece, const Failure& failure);
    void publish(bool done);

    const std::vector<Transfer> transfers_;
    const std::uint64_t chunk_bytes_;
    std::uint64_t size_bytes_ = 0;

    // Under the scheduler's lock.
    std::size_t transfer_ = 0;       // the next piece starts in this transfer
    std::uint64_t transfer_at_ = 0;  // at this byte of it
    std::uint64_t next_piece_ = 0;
    std::deque<Piece> window_;  // from the first piece that has not landed to the last issued
    std::uint64_t landed_base_ = 0;
    std::uint32_t in_flight_ = 0;
    bool sync_in_flight_ = false;
    bool failed_ = false;
    std::uint64_t failed_piece_ = UINT64_MAX;
    Failure failure_{};

    // Waiters': mutex_ makes "check, then sleep" one step; without it a wake-up between the two
    // would be lost and the waiter would sleep on a ticket that ended.
    mutable std::mutex mutex_;
    std::condition_variable changed_;
    std::uint64_t wake_at_ = UINT64_MAX;  // the least that a sleeping waiter waits for
    std::atomic<std::uint64_t> landed_{0};
    std::int64_t ended_ns_ = 0;  // constant once done: done_ is released after it is written
    std::atomic<bool> done_{false};
};

}  // namespace dualblade
