// Packs weights whose scales are known; see packed.py for the order of bytes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "interface.h"
#include "kernels.h"
#include "threads.h"

namespace vesicle {

inline float half_to_float(uint16_t bits) {
  const uint32_t exponent = bits >> 10 & 31, mantissa = bits & 0x3ff;
  if (exponent == 31) return NAN;  // no scale is infinite
  const float size = exponent ? std::ldexp(static_cast<float>(mantissa | 0x400), static_cast<int>(exponent) - 25)
                              : std::ldexp(static_cast<float>(mantissa), -24);
  return bits & 0x8000 ? -size : size;
}

struct Encode {
  ThreadPool* pool;
  const VesicleEncoding* e;
  std::vector<float> worst;  // of a thread

  int64_t groups() const { return (e->n_in + kGroup - 1) / kGroup; }

  void run(int64_t thread) {
    const int64_t step = e->head ? kHeadTile : kTile / 2, threads = pool->threads();
    const int64_t end = e->first + e->rows, tiles = (e->rows + kTile - 1) / kTile;  // a byte is one thread's
    float most = 0;
    for (int64_t t = tiles * thread / threads; t < tiles * (thread + 1) / threads; ++t)
      for (int64_t n = e->first + t * kTile; n < std::min(end, e->first + (t + 1) * kTile); n += step)
        for (int64_t g = 0; g < groups(); ++g) part(n, step, g, &most);
    worst[thread] = most;
  }

 private:
  // A group of `count` outputs from the n-th on: half of a tile of a projection, or a tile of the head.
  void part(int64_t n, int64_t count, int64_t g, float* most) {
    alignas(64) uint8_t codes[kTile / 2][kGroup] = {};
    uint16_t scales[kTile / 2] = {}, lows[kTile / 2] = {};
    const int64_t channels = std::min(kGroup, e->n_in - g * kGroup);
    for (int64_t o = 0; o < count && n + o < e->n_out; ++o) {
      const int64_t at = (n + o) * groups() + g;
      const float* w = e->weight + (n + o - e->first) * e->n_in + g * kGroup;
      scales[o] = e->scales[at];
      lows[o] = e->lows[at];
      code(w, channels, e->inverse[at], e->origin[at], half_to_float(scales[o]), half_to_float(lows[o]), codes[o], most);
    }
    if (!e->high) return;
    if (e->head) write_head(n, g, codes, scales, lows);
    else write_tile(n, g, codes, scales, lows);
  }

  void code(const float* w, int64_t channels, float inverse, float origin, float scale, float low, uint8_t* out,
            float* most) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded, ties to even
    float codes[kGroup], error = 0;
    for (int64_t c = 0; c < channels; ++c) {
      const float x = (w[c] - origin) * inverse;
      codes[c] = (std::min(std::max(x, 0.0f), e->top) + kRound - kRound) * e->multiplier;
    }
    for (int64_t c = 0; c < channels; ++c) {
      error = std::max(error, std::fabs(codes[c] * scale + low - w[c]));
      out[c] = static_cast<uint8_t>(static_cast<int32_t>(codes[c]));
    }
    *most = std::max(*most, error);
  }

  uint8_t leading(uint8_t code) const { return e->bits == 8 ? code >> 4 : code; }

  void write_head(int64_t n, int64_t g, const uint8_t codes[][kGroup], const uint16_t* scales, const uint16_t* lows) {
    const int64_t tile = n / kHeadTile;
    uint8_t* high = e->high + (tile * groups() + g) * 320;
    uint8_t* trailing = e->trailing ? e->trailing + (tile * groups() + g) * 256 : nullptr;
    for (int64_t j = 0; j < 4; ++j)
      for (int64_t o = 0; o < kHeadTile; ++o)
        for (int64_t c = 0; c < 4; ++c) {
          const uint8_t a = codes[o][8 * j + c], b = codes[o][8 * j + 4 + c];
          high[64 * j + 4 * o + c] = static_cast<uint8_t>(leading(a) | leading(b) << 4);
          if (trailing) trailing[64 * j + 4 * o + c] = static_cast<uint8_t>((a & 15) | (b & 15) << 4);
        }
    std::memcpy(high + 256, scales, kHeadTile * sizeof *scales);
    std::memcpy(high + 256 + 2 * kHeadTile, lows, kHeadTile * sizeof *lows);
  }

  // The outputs are the first or second half of a tile of 128, whose bytes hold an output of each half; or all of one of
  // 64 at the end, whose bytes hold two of them.
  void write_tile(int64_t n, int64_t g, const uint8_t codes[][kGroup], const uint16_t* scales, const uint16_t* lows) {
    const int64_t outputs = (e->n_out + kTile / 2 - 1) / (kTile / 2) * (kTile / 2), whole = outputs / kTile * kTile;
    const bool narrow = n >= whole;
    const int64_t width = narrow ? kTile / 2 : kTile, start = narrow ? whole : n / kTile * kTile, row = width / 2;
    const bool second = !narrow && n % kTile;
    uint8_t* high = e->high + start * 20 * groups() + g * width * 20;
    uint8_t* trailing = e->trailing ? e->trailing + start * 16 * groups() + g * width * 16 : nullptr;
    const int64_t lanes = width / 8;  // outputs of a half that are 4 bytes apart by fours
    for (int64_t o = 0; o < kTile / 2; ++o) {
      const int64_t half = narrow ? o / row : second, r = o % row;
      const int64_t byte = r % lanes / 4 * 16 + r / lanes * 4 + r % 4;
      for (int64_t c = 0; c < kGroup; ++c) {
        put(high + c * row + byte, leading(codes[o][c]), half);
        if (trailing) put(trailing + c * row + byte, codes[o][c] & 15, half);
      }
    }
    const int64_t at = n - start;
    std::memcpy(high + 32 * row + 2 * at, scales, kTile / 2 * sizeof *scales);
    std::memcpy(high + 32 * row + 2 * width + 2 * at, lows, kTile / 2 * sizeof *lows);
  }

  // Both halves of a byte are written by one thread, the low one first.
  static void put(uint8_t* byte, uint8_t code, int64_t half) {
    *byte = static_cast<uint8_t>(half ? *byte | code << 4 : code);
  }
};

}  // namespace vesicle
