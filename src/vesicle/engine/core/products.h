// Products of activations with a projection: what is chosen, how it is rounded, who computes which part.
#pragma once

#include <algorithm>
#include <cstring>

#include "buffers.h"
#include "interface.h"
#include "kernels.h"

namespace vesicle {

constexpr int64_t kMaxThreads = 64;
constexpr int32_t kFullBits = 16;

inline bool packed(const VesicleProjection& w) { return w.format == kPacked4 || w.format == kPacked8; }

// How Plan bits read a packed store.
inline Precision precision_of(int64_t format, int32_t bits) {
  const int32_t stored = format == kPacked8 ? 8 : 4;
  if (bits >= stored) return {0x0f, 1.0f, 0.0f, stored == 8};
  const int32_t leading = std::min(bits, 4);
  const int32_t mask = (0x0f << (4 - leading)) & 0x0f;
  return {mask, stored == 8 ? 16.0f : 1.0f, static_cast<float>(1 << (stored - leading)) / 2, false};
}

// Room for the quantized activations of some tokens side by side; see `Quantized`.
struct Shelf {
  Buffer<int8_t> codes;
  Buffer<uint8_t> rows, quads;
  Buffer<float> scales, sums;
  int64_t tokens = 0;

  void room(int64_t n_tokens, int64_t channels) {
    const int64_t groups = (channels + kGroup - 1) / kGroup;
    tokens = n_tokens;
    codes.get(groups * tokens * kGroup);
    rows.get(groups * tokens * kGroup);
    quads.get(groups * tokens);
    scales.get(groups * tokens);
    sums.get(groups * tokens);
  }

  Quantized place(int64_t t) {
    return {codes.get(0) + t * kGroup, rows.get(0) + t * kGroup, quads.get(0) + t,
            scales.get(0) + t,         sums.get(0) + t,          tokens,
            false};
  }
};

// A token's activations at a site, in the form that the weights take.
struct Activation {
  Buffer<float> values;
  Buffer<int32_t> rows;
  Buffer<uint32_t> masks, keys;
  float* x = nullptr;
  int32_t* listed = nullptr;
  int64_t n_listed = 0;
  Quantized quantized{};

  float* room(int64_t n) { return x = values.get(padded(n, 32)); }

  // After `x` has been filled: choose `count` of n channels, and quantize them into a place of the shelf where the
  // weights are packed. Returns how many were chosen.
  int32_t prepare(const Kernels* k, int64_t n, int64_t count, bool quantizes, Shelf* shelf, int64_t place) {
    const int64_t words = (n + 31) / 32;
    uint32_t* mask = masks.get(words);
    k->choose(x, n, count, mask, keys.get(padded(n, 64)));
    if (quantizes) {
      quantized = shelf->place(place);
      k->quantize(x, n, mask, &quantized);
    } else {
      listed = rows.get(n);
      n_listed = 0;
      for (int64_t w = 0; w < words; ++w)
        for (uint32_t left = mask[w]; left; left &= left - 1)
          listed[n_listed++] = static_cast<int32_t>(32 * w + __builtin_ctz(left));
    }
    int64_t chosen = 0;
    for (int64_t w = 0; w < words; ++w) chosen += __builtin_popcount(mask[w]);
    return static_cast<int32_t>(chosen);
  }
};

// The results of a phase. A packed tile that two threads share is completed from their side results.
struct Output {
  Buffer<float> storage, side_storage;
  float* sides = nullptr;
  int64_t width = 0;
  int64_t side_tile[kMaxThreads];

  void room(int64_t n_out, int64_t tokens, int64_t threads) {
    // Rows a multiple of 4 KiB apart would compete for the same cache lines.
    width = padded(n_out, 1024) + kTile + 16;
    storage.get(width * tokens);
    sides = side_storage.get(threads * tokens * kTile);
    std::fill(side_tile, side_tile + threads, -1);
  }

  float* of(int64_t t) { return storage.get(0) + t * width; }

  // y[0:n] of a token, complete.
  void fetch(const Kernels* k, int64_t t, int64_t tokens, int64_t threads, int64_t n, float* y) {
    std::memcpy(y, of(t), n * sizeof(float));
    for (int64_t i = 1; i < threads; ++i) {
      if (side_tile[i] < 0) continue;
      const int64_t start = side_tile[i] * kTile;
      if (start < n) k->add(y + start, sides + (i * tokens + t) * kTile, std::min(kTile, n - start));
    }
  }
};

// This thread's share of y = bias + x w for the tokens that take part, each with its own channels and bits (by place in
// the pass). A token's result depends on its own activations, and on the number of threads, but not on the others. With
// `whole` no two threads share a packed tile, and y is complete without `fetch`.
void multiply(const Kernels* k, const VesicleProjection& w, const int32_t* bits, Activation* const* x,
              const int64_t* tokens, int64_t n_tokens, int64_t all_tokens, bool whole, Output* out, int64_t thread,
              int64_t threads);

}  // namespace vesicle
