// Attention over tiles in C++, to be run under sanitizers: `native/check.sh`. Every kernel of this
// machine against plain sums in double, in shapes around the edges of blocks, tiles and vectors.
#include "attention/attention.hpp"

#include <sys/mman.h>

#include <atomic>
#include <bit>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <vector>

using namespace dualblade;

#if defined(__x86_64__)
namespace dualblade {
extern const Kernel kernel_amx;
}
#endif

#define CHECK(condition)                                                                 \
    do {                                                                                 \
        if (!(condition)) {                                                              \
            std::fprintf(stderr, "%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
            std::exit(1);                                                                \
        }                                                                                \
    } while (false)

namespace {

struct Shape {
    std::int64_t batch, kv_heads, group, tokens, key_dim, value_dim, tile_rows, past;
    bool padded, reordered;
};

// Elements at the very end of what may be read: no sanitizer sees what tile registers load, so a
// step beyond it ends the test.
class Elements {
  public:
    Elements(const std::vector<float>& from, std::int64_t count, Element element)
        : size_(element == Element::kFloat32 ? 4 : 2),
          pages_((static_cast<std::size_t>(count * size_) + kPage - 1) / kPage * kPage) {
        void* all = mmap(nullptr, pages_ + kPage, PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        CHECK(all != MAP_FAILED);
        memory_ = static_cast<char*>(all);
        CHECK(mprotect(memory_ + pages_, kPage, PROT_NONE) == 0);
        first_ = memory_ + pages_ - count * size_;
        for (std::int64_t i = 0; i < count; ++i) {
            // Little-endian: the upper half of a float is its bfloat16.
            const float* one = &from[static_cast<std::size_t>(i)];
            std::memcpy(first_ + i * size_, reinterpret_cast<const char*>(one) + 4 - size_,
                        static_cast<std::size_t>(size_));
        }
    }
    ~Elements() { munmap(memory_, pages_ + kPage); }
    Elements(const Elements&) = delete;
    Elements& operator=(const Elements&) = delete;

    const void* at(std::int64_t i) const { return first_ + i * size_; }

  private:
    static constexpr std::size_t kPage = 4096;
    std::int64_t size_;
    std::size_t pages_;
    char* memory_;
    char* first_;
};

// Keys and values of whole tiles [tiles, batch, kv_heads, tile_rows, dim] and of the rest.
struct Case {
    Shape shape;
    Element element;
    std::vector<float> query, keys, values;
    std::vector<std::int64_t> first_visible;
    std::vector<std::int32_t> table;

    Case(const Shape& wanted, Element of) : shape(wanted), element(of) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        const auto fill = [&](std::vector<float>& rows, std::int64_t count) {
            rows.resize(static_cast<std::size_t>(count));
            for (float& value : rows) {
                value = normal(random);
                if (element == Element::kFloat32) continue;
                value = std::bit_cast<float>(std::bit_cast<std::uint32_t>(value) & 0xffff0000u);
            }
        };
        const std::int64_t rows = tiles() * shape.batch * shape.kv_heads * shape.tile_rows;
        fill(query, shape.batch * shape.kv_heads * shape.group * shape.tokens * shape.key_dim);
        fill(keys, rows * shape.key_dim);
        fill(values, rows * shape.value_dim);
        for (std::int64_t b = 0; b < shape.batch; ++b) {
            first_visible.push_back(shape.padded ? std::min<std::int64_t>(b * 11, shape.past) : 0);
        }
        for (std::int64_t i = 0; i < tiles() * shape.batch; ++i) {
            const auto same = static_cast<std::int32_t>(i % shape.batch);
            table.push_back(shape.reordered ? static_cast<std::int32_t>(
                                                  random() % static_cast<unsigned>(shape.batch))
                                            : same);
        }
    }

    std::int64_t all() const { return shape.past + shape.tokens; }
    std::int64_t tiles() const { return (all() + shape.tile_rows - 1) / shape.tile_rows; }

    const float* row(const std::vector<float>& rows, std::int64_t dim, std::int64_t b,
                     std::int64_t head, std::int64_t token) const {
        const std::int64_t tile = token / shape.tile_rows;
        const std::int64_t stored = table[static_cast<std::size_t>(tile * shape.batch + b)];
        const std::int64_t at =
            ((tile * shape.batch + stored) * shape.kv_heads + head) * shape.tile_rows +
            token % shape.tile_rows;
        return rows.data() + at * dim;
    }

    // Keys or values up to the last token's row; what the last tile has behind it is left out.
    std::int64_t used(std::int64_t dim) const {
        const std::int64_t slabs = tiles() * shape.batch * shape.kv_heads;
        return (slabs * shape.tile_rows - (tiles() * shape.tile_rows - all())) * dim;
    }

    Run run(const Elements& rows, std::int64_t dim, std::int64_t tile, std::int64_t count) const {
        Run part;
        part.head_stride = shape.tile_rows * dim;
        part.sequence_stride = shape.kv_heads * part.head_stride;
        part.tile_stride = shape.batch * part.sequence_stride;
        part.row_stride = dim;
        part.data = rows.at(tile * part.tile_stride);
        part.first_token = tile * shape.tile_rows;
        part.tokens = std::min(count * shape.tile_rows, all() - part.first_token);
        part.tile_rows = shape.tile_rows;
        part.sequences = shape.batch;
        part.table = table.data() + tile * shape.batch;
        return part;
    }

    std::vector<float> attend(Attention& attention, std::int64_t step) const {
        const Elements queries(query, static_cast<std::int64_t>(query.size()), element);
        const Elements all_keys(keys, used(shape.key_dim), element);
        const Elements all_values(values, used(shape.value_dim), element);
        Query asked;
        asked.data = queries.at(0);
        asked.element = element;
        asked.token_stride = shape.key_dim;
        asked.head_stride = shape.tokens * shape.key_dim;
        asked.sequence_stride = shape.kv_heads * shape.group * asked.head_stride;
        asked.batch = shape.batch;
        asked.kv_heads = shape.kv_heads;
        asked.group = shape.group;
        asked.tokens = shape.tokens;
        asked.key_dim = shape.key_dim;
        asked.value_dim = shape.value_dim;
        asked.past = shape.past;
        asked.first_visible = first_visible.data();
        asked.scale = 0.3f;
        std::vector<float> out(static_cast<std::size_t>(
            shape.batch * shape.tokens * shape.kv_heads * shape.group * shape.value_dim));
        std::vector<std::uint16_t> halves(out.size());
        attention.begin(asked);
        for (std::int64_t tile = 0; tile < tiles(); tile += step) {
            const std::int64_t count = std::min(step, tiles() - tile);
            const Run some_keys = run(all_keys, shape.key_dim, tile, count);
            const Run some_values = run(all_values, shape.value_dim, tile, count);
            if (tile / step % 2 == 1) {
                attention.both(some_keys, some_values);
                continue;
            }
            attention.keys(some_keys);
            attention.values(some_values);
        }
        if (element == Element::kFloat32) {
            attention.finish(nullptr, out.data());
            return out;
        }
        attention.finish(nullptr, halves.data());
        for (std::size_t i = 0; i < out.size(); ++i) {
            out[i] = std::bit_cast<float>(std::uint32_t{halves[i]} << 16);
        }
        return out;
    }

    void check(const std::vector<float>& out) const {
        std::size_t at = 0;
        const std::int64_t heads = shape.kv_heads * shape.group;
        for (std::int64_t b = 0; b < shape.batch; ++b) {
            for (std::int64_t t = 0; t < shape.tokens; ++t) {
                for (std::int64_t head = 0; head < heads; ++head) {
                    const float* asked =
                        query.data() + ((b * heads + head) * shape.tokens + t) * shape.key_dim;
                    std::vector<double> sums(static_cast<std::size_t>(shape.value_dim));
                    double total = 0;
                    for (std::int64_t token = first_visible[static_cast<std::size_t>(b)];
                         token <= shape.past + t; ++token) {
                        double score = 0;
                        const float* key = row(keys, shape.key_dim, b, head / shape.group, token);
                        for (std::int64_t i = 0; i < shape.key_dim; ++i) {
                            score += double{asked[i]} * double{key[i]};
                        }
                        const double weight = std::exp(0.3 * score);
                        total += weight;
                        const float* value =
                            row(values, shape.value_dim, b, head / shape.group, token);
                        for (std::size_t i = 0; i < sums.size(); ++i)
                            sums[i] += weight * double{value[i]};
                    }
                    // Half a unit in the last of bfloat16's 8 bits, and 1e-4 for all the rest.
                    const double rounding = element == Element::kFloat32 ? 0 : 1.0 / 256;
                    for (const double sum : sums) {
                        const double right = sum / total;
                        CHECK(std::abs(out[at++] - right) < 1e-4 + rounding * std::abs(right));
                    }
                }
            }
        }
    }
};

void kernels_agree_with_plain_sums() {
    const std::vector<Shape> shapes{
        {1, 1, 1, 1, 64, 64, 64, 0, false, false},     {1, 1, 1, 1, 64, 64, 64, 63, false, false},
        {2, 3, 3, 1, 64, 64, 64, 200, true, false},    {3, 2, 4, 5, 80, 48, 16, 97, true, true},
        {2, 2, 7, 2, 20, 24, 4, 50, false, true},      {4, 8, 1, 1, 128, 128, 128, 300, true, true},
        {1, 1, 2, 16, 256, 64, 512, 700, false, false}};
    for (const char* name : {"amx", "avx512", "avx2", "plain"}) {
        const Kernel* kernel = find_kernel(name);
        if (kernel == nullptr) continue;
        for (const int threads : {1, 3}) {
            Attention attention(threads, *kernel);
            for (const Shape& shape : shapes) {
                for (const Element element : {Element::kFloat32, Element::kBfloat16}) {
                    const Case one(shape, element);
                    const std::vector<float> out = one.attend(attention, 1);
                    one.check(out);
                    CHECK(one.attend(attention, 3) == out);
                }
            }
        }
        std::printf("%s: passed\n", name);
    }
}

// Nothing is written, and nothing is divided by the rows. What the tile kernel does without its
// registers is done on machines without them, too.
void a_query_without_tokens_is_answered() {
    for (const char* name : {"amx", "avx512", "avx2", "plain"}) {
        const Kernel* kernel = find_kernel(name);
        if (kernel == nullptr) continue;
        Attention attention(2, *kernel);
        for (const Element element : {Element::kFloat32, Element::kBfloat16}) {
            const Case none({2, 2, 3, 0, 64, 64, 64, 100, true, false}, element);
            CHECK(none.attend(attention, 1).empty());
        }
    }
#if defined(__x86_64__)
    if (find_kernel("avx512") == nullptr) return;
    Work work;
    work.query.element = Element::kBfloat16;
    work.query.kv_heads = work.query.group = 1;
    work.value_stride = 64;
    CHECK(kernel_amx.sums(work) == 0);
    kernel_amx.pack(work, 0);
    kernel_amx.finish(work, nullptr, nullptr, 0);
#endif
}

void pools_run_every_item_once() {
    for (const int threads : {1, 2, 4}) {
        Pool pool(threads);
        for (std::int64_t items = 0; items < 200; ++items) {
            std::vector<int> done(static_cast<std::size_t>(items));
            pool.run(items, [&](std::int64_t item) { ++done[static_cast<std::size_t>(item)]; });
            for (const int count : done) CHECK(count == 1);
        }
    }
}

// Helpers go on with their items meanwhile; the body must not be gone before they are done.
void a_pool_outlives_an_item_that_throws() {
    Pool pool(4);
    for (int repeat = 0; repeat < 200; ++repeat) {
        const auto caller = std::this_thread::get_id();
        bool thrown = false;
        try {
            auto thrown_by_caller = std::make_unique<std::atomic<bool>>(false);
            pool.run(64, [&](std::int64_t) {
                if (std::this_thread::get_id() == caller) {
                    *thrown_by_caller = true;
                    throw std::bad_alloc();
                }
                while (!*thrown_by_caller) std::this_thread::yield();
                std::this_thread::sleep_for(std::chrono::microseconds(20));
            });
        } catch (const std::bad_alloc&) {
            thrown = true;
        }
        CHECK(thrown);
        std::atomic<int> done = 0;
        pool.run(64, [&](std::int64_t) { ++done; });
        CHECK(done == 64);
    }
}

}  // namespace

int main() {
    pools_run_every_item_once();
    a_pool_outlives_an_item_that_throws();
    kernels_agree_with_plain_sums();
    a_query_without_tokens_is_answered();
    return 0;
}
