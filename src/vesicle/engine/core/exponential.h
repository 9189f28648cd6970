// e^x, by operations that compilers turn into vector instructions; compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

namespace vesicle {
namespace {

// 2^n times a polynomial of the remainder (Cephes coefficients); relative error below 2e-7 from -87 to 88, and the
// nearer end's value beyond. NaN stays NaN: the comparisons and the arithmetic below hand it on.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  x = x > 88.0f ? 88.0f : x;
  // Near 1.5 2^23 floats are whole numbers, so that this sum rounds, and its last bits are n + 127: the exponent.
  constexpr float kRound = 12583039.0f;
  const float shifted = x * 1.44269504088896341f + kRound;
  const float n = shifted - kRound;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float y = 1.9875691500e-4f;
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits <<= 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

}  // namespace
}  // namespace vesicle
