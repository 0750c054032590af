// The engine for where io_uring is forbidden: queue_depth threads that call pread and pwrite, or
// hand NVMe commands to the kernel by ioctl.
#include <sys/ioctl.h>
#include <unistd.h>

#include <cerrno>
#include <condition_variable>
#include <thread>
#include <variant>

#include "queue.hpp"
#include "threads.hpp"

namespace dualblade {

namespace {

std::int64_t transfer_once(const Transfer& piece) {
    void* memory = reinterpret_cast<void*>(piece.address);
    const auto offset = static_cast<off_t>(piece.offset);
    ssize_t result = 0;
    switch (piece.op) {
        case Op::Read:
            result = pread(piece.fd, memory, piece.size_bytes, offset);
            break;
        case Op::Write:
            result = pwrite(piece.fd, memory, piece.size_bytes, offset);
            break;
        case Op::SyncRange:
            result =
                sync_file_range(piece.fd, offset, static_cast<off_t>(piece.size_bytes), kSyncFlags);
            break;
        case Op::DataSync:
            result = fdatasync(piece.fd);
            break;
    }
    return result < 0 ? -static_cast<std::int64_t>(errno) : result;
}

// Signals are blocked in this thread, so that EINTR means what it means in a ring: the kernel gave
// the command up.
std::int64_t send_once(int fd, const NvmeCommand& command) {
    auto bytes = command.bytes();  // a copy: the kernel writes its result into it
    const int told = ioctl(fd, NvmeCommand::kIoctlOperation, bytes.data());
    return command.result(told < 0 ? -errno : told);
}

class PosixEngine final : public Queue {
  public:
    explicit PosixEngine(EngineOptions options) : Queue(options) {
        try {
            for (std::uint32_t i = 0; i < options.queue_depth; ++i) {
                threads_.start("dualblade-posix", [this] { serve(); });
            }
        } catch (...) {
            close();  // the threads that did start
            throw;
        }
    }
    ~PosixEngine() override { close(); }

    int register_buffer(std::uint64_t, std::uint64_t, bool) override { return EOPNOTSUPP; }
    int register_file(int) override { return EOPNOTSUPP; }
    int unregister_file(int fd) override {
        auto lock = scheduler_.lock();
        remove_space(fd);
        return EOPNOTSUPP;
    }
    int register_namespace(int fd, const NvmeNamespace& space) override {
        auto lock = scheduler_.lock();
        add_space(fd, space);
        return 0;
    }
    void abandon() override {}

  protected:
    void wake() override { work_or_end_.notify_one(); }
    void join() override {
        work_or_end_.notify_all();
        threads_.join();
    }
    double thread_cpu_seconds() override { return threads_.cpu_seconds(); }

  private:
    void serve() {
        Request request;
        auto lock = scheduler_.lock();
        while (wait_for_work(lock, request)) {
            // A thread that found work wakes the next one if there is more: one submit need not
            // wake all threads for one piece.
            if (scheduler_.work_waits(lock)) work_or_end_.notify_one();
            auto verdict = Scheduler::Verdict::Again;
            while (verdict != Scheduler::Verdict::Ended) {
                const auto answer = answer_of(request.rest);
                lock.unlock();
                if (verdict == Scheduler::Verdict::AgainLater) {
                    std::this_thread::sleep_for(Scheduler::backoff(request));
                }
                const std::int64_t result = carry_out(request.rest, answer);
                lock.lock();
                verdict = scheduler_.finish(lock, request, result);
            }
        }
    }

    using Answer = std::variant<std::monostate, NvmeCommand, std::int64_t>;

    // What a namespace answers to `piece`; monostate: it is on a file or block device. With the
    // lock: the table may change as soon as it is let go.
    Answer answer_of(const Transfer& piece) const {
        const NvmeNamespace* space = space_of(piece.fd);
        if (space == nullptr) return {};
        return std::visit([](auto said) -> Answer { return said; }, space->answer(piece));
    }

    static std::int64_t carry_out(const Transfer& piece, const Answer& answer) {
        if (const auto* command = std::get_if<NvmeCommand>(&answer)) {
            return send_once(piece.fd, *command);
        }
        if (const auto* refused = std::get_if<std::int64_t>(&answer)) return *refused;
        return transfer_once(piece);
    }

    // Without this wait idle threads would spin. False: closed, and nothing is left to do.
    bool wait_for_work(Scheduler::Lock& lock, Request& request) {
        while (!scheduler_.take(lock, request)) {
            if (scheduler_.closed(lock) && scheduler_.idle(lock)) return false;
            ++sleepers_;
            scheduler_.going_to_sleep(lock);
            work_or_end_.wait(lock);
            --sleepers_;
            // A submit wakes one thread: the next submit is to wake one of those left.
            if (sleepers_ > 0) scheduler_.going_to_sleep(lock);
        }
        return true;
    }

    std::condition_variable work_or_end_;
    std::uint32_t sleepers_ = 0;  // under the scheduler's lock
    Threads threads_;
};

}  // namespace

std::unique_ptr<Engine> open_posix_engine(EngineOptions options) {
    return std::make_unique<PosixEngine>(options);
}

}  // namespace dualblade
