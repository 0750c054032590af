// The engine's contract in C++, to be run under sanitizers: `native/check.sh`.
//
// Tickets and the scheduler are tested without I/O, so every order of completions is reachable;
// the engines on a real file. Each check fails on its own line; no time decides a result.
#include "engine/engine.hpp"

#include <fcntl.h>
#include <linux/nvme_ioctl.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "engine/scheduler.hpp"

using namespace dualblade;

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                \
        }                                                                                \
    } while (false)

namespace {

constexpr std::uint64_t kBlock = 4096;
constexpr std::uint64_t kChunk = 4 * kBlock;
constexpr std::uint64_t kFileBytes = 4 << 20;
const auto kNow = Clock::time_point::min();
const auto kForever = Clock::time_point::max();

Transfer read_of(std::uint64_t size_bytes, std::uint64_t offset = 0) {
    return {3, Op::Read, 0x1000 + offset, size_bytes, offset};
}

// A scheduler whose pieces the test completes by hand.
struct Bench {
    Scheduler scheduler;
    explicit Bench(std::uint32_t depth) : scheduler(depth) {}

    std::shared_ptr<Ticket> submit(std::vector<Transfer> transfers) {
        auto ticket = std::make_shared<Ticket>(std::move(transfers), kChunk);
        CHECK(scheduler.submit(ticket) != Scheduler::Submitted::Closed);
        return ticket;
    }
    std::vector<Request> take_all() {
        auto lock = scheduler.lock();
        std::vector<Request> taken;
        Request request;
        while (scheduler.take(lock, request)) taken.push_back(request);
        return taken;
    }
    Scheduler::Verdict finish(Request& request, std::int64_t result) {
        auto lock = scheduler.lock();
        return scheduler.finish(lock, request, result);
    }
    void finish_whole(Request& request) {
        const Op op = request.rest.op;
        const auto bytes = static_cast<std::int64_t>(request.rest.size_bytes);
        CHECK(finish(request, moves_bytes(op) ? bytes : 0) == Scheduler::Verdict::Ended);
    }
};

void pieces_cover_a_transfer() {
    for (const std::uint64_t size :
         {kBlock, kChunk - kBlock, kChunk, kChunk + kBlock, 3 * kChunk}) {
        Bench bench(100);
        bench.submit({read_of(size, 7 * kBlock)});
        std::uint64_t at = 7 * kBlock;
        for (const Request& piece : bench.take_all()) {
            CHECK(piece.rest.offset == at && piece.rest.address == 0x1000 + at);
            CHECK(piece.rest.size_bytes > 0 && piece.rest.size_bytes <= kChunk);
            CHECK(piece.rest.offset % kBlock == 0);
            at += piece.rest.size_bytes;
        }
        CHECK(at == 7 * kBlock + size);
    }
}

// Any order of completions: landed_bytes is the prefix of pieces that ended, at every moment.
void landing_in_any_order() {
    std::mt19937 random(1);
    for (int round = 0; round < 200; ++round) {
        Bench bench(64);
        auto ticket = bench.submit({read_of(9 * kChunk), read_of(0), read_of(3 * kBlock)});
        auto pieces = bench.take_all();
        CHECK(pieces.size() == 10);
        std::vector<bool> landed(pieces.size());
        std::vector<std::size_t> order(pieces.size());
        for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
        std::shuffle(order.begin(), order.end(), random);
        for (const std::size_t piece : order) {
            CHECK(!ticket->done());
            bench.finish_whole(pieces[piece]);
            landed[piece] = true;
            std::size_t prefix = 0;
            while (prefix < landed.size() && landed[prefix]) ++prefix;
            const std::uint64_t bytes = prefix == 10 ? ticket->size_bytes() : prefix * kChunk;
            CHECK(ticket->landed_bytes() == bytes);
            CHECK(ticket->wait_until(bytes, kNow) == Ticket::Outcome::Landed);
            if (prefix < 10) {
                CHECK(ticket->wait_until(bytes + 1, kNow) == Ticket::Outcome::TimedOut);
            }
        }
        CHECK(ticket->done() && !ticket->failure());
        CHECK(bench.scheduler.wait_idle(kNow));
    }
}

void short_transfers_are_resumed() {
    Bench bench(4);
    auto ticket = bench.submit({read_of(kChunk)});
    auto pieces = bench.take_all();
    CHECK(bench.finish(pieces[0], kBlock) == Scheduler::Verdict::Again);
    CHECK(pieces[0].rest.offset == kBlock && pieces[0].rest.size_bytes == 3 * kBlock);
    CHECK(ticket->landed_bytes() == kBlock);
    CHECK(bench.finish(pieces[0], 3 * kBlock) == Scheduler::Verdict::Ended);
    CHECK(ticket->done() && bench.scheduler.counters().short_transfers == 1);
}

void refusals_are_tried_again_within_bounds() {
    constexpr int kUnrecovered = kNvmeStatus + 0x281;
    const std::pair<int, std::uint64_t> bounds[] = {
        {EINTR, 16},    {EAGAIN, 16}, {ENOMEM, 16},      {ECANCELED, 16},
        {ETIMEDOUT, 1}, {EIO, 0},     {kUnrecovered, 3}, {kUnrecovered + kNvmeDoNotRetry, 0},
    };
    for (const auto& [error, most] : bounds) {
        Bench bench(1);
        auto ticket = bench.submit({read_of(kBlock)});
        auto pieces = bench.take_all();
        std::uint64_t tries = 0;
        auto pause = std::chrono::microseconds(0);
        while (bench.finish(pieces[0], -error) != Scheduler::Verdict::Ended) {
            CHECK(Scheduler::backoff(pieces[0]) >= pause);
            pause = Scheduler::backoff(pieces[0]);
            ++tries;
        }
        CHECK(tries == most && bench.scheduler.counters().retries == tries);
        CHECK(ticket->done());
        CHECK(ticket->failure()->error_number == (error == ECANCELED ? EIO : error));
    }
}

// A sync is not asked twice what a writeback ended with.
void failed_syncs_stay_failed() {
    for (const int error : {EINTR, EAGAIN, ENOMEM, ETIMEDOUT, EIO, ECANCELED}) {
        Bench bench(1);
        auto ticket = bench.submit({{3, Op::SyncRange, 0, kBlock, 0}});
        auto pieces = bench.take_all();
        CHECK(bench.finish(pieces[0], -error) == Scheduler::Verdict::Ended);
        CHECK(ticket->failure()->error_number == (error == ECANCELED ? EIO : error));
    }
}

// The kernel says once that a writeback failed, to the first that syncs the descriptor; and which
// of two is heard of first says nothing.
void a_failed_writeback_is_told_to_all_whom_it_may_be_of() {
    for (const bool failure_first : {true, false}) {
        Bench bench(8);
        const auto written = [&](int fd, std::uint64_t offset) {
            return bench.submit(
                {{fd, Op::Write, 0, kBlock, offset}, {fd, Op::SyncRange, 0, kBlock, offset}});
        };
        auto mine = written(3, 0), yours = written(3, kBlock), elsewhere = written(4, 0);
        for (Request& write : bench.take_all()) bench.finish_whole(write);
        auto syncs = bench.take_all();
        CHECK(syncs.size() == 3);
        const auto sync_of = [&](const std::shared_ptr<Ticket>& ticket) -> Request& {
            return *std::find_if(syncs.begin(), syncs.end(),
                                 [&](const Request& sync) { return sync.ticket == ticket; });
        };
        if (failure_first) bench.finish(sync_of(mine), -EIO);
        auto later = written(3, 2 * kBlock);
        bench.finish_whole(sync_of(yours));
        CHECK(yours->done() == failure_first);
        bench.finish_whole(sync_of(elsewhere));
        CHECK(elsewhere->done() && !elsewhere->failure());
        if (!failure_first) bench.finish(sync_of(mine), -EIO);
        CHECK(mine->failure()->error_number == EIO && yours->failure()->error_number == EIO);
        CHECK(bench.scheduler.counters().errors == 2);
        for (int part = 0; part < 2; ++part) {
            for (Request& request : bench.take_all()) bench.finish_whole(request);
        }
        // What was under way when it failed may be of it as well.
        CHECK(later->done() && later->failure().has_value() == !failure_first);
        CHECK(bench.scheduler.wait_idle(kNow));
    }
}

// Not done while pieces are in flight; the lowest failed piece is told; the rest never starts.
void failure_waits_for_what_is_in_flight() {
    Bench bench(4);
    auto ticket = bench.submit({read_of(8 * kChunk)});
    auto pieces = bench.take_all();
    CHECK(pieces.size() == 4);
    bench.finish(pieces[2], -EIO);
    CHECK(bench.take_all().empty());
    bench.finish_whole(pieces[0]);
    bench.finish(pieces[1], 0);
    CHECK(!ticket->done() && !ticket->failure());
    CHECK(ticket->wait_until(Ticket::kAll, kNow) == Ticket::Outcome::TimedOut);
    bench.finish_whole(pieces[3]);
    CHECK(ticket->done() && ticket->landed_bytes() == kChunk);
    CHECK(ticket->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Failed);
    CHECK(ticket->wait_until(kChunk, kForever) == Ticket::Outcome::Landed);
    const Failure failure = *ticket->failure();
    CHECK(failure.error_number == 0 && failure.offset == kChunk && failure.size_bytes == kChunk);
    CHECK(bench.scheduler.counters().errors == 2 && bench.scheduler.wait_idle(kNow));
}

void syncs_are_barriers_and_let_others_pass() {
    Bench bench(8);
    auto first = bench.submit({{3, Op::Write, 0, 2 * kChunk, 0},
                               {3, Op::SyncRange, 0, 5ull << 29, 0},  // 2.5 GiB: three pieces
                               {3, Op::Write, 0, kBlock, 0}});
    auto second = bench.submit({read_of(kBlock)});
    auto taken = bench.take_all();
    CHECK(taken.size() == 3 && taken[2].ticket == second);
    bench.finish_whole(taken[1]);
    CHECK(bench.take_all().empty());
    bench.finish_whole(taken[0]);
    std::uint64_t synced = 0;
    auto syncs = bench.take_all();
    CHECK(syncs.size() == 3);  // side by side: they are one barrier
    for (Request& sync : syncs) {
        CHECK(sync.rest.op == Op::SyncRange && sync.rest.offset == synced);
        CHECK(bench.take_all().empty());
        synced += sync.rest.size_bytes;
        bench.finish_whole(sync);
    }
    CHECK(synced == 5ull << 29);
    auto last = bench.take_all();
    CHECK(last.size() == 1 && last[0].rest.op == Op::Write && !first->done());
    bench.finish_whole(last[0]);
    CHECK(first->done() && first->landed_bytes() == 2 * kChunk + kBlock);
}

void failed_write_keeps_its_sync_from_running() {
    Bench bench(8);
    auto ticket = bench.submit({{3, Op::Write, 0, kBlock, 0}, {3, Op::DataSync, 0, 0, 0}});
    auto taken = bench.take_all();
    CHECK(taken.size() == 1);
    bench.finish(taken[0], -ENOSPC);
    CHECK(bench.take_all().empty() && ticket->done());
    CHECK(ticket->failure()->error_number == ENOSPC && bench.scheduler.counters().sync_ops == 0);
}

void closing_cancels_what_has_not_started() {
    Bench bench(2);
    auto half = bench.submit({read_of(4 * kChunk)});
    auto behind = bench.submit({read_of(kBlock, kBlock)});
    auto parked = bench.submit({read_of(kBlock), {3, Op::DataSync, 0, 0, 0}});
    auto pieces = bench.take_all();
    bench.scheduler.close();
    CHECK(behind->done() && behind->failure()->error_number == ECANCELED);
    CHECK(behind->failure()->offset == kBlock && parked->done());
    CHECK(!half->done() && !bench.scheduler.wait_idle(kNow));
    for (Request& piece : pieces) bench.finish_whole(piece);
    CHECK(half->done() && half->landed_bytes() == 2 * kChunk);
    CHECK(half->failure()->error_number == ECANCELED && half->failure()->offset == 2 * kChunk);
    CHECK(bench.scheduler.wait_idle(kNow));
    auto late = std::make_shared<Ticket>(std::vector<Transfer>{}, kChunk);
    CHECK(bench.scheduler.submit(late) == Scheduler::Submitted::Closed);
}

void empty_batches_have_ended() {
    Bench bench(1);
    CHECK(bench.submit({})->done());
    CHECK(bench.submit({read_of(0), read_of(0)})->done());
    CHECK(bench.take_all().empty() && bench.scheduler.wait_idle(kNow));
}

void depth_counts_only_while_work_waits() {
    Bench bench(2);
    bench.submit({read_of(2 * kChunk)});
    auto pieces = bench.take_all();
    CHECK(pieces.size() == 2 && bench.scheduler.counters().busy_seconds > 0);
    const double backlog = bench.scheduler.counters().backlog_seconds;
    CHECK(bench.scheduler.counters().backlog_seconds == backlog);  // nothing waits
    bench.submit({read_of(kBlock)});
    CHECK(bench.take_all().empty());  // the queue is full
    const Counters counters = bench.scheduler.counters();
    CHECK(counters.backlog_seconds > backlog);
    CHECK(counters.depth_seconds <= 2 * counters.busy_seconds * (1 + 1e-9));
    for (Request& piece : pieces) bench.finish_whole(piece);
}

// What the encoder makes is the kernel's own struct for the ioctl, by the kernel's own header.
void commands_are_what_the_ioctl_takes() {
    static_assert(NvmeCommand::kBytes == sizeof(nvme_passthru_cmd));
    static_assert(NvmeCommand::kIoctlOperation == NVME_IOCTL_IO_CMD);
    std::mt19937_64 random(3);
    for (int round = 0; round < 10000; ++round) {
        const std::uint64_t block = 512ull << random() % 4;
        const auto space = NvmeNamespace::make({7, block, kChunk, kFileBytes, kChunk, kChunk});
        CHECK(space);
        const Transfer piece{3, random() % 2 ? Op::Read : Op::Write, random(),
                             random() % (2 * kChunk / 512) * 512,
                             random() % (kFileBytes / 512) * 512};
        const auto command = space->command(piece);
        if (!command) continue;
        nvme_passthru_cmd told;
        std::memcpy(&told, command->bytes().data(), sizeof told);
        CHECK(told.opcode == (piece.op == Op::Read ? 2 : 1) && told.nsid == 7 && told.flags == 0);
        CHECK(told.addr == piece.address && told.data_len == piece.size_bytes);
        CHECK(told.data_len == (told.cdw12 + 1ull) * block && told.cdw12 <= 0xffff);
        const std::uint64_t first = told.cdw10 | std::uint64_t{told.cdw11} << 32;
        CHECK(first * block == piece.offset && first * block >= kChunk);
        CHECK((first + told.cdw12 + 1) * block <= kFileBytes);
        CHECK(told.metadata == 0 && told.metadata_len == 0 && told.timeout_ms == 0);
        CHECK(command->result(0) == static_cast<std::int64_t>(piece.size_bytes));
        CHECK(command->result(0x281) == -(kNvmeStatus + 0x281));
        CHECK(command->result(-EINTR) == -ETIMEDOUT && command->result(-ENODEV) == -ENODEV);
    }
}

// A file of its own, aligned memory, and an engine.
using Open = std::unique_ptr<Engine> (*)(EngineOptions);
struct Device {
    char path[32] = "/tmp/dualblade-test-XXXXXX";
    int fd = mkstemp(path);
    std::vector<unsigned char> content;
    unsigned char* memory = nullptr;

