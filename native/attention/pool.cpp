#include "attention/pool.hpp"

#include <chrono>
#include <system_error>
#include <thread>

namespace dualblade {
namespace {

// Jobs follow each other within tens of microseconds while tiles are at hand; a sleeping thread
// takes as long to wake.
constexpr auto kSpin = std::chrono::microseconds(50);

template <typename Done>
bool spin_until(Done done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    while (!done()) {
        if (std::chrono::steady_clock::now() > end) return false;
        std::this_thread::yield();  // another thread of ours may need the core
    }
    return true;
}

}  // namespace

Pool::Pool(int threads) : parts_(static_cast<std::size_t>(threads)) {
    for (std::size_t part = 1; part < parts_.size(); ++part) {
        try {
            threads_.start("db-attend", [this, part] { work(part); });
        } catch (const std::system_error&) {
            return;  // a limit on processes: who is there takes all parts
        }
    }
}

Pool::~Pool() {
    {
        std::lock_guard lock(mutex_);
        ending_ = true;
    }
    wake_.notify_all();
    threads_.join();
}

void Pool::run(std::int64_t items, const std::function<void(std::int64_t)>& body) {
    if (parts_.size() < 2 || items < 2) {
        for (std::int64_t item = 0; item < items; ++item) body(item);
        return;
    }
    {
        std::lock_guard lock(mutex_);
        body_ = &body;
        const auto count = static_cast<std::int64_t>(parts_.size());
        for (std::int64_t i = 0; i < count; ++i) {
            Part& part = parts_[static_cast<std::size_t>(i)];
            part.next = i * items / count;
            part.end = (i + 1) * items / count;
        }
        ++job_;
    }
    wake_.notify_all();
    // However it ends: without the wait a helper could still work on its last item.
    const struct Closing {
        Pool& pool;
        ~Closing() {
            {
                std::lock_guard lock(pool.mutex_);
                ++pool.job_;  // closed: a helper that wakes from here on finds nothing to do
            }
            while (pool.active_ != 0) std::this_thread::yield();
        }
    } closing{*this};
    take(0);
}

void Pool::take(std::size_t first) {
    for (std::size_t i = 0; i < parts_.size(); ++i) {
        Part& part = parts_[(first + i) % parts_.size()];
        std::int64_t item;
        while ((item = part.next.fetch_add(1)) < part.end) (*body_)(item);
    }
}

void Pool::work(std::size_t part) {
    std::uint64_t seen = 0;
    while (true) {
        spin_until([&] { return ending_ || (job_ != seen && job_ % 2 == 1); });
        {
            std::unique_lock lock(mutex_);
            wake_.wait(lock, [&] { return ending_ || (job_ != seen && job_ % 2 == 1); });
            if (ending_) return;
            seen = job_;
            ++active_;  // under the lock that closes the job: the caller waits for us
        }
        take(part);
        --active_;
    }
}

}  // namespace dualblade
