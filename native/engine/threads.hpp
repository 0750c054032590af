// Threads of an engine: signals stay with the caller's threads, CPU time is counted.
#pragma once

#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <deque>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

namespace dualblade {

class Threads {
  public:
    void start(const char* name, std::function<void()> body) {
        // Signals are blocked in the new thread: Ctrl-C delivered to it would not wake Python's
        // main thread from its own system calls. What it does wrong itself is told as anywhere.
        const SignalsBlocked blocked;
        Usage& usage = usages_.emplace_back();
        threads_.emplace_back([this, &usage, body = std::move(body)] {
            {
                std::lock_guard lock(mutex_);
                pthread_getcpuclockid(pthread_self(), &usage.clock);
                usage.running = true;
            }
            body();
            std::lock_guard lock(mutex_);
            usage.running = false;
            usage.ended_seconds = read_clock(usage.clock);
        });
        pthread_setname_np(threads_.back().native_handle(), name);
    }

    // Idempotent, not concurrent with itself.
    void join() {
        for (std::thread& thread : threads_) thread.join();
        threads_.clear();
    }

    // CPU time of the threads, user and system, running or ended.
    double cpu_seconds() {
        // Without the lock a thread could end, and its clock with it, between look and read.
        std::lock_guard lock(mutex_);
        double total = 0;
        for (const Usage& usage : usages_) {
            total += usage.running ? read_clock(usage.clock) : usage.ended_seconds;
        }
        return total;
    }

  private:
    struct SignalsBlocked {
        sigset_t before;
        SignalsBlocked() {
            sigset_t all;
            sigfillset(&all);
            for (const int own : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, own);
            pthread_sigmask(SIG_SETMASK, &all, &before);
        }
        ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before, nullptr); }
    };
    struct Usage {
        clockid_t clock{};
        bool running = false;
        double ended_seconds = 0;
    };

    static double read_clock(clockid_t clock) {
        timespec used{};
        clock_gettime(clock, &used);
        return static_cast<double>(used.tv_sec) + 1e-9 * static_cast<double>(used.tv_nsec);
    }

    std::mutex mutex_;
    std::deque<Usage> usages_;  // a deque: threads keep references to their entry
    std::vector<std::thread> threads_;
};

}  // namespace dualblade
