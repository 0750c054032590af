// Attention of a few query rows over keys and values where they lie, with a running softmax.
//
// Per sequence and KV head, tokens are taken in order in blocks of kBlock, counted from the
// beginning of each tile; every kLaneTokens the next of `lanes` independent states takes over, so
// that one head keeps several threads busy. So a run must not be cut inside a block; elsewhere it
// may be, and there may be any number of threads, without changing a bit of the result.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "attention/pool.hpp"

namespace dualblade {

inline constexpr std::int64_t kBlock = 16;
inline constexpr std::int64_t kLaneTokens = 64;
inline constexpr std::int64_t kLineFloats = 16;  // of a cache line

inline std::int64_t round_up(std::int64_t value, std::int64_t unit) {
    return (value + unit - 1) / unit * unit;
}

enum class Element : int { kFloat32 = 0, kBfloat16 = 1 };

// Query [batch, kv_heads * group, tokens, key_dim]; its last token sees itself and all before.
struct Query {
    const void* data = nullptr;
    std::int64_t sequence_stride = 0, head_stride = 0, token_stride = 0;  // elements
    std::int64_t batch = 0, kv_heads = 0, group = 0, tokens = 0;
    std::int64_t key_dim = 0, value_dim = 0;
    std::int64_t past = 0;                        // tokens before the first of the query
    const std::int64_t* first_visible = nullptr;  // [batch], left padding; null: all are seen
    float scale = 1;
    Element element = Element::kFloat32;

    std::int64_t rows() const { return group * tokens; }
    std::int64_t heads() const { return batch * kv_heads; }
};

// Tiles of keys or values: [tiles, sequences, kv_heads, tile_rows, dim], the last one maybe short.
struct Run {
    const void* data = nullptr;
    std::int64_t tile_stride = 0, sequence_stride = 0, head_stride = 0, row_stride = 0;  // elements
    std::int64_t first_token = 0, tokens = 0, tile_rows = 0;
    std::int64_t first_sequence = 0, sequences = 0;  // the stored ones that are here
    const std::int32_t* table = nullptr;  // [tiles, batch]: logical to stored; null: the same

    std::int64_t tiles() const { return (tokens + tile_rows - 1) / tile_rows; }
    // Pieces of a tile that lanes take in turn, at most, wherever it begins.
    std::int64_t tile_stretches() const { return tile_rows / kLaneTokens + 2; }
    std::int64_t row_weights() const { return round_up(tokens, kLineFloats); }
    std::int64_t row_corrections() const { return tiles() * tile_stretches() * kLineFloats; }
};

// Floats in whole cache lines.
template <typename T>
struct LineAllocator {
    using value_type = T;
    LineAllocator() = default;
    template <typename U>
    LineAllocator(const LineAllocator<U>&) {}
    T* allocate(std::size_t count) {
        return static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64}));
    }
    void deallocate(T* memory, std::size_t) { ::operator delete(memory, std::align_val_t{64}); }
    bool operator==(const LineAllocator&) const { return true; }
};
using LineFloats = std::vector<float, LineAllocator<float>>;

// What the kernels of one instruction set work on; rows are group x tokens of one KV head. Lanes of
// a head are taken by several threads at a time: what each writes at every stretch has cache lines
// of its own, but for totals of few rows.
struct Work {
    Query query;
    std::int64_t lanes = 1;                         // a power of two
    std::int64_t span = 1;                          // KV heads of one sequence that an item takes
    std::int64_t key_stride = 0, value_stride = 0;  // floats of a packed row

    std::int64_t items() const { return query.heads() / span * lanes; }

    LineFloats packed;       // [heads, rows, key_stride], scaled, base 2 (AMX: neither)
    LineFloats maximum;      // [heads, lanes, rows]
    LineFloats totals;       // [heads, lanes, rows, width], partial sums
    LineFloats sums;         // [heads, lanes, Kernel::sums]
    LineFloats weights;      // [heads, rows, Run::row_weights]
    LineFloats corrections;  // [heads, rows, Run::row_corrections]: of each block of a stretch
};

// One instruction set's way of doing it. `item` is lanes * (number of the span) + lane.
struct Kernel {
    const char* name;
    std::int64_t width;                 // floats in a vector
    std::int64_t (*sums)(const Work&);  // floats for the sums of values of one state
    void (*pack)(Work&, std::int64_t head);
    void (*keys)(Work&, const Run&, std::int64_t item);
    void (*values)(Work&, const Run&, std::int64_t item);
    void (*finish)(Work&, const float* sinks, void* out, std::int64_t head);
};

// The best that this machine has; `wanted` names another one, for tests. Null: not here.
const Kernel* find_kernel(const char* wanted);

// One attention call after another: begin, then keys and values of each run in turn, then finish.
// Used by one thread at a time.
class Attention {
  public:
    Attention(int threads, const Kernel& kernel) : pool_(new Pool(threads)), kernel_(kernel) {}
    ~Attention() {  // in a forked child the threads do not exist: joining them would hang
        if (getpid() != owner_) static_cast<void>(pool_.release());
    }

    void begin(const Query& query);
    void keys(const Run& run);
    void values(const Run& run);  // of the same tokens as the last keys()
    // Both at once: a thread goes on to an item's values without a wait for the other items.
    void both(const Run& keys, const Run& values);
    // out [batch, tokens, kv_heads * group, value_dim]; sinks [kv_heads * group] or null.
    void finish(const float* sinks, void* out);

    const char* kernel_name() const { return kernel_.name; }

  private:
    void make_room(const Run& keys);

    const pid_t owner_ = getpid();
    std::unique_ptr<Pool> pool_;
    const Kernel& kernel_;
    Work work_;
};

}  // namespace dualblade
