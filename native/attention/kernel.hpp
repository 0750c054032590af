// The kernel in terms of vectors of kWidth floats; each instruction set compiles it once, in an
// anonymous namespace, with kWidth set before inclusion. GCC and Clang vector extensions only.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "attention/attention.hpp"

namespace dualblade {
namespace {

using Floats = float __attribute__((vector_size(kWidth * 4)));
using Ints = std::int32_t __attribute__((vector_size(kWidth * 4)));
using Words = std::uint32_t __attribute__((vector_size(kWidth * 4)));

constexpr std::int64_t kChunk = 2 * kWidth;     // elements that one load turns into two vectors
constexpr float kLog2E = 1.44269504088896341f;  // the softmax is in base 2
constexpr float kNothing = -std::numeric_limits<float>::infinity();

using Bfloat16 = std::uint16_t;

struct Pair {
    Floats first, second;
};

Floats load(const float* from) {
    Floats out;
    std::memcpy(&out, from, sizeof out);
    return out;
}

void store(float* to, Floats value) {
    std::memcpy(to, &value, sizeof value);
}

// kChunk elements as two vectors: halves of a float row; even and odd elements of a bfloat16 row,
// which need a shift and a mask but no shuffle. Packed queries and sums are in the same order.
Pair load_chunk(const float* from) {
    return {load(from), load(from + kWidth)};
}

Pair load_chunk(const Bfloat16* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    const Words even = words << 16, odd = words & 0xffff0000u;
    return {std::bit_cast<Floats>(even), std::bit_cast<Floats>(odd)};
}

// Asks for a chunk that is to be loaded in a while. A head's rows in a tile are a few KiB long, too
// short for the machine to see a stream in them; without this, reading and computing take turns.
// At the end of a run nothing useful is asked for, which does no harm.
template <typename T>
void ask_for(const T* chunk) {
    for (std::size_t at = 0; at < kChunk * sizeof(T); at += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(chunk) + at);
    }
}

// The last elements of a row whose length is no multiple of kChunk, zeros behind them.
template <typename T>
Pair load_rest(const T* from, std::int64_t count) {
    T padded[kChunk] = {};
    std::memcpy(padded, from, static_cast<std::size_t>(count) * sizeof(T));
    return load_chunk(padded);
}

// Where element `i` of a row is in its packed form.
template <typename T>
std::int64_t packed_index(std::int64_t i) {
    if constexpr (sizeof(T) == 4) return i;
    const std::int64_t within = i % kChunk;
    return i - within + (within % 2) * kWidth + within / 2;
}

float to_float(float value) {
    return value;
}

float to_float(Bfloat16 value) {
    const std::uint32_t bits = std::uint32_t{value} << 16;
    float out;
    std::memcpy(&out, &bits, sizeof out);
    return out;
}

void from_float(float value, float& out) {
    out = value;
}

void from_float(float value, Bfloat16& out) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_nan = value != value;
    // Round to nearest, ties to even; a NaN stays one.
    out = static_cast<Bfloat16>(is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// 2^x for x <= 0; 0 below the smallest normal number; not a number stays it, whatever its bits.
// Cephes' polynomial for exp2 on [-0.5, 0.5], relative error 2e-7.
Floats exp2(Floats x) {
    const Floats low = Floats{} + -126.0f;
    const Floats clamped = x < -126.0f ? low : x;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number
    const Floats shifted = clamped + kRound;
    const Floats rest = clamped - (shifted - kRound);
    Floats poly = rest * 1.535336188319500e-4f + 1.339887440266574e-3f;
    poly = poly * rest + 9.618437357674640e-3f;
    poly = poly * rest + 5.550332471162809e-2f;
    poly = poly * rest + 2.402264791363012e-1f;
    poly = poly * rest + 6.931472028550421e-1f;
    poly = poly * rest + 1.0f;
    const Ints exponent = (std::bit_cast<Ints>(shifted) - 0x4b400000) << 23;
    const Ints bits = std::bit_cast<Ints>(poly) + exponent;
    const Floats result = std::bit_cast<Floats>(bits);
    return x < -126.0f ? Floats{} : (x == x ? result : x);
}

float exp2(float x) {
    return exp2(Floats{} + x)[0];
}

// Sums of kWidth vectors as one vector, lane i the sum of vector i: halves of segments are added,
// two vectors at a time, until a segment is one lane.
template <int kSegment, std::size_t... kLane>
[[gnu::always_inline]] inline Floats fold(Floats a, Floats b, std::index_sequence<kLane...>) {
    constexpr int half = kSegment / 2;
    constexpr auto at = [](int lane, int offset) {
        const int piece = lane / half;
        return (piece % 2) * kWidth + piece / 2 * kSegment + lane % half + offset;
    };
    return __builtin_shufflevector(a, b, at(kLane, 0)...) +
           __builtin_shufflevector(a, b, at(kLane, half)...);
}

template <int kSegment = kWidth>
[[gnu::always_inline]] inline Floats sum_lanes(Floats* vectors) {
    if constexpr (kSegment == 1) {
        return vectors[0];
    } else {
        constexpr int half = kSegment / 2;
#pragma GCC unroll 16
        for (int i = 0; i < half; ++i) {
            vectors[i] =
                fold<kSegment>(vectors[i], vectors[i + half], std::make_index_sequence<kWidth>{});
        }
        return sum_lanes<half>(vectors);
    }
}

// out[q * kLaneTokens + i] = packed query row q . key row i, for kQueries rows and the `count` keys
// of a block; what is beyond them is undefined.
template <int kQueries, bool kWhole, typename T>
void dot_rows(const float* const* queries, const T* keys, std::int64_t stride, std::int64_t count,
              std::int64_t dim, std::int64_t ahead, float* out) {
    constexpr int kRows = kWidth / kQueries;
    const std::int64_t whole = dim / kChunk * kChunk;
    for (std::int64_t base = 0; base < count; base += kRows) {
        const T* rows[kRows];
#pragma GCC unroll 16
        for (int i = 0; i < kRows; ++i) {
            rows[i] = keys + (kWhole || base + i < count ? base + i : base) * stride;
        }
        Floats sums[kWidth];
#pragma GCC unroll 16
        for (int i = 0; i < kWidth; ++i) sums[i] = Floats{};
        const auto add = [&](const auto& chunk_of, std::int64_t at) {
#pragma GCC unroll 16
            for (int i = 0; i < kRows; ++i) {
                const Pair key = chunk_of(rows[i]);
                ask_for(rows[i] + at + ahead);
#pragma GCC unroll 4
                for (int q = 0; q < kQueries; ++q) {
                    Floats& sum = sums[q * kRows + i];
                    sum += key.first * load(queries[q] + at);
                    sum += key.second * load(queries[q] + at + kWidth);
                }
            }
        };
        for (std::int64_t at = 0; at < whole; at += kChunk) {
            add([at](const T* row) { return load_chunk(row + at); }, at);
        }
        if (whole < dim) {
            add([=](const T* row) { return load_rest(row + whole, dim - whole); }, whole);
        }
        const Floats scores = sum_lanes(sums);
        const auto some = std::min<std::int64_t>(kRows, kBlock - base);
        for (int q = 0; q < kQueries; ++q) {
            std::memcpy(out + q * kLaneTokens + base,
                        reinterpret_cast<const float*>(&scores) + q * kRows,
                        static_cast<std::size_t>(some) * sizeof(float));
        }
    }
}

template <int kQueries, typename T>
void dot_block(const float* const* queries, const T* keys, std::int64_t stride, std::int64_t count,
               std::int64_t dim, std::int64_t ahead, float* out) {
    if (count == kBlock) {
        dot_rows<kQueries, true>(queries, keys, stride, kBlock, dim, ahead, out);
    } else {
        dot_rows<kQueries, false>(queries, keys, stride, count, dim, ahead, out);
    }
}

// sums[q] += weights[q][i] * value row i, over `count` rows.
template <int kQueries, int kChunks, typename T>
void add_rows(const float* weights, std::int64_t weight_stride, const T* rows, std::int64_t stride,
              std::int64_t count, float* sums, std::int64_t sum_stride, std::int64_t rest,
              std::int64_t ahead) {
    // From zero, added to the sums at the end: chains of additions stay short, and errors small.
    Floats held[kQueries][kChunks][2];
    for (int q = 0; q < kQueries; ++q) {
        for (int c = 0; c < kChunks; ++c) held[q][c][0] = held[q][c][1] = Floats{};
    }
    for (std::int64_t i = 0; i < count; ++i) {
        for (int c = 0; c < kChunks; ++c) {
            const T* at = rows + i * stride + c * kChunk;
            const Pair value = rest == 0 ? load_chunk(at) : load_rest(at, rest);
            ask_for(at + ahead);
            for (int q = 0; q < kQueries; ++q) {
                const float weight = weights[q * weight_stride + i];
                held[q][c][0] += value.first * weight;
                held[q][c][1] += value.second * weight;
            }
        }
    }
    for (int q = 0; q < kQueries; ++q) {
        for (int c = 0; c < kChunks; ++c) {
            float* sum = sums + q * sum_stride + c * kChunk;
            store(sum, load(sum) + held[q][c][0]);
            store(sum + kWidth, load(sum + kWidth) + held[q][c][1]);
        }
    }
}

template <int kQueries, typename T>
void add_values(const float* weights, std::int64_t weight_stride, const T* rows,
                std::int64_t stride, std::int64_t count, std::int64_t dim, std::int64_t ahead,
                float* sums, std::int64_t sum_stride) {
    std::int64_t at = 0;
    for (; at + 2 * kChunk <= dim; at += 2 * kChunk) {
        add_rows<kQueries, 2>(weights, weight_stride, rows + at, stride, count, sums + at,
                              sum_stride, 0, ahead);
    }
    for (; at + kChunk <= dim; at += kChunk) {
        add_rows<kQueries, 1>(weights, weight_stride, rows + at, stride, count, sums + at,
                              sum_stride, 0, ahead);
    }
    if (at < dim) {
        add_rows<kQueries, 1>(weights, weight_stride, rows + at, stride, count, sums + at,
                              sum_stride, dim - at, ahead);
    }
}

// Rows in fours where there are so many; the vectors of more would not fit the registers.
template <typename Each>
void in_fours(std::int64_t rows, Each each) {
    std::int64_t row = 0;
    for (; row + 4 <= rows; row += 4) each(std::integral_constant<int, 4>{}, row);
    if (rows - row == 3) each(std::integral_constant<int, 3>{}, row);
    if (rows - row == 2) each(std::integral_constant<int, 2>{}, row);
    if (rows - row == 1) each(std::integral_constant<int, 1>{}, row);
}

// Up to kLaneTokens of one head; `state` is its lane's, `number` its own in the run. The stretch
// that comes next lies `ahead` elements behind this one; 0: none does.
template <typename T>
struct Stretch {
    std::int64_t head, state;
    const T* data;
    std::int64_t token, count, number, ahead = 0;
};

// Calls each(stretch) for the stretches of at most kLaneTokens of the run that the item's sequence
// sees and that its lane is to take: in the order of memory, where several heads of a tile lie side
// by side.
template <typename T, typename Each>
void for_stretches(const Work& work, const Run& run, std::int64_t item, Each each) {
    const Query& query = work.query;
    const std::int64_t lane = item % work.lanes, span = item / work.lanes;
    const std::int64_t spans = query.kv_heads / work.span;
    const std::int64_t sequence = span / spans, first_head = span % spans * work.span;
    const std::int64_t seen = query.first_visible ? query.first_visible[sequence] : 0;
    std::optional<Stretch<T>> last;
    for (std::int64_t tile = 0; tile < run.tiles(); ++tile) {
        std::int64_t stored = run.table ? run.table[tile * query.batch + sequence] : sequence;
        stored -= run.first_sequence;
        if (stored < 0 || stored >= run.sequences) continue;
        const std::int64_t first = run.first_token + tile * run.tile_rows;
        const std::int64_t end = first + std::min(run.tile_rows, run.tokens - tile * run.tile_rows);
        // The lane's first turn from here on: most tiles are other lanes'.
        const std::int64_t turn = first / kLaneTokens;
        const std::int64_t own = turn + ((lane - turn) & (work.lanes - 1));
        if (own * kLaneTokens >= end) continue;
        for (std::int64_t kv_head = first_head; kv_head < first_head + work.span; ++kv_head) {
            const T* data = static_cast<const T*>(run.data) + tile * run.tile_stride +
                            stored * run.sequence_stride + kv_head * run.head_stride;
            const std::int64_t head = sequence * query.kv_heads + kv_head;
            for (std::int64_t at = own; at * kLaneTokens < end; at += work.lanes) {
                const std::int64_t token = std::max(first, at * kLaneTokens);
                const std::int64_t next = std::min(end, (at + 1) * kLaneTokens);
                if (next <= seen) continue;
                const Stretch<T> one{head,
                                     head * work.lanes + lane,
                                     data + (token - first) * run.row_stride,
                                     token,
                                     next - token,
                                     tile * run.tile_stretches() + at - turn};
                if (last) {
                    last->ahead = one.data - last->data;
                    each(*last);
                }
                last = one;
            }
        }
    }
    if (last) each(*last);
}

// Scores [rows, kLaneTokens] that a row may not see become minus infinity; so do those that fill
// up the last block.
void hide(const Query& query, std::int64_t head, std::int64_t token, std::int64_t count,
          float* scores) {
    const std::int64_t sequence = head / query.kv_heads;
    const std::int64_t seen = query.first_visible ? query.first_visible[sequence] : 0;
    if (token >= seen && token + count <= query.past + 1 && count % kBlock == 0) return;
    const std::int64_t filled = (count + kBlock - 1) / kBlock * kBlock;
    for (std::int64_t row = 0; row < query.rows(); ++row) {
        const std::int64_t last = query.past + row % query.tokens;
        for (std::int64_t i = 0; i < filled; ++i) {
            if (i >= count || token + i < seen || token + i > last) {
                scores[row * kLaneTokens + i] = kNothing;
            }
        }
    }
}

// Whether any of `count` scores, a multiple of kBlock, is above `maximum`.
bool any_above(const float* scores, std::int64_t count, float maximum) {
    Ints above = {};
    for (std::int64_t i = 0; i < count; i += kWidth) above |= load(scores + i) > maximum;
#if defined(__AVX512F__)
    const auto bits = std::bit_cast<__m512i>(above);
    return _mm512_test_epi32_mask(bits, bits) != 0;
#elif defined(__AVX2__)
    return _mm256_movemask_epi8(std::bit_cast<__m256i>(above)) != 0;
#else
    std::int32_t any = 0;
    for (int i = 0; i < kWidth; ++i) any |= above[i];
    return any != 0;
#endif
}

// The running softmax takes in one row's scores of a stretch and makes weights of them: block by
// block the maximum so far is followed, and `corrections` says by what the sums before each block
// are to be multiplied. `totals` are kWidth partial sums.
void update_row(const float* scores, std::int64_t blocks, float& maximum, float* totals,
                float* corrections, float* weights) {
    Floats sums = load(totals);
    const bool rises = any_above(scores, blocks * kBlock, maximum);  // rare after the first few
    for (std::int64_t block = 0; block < blocks; ++block) {
        const float* some = scores + block * kBlock;
        corrections[block] = 1;
        if (rises && any_above(some, kBlock, maximum)) {
            const float before = maximum;
            for (std::int64_t i = 0; i < kBlock; ++i) maximum = std::max(maximum, some[i]);
            corrections[block] = exp2(before - maximum);
            sums *= corrections[block];
        }
        // While nothing was seen all scores are minus infinity: their difference is no number.
        const float origin = maximum == kNothing ? 0.0f : maximum;
        for (std::int64_t i = 0; i < kBlock; i += kWidth) {
            const Floats weight = exp2(load(some + i) - origin);
            store(weights + block * kBlock + i, weight);
            sums += weight;
        }
    }
    store(totals, sums);
}

// Scores [rows, kLaneTokens] of a stretch.
template <typename T>
void dot_stretch(const Work& work, const Run& run, const Stretch<T>& stretch, float* scores) {
    const std::int64_t rows = work.query.rows();
    const float* packed = work.packed.data() + stretch.head * rows * work.key_stride;
    in_fours(rows, [&](auto some, std::int64_t row) {
        constexpr int kQueries = some == 3 ? 4 : int{some};  // the fourth answers nobody
        constexpr int kFit = kQueries < kWidth ? kQueries : kWidth;
        for (int done = 0; done < kQueries; done += kFit) {
            const float* queries[kFit];
            for (int q = 0; q < kFit; ++q) {
                queries[q] = packed + std::min(row + done + q, rows - 1) * work.key_stride;
            }
            for (std::int64_t at = 0; at < stretch.count; at += kBlock) {
                dot_block<kFit>(queries, stretch.data + at * run.row_stride, run.row_stride,
                                std::min(kBlock, stretch.count - at), work.query.key_dim,
                                row + done == 0 ? stretch.ahead : 0,
                                scores + (row + done) * kLaneTokens + at);
            }
        }
    });
}

// `dot` fills in the scores of a stretch.
template <typename T, typename Dot>
void keys_of(Work& work, const Run& run, std::int64_t item, Dot dot) {
    const std::int64_t rows = work.query.rows(), corrections = run.row_corrections();
    thread_local std::vector<float> scores;
    scores.resize(static_cast<std::size_t>((rows + 3) * kLaneTokens));
    for_stretches<T>(work, run, item, [&](const Stretch<T>& stretch) {
        dot(work, run, stretch, scores.data());
        hide(work.query, stretch.head, stretch.token, stretch.count, scores.data());
        for (std::int64_t row = 0; row < rows; ++row) {
            const std::int64_t state = stretch.state * rows + row, at = stretch.head * rows + row;
            float* from = scores.data() + row * kLaneTokens;
            float* to =
                work.weights.data() + at * run.row_weights() + stretch.token - run.first_token;
            // The last block may be short, and what follows it another lane's.
            const bool is_whole = stretch.count % kBlock == 0;
            update_row(from, (stretch.count + kBlock - 1) / kBlock, work.maximum[state],
                       work.totals.data() + state * kWidth,
                       work.corrections.data() + at * corrections + stretch.number * kLineFloats,
                       is_whole ? to : from);
            if (!is_whole) std::copy(from, from + stretch.count, to);
        }
    });
}

// The sums of values: [rows, value_stride] for each state.
template <typename T>
struct RowSums {
    // Floats of one state.
    static std::int64_t size(const Work& work) { return work.query.rows() * work.value_stride; }

    static void multiply(Work& work, std::int64_t state, std::int64_t row, float factor) {
        float* sums = work.sums.data() + state * size(work) + row * work.value_stride;
        for (std::int64_t i = 0; i < work.value_stride; ++i) sums[i] *= factor;
    }

    // Adds rows `at` ... `end` of a stretch, whole blocks but for the last.
    static void add(Work& work, const Run& run, const Stretch<T>& stretch, std::int64_t at,
                    std::int64_t end) {
        const std::int64_t rows = work.query.rows();
        for (; at < end; at += kBlock) {
            in_fours(rows, [&](auto some, std::int64_t row) {
                const float* weights = work.weights.data() +
                                       (stretch.head * rows + row) * run.row_weights() +
                                       stretch.token + at - run.first_token;
                add_values<some>(
                    weights, run.row_weights(), stretch.data + at * run.row_stride, run.row_stride,
                    std::min(kBlock, stretch.count - at), work.query.value_dim,
                    row == 0 ? stretch.ahead : 0,
                    work.sums.data() + stretch.state * size(work) + row * work.value_stride,
                    work.value_stride);
            });
        }
    }
};

// Blocks are added several at a time, up to the next one that a correction comes before.
template <typename T, typename Sums>
void values_of(Work& work, const Run& run, std::int64_t item) {
    const std::int64_t rows = work.query.rows(), corrections = run.row_corrections();
    for_stretches<T>(work, run, item, [&](const Stretch<T>& stretch) {
        std::int64_t added = 0;
        for (std::int64_t at = 0; at < stretch.count; at += kBlock) {
            const float* by = work.corrections.data() + stretch.head * rows * corrections +
                              stretch.number * kLineFloats + at / kBlock;
            for (std::int64_t row = 0; row < rows; ++row) {
                if (by[row * corrections] == 1.0f) continue;
                if (added < at) Sums::add(work, run, stretch, added, at);
                added = at;
                Sums::multiply(work, stretch.state, row, by[row * corrections]);
            }
        }
        Sums::add(work, run, stretch, added, stretch.count);
    });
}

template <typename T>
const T* query_row(const Query& query, std::int64_t head, std::int64_t row) {
    const std::int64_t sequence = head / query.kv_heads, kv_head = head % query.kv_heads;
    return static_cast<const T*>(query.data) + sequence * query.sequence_stride +
           (kv_head * query.group + row / query.tokens) * query.head_stride +
           row % query.tokens * query.token_stride;
}

template <typename T>
void pack_of(Work& work, std::int64_t head) {
    const Query& query = work.query;
    const float scale = query.scale * kLog2E;
    for (std::int64_t row = 0; row < query.rows(); ++row) {
        const T* from = query_row<T>(query, head, row);
        float* to = work.packed.data() + (head * query.rows() + row) * work.key_stride;
        std::fill(to, to + work.key_stride, 0.0f);
        for (std::int64_t i = 0; i < query.key_dim; ++i) {
            to[packed_index<T>(i)] = to_float(from[i]) * scale;
        }
    }
}

// Merges the lanes, in order, and writes the rows out. A row that sees nothing becomes zeros.
// `sums` [lanes, rows, value_stride].
template <typename T>
void finish_of(const Work& work, float* sums, const float* sinks, void* out, std::int64_t head) {
    const Query& query = work.query;
    const std::int64_t rows = query.rows(), kv_head = head % query.kv_heads;
    for (std::int64_t row = 0; row < rows; ++row) {
        const std::int64_t query_head = kv_head * query.group + row / query.tokens;
        const std::int64_t state = head * work.lanes * rows + row;
        const float sink = sinks ? sinks[query_head] * kLog2E : kNothing;
        float largest = sink;
        for (std::int64_t lane = 0; lane < work.lanes; ++lane) {
            largest = std::max(largest, work.maximum[state + lane * rows]);
        }
        float total = sinks ? exp2(sink - largest) : 0.0f;
        float* merged = sums + row * work.value_stride;
        for (std::int64_t lane = 0; lane < work.lanes; ++lane) {
            const float share =
                largest == kNothing ? 0.0f : exp2(work.maximum[state + lane * rows] - largest);
            const float* totals = work.totals.data() + (state + lane * rows) * kWidth;
            total += std::accumulate(totals, totals + kWidth, 0.0f) * share;
            const float* sum = merged + lane * rows * work.value_stride;
            for (std::int64_t i = 0; i < work.value_stride; ++i) {
                merged[i] = lane == 0 ? sum[i] * share : merged[i] + sum[i] * share;
            }
        }
        const float factor = total > 0 ? 1.0f / total : 0.0f;
        T* to =
            static_cast<T*>(out) + ((head / query.kv_heads * query.tokens + row % query.tokens) *
                                        query.kv_heads * query.group +
                                    query_head) *
                                       query.value_dim;
        for (std::int64_t i = 0; i < query.value_dim; ++i) {
            from_float(merged[packed_index<T>(i)] * factor, to[i]);
        }
    }
}

template <typename Call>
void with_element(Element element, Call call) {
    element == Element::kFloat32 ? call(float{}) : call(Bfloat16{});
}

std::int64_t row_sums(const Work& work) {
    return RowSums<float>::size(work);
}

void pack(Work& work, std::int64_t head) {
    with_element(work.query.element, [&](auto zero) { pack_of<decltype(zero)>(work, head); });
}

void keys(Work& work, const Run& run, std::int64_t item) {
    with_element(work.query.element, [&](auto zero) {
        keys_of<decltype(zero)>(work, run, item, dot_stretch<decltype(zero)>);
    });
}

void values(Work& work, const Run& run, std::int64_t item) {
    with_element(work.query.element, [&](auto zero) {
        values_of<decltype(zero), RowSums<decltype(zero)>>(work, run, item);
    });
}

void finish(Work& work, const float* sinks, void* out, std::int64_t head) {
    float* sums = work.sums.data() + head * work.lanes * row_sums(work);
    with_element(work.query.element,
                 [&](auto zero) { finish_of<decltype(zero)>(work, sums, sinks, out, head); });
}

}  // namespace
}  // namespace dualblade
