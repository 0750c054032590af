// The kernel for matrix units of bfloat16 (AMX): the query rows of a group cost little more than
// one, and the products of bfloat16 elements are exact. float32 goes the way of AVX-512. See
// CMakeLists.txt for the flags that this file alone is compiled with.
//
// A tile register holds 16 rows of 64 bytes. One instruction does, over pairs of elements,
//     C[m][n] += A[m][2k] * B[k][2n] + A[m][2k + 1] * B[k][2n + 1]     C in float32, k of 0 ... 15
// and both products have keys or values as they lie in memory as one side.
namespace dualblade {
constexpr int kWidth = 16;
}
#include "attention/kernel.hpp"

namespace dualblade {
namespace {

constexpr std::int64_t kTileRows = 16;
constexpr std::int64_t kTileRowBytes = 64;
static_assert(kBlock == kTileRows && kChunk * sizeof(Bfloat16) == kTileRowBytes);

// The names of the registers are part of the instructions. "memory": the compiler knows nothing of
// what they read and write.
template <int kTile>
void tile_load(const void* from, std::int64_t stride_bytes) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride_bytes), "i"(kTile)
                 : "memory");
}

template <int kTile>
void tile_store(void* to, std::int64_t stride_bytes) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride_bytes), "i"(kTile)
                 : "memory");
}

template <int kTile>
void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

template <int kC, int kA, int kB>
void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

constexpr int kC = 0, kA = 1, kB = 2;

