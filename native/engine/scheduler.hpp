// Which piece goes next, and what a completion means. Shared by all engines; does no I/O itself.
#pragma once

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <set>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "ticket.hpp"
#include "types.hpp"

namespace dualblade {

// First in, first out across tickets. A ticket that stands at a barrier lets others pass.
// Functions that take `Lock&` are called with the scheduler's lock held.
class Scheduler {
  public:
    using Lock = std::unique_lock<std::mutex>;
    enum class Verdict { Ended, Again, AgainLater };
    enum class Submitted { Closed, Asleep, Awake };

    explicit Scheduler(std::uint32_t queue_depth) : queue_depth_(queue_depth) {}

    // Any thread. Asleep: the engine must be woken, it may be sleeping beside free places.
    Submitted submit(const std::shared_ptr<Ticket>& ticket);
    // Any thread: no new tickets; what has not started fails with ECANCELED.
    void close();
    // Any thread: blocks until all submitted tickets ended, or `deadline`; true if they did.
    bool wait_idle(Clock::time_point deadline);
    // Any thread. Without thread_cpu_seconds, which the engine adds.
    Counters counters();

    // Without this lock, submitters, waiters and engine threads would see tickets half-changed.
    Lock lock() { return Lock(mutex_); }
    // The next piece to start, in `slot`; false if there is none or the queue is full.
    bool take(Lock&, Request& slot);
    // What `result` (bytes or -errno) of `request` means. Again: issue request.rest once more;
    // AgainLater: after backoff().
    Verdict finish(Lock&, Request& request, std::int64_t result);
    // Says how long a piece that was refused for lack of resources pauses, longer each time.
    static std::chrono::microseconds backoff(const Request& request);
    bool work_waits(Lock&) const { return !ready_.empty(); }
    bool closed(Lock&) const { return closed_; }
    // Nothing waits, nothing is in flight.
    bool idle(Lock&) const { return live_tickets_ == 0; }
    // The engine is about to sleep: the next submit must wake it.
    void going_to_sleep(Lock&) { asleep_ = true; }

  private:
    void account();
    void drop_finished_heads();
    Verdict retry_or_fail(Request& request, int error_number);
    void fail(Request& request, int error_number);
    void end_sync(Request& request, int error_number);
    void end_piece(Request& request);

    const std::uint32_t queue_depth_;
    std::mutex mutex_;
    std::condition_variable became_idle_;
    std::deque<std::shared_ptr<Ticket>> ready_;
    std::unordered_set<std::shared_ptr<Ticket>> parked_;  // at a barrier, with pieces in flight
    std::uint32_t in_flight_ = 0;
    std::uint64_t live_tickets_ = 0;
    // Of one descriptor, which tells of a failed writeback once, to whichever sync comes first, and
    // not whose bytes it was: all that it may be of fail.
    struct Syncs {
        std::set<std::uint64_t> running;                      // by number
        std::vector<std::pair<Request, std::uint64_t>> held;  // until that one has ended, too
        std::uint64_t epoch = 0;                              // the last that failed
        int error_number = 0;
    };
    std::unordered_map<int, Syncs> syncs_;
    std::uint64_t syncs_started_ = 0;
    std::uint64_t failed_syncs_ = 0;
    bool closed_ = false;
    bool asleep_ = false;
    Counters counters_;
    Clock::time_point accounted_until_ = Clock::now();
};

}  // namespace dualblade
