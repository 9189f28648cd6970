// Kernels for x86-64 CPUs with AVX2, FMA and F16C (since 2013).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define VESICLE_AVX2 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,popcnt,bmi,bmi2")
#endif
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const vesicle::Kernels* vesicle::kernels_avx2() {
  static const Kernels kernels = table("avx2");
  return &kernels;
}
#else
const vesicle::Kernels* vesicle::kernels_avx2() { return nullptr; }
#endif