// The shapes of this thread's tiles: A is whole, B and C have `columns` of four bytes. Given back
// at the end, for others that multiply on this thread and for the system, which saves what is in
// use.
class Tiles {
  public:
    explicit Tiles(std::int64_t columns) {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {};
            std::uint8_t rows[16] = {};
        } shapes;
        for (const int tile : {kC, kA, kB}) {
            shapes.rows[tile] = kTileRows;
            shapes.row_bytes[tile] = static_cast<std::uint16_t>(4 * columns);
        }
        shapes.row_bytes[kA] = kTileRowBytes;
        asm volatile("ldtilecfg (%0)" ::"r"(&shapes) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// The rows of a block, as whole tiles may read them: where they lie, or copied among zeros where a
// tile would reach over the last row or element.
struct Block {
    const Bfloat16* rows;
    std::int64_t stride;
    const Bfloat16 *here, *next;  // this block and the one behind it, in memory

    Block(const Bfloat16* from, std::int64_t from_stride, std::int64_t count, std::int64_t dim)
        : rows(from), stride(from_stride), here(from), next(from + kBlock * from_stride) {
        if (count == kBlock && dim % kChunk == 0) return;
        thread_local std::vector<Bfloat16> copy;
        stride = (dim + kChunk - 1) / kChunk * kChunk;
        copy.assign(static_cast<std::size_t>(kBlock * stride), 0);
        for (std::int64_t i = 0; i < count; ++i) {
            std::memcpy(copy.data() + i * stride, from + i * from_stride,
                        static_cast<std::size_t>(dim) * sizeof(Bfloat16));
        }
        rows = copy.data();
    }

    // A chunk of the rows. Rows are asked for in the order of memory: those of the next stretch, a
    // row `ahead`, into the second-level cache, those of the next block from there into the first.
    template <int kTile>
    void load(std::int64_t chunk, std::int64_t ahead) const {
        tile_load<kTile>(rows + chunk * kChunk, stride * std::int64_t{sizeof(Bfloat16)});
        if (ahead == 0) return;
#pragma GCC unroll 16
        for (std::int64_t line = chunk * kBlock; line < (chunk + 1) * kBlock; ++line) {
            __builtin_prefetch(here + ahead + line * kChunk, 0, 2);
            __builtin_prefetch(next + line * kChunk);
        }
    }
};

// Query rows that are multiplied at a time. All panels have as many, the last one filled up with
// zeros: at most twice as many bfloat16 as there is room for floats.
std::int64_t panel_rows(const Query& query) {
    return std::min(query.rows(), kTileRows);
}

// Packed for B: [panels, chunks of the row, pairs in a chunk, rows of a panel, 2]. Not scaled: the
// scores are.
void pack_tiles(Work& work, std::int64_t head) {
    const Query& query = work.query;
    const std::int64_t rows = query.rows(), panel = panel_rows(query);
    float* packed = work.packed.data() + head * rows * work.key_stride;
    std::fill(packed, packed + rows * work.key_stride, 0.0f);
    for (std::int64_t row = 0; row < rows; ++row) {
        const Bfloat16* from = query_row<Bfloat16>(query, head, row);
        std::byte* to =
            reinterpret_cast<std::byte*>(packed) + (row / panel * work.key_stride * panel) * 2;
        for (std::int64_t i = 0; i < query.key_dim; ++i) {
            const std::int64_t at = (i / 2 * panel + row % panel) * 2 + i % 2;
            std::memcpy(to + at * 2, from + i, sizeof(Bfloat16));
        }
    }
}

// As `dot_stretch`: A is 16 keys by 32 elements, B the queries, C [keys, queries].
void dot_tiles(const Work& work, const Run& run, const Stretch<Bfloat16>& stretch, float* scores) {
    const Query& query = work.query;
    const std::int64_t rows = query.rows(), panel = panel_rows(query), pair_bytes = 4 * panel;
    const auto* packed = reinterpret_cast<const std::byte*>(work.packed.data() +
                                                            stretch.head * rows * work.key_stride);
    const Ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const __m512i places = std::bit_cast<__m512i>(lanes * static_cast<std::int32_t>(panel));
    alignas(64) float dots[kBlock * kTileRows];
    for (std::int64_t at = 0; at < stretch.count; at += kBlock) {
        const Block block(stretch.data + at * run.row_stride, run.row_stride,
                          std::min(kBlock, stretch.count - at), query.key_dim);
        const std::byte* queries = packed;
        for (std::int64_t row = 0; row < rows; row += panel) {
            tile_zero<kC>();
            for (std::int64_t chunk = 0; chunk < work.key_stride / kChunk; ++chunk) {
                block.load<kA>(chunk, row == 0 ? stretch.ahead : 0);
                tile_load<kB>(queries, pair_bytes);
                tile_multiply<kC, kA, kB>();
                queries += kChunk / 2 * pair_bytes;
            }
            tile_store<kC>(dots, pair_bytes);
            for (std::int64_t q = 0; q < std::min(panel, rows - row); ++q) {
                const auto dot = std::bit_cast<Floats>(
                    _mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, places, dots + q, 4));
                store(scores + (row + q) * kLaneTokens + at, dot * (query.scale * kLog2E));
            }
        }
    }
}

// The nearest bfloat16 above zeros, as a float has it.
Words upper_half(Floats value) {
    return (std::bit_cast<Words>(value) + 0x8000u) & 0xffff0000u;
}

// As `add_block`: A is the weights, B 16 values by 32 elements. A weight goes to the even elements
// by a row of A that has it in even places and zeros in odd ones, to the odd elements by another
// one; each of them twice, for a weight is the sum of two bfloat16 (16 bits of it are kept). So
// four query rows are the 16 of A: even, what even leaves, odd, what odd leaves.
void add_tiles(Work& work, const Run& run, const Stretch<Bfloat16>& stretch, std::int64_t at) {
    constexpr std::int64_t kQueries = kTileRows / 4;
    const std::int64_t rows = work.query.rows(), count = std::min(kBlock, stretch.count - at);
    const Block block(stretch.data + at * run.row_stride, run.row_stride, count,
                      work.query.value_dim);
    Words parts[kTileRows] = {};
    Floats sums[kTileRows];
    for (std::int64_t row = 0; row < rows; row += kQueries) {
        const std::int64_t some = std::min(kQueries, rows - row);
        for (std::int64_t q = 0; q < some; ++q) {
            const float* from = work.weights.data() + (stretch.head * rows + row + q) * run.tokens +
                                stretch.token + at - run.first_token;
            const Pair padded = count == kBlock ? Pair{load(from), {}} : load_rest(from, count);
            const Words most = upper_half(padded.first);
            const Words rest = upper_half(padded.first - std::bit_cast<Floats>(most));
            parts[q] = most >> 16;
            parts[kQueries + q] = rest >> 16;
            parts[2 * kQueries + q] = most;
            parts[3 * kQueries + q] = rest;
        }
        tile_load<kA>(parts, kTileRowBytes);
        for (std::int64_t chunk = 0; chunk < work.value_stride / kChunk; ++chunk) {
            tile_zero<kC>();
            block.load<kB>(chunk, row == 0 ? stretch.ahead : 0);
            tile_multiply<kC, kA, kB>();
            tile_store<kC>(sums, kTileRowBytes);
            for (std::int64_t q = 0; q < some; ++q) {
                float* sum = work.sums.data() +
                             (stretch.state * rows + row + q) * work.value_stride + chunk * kChunk;
                store(sum, load(sum) + (sums[q] + sums[kQueries + q]));
                store(sum + kWidth,
                      load(sum + kWidth) + (sums[2 * kQueries + q] + sums[3 * kQueries + q]));
            }
        }
    }
}

void pack_either(Work& work, std::int64_t head) {
    work.query.element == Element::kBfloat16 ? pack_tiles(work, head) : pack(work, head);
}

void keys_either(Work& work, const Run& run, std::int64_t item) {
    if (work.query.element == Element::kFloat32) return keys(work, run, item);
    const Tiles tiles(panel_rows(work.query));
    keys_of<Bfloat16>(work, run, item, dot_tiles);
}

void values_either(Work& work, const Run& run, std::int64_t item) {
    if (work.query.element == Element::kFloat32) return values(work, run, item);
    const Tiles tiles(kTileRows);
    values_of<Bfloat16>(work, run, item, add_tiles);
}

}  // namespace

extern const Kernel kernel_amx;
const Kernel kernel_amx{"amx", kWidth, pack_either, keys_either, values_either, finish};
}  // namespace dualblade