    Device() : content(kFileBytes) {
        std::mt19937_64 random(2);
        for (std::size_t i = 0; i < content.size(); i += 8) {
            const std::uint64_t word = random();
            std::memcpy(&content[i], &word, 8);
        }
        CHECK(write(fd, content.data(), kFileBytes) == static_cast<ssize_t>(kFileBytes));
        // /tmp may be a tmpfs, which has no O_DIRECT before Linux 6.6: buffered then.
        const int direct = open(path, O_RDWR | O_DIRECT);
        if (direct >= 0) {
            close(fd);
            fd = direct;
        }
        memory = static_cast<unsigned char*>(std::aligned_alloc(kBlock, kFileBytes));
        std::memset(memory, 0, kFileBytes);
    }
    ~Device() {
        std::free(memory);
        close(fd);
        unlink(path);
    }
    Transfer at(Op op, std::uint64_t offset, std::uint64_t size_bytes) const {
        const auto address = reinterpret_cast<std::uint64_t>(memory) + offset;
        return {fd, op, address, size_bytes, offset};
    }
    bool same(std::uint64_t offset, std::uint64_t size_bytes) const {
        return std::memcmp(memory + offset, &content[offset], size_bytes) == 0;
    }
};

void reads_land_in_order_for_waiters(Open open_engine) {
    Device device;
    auto engine = open_engine({4, kChunk});
    auto ticket = engine->submit({device.at(Op::Read, 0, kFileBytes)});
    std::vector<std::thread> waiters;
    for (std::uint64_t part = 1; part <= 4; ++part) {
        waiters.emplace_back([&, part] {
            const std::uint64_t bytes = part * kFileBytes / 4;
            CHECK(ticket->wait_until(bytes, kForever) == Ticket::Outcome::Landed);
            CHECK(device.same(0, bytes));
        });
    }
    for (auto& waiter : waiters) waiter.join();
    CHECK(ticket->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Landed);
    CHECK(engine->counters().read_bytes == kFileBytes);
    CHECK(engine->counters().read_ops == kFileBytes / kChunk);
}

void many_threads_submit(Open open_engine) {
    Device device;
    auto engine = open_engine({8, kChunk});
    const bool registered = engine->register_file(device.fd) == 0;
    engine->register_buffer(reinterpret_cast<std::uint64_t>(device.memory), kFileBytes, false);
    std::vector<std::thread> threads;
    for (std::uint64_t number = 0; number < 4; ++number) {
        threads.emplace_back([&, number] {
            const std::uint64_t share = kFileBytes / 4, begin = number * share;
            for (std::uint64_t at = 0; at < share; at += kBlock) {
                auto ticket = engine->submit({device.at(Op::Read, begin + at, kBlock)});
                if (at % (16 * kBlock) != 0) continue;  // most are left to themselves
                CHECK(ticket->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Landed);
                CHECK(device.same(begin + at, kBlock));
            }
        });
    }
    for (auto& thread : threads) thread.join();
    CHECK(engine->drain(kForever));
    CHECK(device.same(0, kFileBytes));
    CHECK((engine->unregister_file(device.fd) == 0) == registered);
}

// Both doors of one file at once, and a batch through both: all of it lands.
void doors_side_by_side(Open open_engine) {
    Device device;
    auto engine = open_engine({4, kChunk});
    const int buffered = open(device.path, O_RDWR);
    std::vector<std::shared_ptr<Ticket>> tickets;
    for (std::uint64_t at = 0; at < kFileBytes; at += 4 * kChunk) {
        Transfer through_cache = device.at(Op::Read, at, 2 * kChunk);
        through_cache.fd = buffered;
        const Transfer direct = device.at(Op::Read, at + 2 * kChunk, 2 * kChunk);
        if (at % (8 * kChunk) == 0) {
            tickets.push_back(engine->submit({direct, through_cache}));
        } else {
            tickets.push_back(engine->submit({direct}));
            tickets.push_back(engine->submit({through_cache}));
        }
    }
    for (const auto& ticket : tickets) {
        CHECK(ticket->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Landed);
    }
    CHECK(device.same(0, kFileBytes) && engine->counters().read_bytes == kFileBytes);
    engine->close();
    close(buffered);
}

void writes_and_syncs(Open open_engine) {
    Device device;
    auto engine = open_engine({4, kChunk});
    std::memset(device.memory, 0x5a, kFileBytes);
    auto ticket = engine->submit({device.at(Op::Write, 0, kFileBytes / 2),
                                  {device.fd, Op::SyncRange, 0, kFileBytes / 2, 0},
                                  device.at(Op::Write, kFileBytes / 2, kFileBytes / 2),
                                  {device.fd, Op::DataSync, 0, 0, 0}});
    CHECK(ticket->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Landed);
    std::memset(device.memory, 0, kFileBytes);
    auto back = engine->submit({device.at(Op::Read, 0, kFileBytes)});
    CHECK(back->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Landed);
    CHECK(device.memory[0] == 0x5a && device.memory[kFileBytes - 1] == 0x5a);
    CHECK(engine->counters().sync_ops == 2 && engine->counters().thread_cpu_seconds > 0);
}

void failures_are_told(Open open_engine) {
    Device device;
    auto engine = open_engine({4, kChunk});
    Transfer bad = device.at(Op::Read, 0, kBlock);
    bad.fd = -1;
    auto ticket = engine->submit({device.at(Op::Read, 0, kChunk), bad});
    CHECK(ticket->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Failed);
    CHECK(ticket->failure()->error_number == EBADF && ticket->landed_bytes() == kChunk);
    Transfer beyond = device.at(Op::Read, 0, 2 * kBlock);
    beyond.offset = kFileBytes - kBlock;
    auto end = engine->submit({beyond});
    CHECK(end->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Failed);
    CHECK(end->failure()->error_number == 0 && end->failure()->offset == kFileBytes);
    CHECK(end->landed_bytes() == kBlock);
}

// A plain file in the place of a namespace: what commands can say reaches the kernel, which refuses
// it; what they cannot never gets there. Other descriptors and the table's users are undisturbed.
void namespaces_are_refused_or_addressed(Open open_engine) {
    Device device;
    auto engine = open_engine({4, kChunk});
    const auto space = NvmeNamespace::make({1, 512, kChunk, kFileBytes / 2, kChunk, kBlock});
    CHECK(space && !NvmeNamespace::make({1, 500, kChunk, kFileBytes / 2, kChunk, kBlock}));
    const int added = engine->register_namespace(device.fd, *space);
    if (added != 0) {
        CHECK(added == EOPNOTSUPP);
        return;
    }
    CHECK(engine->register_namespace(device.fd, *space) == 0);  // again: the old one is replaced
    const auto error_of = [&](Transfer transfer) {
        auto ticket = engine->submit({transfer});
        CHECK(ticket->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Failed);
        return ticket->failure()->error_number;
    };
    const int unknown = error_of(device.at(Op::Read, kChunk, kChunk));  // ring, ioctl
    CHECK(unknown == EOPNOTSUPP || unknown == ENOTTY);
    CHECK(error_of(device.at(Op::Write, 0, kBlock)) == EINVAL);
    CHECK(error_of(device.at(Op::Write, kChunk + 1, kBlock)) == EINVAL);
    CHECK(error_of(device.at(Op::Read, kFileBytes / 2, kBlock)) == 0);
    CHECK(error_of(device.at(Op::Write, kFileBytes / 2, kBlock)) == ENOSPC);
    CHECK(engine->unregister_file(device.fd) !=
          0);  // the namespace is forgotten; no file was known
    auto plain = engine->submit({device.at(Op::Read, 0, kChunk)});
    CHECK(plain->wait_until(Ticket::kAll, kForever) == Ticket::Outcome::Landed);
}

// Whatever is under way when the engine goes: every ticket ends, and only then is memory free.
void destroyed_with_everything_under_way(Open open_engine) {
    for (int round = 0; round < 30; ++round) {
        Device device;
        std::vector<std::shared_ptr<Ticket>> tickets;
        {
            auto engine = open_engine({4, kChunk});
            for (int i = 0; i < 20; ++i) {
                tickets.push_back(engine->submit({device.at(Op::Read, 0, kFileBytes)}));
            }
            std::thread other([&] { engine->close(); });
            engine->close();
            other.join();
            CHECK(engine->submit({}) == nullptr);
        }
        for (const auto& ticket : tickets) {
            CHECK(ticket->done());
            if (ticket->failure()) CHECK(ticket->failure()->error_number == ECANCELED);
        }
    }
}

void waiters_meet_a_closing_engine(Open open_engine) {
    Device device;
    auto engine = open_engine({1, kBlock});
    auto ticket = engine->submit({device.at(Op::Read, 0, kFileBytes)});
    std::thread waiter([&] { ticket->wait_until(Ticket::kAll, kForever); });
    std::thread watcher([&] {
        while (!ticket->done()) engine->counters();
    });
    CHECK(ticket->wait_until(kBlock, kForever) == Ticket::Outcome::Landed);
    engine->close();
    waiter.join();
    watcher.join();
    CHECK(device.same(0, ticket->landed_bytes()));
}

// Who closes wakes the engine's thread together with a registration, and must not be forgotten.
void closing_beside_a_registration(Open open_engine) {
    for (int round = 0; round < 1000; ++round) {
        auto engine = open_engine({1, kBlock});
        std::atomic<bool> go{false};
        std::thread other([&] {
            while (!go) std::this_thread::yield();
            engine->unregister_file(0);
        });
        go = true;
        engine->close();
        other.join();
    }
}

}  // namespace

