// The kernel for AVX2; see CMakeLists.txt for the flags that this file alone is compiled with.
namespace dualblade {
constexpr int kWidth = 8;
}
#include "attention/kernel.hpp"

namespace dualblade {
extern const Kernel kernel_avx2;
const Kernel kernel_avx2{"avx2", kWidth, row_sums, pack, keys, values, finish};
}  // namespace dualblade
