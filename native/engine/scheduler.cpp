#include "scheduler.hpp"

#include <cerrno>

namespace dualblade {

namespace {
// EINTR, EAGAIN and ENOMEM end after this many tries of one piece without progress. With the pauses
// of backoff(), 0.2 ms doubling to 12.8 ms, a piece gives up after about 140 ms of refusals.
// ENOMEM: a write that must not wait finds no page in a memory cgroup full of clean ones (XFS,
// Linux 6.0 to 6.13); tried again it may wait.
constexpr std::uint32_t kRetriesMax = 16;
constexpr std::uint32_t kBackoffDoublingsMax = 7;
// What a drive refuses without saying "do not retry" is tried this often again: the kernel retries
// its own commands, never those that pass through. One that timed out took half a minute, and the
// drive was reset since: once.
constexpr std::uint32_t kNvmeRetriesMax = 3;

// ECANCELED: the kernel made no worker for the piece (pids.max), or its process was frozen.
std::uint32_t retries_max(Op op, int error_number) {
    // What a writeback ended with is told by one sync: the next would say that all is well. Not
    // even ECANCELED: a file system may say it, and a ring keeps the worker that proved it.
    if (!moves_bytes(op) && error_number < kNvmeStatus) return 0;
    if (error_number == EINTR || error_number == EAGAIN || error_number == ENOMEM ||
        error_number == ECANCELED) {
        return kRetriesMax;
    }
    if (error_number == ETIMEDOUT) return 1;
    const bool nvme = error_number >= kNvmeStatus;
    return nvme && !((error_number - kNvmeStatus) & kNvmeDoNotRetry) ? kNvmeRetriesMax : 0;
}
}  // namespace

std::chrono::microseconds Scheduler::backoff(const Request& request) {
    return std::chrono::microseconds(100u << std::min(request.retries, kBackoffDoublingsMax));
}

Scheduler::Submitted Scheduler::submit(const std::shared_ptr<Ticket>& ticket) {
    Lock guard(mutex_);
    if (closed_) return Submitted::Closed;
    if (ticket->settle()) return Submitted::Awake;  // a batch of nothing has ended already
    ticket->epoch = failed_syncs_;
    account();
    ++live_tickets_;
    ready_.push_back(ticket);
    const bool asleep = asleep_;
    asleep_ = false;
    return asleep ? Submitted::Asleep : Submitted::Awake;
}

void Scheduler::close() {
    Lock guard(mutex_);
    account();
    closed_ = true;
    const auto drop = [this](const std::shared_ptr<Ticket>& ticket) {
        ticket->drop_rest(ECANCELED);
        if (ticket->settle()) --live_tickets_;
    };
    for (const auto& ticket : ready_) drop(ticket);
    for (const auto& ticket : parked_) drop(ticket);
    ready_.clear();
    parked_.clear();
    if (live_tickets_ == 0) became_idle_.notify_all();
}

bool Scheduler::wait_idle(Clock::time_point deadline) {
    Lock guard(mutex_);
    // Without this wait close() would free what engine threads still use.
    return became_idle_.wait_until(guard, deadline, [this] { return live_tickets_ == 0; });
}

Counters Scheduler::counters() {
    Lock guard(mutex_);
    account();
    return counters_;
}

bool Scheduler::take(Lock&, Request& slot) {
    if (in_flight_ == queue_depth_) return false;
    drop_finished_heads();
    if (ready_.empty()) return false;
    account();
    slot = ready_.front()->issue(ready_.front());
    ++in_flight_;
    if (!moves_bytes(slot.rest.op)) {
        slot.sync = ++syncs_started_;
        syncs_[slot.rest.fd].running.insert(slot.sync);
    }
    drop_finished_heads();
    return true;
}

// Keeps the head of `ready_` a ticket that has a piece to start, so that empty() means no backlog.
void Scheduler::drop_finished_heads() {
    while (!ready_.empty()) {
        const auto next = ready_.front()->next();
        if (next == Ticket::Next::Ready) return;
        if (next == Ticket::Next::AtBarrier) parked_.insert(ready_.front());
        ready_.pop_front();
    }
}

Scheduler::Verdict Scheduler::finish(Lock&, Request& request, std::int64_t result) {
    account();
    Transfer& rest = request.rest;
    if (result < 0) return retry_or_fail(request, static_cast<int>(-result));
    if (!moves_bytes(rest.op)) {
        ++counters_.sync_ops;
        end_sync(request, 0);
        return Verdict::Ended;
    }
    if (result == 0) {
        // A read beyond the end; a write that makes no progress would be resumed for ever.
        return retry_or_fail(request, rest.op == Op::Read ? 0 : EIO);
    }
    const auto bytes = static_cast<std::uint64_t>(result);
    (rest.op == Op::Read ? counters_.read_ops : counters_.write_ops) += 1;
    (rest.op == Op::Read ? counters_.read_bytes : counters_.write_bytes) += bytes;
    rest.address += bytes;
    rest.offset += bytes;
    rest.size_bytes -= bytes;
    request.retries = 0;
    request.ticket->land(request.piece, bytes);
    if (rest.size_bytes > 0) {
        ++counters_.short_transfers;
        return Verdict::Again;
    }
    end_piece(request);
    --in_flight_;
    return Verdict::Ended;
}

Scheduler::Verdict Scheduler::retry_or_fail(Request& request, int error_number) {
    if (request.retries < retries_max(request.rest.op, error_number)) {
        ++request.retries;
        ++counters_.retries;
        return error_number == EINTR ? Verdict::Again : Verdict::AgainLater;
    }
    if (error_number == ECANCELED) error_number = EIO;  // callers read it as "engine closed"
    if (moves_bytes(request.rest.op)) {
        fail(request, error_number);
        --in_flight_;
    } else {
        end_sync(request, error_number);
    }
    return Verdict::Ended;
}

void Scheduler::fail(Request& request, int error_number) {
    ++counters_.errors;
    request.ticket->fail(request, error_number);
    end_piece(request);
}

// A sync that ended well is believed once no other is under way that may have been told of the
// failure of its bytes.
void Scheduler::end_sync(Request& request, int error_number) {
    --in_flight_;
    Syncs& syncs = syncs_[request.rest.fd];
    syncs.running.erase(request.sync);
    if (error_number != 0) {
        syncs.epoch = ++failed_syncs_;
        syncs.error_number = error_number;
        fail(request, error_number);
    } else {
        const std::uint64_t last = syncs.running.empty() ? 0 : *syncs.running.rbegin();
        syncs.held.emplace_back(std::move(request), last);
    }
    std::erase_if(syncs.held, [&](auto& held) {
        auto& [sync, last] = held;
        if (!syncs.running.empty() && *syncs.running.begin() <= last) return false;
        if (syncs.epoch > sync.ticket->epoch) {
            fail(sync, syncs.error_number);
        } else {
            end_piece(sync);
        }
        return true;
    });
}

void Scheduler::end_piece(Request& request) {
    // Moved, not copied: a slot that kept the ticket would keep it alive until its next use.
    const std::shared_ptr<Ticket> ticket = std::move(request.ticket);
    ticket->retire();
    if (parked_.contains(ticket) && ticket->next() != Ticket::Next::AtBarrier) {
        parked_.erase(ticket);
        if (ticket->next() == Ticket::Next::Ready) ready_.push_front(ticket);
    }
    if (ticket->settle() && --live_tickets_ == 0) became_idle_.notify_all();
}

// Adds the time since the last change, in which the numbers in flight and waiting were constant.
void Scheduler::account() {
    const auto now = Clock::now();
    const double seconds = std::chrono::duration<double>(now - accounted_until_).count();
    accounted_until_ = now;
    const double depth_seconds = seconds * in_flight_;
    if (in_flight_ > 0) counters_.busy_seconds += seconds;
    counters_.depth_seconds += depth_seconds;
    if (!ready_.empty()) {
        counters_.backlog_seconds += seconds;
        counters_.backlog_depth_seconds += depth_seconds;
    }
}

}  // namespace dualblade
