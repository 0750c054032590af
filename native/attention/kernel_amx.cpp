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

// Registers: C of up to four blocks or chunks, whose products overlap; A and B in turn, so that the
// next is loaded while this one is multiplied.
constexpr int kFour = 4, kC = 0, kA = 4, kB = 6;
static_assert(kLaneTokens == kFour * kBlock);

// Calls each(constant) for 0 ... count - 1, at most four: the names of registers are constants.
template <typename Each>
[[gnu::always_inline]] inline void for_four(std::int64_t count, Each each) {
    if (count > 0) each(std::integral_constant<int, 0>{});
    if (count > 1) each(std::integral_constant<int, 1>{});
    if (count > 2) each(std::integral_constant<int, 2>{});
    if (count > 3) each(std::integral_constant<int, 3>{});
}

// The shapes of this thread's tiles: A [rows, 64 bytes], B [16, columns of four bytes], C [rows,
// columns]. Given back at the end, for others that multiply on this thread and for the system,
// which saves what is in use.
class Tiles {
  public:
    Tiles(std::int64_t rows, std::int64_t columns) {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t row_bytes[16] = {};
            std::uint8_t rows[16] = {};
        } shapes;
        for (int tile = 0; tile < 8; ++tile) {
            const bool is_a = tile >= kA && tile < kB, is_b = tile >= kB;
            shapes.rows[tile] = static_cast<std::uint8_t>(is_b ? kTileRows : rows);
            shapes.row_bytes[tile] = static_cast<std::uint16_t>(is_a ? kTileRowBytes : 4 * columns);
        }
        asm volatile("ldtilecfg (%0)" ::"r"(&shapes) : "memory");
    }
    ~Tiles() { asm volatile("tilerelease"); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// A block's rows, as whole tiles may read them: where they lie, or copied among zeros where a tile
// would reach over the last row or element.
struct Block {
    const Bfloat16* rows;
    std::int64_t stride;
    const Bfloat16 *far, *near;  // to be asked for meanwhile, as many rows; `far` null: nothing
};

// A chunk of a block's rows.
template <int kTile>
void load_rows(const Block& block, std::int64_t chunk) {
    tile_load<kTile>(block.rows + chunk * kChunk, block.stride * std::int64_t{sizeof(Bfloat16)});
    if (block.far == nullptr) return;
    const Bfloat16 *far = block.far + chunk * kBlock * kChunk,
                   *near = block.near + chunk * kBlock * kChunk;
#pragma GCC unroll 16
    for (std::int64_t line = 0; line < kBlock; ++line) {
        __builtin_prefetch(far + line * kChunk, 0, 2);
        __builtin_prefetch(near + line * kChunk);
    }
}

// The blocks of a stretch from row `at` on.
struct Blocks {
    Block all[kFour];
    std::int64_t count;

    // Rows are asked for in the order of memory: those of the next stretch into the second-level
    // cache, those of the next block from there into the first.
    Blocks(const Run& run, const Stretch<Bfloat16>& stretch, std::int64_t at, std::int64_t end,
           std::int64_t dim, bool ask)
        : count((end - at + kBlock - 1) / kBlock) {
        thread_local std::vector<Bfloat16> copy;
        const std::int64_t padded = (dim + kChunk - 1) / kChunk * kChunk;
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t row = at + i * kBlock, rows = std::min(kBlock, end - row);
            const Bfloat16* from = stretch.data + row * run.row_stride;
            const Bfloat16* far = ask && stretch.ahead != 0 ? from + stretch.ahead : nullptr;
            const bool is_last = row + kBlock >= stretch.count;
            const Bfloat16* near =
                is_last ? stretch.data + stretch.ahead : from + kBlock * run.row_stride;
            all[i] = {from, run.row_stride, far, near};
            if (rows == kBlock && dim == padded) continue;
            copy.resize(static_cast<std::size_t>(kFour * kBlock * padded));
            Bfloat16* to = copy.data() + i * kBlock * padded;
            std::fill(to, to + kBlock * padded, Bfloat16{});
            for (std::int64_t r = 0; r < rows; ++r) {
                std::memcpy(to + r * padded, from + r * run.row_stride,
                            static_cast<std::size_t>(dim) * sizeof(Bfloat16));
            }
            all[i].rows = to;
            all[i].stride = padded;
        }
    }
};

