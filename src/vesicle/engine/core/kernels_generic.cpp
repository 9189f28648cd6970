// Kernels in portable C++, and the choice among all of them.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

#include "kernels.inc"

const vesicle::Kernels* vesicle::kernels_generic() {
  static const Kernels kernels = table("generic");
  return &kernels;
}

#if defined(__aarch64__)
static bool has_dot_products() {
#if defined(__ARM_FEATURE_DOTPROD) || defined(__APPLE__)
  return true;
#elif defined(__linux__)
  constexpr unsigned long kDotProducts = 1ul << 20;  // HWCAP_ASIMDDP, which older headers lack
  return getauxval(AT_HWCAP) & kDotProducts;
#else
  return false;
#endif
}
#endif

const vesicle::Kernels* vesicle::kernels_for(const char* name) {
  const auto allowed = [name](const char* this_one) { return !name || !std::strcmp(name, this_one); };
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_cpu_init();
  const bool avx512 = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
                      __builtin_cpu_supports("avx512vbmi2");
  if (avx512 && kernels_avx512() && allowed("avx512")) return kernels_avx512();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx2 && kernels_avx2() && allowed("avx2")) return kernels_avx2();
#endif
#if defined(__aarch64__)
  if (kernels_neon() && has_dot_products() && allowed("neon")) return kernels_neon();
#endif
  return allowed("generic") ? kernels_generic() : nullptr;
}
