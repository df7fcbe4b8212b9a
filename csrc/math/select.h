// Choosing between two values without a branch. A compiler that sees `c ? a : b` may move the load of `a` behind the
// branch, and then cannot vectorise the loop; on bit patterns it has no choice. Nothing is multiplied, so NaN on the
// side not chosen stays there.
#pragma once

#include <cstdint>

#include "../macros.h"

#if !defined(__CUDACC__)
#include <bit>
#endif

namespace pywm::math {

#if defined(__CUDACC__)

template <typename S>
PYWM_HD S select(bool condition, S yes, S no) {
  return condition ? yes : no;
}

#else

PYWM_HD float select(bool condition, float yes, float no) {
  const uint32_t mask = 0u - static_cast<uint32_t>(condition);
  return std::bit_cast<float>((std::bit_cast<uint32_t>(yes) & mask) | (std::bit_cast<uint32_t>(no) & ~mask));
}
PYWM_HD double select(bool condition, double yes, double no) {
  const uint64_t mask = uint64_t(0) - static_cast<uint64_t>(condition);
  return std::bit_cast<double>((std::bit_cast<uint64_t>(yes) & mask) | (std::bit_cast<uint64_t>(no) & ~mask));
}

#endif

}  // namespace pywm::math
