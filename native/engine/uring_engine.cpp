// The io_uring engine: two queues, one for each door.
//
// A page-cache hit is copied by the thread that submits it, inside io_uring_enter: in one ring a
// direct read behind it waits for the copy, and so does the completion that would refill the
// drive's queue. Measured on two cores, hits and direct reads mixed half and half in runs of 4 to
// 64 MiB: a queue of its own for each gives 1.4 times the bytes per second.
#include <fcntl.h>

#include <algorithm>
#include <mutex>
#include <utility>

#include "uring_queue.hpp"

namespace dualblade {

namespace {

// Pages written at once become one folio: of 2 MiB, where they are aligned to it, and mapped by one
// entry of the page table, which reading in place is twice as fast with. A write of the page cache
// keeps no drive waiting, so a whole staging slot goes as one.
constexpr std::uint64_t kBufferedWriteBytes = 4 << 20;

EngineOptions for_page_cache(EngineOptions options) {
    options.write_piece_bytes_min = kBufferedWriteBytes;
    return options;
}

class UringEngine final : public Engine {
  public:
    explicit UringEngine(EngineOptions options)
        : buffered_(open_uring_queue(for_page_cache(options), false)),
          direct_(open_uring_queue(options, options.poll_direct)) {}

    std::shared_ptr<Ticket> submit(std::vector<Transfer> transfers) override {
        Queue& queue = all_direct(transfers) ? *direct_ : *buffered_;
        return queue.submit(std::move(transfers));
    }
    bool drain(Clock::time_point deadline) override {
        return buffered_->drain(deadline) && direct_->drain(deadline);
    }
    Counters counters() override {
        Counters counters = buffered_->counters();
        counters.direct_busy_seconds = 0;
        counters += direct_->counters();
        return counters;
    }
    void begin_close() override {
        buffered_->begin_close();
        direct_->begin_close();
    }
    void close() override {
        begin_close();
        buffered_->close();
        direct_->close();
    }

    // The direct queue alone: memory that is pinned twice counts twice against the memlock limit,
    // and what registering saves is pinning, which a copy from the page cache does not do.
    int register_buffer(std::uint64_t address, std::uint64_t size_bytes, bool huge) override {
        return direct_->register_buffer(address, size_bytes, huge);
    }
    int register_file(int fd) override {
        const int error = buffered_->register_file(fd);
        return error != 0 ? error : direct_->register_file(fd);
    }
    int unregister_file(int fd) override {
        {
            std::lock_guard lock(mutex_);
            std::erase(spaces_, fd);
        }
        const int error = buffered_->unregister_file(fd);
        return std::max(error, direct_->unregister_file(fd));
    }
    int register_namespace(int fd, const NvmeNamespace& space) override {
        int error = buffered_->register_namespace(fd, space);
        if (error == 0) error = direct_->register_namespace(fd, space);
        if (error != 0) return error;
        std::lock_guard lock(mutex_);
        std::erase(spaces_, fd);
        spaces_.push_back(fd);
        return 0;
    }
    void limit_direct_pieces(std::uint64_t size_bytes) override {
        direct_->limit_direct_pieces(size_bytes);
    }
    void abandon() override {
        buffered_->abandon();
        direct_->abandon();
    }

  private:
    // A batch goes through one queue, or its syncs would not wait for its writes. Flushes are no
    // work for a ring that polls, so a batch with one goes the ordinary way.
    bool all_direct(const std::vector<Transfer>& transfers) {
        int known = -1;
        for (const Transfer& transfer : transfers) {
            if (!moves_bytes(transfer.op)) return false;
            if (transfer.fd == known) continue;
            if (!is_direct(transfer.fd)) return false;
            known = transfer.fd;
        }
        return !transfers.empty();
    }

    bool is_direct(int fd) {
        const int flags = fcntl(fd, F_GETFL);
        if (flags < 0) return false;
        if (flags & O_DIRECT) return true;
        std::lock_guard lock(mutex_);
        return std::find(spaces_.begin(), spaces_.end(), fd) != spaces_.end();
    }

    const std::unique_ptr<Queue> buffered_, direct_;
    // Any thread submits while another introduces a namespace.
    std::mutex mutex_;
    std::vector<int> spaces_;
};

}  // namespace

std::unique_ptr<Engine> open_uring_engine(EngineOptions options) {
    return std::make_unique<UringEngine>(options);
}

}  // namespace dualblade
