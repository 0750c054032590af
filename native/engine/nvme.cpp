#include "nvme.hpp"

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

namespace dualblade {

namespace {

constexpr std::uint64_t kBlocksMax = 1 << 16;  // NLB is 16 bits, counted from 0

struct Fields {
    std::uint8_t opcode;
    std::uint8_t flags;
    std::uint16_t reserved1;
    std::uint32_t namespace_id;
    std::uint32_t dword2, dword3;
    std::uint64_t metadata;
    std::uint64_t address;
    std::uint32_t metadata_bytes;
    std::uint32_t data_bytes;
    std::uint32_t dword10, dword11, dword12, dword13, dword14, dword15;
    std::uint32_t timeout_ms;  // 0: the kernel's own
    std::uint32_t reserved2;
};
static_assert(sizeof(Fields) == NvmeCommand::kBytes);

}  // namespace

NvmeCommand::NvmeCommand(Opcode opcode, const NamespaceLimits& limits, std::uint64_t first_block,
                         std::uint64_t block_count, std::uint64_t address)
    : size_bytes_(block_count * limits.block_bytes) {
    Fields fields{};
    fields.opcode = static_cast<std::uint8_t>(opcode);
    fields.namespace_id = limits.namespace_id;
    if (opcode != Opcode::Flush) {
        fields.address = address;
        fields.data_bytes = static_cast<std::uint32_t>(size_bytes_);
        fields.dword10 = static_cast<std::uint32_t>(first_block);
        fields.dword11 = static_cast<std::uint32_t>(first_block >> 32);
        fields.dword12 = static_cast<std::uint32_t>(block_count - 1);
    }
    std::memcpy(bytes_.data(), &fields, sizeof fields);
}

std::int64_t NvmeCommand::result(std::int32_t told) const {
    if (told == 0) return static_cast<std::int64_t>(size_bytes_);
    if (told > 0) return -(std::int64_t{kNvmeStatus} + told);
    return told == -EINTR ? -ETIMEDOUT : told;  // the kernel gave the command up
}

std::optional<NvmeNamespace> NvmeNamespace::make(const NamespaceLimits& limits) {
    const std::uint64_t block = limits.block_bytes;
    if (!std::has_single_bit(block) || block < 512 || block > (1 << 16)) return std::nullopt;
    const auto whole = [block](std::uint64_t bytes) { return bytes % block == 0; };
    const auto carried = [&](std::uint64_t bytes) {
        return bytes > 0 && whole(bytes) && bytes / block <= kBlocksMax && bytes <= INT32_MAX;
    };
    if (limits.namespace_id == 0 || limits.namespace_id == UINT32_MAX) return std::nullopt;
    if (!whole(limits.begin) || !whole(limits.end) || limits.begin >= limits.end) {
        return std::nullopt;
    }
    if (!carried(limits.command_bytes_max) || !carried(limits.scattered_bytes_max)) {
        return std::nullopt;
    }
    return NvmeNamespace(limits);
}

std::optional<NvmeCommand> NvmeNamespace::command(const Transfer& piece) const {
    using Opcode = NvmeCommand::Opcode;
    if (!moves_bytes(piece.op)) return NvmeCommand(Opcode::Flush, limits_, 0, 0, 0);
    const std::uint64_t block = limits_.block_bytes;
    if (piece.size_bytes == 0 || piece.size_bytes > limits_.command_bytes_max) return std::nullopt;
    if (piece.offset % block != 0 || piece.size_bytes % block != 0) return std::nullopt;
    if (piece.offset < limits_.begin || piece.offset >= limits_.end) return std::nullopt;
    if (piece.size_bytes > limits_.end - piece.offset) return std::nullopt;
    return NvmeCommand(piece.op == Op::Read ? Opcode::Read : Opcode::Write, limits_,
                       piece.offset / block, piece.size_bytes / block, piece.address);
}

std::variant<NvmeCommand, std::int64_t> NvmeNamespace::answer(Transfer piece) const {
    if (moves_bytes(piece.op)) {
        if (piece.offset >= limits_.end) return piece.op == Op::Read ? 0 : -std::int64_t{ENOSPC};
        piece.size_bytes = std::min(piece.size_bytes, limits_.end - piece.offset);
    }
    const auto said = command(piece);
    if (!said) return -std::int64_t{EINVAL};
    return *said;
}

}  // namespace dualblade
