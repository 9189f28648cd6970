// Kernels for CPUs with AVX-512 VNNI and VBMI2 (Intel Ice Lake, AMD Zen 4 and later).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "kernels.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

#define VESICLE_AVX512 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,avx512vbmi2,avx2,fma,f16c,popcnt,bmi,bmi2,prefer-vector-width=512")
#endif
#include "kernels.inc"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

const vesicle::Kernels* vesicle::kernels_avx512() {
  static const Kernels kernels = table("avx512");
  return &kernels;
}
#else
const vesicle::Kernels* vesicle::kernels_avx512() { return nullptr; }
#endif
