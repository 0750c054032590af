// Threads that take numbered items of one job after another. Each begins with a part of its own,
// the same in every job of as many items, because what one job left in a core's cache is what the
// next one reads there; who has done his part takes from the others'.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

#include "engine/threads.hpp"

namespace dualblade {

// The caller works too, and alone when the others are held up: another program on a core costs
// that core and no more. `run` is called by one thread at a time.
class Pool {
  public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // body(0) ... body(items - 1), in any order, on any thread; all have ended at return.
    void run(std::int64_t items, const std::function<void(std::int64_t)>& body);

  private:
    // Of one thread: the next item that nobody has taken, on a cache line of its own.
    struct alignas(64) Part {
        std::atomic<std::int64_t> next{0};
        std::int64_t end = 0;
    };

    void work(std::size_t part);
    void take(std::size_t part);

    Threads threads_;
    std::vector<Part> parts_;  // the caller's is the first
    std::mutex mutex_;
    std::condition_variable wake_;
    std::atomic<std::uint64_t> job_{0};  // odd while one is open; changed under the lock
    std::atomic<int> active_{0};
    const std::function<void(std::int64_t)>* body_ = nullptr;
    std::atomic<bool> ending_{false};
};

}  // namespace dualblade