// Query rows that are multiplied at a time. All panels have as many, the last one filled up with
// zeros: at most twice as many bfloat16 as there is room for floats. At least one, of which a query
// without tokens has none.
std::int64_t panel_rows(const Query& query) {
    return std::clamp<std::int64_t>(query.rows(), 1, kTileRows);
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

// Four columns of C [16, 4], whose rows lie `stride` floats apart, as one vector each.
void columns_of(const float* c, std::int64_t stride, Floats* columns) {
    constexpr __mmask16 kAll = 0xffff;  // without a mask GCC 12 warns of its own header
    // Row 4 * lane + i is lane `lane` of rows[i]; within lanes, a matrix of four by four is turned.
    __m512 rows[4];
    for (int i = 0; i < 4; ++i) {
        rows[i] = _mm512_castps128_ps512(_mm_loadu_ps(c + i * stride));
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(c + (4 + i) * stride), 1);
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(c + (8 + i) * stride), 2);
        rows[i] = _mm512_insertf32x4(rows[i], _mm_loadu_ps(c + (12 + i) * stride), 3);
    }
    const __m512 low01 = _mm512_maskz_unpacklo_ps(kAll, rows[0], rows[1]);
    const __m512 low23 = _mm512_maskz_unpacklo_ps(kAll, rows[2], rows[3]);
    const __m512 high01 = _mm512_maskz_unpackhi_ps(kAll, rows[0], rows[1]);
    const __m512 high23 = _mm512_maskz_unpackhi_ps(kAll, rows[2], rows[3]);
    columns[0] = std::bit_cast<Floats>(_mm512_maskz_shuffle_ps(kAll, low01, low23, 0x44));
    columns[1] = std::bit_cast<Floats>(_mm512_maskz_shuffle_ps(kAll, low01, low23, 0xee));
    columns[2] = std::bit_cast<Floats>(_mm512_maskz_shuffle_ps(kAll, high01, high23, 0x44));
    columns[3] = std::bit_cast<Floats>(_mm512_maskz_shuffle_ps(kAll, high01, high23, 0xee));
}

// As `dot_stretch`: A is 16 keys by 32 elements, B the queries, C [keys, queries] of each block.
void dot_tiles(const Work& work, const Run& run, const Stretch<Bfloat16>& stretch, float* scores) {
    const Query& query = work.query;
    const std::int64_t rows = query.rows(), panel = panel_rows(query), pair_bytes = 4 * panel;
    const std::int64_t chunks = work.key_stride / kChunk, chunk_bytes = kChunk / 2 * pair_bytes;
    const std::int64_t stride = (panel + 3) / 4 * 4;
    const auto* queries = reinterpret_cast<const std::byte*>(work.packed.data() +
                                                             stretch.head * rows * work.key_stride);
    alignas(64) float dots[kBlock * kTileRows];
    for (std::int64_t row = 0; row < rows; row += panel) {
        const std::int64_t some = std::min(panel, rows - row);
        const Blocks blocks(run, stretch, 0, stretch.count, query.key_dim, row == 0);
        const auto finish = [&](auto i) {
            tile_store<kC + i>(dots, stride * std::int64_t{sizeof(float)});
            for (std::int64_t q = 0; q < some; q += 4) {
                Floats columns[4];
                columns_of(dots + q, stride, columns);
                for (std::int64_t at = q; at < std::min(some, q + 4); ++at) {
                    store(scores + (row + at) * kLaneTokens + i * kBlock,
                          columns[at - q] * (query.scale * kLog2E));
                }
            }
        };
        for_four(blocks.count, [&](auto i) {
            tile_zero<kC + i>();
            for (std::int64_t chunk = 0; chunk < chunks; ++chunk) {
                load_rows<kA + i % 2>(blocks.all[i], chunk);
                tile_load<kB + i % 2>(queries + chunk * chunk_bytes, pair_bytes);
                tile_multiply<kC + i, kA + i % 2, kB + i % 2>();
            }
            if constexpr (i > 0) finish(std::integral_constant<int, i - 1>{});
            if (i + 1 == blocks.count) finish(i);
        });
        queries += chunks * chunk_bytes;
    }
}

