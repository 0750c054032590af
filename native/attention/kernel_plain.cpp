// The kernel for any machine (four floats: SSE2, NEON); see CMakeLists.txt for the flags that this
// file alone is compiled with.
namespace dualblade {
constexpr int kWidth = 4;
}
#include "attention/kernel.hpp"

namespace dualblade {
extern const Kernel kernel_plain;
const Kernel kernel_plain{"plain", kWidth, row_sums, pack, keys, values, finish};
}  // namespace dualblade
