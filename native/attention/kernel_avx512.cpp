// The kernel for AVX-512; see CMakeLists.txt for the flags that this file alone is compiled with.
namespace dualblade {
constexpr int kWidth = 16;
}
#include "attention/kernel.hpp"

namespace dualblade {
extern const Kernel kernel_avx512;
const Kernel kernel_avx512{"avx512", kWidth, row_sums, pack, keys, values, finish};
}  // namespace dualblade
