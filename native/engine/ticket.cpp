#include "ticket.hpp"

#include <algorithm>
#include <utility>

namespace dualblade {

namespace {
// sync_file_range's length is 32 bits in a submission entry: larger ranges are several pieces.
constexpr std::uint64_t kSyncPieceBytes = 1ull << 30;
}  // namespace

Ticket::Ticket(std::vector<Transfer> transfers, std::uint64_t chunk_bytes)
    : transfers_(std::move(transfers)), chunk_bytes_(chunk_bytes) {
    for (const Transfer& transfer : transfers_) {
        if (moves_bytes(transfer.op)) size_bytes_ += transfer.size_bytes;
    }
    skip_empty();
}

std::optional<Failure> Ticket::failure() const {
    if (!done() || !failed_) return std::nullopt;
    return failure_;  // constant once done: done_ is released after the last write to it
}

Ticket::Outcome Ticket::wait_until(std::uint64_t bytes, Clock::time_point deadline) {
    std::unique_lock lock(mutex_);
    while (true) {
        if (bytes != kAll && landed_bytes() >= bytes) return Outcome::Landed;
        if (done()) return failed_ ? Outcome::Failed : Outcome::Landed;
        if (Clock::now() >= deadline) return Outcome::TimedOut;
        wake_at_ = std::min(wake_at_, bytes);
        // Without this sleep a waiter would spin; publish() wakes it at wake_at_ or at the end.
        changed_.wait_until(lock, deadline);
    }
}

Ticket::Next Ticket::next() const {
    if (failed_ || transfer_ == transfers_.size()) return Next::Nothing;
    // Syncs in a row are one barrier: those of several descriptors run side by side.
    const bool sync_is_next = !moves_bytes(transfers_[transfer_].op);
    const bool barrier = sync_in_flight_ != sync_is_next;
    return barrier && in_flight_ > 0 ? Next::AtBarrier : Next::Ready;
}

// What the next piece is. Call only when there is one.
Transfer Ticket::cut() const {
    Transfer piece = transfers_[transfer_];
    const std::uint64_t limit = moves_bytes(piece.op) ? chunk_bytes_ : kSyncPieceBytes;
    piece.size_bytes = std::min(piece.size_bytes - transfer_at_, limit);
    piece.address += transfer_at_;
    piece.offset += transfer_at_;
    return piece;
}

Request Ticket::issue(const std::shared_ptr<Ticket>& self) {
    Request request{self, next_piece_, cut(), 0};
    if (moves_bytes(request.rest.op)) {
        window_.push_back({request.rest.size_bytes, 0});
        ++next_piece_;
    } else {
        sync_in_flight_ = true;
    }
    ++in_flight_;
    transfer_at_ += request.rest.size_bytes;
    if (transfer_at_ >= transfers_[transfer_].size_bytes) {
        transfer_at_ = 0;
        ++transfer_;
        skip_empty();
    }
    return request;
}

// A read or write of nothing has landed already; a sync of size 0 is still a sync.
void Ticket::skip_empty() {
    while (transfer_ < transfers_.size() && moves_bytes(transfers_[transfer_].op) &&
           transfers_[transfer_].size_bytes == 0) {
        ++transfer_;
    }
}

void Ticket::land(std::uint64_t piece, std::uint64_t bytes) {
    const std::uint64_t first_piece = next_piece_ - window_.size();
    window_[piece - first_piece].done_bytes += bytes;
    while (!window_.empty() && window_.front().done_bytes == window_.front().size_bytes) {
        landed_base_ += window_.front().size_bytes;
        window_.pop_front();
    }
    publish(false);
}

void Ticket::fail(const Request& request, int error_number) {
    const Transfer& rest = request.rest;
    note_failure(request.piece, {error_number, rest.op, rest.fd, rest.offset, rest.size_bytes});
}

void Ticket::drop_rest(int error_number) {
    if (failed_ || transfer_ == transfers_.size()) return;
    const Transfer piece = cut();
    note_failure(next_piece_, {error_number, piece.op, piece.fd, piece.offset, piece.size_bytes});
}

// Of several failures the lowest piece's is told, so that what is told does not depend on timing.
void Ticket::note_failure(std::uint64_t piece, const Failure& failure) {
    if (!failed_ || piece < failed_piece_) {
        failed_piece_ = piece;
        failure_ = failure;
    }
    failed_ = true;
}

void Ticket::retire() {
    --in_flight_;
    if (in_flight_ == 0) sync_in_flight_ = false;
}

bool Ticket::settle() {
    if (in_flight_ > 0 || next() != Next::Nothing || done()) return false;
    publish(true);
    return true;
}

void Ticket::publish(bool done) {
    std::lock_guard lock(mutex_);
    const std::uint64_t landed = landed_base_ + (window_.empty() ? 0 : window_.front().done_bytes);
    landed_.store(landed, std::memory_order_release);
    if (done) {
        ended_ns_ = std::chrono::nanoseconds(Clock::now().time_since_epoch()).count();
        done_.store(true, std::memory_order_release);
    }
    // Waking only those whose bytes are there saves two context switches for each piece.
    if (done || landed >= wake_at_) {
        wake_at_ = UINT64_MAX;
        changed_.notify_all();
    }
}

}  // namespace dualblade
