// Python's view of the engine: numbers in, numbers out. Errors get their words in dualblade.io.
#include <Python.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <memory>
#include <string>
#include <system_error>
#include <vector>

#include "engine/engine.hpp"

namespace nb = nanobind;
using namespace dualblade;

namespace {

// A wait wakes this often to let Ctrl-C through: Python runs signal handlers in this thread only.
constexpr auto kSignalCheck = std::chrono::milliseconds(100);

// What a wait ended with; dualblade.io knows these numbers.
enum WaitResult { kLanded = 0, kFailed = 1, kTimedOut = 2, kForked = 3 };

Clock::time_point deadline_after(double seconds) {
    // Beyond a year is for ever; it also keeps the sum below within the clock's range.
    constexpr double kForever = 365.0 * 24 * 3600;
    if (!(seconds < kForever)) return Clock::time_point::max();
    return Clock::now() + std::chrono::duration_cast<Clock::duration>(
                              std::chrono::duration<double>(std::max(seconds, 0.0)));
}

// Calls wait(deadline) with Python's lock released until it answers true or `deadline` has passed.
// Throws what a signal handler raised.
template <typename Wait>
bool wait_in_slices(Clock::time_point deadline, Wait wait) {
    while (true) {
        const auto now = Clock::now();
        bool ended;
        {
            nb::gil_scoped_release released;
            ended = wait(deadline - now < kSignalCheck ? deadline : now + kSignalCheck);
        }
        if (ended) return true;
        if (PyErr_CheckSignals() != 0) throw nb::python_error();
        if (Clock::now() >= deadline) return false;
    }
}

struct PyTicket {
    std::shared_ptr<Ticket> ticket;
    pid_t owner;

    int wait(std::uint64_t bytes, double timeout_seconds) const {
        if (ticket->done() || ticket->landed_bytes() >= bytes) return ended(bytes);
        if (getpid() != owner) return kForked;  // nobody is left to finish it
        const bool in_time =
            wait_in_slices(deadline_after(timeout_seconds), [&](Clock::time_point deadline) {
                return ticket->wait_until(bytes, deadline) != Ticket::Outcome::TimedOut;
            });
        return in_time ? ended(bytes) : kTimedOut;
    }
    int ended(std::uint64_t bytes) const {
        if (bytes != Ticket::kAll && ticket->landed_bytes() >= bytes) return kLanded;
        return ticket->failure() ? kFailed : kLanded;
    }
    nb::object failure() const {
        const auto failure = ticket->failure();
        if (!failure) return nb::none();
        return nb::make_tuple(failure->error_number, static_cast<int>(failure->op), failure->fd,
                              failure->offset, failure->size_bytes);
    }
};

Transfer transfer_from(nb::handle item) {
    const auto fields = nb::cast<nb::tuple>(item);
    if (fields.size() != 5) throw nb::value_error("a transfer has 5 fields");
    const int op = nb::cast<int>(fields[1]);
    if (op < 0 || op > static_cast<int>(Op::DataSync)) throw nb::value_error("unknown operation");
    const Transfer transfer{nb::cast<int>(fields[0]), static_cast<Op>(op),
                            nb::cast<std::uint64_t>(fields[2]), nb::cast<std::uint64_t>(fields[3]),
                            nb::cast<std::uint64_t>(fields[4])};
    // Offsets are signed in the kernel, and no transfer may wrap around.
    constexpr std::uint64_t kMax = INT64_MAX;
    if (transfer.size_bytes > kMax || transfer.offset > kMax - transfer.size_bytes) {
        throw nb::value_error("offset and size pass 2**63");
    }
    return transfer;
}

NvmeNamespace namespace_from(const nb::tuple& fields) {
    if (fields.size() != 6) throw nb::value_error("limits of a namespace have 6 fields");
    const auto number = [&](int i) { return nb::cast<std::uint64_t>(fields[i]); };
    const auto space = NvmeNamespace::make({nb::cast<std::uint32_t>(fields[0]), number(1),
                                            number(2), number(3), number(4), number(5)});
    if (!space) throw nb::value_error("limits that no namespace can have");
    return *space;
}

// The encoder by itself, for tests: the command's bytes, or None.
nb::object nvme_command(const nb::tuple& limits, nb::handle transfer) {
    const auto command = namespace_from(limits).command(transfer_from(transfer));
    if (!command) return nb::none();
    return nb::bytes(reinterpret_cast<const char*>(command->bytes().data()), NvmeCommand::kBytes);
}

class PyEngine {
  public:
    PyEngine(const std::string& kind, std::uint32_t queue_depth, std::uint64_t chunk_bytes,
             bool poll_direct)
        : owner_(getpid()) {
        const EngineOptions options{queue_depth, chunk_bytes, poll_direct};
        try {
            engine_ = kind == "posix" ? open_posix_engine(options) : open_uring(options);
        } catch (const std::system_error& error) {
            errno = error.code().value();
            PyErr_SetFromErrno(PyExc_OSError);
            throw nb::python_error();
        }
    }
    ~PyEngine() {
        // In a forked child the threads do not exist: joining them would hang or abort.
        [[maybe_unused]] auto* leaked = forked() ? engine_.release() : nullptr;
        // An engine that was not closed waits here for what is in flight.
        nb::gil_scoped_release released;
        engine_.reset();
    }