int main() {
    pieces_cover_a_transfer();
    landing_in_any_order();
    short_transfers_are_resumed();
    refusals_are_tried_again_within_bounds();
    failed_syncs_stay_failed();
    a_failed_writeback_is_told_to_all_whom_it_may_be_of();
    failure_waits_for_what_is_in_flight();
    syncs_are_barriers_and_let_others_pass();
    failed_write_keeps_its_sync_from_running();
    closing_cancels_what_has_not_started();
    empty_batches_have_ended();
    depth_counts_only_while_work_waits();
    commands_are_what_the_ioctl_takes();
    std::vector<std::pair<const char*, Open>> engines{{"posix", open_posix_engine}};
#ifdef DUALBLADE_HAVE_URING
    engines.emplace_back("io_uring", open_uring_engine);
#endif
    for (const auto& [name, open_engine] : engines) {
        reads_land_in_order_for_waiters(open_engine);
        many_threads_submit(open_engine);
        doors_side_by_side(open_engine);
        writes_and_syncs(open_engine);
        failures_are_told(open_engine);
        namespaces_are_refused_or_addressed(open_engine);
        destroyed_with_everything_under_way(open_engine);
        waiters_meet_a_closing_engine(open_engine);
        closing_beside_a_registration(open_engine);
        std::printf("%s: passed\n", name);
    }
    return 0;
}
