#include "products.h"

namespace vesicle {
namespace {

void multiply_dense(const Kernels* k, const VesicleProjection& w, Activation* const* x, const int64_t* tokens,
                    int64_t n_tokens, Output* out, int64_t thread, int64_t threads) {
  const int64_t part = padded((w.n_out + threads - 1) / threads, 32);
  const int64_t start = thread * part, size = std::min(part, w.n_out - start);
  if (size <= 0) return;
  const float* from[kMaxTokens];
  float* to[kMaxTokens];
  int64_t n_whole = 0;  // tokens that read every channel: two or more share the reading
  const int32_t* every = nullptr;
  const auto single = [&](const Activation& a, float* y) {
    if (w.format == kDense32)
      k->rows_f32(a.x, a.listed, a.n_listed, static_cast<const float*>(w.data) + start, w.stride, y, size);
    else
      k->rows_bf16(a.x, a.listed, a.n_listed, static_cast<const uint16_t*>(w.data) + start, w.stride, y, size);
  };
  for (int64_t i = 0; i < n_tokens; ++i) {
    float* y = out->of(tokens[i]) + start;
    if (w.bias) {
      std::memcpy(y, w.bias + start, size * sizeof(float));
    } else {
      std::memset(y, 0, size * sizeof(float));
    }
    const Activation& a = *x[i];
    if (n_tokens == 1 || a.n_listed < w.n_in) {
      single(a, y);
      continue;
    }
    every = a.listed;
    from[n_whole] = a.x;
    to[n_whole++] = y;
  }
  if (!n_whole) return;
  if (w.format == kDense32)
    k->strips_f32(from, n_whole, every, w.n_in, static_cast<const float*>(w.data) + start, w.stride, to, size);
  else
    k->strips_bf16(from, n_whole, every, w.n_in, static_cast<const uint16_t*>(w.data) + start, w.stride, to, size);
}

}  // namespace

void multiply(const Kernels* k, const VesicleProjection& w, const int32_t* bits, Activation* const* x,
              const int64_t* tokens, int64_t n_tokens, int64_t all_tokens, bool whole, Output* out, int64_t thread,
              int64_t threads) {
  if (!n_tokens) return;
  if (!packed(w)) return multiply_dense(k, w, x, tokens, n_tokens, out, thread, threads);
  const int64_t groups = (w.n_in + kGroup - 1) / kGroup, columns = padded(w.n_out, kTile / 2);
  const int64_t full = columns / kTile, half = columns % kTile != 0;
  const int64_t units = groups * (2 * full + half);  // half a tile's group each
  const auto bound = [&](int64_t i) {
    int64_t unit = units * i / threads;
    if (whole) return i == threads ? units : unit / (2 * groups) * 2 * groups;
    return unit < 2 * full * groups ? unit / 2 * 2 : unit;
  };
  const int64_t first = bound(thread), last = bound(thread + 1);
  const uint8_t* high = static_cast<const uint8_t*>(w.data);
  const uint8_t* trailing = static_cast<const uint8_t*>(w.trailing);
  // Tokens that read the weights at the same bits go through a tile together.
  const Quantized* together[kMaxTokens];
  float* y[kMaxTokens];
  for (int64_t unit = first; unit < last;) {
    const bool wide = unit < 2 * full * groups;
    const int64_t tile = wide ? unit / (2 * groups) : full;
    const int64_t from = wide ? unit % (2 * groups) / 2 : unit - 2 * full * groups;
    const int64_t step = wide ? 2 : 1;
    const int64_t to = std::min(groups, from + (last - unit) / step);
    const int64_t size = wide ? kTile : kTile / 2;
    const uint8_t* data = high + tile * groups * (32 * kTile / 2 + 4 * kTile);
    const uint8_t* trail = trailing ? trailing + tile * groups * (32 * kTile / 2) : nullptr;
    for (int64_t i = 0; i < n_tokens; ++i) {
      float* to_fill;
      if (from) {
        out->side_tile[thread] = tile;
        to_fill = out->sides + (thread * all_tokens + tokens[i]) * kTile;
      } else {
        to_fill = out->of(tokens[i]) + tile * kTile;
      }
      std::memset(to_fill, 0, size * sizeof(float));
      if (!from && w.bias)
        std::memcpy(to_fill, w.bias + tile * kTile, std::min(size, w.n_out - tile * kTile) * sizeof(float));
    }
    bool done[kMaxTokens] = {};
    for (int64_t i = 0; i < n_tokens; ++i) {
      if (done[i]) continue;
      int64_t n = 0;
      for (int64_t j = i; j < n_tokens; ++j) {
        if (done[j] || bits[tokens[j]] != bits[tokens[i]]) continue;
        done[j] = true;
        together[n] = &x[j]->quantized;
        y[n++] = from ? out->sides + (thread * all_tokens + tokens[j]) * kTile : out->of(tokens[j]) + tile * kTile;
      }
      const Precision precision = precision_of(w.format, bits[tokens[i]]);
      k->tile(data, trail, size, from, to, &precision, together, n, y);
    }
    unit += (to - from) * step;
  }
}

}  // namespace vesicle
