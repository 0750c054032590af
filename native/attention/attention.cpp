#include "attention/attention.hpp"

#include <cstring>
#include <limits>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dualblade {

extern const Kernel kernel_plain;
#if defined(__x86_64__)
extern const Kernel kernel_avx2;
extern const Kernel kernel_avx512;
extern const Kernel kernel_amx;
#endif

namespace {

// Work for about this many threads even where one sequence has one head.
constexpr std::int64_t kItemsMin = 16;
constexpr std::int64_t kLanesMax = 8;

// Room for `size` floats; grows, never shrinks, so that a step allocates nothing.
void ensure(LineFloats& buffer, std::int64_t size) {
    if (buffer.size() < static_cast<std::size_t>(size))
        buffer.resize(static_cast<std::size_t>(size));
}

#if defined(__x86_64__)
// Whether the processor multiplies tiles of bfloat16 and Linux lets this process: it saves 8 KiB of
// registers more for each thread that uses them, and wants to be asked (once; threads and forks
// have what their process has).
bool may_use_amx() {
    constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, Linux 5.16
    static const bool may = [] {
        unsigned a, b, c, d;
        return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
               syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    }();
    return may;
}
#endif

}  // namespace

const Kernel* find_kernel(const char* wanted) {
    const auto is_wanted = [&](const Kernel& kernel) {
        return *wanted == '\0' || std::strcmp(wanted, kernel.name) == 0;
    };
#if defined(__x86_64__)
    // What CMakeLists.txt compiles it for.
    const bool has_avx512 =
        __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
    if (is_wanted(kernel_amx) && has_avx512 && may_use_amx()) return &kernel_amx;
    if (is_wanted(kernel_avx512) && has_avx512) return &kernel_avx512;
    if (is_wanted(kernel_avx2) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return &kernel_avx2;
    }
#endif
    return is_wanted(kernel_plain) ? &kernel_plain : nullptr;
}

void Attention::begin(const Query& query) {
    work_.query = query;
    work_.lanes = 1;
    while (work_.lanes < kLanesMax && query.heads() * work_.lanes < kItemsMin) work_.lanes *= 2;
    // As many heads to an item as leave enough items: more of memory is read in its order.
    work_.span = 1;
    for (std::int64_t span = 2; span <= query.kv_heads; ++span) {
        const bool is_even = query.kv_heads % span == 0;
        if (is_even && query.heads() * work_.lanes / span >= kItemsMin / 2) work_.span = span;
    }
    work_.key_stride = round_up(query.key_dim, 2 * kernel_.width);
    work_.value_stride = round_up(query.value_dim, 2 * kernel_.width);
    const std::int64_t states = query.heads() * work_.lanes * query.rows();
    ensure(work_.packed, query.heads() * query.rows() * work_.key_stride);
    work_.maximum.assign(static_cast<std::size_t>(states), -std::numeric_limits<float>::infinity());
    work_.totals.assign(static_cast<std::size_t>(states * kernel_.width), 0.0f);
    const std::int64_t sums = query.heads() * work_.lanes * kernel_.sums(work_);
    work_.sums.assign(static_cast<std::size_t>(sums), 0.0f);
    // Also wakes the threads: they are at hand when the first keys come.
    pool_->run(query.heads(), [&](std::int64_t head) { kernel_.pack(work_, head); });
}

void Attention::make_room(const Run& keys) {
    const std::int64_t rows = work_.query.heads() * work_.query.rows();
    ensure(work_.weights, rows * keys.row_weights());
    ensure(work_.corrections, rows * keys.row_corrections());
}

void Attention::keys(const Run& run) {
    make_room(run);
    pool_->run(work_.items(), [&](std::int64_t item) { kernel_.keys(work_, run, item); });
}

void Attention::values(const Run& run) {
    pool_->run(work_.items(), [&](std::int64_t item) { kernel_.values(work_, run, item); });
}

void Attention::both(const Run& keys, const Run& values) {
    make_room(keys);
    pool_->run(work_.items(), [&](std::int64_t item) {
        kernel_.keys(work_, keys, item);
        kernel_.values(work_, values, item);
    });
}

void Attention::finish(const float* sinks, void* out) {
    pool_->run(work_.query.heads(),
               [&](std::int64_t head) { kernel_.finish(work_, sinks, out, head); });
}

}  // namespace dualblade