// The nearest bfloat16 above zeros, as a float has it.
Words upper_half(Floats value) {
    return (std::bit_cast<Words>(value) + 0x8000u) & 0xffff0000u;
}

// Values go by C = A * B with the weights as A, 16 values by 32 elements as B, and the sums as C. A
// weight goes to the even elements by a row of A that has it in even places and zeros in odd ones,
// to the odd elements by another one; each of them twice, for a weight is the sum of two bfloat16
// (16 bits of it are kept). So a row of the query is four of A and of C: even, what even leaves,
// odd, what odd leaves. The sums stay like that until the end: [panels, chunks, 4, rows of a panel,
// 16], all panels with as many rows, the last one filled up with zeros.
struct TileSums {
    static constexpr std::int64_t kParts = 4;

    static std::int64_t panel(const Query& query) {
        return std::clamp<std::int64_t>(query.rows(), 1, kTileRows / kParts);
    }

    // Floats of one state.
    static std::int64_t size(const Work& work) {
        const std::int64_t some = panel(work.query);
        return (work.query.rows() + some - 1) / some * some * work.value_stride * 2;
    }

    static void multiply(Work& work, std::int64_t state, std::int64_t row, float factor) {
        const std::int64_t some = panel(work.query), chunks = work.value_stride / kChunk;
        float* sums = work.sums.data() + state * size(work) +
                      row / some * some * work.value_stride * 2 + row % some * kWidth;
        for (std::int64_t part = 0; part < chunks * kParts; ++part) {
            store(sums + part * some * kWidth, load(sums + part * some * kWidth) * factor);
        }
    }

    // As `RowSums`. C stays in its registers from block to block: the order of the additions is the
    // same wherever it is put down.
    static void add(Work& work, const Run& run, const Stretch<Bfloat16>& stretch, std::int64_t at,
                    std::int64_t end) {
        const std::int64_t rows = work.query.rows(), some = panel(work.query);
        const std::int64_t chunks = work.value_stride / kChunk, size_bytes = kTileRowBytes;
        float* sums = work.sums.data() + stretch.state * size(work);
        for (std::int64_t row = 0; row < rows; row += some) {
            const Blocks blocks(run, stretch, at, end, work.query.value_dim, row == 0);
            // The next block's are made before this one's are loaded: a tile cannot be loaded from
            // stores that are still on their way.
            alignas(64) Words parts[2][kTileRows];
            for (std::int64_t first = 0; first < chunks; first += kFour) {
                const std::int64_t count = std::min<std::int64_t>(kFour, chunks - first);
                float* c = sums + first * kParts * some * kWidth;
                split(work, run, stretch, row, at, parts[0]);
                for_four(count, [&](auto chunk) {
                    tile_load<kC + chunk>(c + chunk * kParts * some * kWidth, size_bytes);
                });
                for (std::int64_t i = 0; i < blocks.count; ++i) {
                    if (i + 1 < blocks.count) {
                        split(work, run, stretch, row, at + (i + 1) * kBlock, parts[(i + 1) % 2]);
                    }
                    tile_load<kA>(parts[i % 2], size_bytes);
                    for_four(count, [&](auto chunk) {
                        load_rows<kB + chunk % 2>(blocks.all[i], first + chunk);
                        tile_multiply<kC + chunk, kA, kB + chunk % 2>();
                    });
                }
                for_four(count, [&](auto chunk) {
                    tile_store<kC + chunk>(c + chunk * kParts * some * kWidth, size_bytes);
                });
            }
            sums += chunks * kParts * some * kWidth;
        }
    }