    bool forked() const { return getpid() != owner_; }
    void abandon() { engine_->abandon(); }

    // None: closed, or this is a forked child.
    nb::object submit(nb::handle items) {
        std::vector<Transfer> transfers;
        for (nb::handle item : items) transfers.push_back(transfer_from(item));
        if (forked()) return nb::none();
        auto ticket = engine_->submit(std::move(transfers));
        if (!ticket) return nb::none();
        return nb::cast(PyTicket{std::move(ticket), owner_});
    }
    nb::tuple counters() {
        if (forked()) return nb::make_tuple();
        const Counters c = engine_->counters();
        return nb::make_tuple(c.read_ops, c.read_bytes, c.write_ops, c.write_bytes, c.sync_ops,
                              c.errors, c.retries, c.short_transfers, c.busy_seconds,
                              c.depth_seconds, c.backlog_seconds, c.backlog_depth_seconds,
                              c.thread_cpu_seconds, c.direct_busy_seconds);
    }
    int register_buffer(std::uint64_t address, std::uint64_t size_bytes, bool huge) {
        return on_engine([&] { return engine_->register_buffer(address, size_bytes, huge); });
    }
    int register_namespace(int fd, const nb::tuple& limits) {
        const NvmeNamespace space = namespace_from(limits);
        return on_engine([&] { return engine_->register_namespace(fd, space); });
    }
    int register_file(int fd) {
        return on_engine([&] { return engine_->register_file(fd); });
    }
    int unregister_file(int fd) {
        return on_engine([&] { return engine_->unregister_file(fd); });
    }
    void limit_direct_pieces(std::uint64_t size_bytes) {
        if (size_bytes == 0) throw nb::value_error("pieces of nothing");
        if (!forked()) engine_->limit_direct_pieces(size_bytes);
    }
    bool drain(double timeout_seconds) {
        if (forked()) return true;
        return wait_in_slices(deadline_after(timeout_seconds), [this](Clock::time_point deadline) {
            return engine_->drain(deadline);
        });
    }
    void close() {
        if (forked()) return;
        engine_->begin_close();
        // In slices, or a device that hangs would take Ctrl-C with it.
        drain(INFINITY);
        nb::gil_scoped_release released;
        engine_->close();
    }

  private:
    static std::unique_ptr<Engine> open_uring([[maybe_unused]] EngineOptions options) {
#ifdef DUALBLADE_HAVE_URING
        return open_uring_engine(options);
#else
        throw std::system_error(ENOSYS, std::generic_category());
#endif
    }
    template <typename Call>
    int on_engine(Call call) {
        if (forked()) return ECANCELED;
        nb::gil_scoped_release released;
        return call();
    }

    const pid_t owner_;
    std::unique_ptr<Engine> engine_;
};

}  // namespace

NB_MODULE(_native, module) {
    // An engine or ticket in a global of the user's is no bug of ours to report at exit.
    nb::set_leak_warnings(false);
#ifdef DUALBLADE_HAVE_URING
    module.attr("HAVE_URING") = true;
#else
    module.attr("HAVE_URING") = false;
#endif
    module.def("nvme_command", &nvme_command, nb::arg("limits"), nb::arg("transfer"));
    nb::class_<PyTicket>(module, "Ticket")
        .def_prop_ro("size_bytes", [](const PyTicket& self) { return self.ticket->size_bytes(); })
        .def_prop_ro("done", [](const PyTicket& self) { return self.ticket->done(); })
        .def_prop_ro("landed_bytes",
                     [](const PyTicket& self) { return self.ticket->landed_bytes(); })
        .def_prop_ro("ended_ns", [](const PyTicket& self) { return self.ticket->ended_ns(); })
        .def_prop_ro("failure", &PyTicket::failure)
        .def("wait", &PyTicket::wait, nb::arg("size_bytes"), nb::arg("timeout_seconds"));
    nb::class_<PyEngine>(module, "Engine")
        .def(nb::init<const std::string&, std::uint32_t, std::uint64_t, bool>(), nb::arg("kind"),
             nb::arg("queue_depth"), nb::arg("chunk_bytes"), nb::arg("poll_direct"))
        .def("submit", &PyEngine::submit, nb::arg("transfers"))
        .def("counters", &PyEngine::counters)
        .def("register_buffer", &PyEngine::register_buffer, nb::arg("address"),
             nb::arg("size_bytes"), nb::arg("huge"))
        .def("register_namespace", &PyEngine::register_namespace, nb::arg("fd"), nb::arg("limits"))
        .def("register_file", &PyEngine::register_file, nb::arg("fd"))
        .def("unregister_file", &PyEngine::unregister_file, nb::arg("fd"))
        .def("limit_direct_pieces", &PyEngine::limit_direct_pieces, nb::arg("size_bytes"))
        .def("drain", &PyEngine::drain, nb::arg("timeout_seconds"))
        .def("close", &PyEngine::close)
        .def("abandon", &PyEngine::abandon)
        .def_prop_ro("forked", &PyEngine::forked);
}
