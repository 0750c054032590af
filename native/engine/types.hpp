// Words that every part of the engine shares. Sizes and offsets are bytes, times are seconds.
#pragma once

#include <chrono>
#include <cstdint>

namespace dualblade {

using Clock = std::chrono::steady_clock;

enum class Op : std::uint8_t { Read = 0, Write = 1, SyncRange = 2, DataSync = 3 };

inline bool moves_bytes(Op op) {
    return op == Op::Read || op == Op::Write;
}

// One contiguous transfer. `address` stays the caller's memory: it must live until the ticket
// ended.
struct Transfer {
    int fd;
    Op op;
    std::uint64_t address;
    std::uint64_t size_bytes;
    std::uint64_t offset;
};

// An error number of this or more is an NVMe status field (with its "do not retry" bit) added to
// it: what a command that passed through to a drive ended with.
constexpr int kNvmeStatus = 0x10000;
constexpr int kNvmeDoNotRetry = 0x4000;

// The piece that failed. `error_number` is a positive errno, kNvmeStatus + a status, or 0 for a
// read beyond the end of file.
struct Failure {
    int error_number;
    Op op;
    int fd;
    std::uint64_t offset;
    std::uint64_t size_bytes;
};

// Totals since the engine was opened. "Backlog" is time in which a piece was waiting for a free
// place in the queue: depth over backlog says whether the engine keeps the queue full when it can.
// With a queue for each door the seconds of both are added up.
struct Counters {
    std::uint64_t read_ops = 0;
    std::uint64_t read_bytes = 0;
    std::uint64_t write_ops = 0;
    std::uint64_t write_bytes = 0;
    std::uint64_t sync_ops = 0;
    std::uint64_t errors = 0;
    std::uint64_t retries = 0;
    std::uint64_t short_transfers = 0;
    double busy_seconds = 0;
    double depth_seconds = 0;
    double backlog_seconds = 0;
    double backlog_depth_seconds = 0;
    double thread_cpu_seconds = 0;
    double direct_busy_seconds = 0;  // of busy_seconds, the queue's that direct I/O goes by

    Counters& operator+=(const Counters& other) {
        read_ops += other.read_ops;
        read_bytes += other.read_bytes;
        write_ops += other.write_ops;
        write_bytes += other.write_bytes;
        sync_ops += other.sync_ops;
        errors += other.errors;
        retries += other.retries;
        short_transfers += other.short_transfers;
        busy_seconds += other.busy_seconds;
        depth_seconds += other.depth_seconds;
        backlog_seconds += other.backlog_seconds;
        backlog_depth_seconds += other.backlog_depth_seconds;
        thread_cpu_seconds += other.thread_cpu_seconds;
        direct_busy_seconds += other.direct_busy_seconds;
        return *this;
    }
};

}  // namespace dualblade