    // The rows of A for a block.
    static void split(const Work& work, const Run& run, const Stretch<Bfloat16>& stretch,
                      std::int64_t row, std::int64_t at, Words* parts) {
        const std::int64_t rows = work.query.rows(), some = panel(work.query);
        const std::int64_t count = std::min(kBlock, stretch.count - at);
        for (std::int64_t q = 0; q < some; ++q) {
            const float* from = work.weights.data() +
                                (stretch.head * rows + row + q) * run.row_weights() +
                                stretch.token + at - run.first_token;
            Floats weights{};
            if (row + q < rows)
                weights = count == kBlock ? load(from) : load_rest(from, count).first;
            const Words most = upper_half(weights);
            const Words rest = upper_half(weights - std::bit_cast<Floats>(most));
            parts[q] = most >> 16;
            parts[some + q] = rest >> 16;
            parts[2 * some + q] = most;
            parts[3 * some + q] = rest;
        }
    }

    // The states of a head as `RowSums` has them, in their place.
    static void to_rows(Work& work, std::int64_t head) {
        const std::int64_t rows = work.query.rows(), some = panel(work.query);
        const std::int64_t chunks = work.value_stride / kChunk,
                           panel_floats = kParts * some * kWidth;
        float* all = work.sums.data() + head * work.lanes * size(work);
        thread_local std::vector<float> panel;
        panel.resize(static_cast<std::size_t>(chunks * panel_floats));
        for (std::int64_t lane = 0; lane < work.lanes; ++lane) {
            for (std::int64_t row = 0; row < rows; row += some) {
                const float* from = all + lane * size(work) + row * work.value_stride * 2;
                std::copy(from, from + chunks * panel_floats, panel.data());
                for (std::int64_t q = 0; q < std::min(some, rows - row); ++q) {
                    float* to = all + (lane * rows + row + q) * work.value_stride;
                    for (std::int64_t chunk = 0; chunk < chunks; ++chunk, to += kChunk) {
                        const float* part = panel.data() + chunk * panel_floats + q * kWidth;
                        const std::int64_t next = some * kWidth;
                        store(to, load(part) + load(part + next));
                        store(to + kWidth, load(part + 2 * next) + load(part + 3 * next));
                    }
                }
            }
        }
    }
};

bool is_float(const Work& work) {
    return work.query.element == Element::kFloat32;
}

std::int64_t sums_either(const Work& work) {
    return is_float(work) ? RowSums<float>::size(work) : TileSums::size(work);
}

void pack_either(Work& work, std::int64_t head) {
    is_float(work) ? pack(work, head) : pack_tiles(work, head);
}

void keys_either(Work& work, const Run& run, std::int64_t item) {
    if (is_float(work)) return keys(work, run, item);
    const Tiles tiles(kTileRows, panel_rows(work.query));
    keys_of<Bfloat16>(work, run, item, dot_tiles);
}

void values_either(Work& work, const Run& run, std::int64_t item) {
    if (is_float(work)) return values(work, run, item);
    const Tiles tiles(TileSums::kParts * TileSums::panel(work.query), kWidth);
    values_of<Bfloat16, TileSums>(work, run, item);
}

void finish_either(Work& work, const float* sinks, void* out, std::int64_t head) {
    if (is_float(work)) return finish(work, sinks, out, head);
    TileSums::to_rows(work, head);
    finish_of<Bfloat16>(work, work.sums.data() + head * work.lanes * TileSums::size(work), sinks,
                        out, head);
}

}  // namespace

extern const Kernel kernel_amx;
const Kernel kernel_amx{"amx",       kWidth,        sums_either,  pack_either,
                        keys_either, values_either, finish_either};
}  // namespace dualblade
