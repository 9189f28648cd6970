// Kernels for 64-bit ARM CPUs with dot-product instructions (ARMv8.2 and later: since 2018, and all of Apple's).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

// Clang before 16 offers the instructions only where the whole build may use them.
#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__) && \
    (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD))
#include <arm_neon.h>

#define VESICLE_NEON 1
#if defined(__ARM_FEATURE_DOTPROD)
#include "kernels.inc"
#elif defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#include "kernels.inc"
#pragma clang attribute pop
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#include "kernels.inc"
#pragma GCC pop_options
#endif

const vesicle::Kernels* vesicle::kernels_neon() {
  static const Kernels kernels = table("neon");
  return &kernels;
}
#else
const vesicle::Kernels* vesicle::kernels_neon() { return nullptr; }
#endif
