#include "queue.hpp"

#include <algorithm>

namespace dualblade {

std::shared_ptr<Ticket> Queue::submit(std::vector<Transfer> transfers) {
    const std::uint64_t piece_bytes = piece_bytes_max(transfers);
    auto ticket = std::make_shared<Ticket>(std::move(transfers), piece_bytes);
    const auto submitted = scheduler_.submit(ticket);
    if (submitted == Scheduler::Submitted::Closed) return nullptr;
    if (submitted == Scheduler::Submitted::Asleep) wake();
    return ticket;
}

Counters Queue::counters() {
    Counters counters = scheduler_.counters();
    counters.thread_cpu_seconds = thread_cpu_seconds();
    counters.direct_busy_seconds = counters.busy_seconds;
    return counters;
}

void Queue::begin_close() {
    scheduler_.close();
    wake();
}

void Queue::close() {
    std::lock_guard lock(closing_);
    begin_close();
    drain(Clock::time_point::max());
    wake();
    join();
}

void Queue::add_space(int fd, const NvmeNamespace& space) {
    remove_space(fd);
    spaces_.emplace_back(fd, space);
}

void Queue::remove_space(int fd) {
    std::erase_if(spaces_, [fd](const auto& known) { return known.first == fd; });
}

const NvmeNamespace* Queue::space_of(int fd) const {
    for (const auto& [known, space] : spaces_) {
        if (known == fd) return &space;
    }
    return nullptr;
}

// The largest piece that each of `transfers` may be cut into.
std::uint64_t Queue::piece_bytes_max(const std::vector<Transfer>& transfers) {
    std::uint64_t most = piece_bytes_;
    if (most < write_piece_bytes_min_ &&
        std::none_of(
            transfers.begin(), transfers.end(),
            [](const Transfer& transfer) { return transfer.op == Op::Read; })) {
        most = write_piece_bytes_min_;
    }
    // Without the lock the engine's thread could change its tables underneath.
    auto lock = scheduler_.lock();
    if (spaces_.empty()) return most;
    for (const Transfer& transfer : transfers) {
        const NvmeNamespace* space = space_of(transfer.fd);
        if (space == nullptr || !moves_bytes(transfer.op)) continue;
        const NamespaceLimits& limits = space->limits();
        const bool huge = in_huge_pages(transfer);
        most = std::min(most, huge ? limits.command_bytes_max : limits.scattered_bytes_max);
    }
    return most;
}

}  // namespace dualblade
