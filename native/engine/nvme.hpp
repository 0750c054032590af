// What may be said to an NVMe namespace, and nothing else: the kernel does not check commands that
// pass through it. A length that disagrees with the block count is not refused; the drive then
// overruns the buffer. So a command can only be made here, from blocks, inside one store.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <variant>

#include "types.hpp"

namespace dualblade {

// Sizes and offsets are bytes, offsets from the namespace's first block.
struct NamespaceLimits {
    std::uint32_t namespace_id;
    std::uint64_t block_bytes;
    std::uint64_t begin;  // of the store's extents
    std::uint64_t end;
    std::uint64_t command_bytes_max;    // the drive's and the kernel's limit
    std::uint64_t scattered_bytes_max;  // what memory in single 4 KiB pages allows
};

// The 72 bytes of struct nvme_uring_cmd (linux/nvme_ioctl.h), ready for the submission entry; and
// of struct nvme_passthru_cmd, ready for the ioctl: they differ in the last four alone, which are
// reserved in the one and where the kernel writes a result that nobody needs in the other.
class NvmeCommand {
  public:
    static constexpr std::size_t kBytes = 72;
    static constexpr std::uint32_t kUringOperation = 0xC0484E80;  // NVME_URING_CMD_IO
    static constexpr std::uint32_t kIoctlOperation = 0xC0484E43;  // NVME_IOCTL_IO_CMD

    const std::array<std::uint8_t, kBytes>& bytes() const { return bytes_; }
    // Bytes or a negative error number, from what the kernel told of it: 0, a status, or -errno.
    std::int64_t result(std::int32_t told) const;

  private:
    friend class NvmeNamespace;
    enum class Opcode : std::uint8_t { Flush = 0x00, Write = 0x01, Read = 0x02 };
    NvmeCommand(Opcode opcode, const NamespaceLimits& limits, std::uint64_t first_block,
                std::uint64_t block_count, std::uint64_t address);

    std::array<std::uint8_t, kBytes> bytes_{};
    std::uint64_t size_bytes_ = 0;
};

class NvmeNamespace {
  public:
    // Nothing for limits that contradict themselves or the command's fields.
    static std::optional<NvmeNamespace> make(const NamespaceLimits& limits);

    const NamespaceLimits& limits() const { return limits_; }
    // Nothing for what is not whole blocks, outside the store, or more than one command carries.
    // Both syncs are a flush: NVMe has no flush of a range.
    std::optional<NvmeCommand> command(const Transfer& piece) const;
    // The command for `piece`, cut at the store's end as a block device would; else why there is
    // none, as a block device would answer it: 0 for a read at the end, or -errno.
    std::variant<NvmeCommand, std::int64_t> answer(Transfer piece) const;

  private:
    explicit NvmeNamespace(const NamespaceLimits& limits) : limits_(limits) {}
    NamespaceLimits limits_;
};

}  // namespace dualblade
