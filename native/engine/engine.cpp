#include "engine.hpp"

#include <utility>

namespace dualblade {

std::shared_ptr<Ticket> Engine::submit(std::vector<Transfer> transfers) {
    const std::uint64_t piece_bytes = piece_bytes_max(transfers);
    auto ticket = std::make_shared<Ticket>(std::move(transfers), piece_bytes);
    const auto submitted = scheduler_.submit(ticket);
    if (submitted == Scheduler::Submitted::Closed) return nullptr;
    if (submitted == Scheduler::Submitted::Asleep) wake();
    return ticket;
}

Counters Engine::counters() {
    Counters counters = scheduler_.counters();
    counters.thread_cpu_seconds = thread_cpu_seconds();
    return counters;
}

void Engine::begin_close() {
    scheduler_.close();
    wake();
}

void Engine::close() {
    std::lock_guard lock(closing_);
    begin_close();
    drain(Clock::time_point::max());
    wake();
    join();
}

}  // namespace dualblade
