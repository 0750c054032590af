#include "uring_ring.hpp"

#include <poll.h>
#include <sys/eventfd.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <system_error>
#include <utility>

namespace dualblade {

namespace {

// What NVMe commands need (5.19): room for one in a submission entry, and for its result. Always
// asked for: a ring serves both doors of a store, and 64 bytes more an entry cost nothing seen.
constexpr unsigned kWideFlags = IORING_SETUP_SQE128 | IORING_SETUP_CQE32;
// Best first. SINGLE_ISSUER + DEFER_TASKRUN (6.1): completions are worked off when this thread
// asks, never by interrupting it. COOP_TASKRUN (5.19) is the next best.
constexpr unsigned kSetupFlags[] = {
    IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN | IORING_SETUP_SUBMIT_ALL | kWideFlags,
    IORING_SETUP_COOP_TASKRUN | IORING_SETUP_SUBMIT_ALL | kWideFlags,
    0,
};

}  // namespace

int setup_ring(unsigned entries, bool polled, io_uring& ring) {
    int error = 0;
    for (const unsigned flags : kSetupFlags) {
        const unsigned poll = polled ? IORING_SETUP_IOPOLL : 0;
        error = -io_uring_queue_init(entries, &ring, flags | poll);
        if (error != EINVAL) break;
    }
    return error;
}

bool ring_carries_nvme(io_uring& ring) {
    if ((ring.flags & kWideFlags) != kWideFlags) return false;
    io_uring_probe* probe = io_uring_get_probe_ring(&ring);
    const bool known = probe != nullptr && io_uring_opcode_supported(probe, IORING_OP_URING_CMD);
    io_uring_free_probe(probe);
    return known;
}

bool commands_take_registered_memory() {
    utsname kernel{};
    int major = 0, minor = 0;
    return uname(&kernel) == 0 && std::sscanf(kernel.release, "%d.%d", &major, &minor) == 2 &&
           std::pair(major, minor) >= std::pair(6, 12);
}

int prove_ring(io_uring& ring) {
    io_uring_probe* probe = io_uring_get_probe_ring(&ring);
    if (probe == nullptr) return ENOSYS;
    bool all = true;
    for (const int op : {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_READ_FIXED,
                         IORING_OP_WRITE_FIXED, IORING_OP_FSYNC, IORING_OP_SYNC_FILE_RANGE}) {
        all = all && io_uring_opcode_supported(probe, op);
    }
    io_uring_free_probe(probe);
    if (!all) return ENOSYS;
    io_uring_sqe* sqe = io_uring_get_sqe(&ring);
    io_uring_prep_nop(sqe);
    // By a kernel worker, which syncs need: where none may be made they would be cancelled. A ring
    // that polls has no syncs.
    if (!(ring.flags & IORING_SETUP_IOPOLL)) io_uring_sqe_set_flags(sqe, IOSQE_ASYNC);
    int entered = 0;
    do {  // stopping or freezing the process ends a wait early, and says nothing of the ring
        entered = io_uring_submit_and_wait(&ring, 1);
    } while (entered == -EINTR || (entered >= 0 && io_uring_cq_ready(&ring) == 0));
    if (entered < 0) return -entered;
    io_uring_cqe* cqe = nullptr;
    if (const int error = io_uring_peek_cqe(&ring, &cqe)) return -error;
    const int result = cqe->res;
    io_uring_cqe_seen(&ring, cqe);
    return result < 0 ? -result : 0;
}

Event::Event() : fd_(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)) {
    if (fd_ < 0) throw std::system_error(errno, std::generic_category(), "eventfd");
}

Event::~Event() {
    close(fd_);
}

void Event::signal() const {
    const std::uint64_t one = 1;
    [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
}

void Event::clear() const {
    std::uint64_t count;
    [[maybe_unused]] const ssize_t drained = read(fd_, &count, sizeof count);
}

void Event::wait() const {
    pollfd wanted{fd_, POLLIN, 0};
    poll(&wanted, 1, -1);
    clear();
}

}  // namespace dualblade
