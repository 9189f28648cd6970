// Whole layers of a decode step, for one token of each of up to 16 sequences, without returning to Python.
//
// A layer has five phases; between them the threads meet. What is cheap for one token (norms, decisions, choosing
// channels) every thread works out for itself; with several tokens it is shared out instead. Nothing that a Plan
// skips is read: channels by their rows, modules and blocks whole.

#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>

#include "kernels.h"
#include "threads.h"

namespace vesicle {
namespace {

constexpr int kTransmitters = 5, kDopamine = 0, kSerotonin = 1, kGaba = 2;
constexpr int kSmall = 1, kBig = 2, kFullBits = 16;
constexpr int64_t kMaxThreads = 64, kSegments = 16;

template <typename T>
class Buffer {  // aligned, grows, keeps no contents
 public:
  T* get(int64_t n) {
    if (n > size_) {
      storage_.reset(new char[n * sizeof(T) + 64]);
      size_ = n;
    }
    const uintptr_t address = reinterpret_cast<uintptr_t>(storage_.get());
    return reinterpret_cast<T*>((address + 63) / 64 * 64);
  }

 private:
  std::unique_ptr<char[]> storage_;
  int64_t size_ = 0;
};

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool packed(const VesicleProjection& w) { return w.format == kPacked4 || w.format == kPacked8; }

// How Plan bits read a packed store.
Precision precision_of(int64_t format, int32_t bits) {
  const int32_t stored = format == kPacked8 ? 8 : 4;
  if (bits >= stored) return {0x0f, 1.0f, 0.0f, stored == 8};
  const int32_t leading = std::min(bits, 4);
  const int32_t mask = (0x0f << (4 - leading)) & 0x0f;
  return {mask, stored == 8 ? 16.0f : 1.0f, static_cast<float>(1 << (stored - leading)) / 2, false};
}

// A token's activations at a site, in the form that the weights take.
struct Activation {
  Buffer<float> values;
  Buffer<int32_t> rows;
  Buffer<int8_t> codes;
  Buffer<uint8_t> names, quads;
  Buffer<float> scales, sums;
  Buffer<uint32_t> masks, keys;
  float* x = nullptr;
  int32_t* listed = nullptr;
  int64_t n_listed = 0;
  Quantized quantized{};

  float* room(int64_t n) { return x = values.get(padded(n, 32)); }

  // After `x` has been filled: choose `count` of n channels. Returns how many were chosen.
  int32_t prepare(const Kernels* k, int64_t n, int64_t count, bool quantizes) {
    const int64_t words = (n + 31) / 32;
    uint32_t* mask = masks.get(words);
    k->choose(x, n, count, mask, keys.get(padded(n, 64)));
    if (quantizes) {
      quantized.codes = codes.get(words * 32);
      quantized.rows = names.get(words * 32);
      quantized.quads = quads.get(words);
      quantized.scales = scales.get(words);
      quantized.sums = sums.get(words);
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

// This thread's share of y = bias + x w for the tokens that take part.
void multiply(const Kernels* k, const VesicleProjection& w, const int32_t* bits, Activation* const* x,
              const int64_t* tokens, int64_t n_tokens, int64_t all_tokens, Output* out, int64_t thread,
              int64_t threads) {
  if (!n_tokens) return;
  if (!packed(w)) {
    const int64_t part = padded((w.n_out + threads - 1) / threads, 32);
    const int64_t start = thread * part, size = std::min(part, w.n_out - start);
    if (size <= 0) return;
    for (int64_t i = 0; i < n_tokens; ++i) {
      float* y = out->of(tokens[i]) + start;
      if (w.bias) {
        std::memcpy(y, w.bias + start, size * sizeof(float));
      } else {
        std::memset(y, 0, size * sizeof(float));
      }
      const Activation& a = *x[i];
      if (w.format == kDense32) {
        k->rows_f32(a.x, a.listed, a.n_listed, static_cast<const float*>(w.data) + start, w.stride, y, size);
      } else {
        k->rows_bf16(a.x, a.listed, a.n_listed, static_cast<const uint16_t*>(w.data) + start, w.stride, y, size);
      }
    }
    return;
  }
  const int64_t groups = (w.n_in + kGroup - 1) / kGroup, columns = padded(w.n_out, kTile / 2);
  const int64_t full = columns / kTile, half = columns % kTile != 0;
  const int64_t units = groups * (2 * full + half);  // half a tile's group each
  const auto bound = [&](int64_t i) {
    int64_t unit = units * i / threads;
    return unit < 2 * full * groups ? unit / 2 * 2 : unit;
  };
  const int64_t first = bound(thread), last = bound(thread + 1);
  const uint8_t* high = static_cast<const uint8_t*>(w.data);
  const uint8_t* rest = static_cast<const uint8_t*>(w.rest);
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
    const uint8_t* trail = rest ? rest + tile * groups * (32 * kTile / 2) : nullptr;
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

// What a rule makes of a level; see effectors/rules.py.
int32_t decided(const VesicleRule& rule, double level, int64_t visible) {
  if (rule.steps >= 0) {
    for (int64_t i = 0; i < rule.steps; ++i)
      if (level >= rule.levels[i]) return rule.values[i];
    return rule.below;
  }
  const int64_t width = rule.width ? rule.width : visible;
  const double share = std::min(1.0, std::max(rule.floor, 1.0 - rule.rate * (1.0 - level)));
  const int64_t count = static_cast<int64_t>(std::ceil(share * width - 1e-9));
  return static_cast<int32_t>(std::min(width, std::max(std::min(width, rule.least), count)));
}

float from_half(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31;
  uint32_t wide = sign | ((exponent + 112) << 23) | (static_cast<uint32_t>(bits & 0x3ff) << 13);
  if (exponent == 31) wide |= 0x7f800000u;  // infinity or NaN
  float value;
  if (!exponent) {  // zero or subnormal, in units of 2^-24
    const float tiny = static_cast<float>(bits & 0x3ff) * 5.9604644775390625e-8f;
    std::memcpy(&wide, &tiny, sizeof wide);
    wide |= sign;
  }
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// The 32 codes of one group of a row of a packed head, and their scale and low.
void head_codes(const VesicleProjection& w, int64_t row, int64_t g, int32_t* codes, float* scale, float* low) {
  const int64_t groups = (w.n_in + kGroup - 1) / kGroup, block = row / kHeadTile * groups + g, o = row % kHeadTile;
  const uint8_t* high = static_cast<const uint8_t*>(w.data) + block * 320;
  const uint8_t* rest = w.format == kPacked8 ? static_cast<const uint8_t*>(w.rest) + block * 256 : nullptr;
  for (int64_t j = 0; j < 4; ++j)
    for (int64_t c = 0; c < 4; ++c) {
      int32_t a = high[64 * j + 4 * o + c] & 15, b = high[64 * j + 4 * o + c] >> 4;
      if (rest) {
        a = 16 * a + (rest[64 * j + 4 * o + c] & 15);
        b = 16 * b + (rest[64 * j + 4 * o + c] >> 4);
      }
      codes[8 * j + c] = a;
      codes[8 * j + 4 + c] = b;
    }
  *scale = from_half(high + 256 + 2 * o);
  *low = from_half(high + 256 + 2 * (kHeadTile + o));
}

float head_logit(const VesicleProjection& w, const Quantized& x, int64_t row) {
  float total = 0, scale, low;
  int32_t codes[kGroup];
  for (int64_t g = 0; g < (w.n_in + kGroup - 1) / kGroup; ++g) {
    head_codes(w, row, g, codes, &scale, &low);
    int32_t sum = 0;
    for (int64_t i = 0; i < kGroup; ++i) sum += codes[i] * x.codes[g * kGroup + i];
    total += scale * (x.scales[g] * static_cast<float>(sum)) + low * x.sums[g];
  }
  return total;
}

// A row of the embedding.
void head_row_values(const VesicleProjection& w, int64_t row, float* out) {
  if (w.format == kDense32) {
    std::memcpy(out, static_cast<const float*>(w.data) + row * w.n_in, w.n_in * sizeof(float));
    return;
  }
  if (w.format == kDenseBf16) {
    const uint16_t* from = static_cast<const uint16_t*>(w.data) + row * w.n_in;
    for (int64_t i = 0; i < w.n_in; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(out + i, &bits, sizeof bits);
    }
    return;
  }
  int32_t codes[kGroup];
  float scale, low;
  for (int64_t start = 0; start < w.n_in; start += kGroup) {
    head_codes(w, row, start / kGroup, codes, &scale, &low);
    for (int64_t i = 0; i < kGroup && start + i < w.n_in; ++i)
      out[start + i] = scale * static_cast<float>(codes[i]) + low;
  }
}

// A token's state; each thread has its own copy when there is only one token.
struct Lane {
  Buffer<float> residual_, after_, normed_, joint_, mixed_, parts_;
  float *residual, *after, *normed;
  Activation in;
  // Decisions for the layer at hand: attention for this layer, FFN for this layer.
  VesiclePlanRow row;
  int32_t blocks, head;
};

struct Step {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleModel* model;
  VesicleToken* tokens;
  int64_t n;
  std::vector<std::unique_ptr<Lane>> lanes;
  Output value_key, query, attention_out, ffn_in, ffn_out;
  Buffer<float> inner_, partial_, logits_, scored_;
  float *inner, *partial, *scored;
  int64_t inner_rank, scored_row;
  std::vector<Buffer<float>> choices;
  std::vector<Buffer<int32_t>> lists;
  std::vector<Buffer<uint32_t>> chosen;
  std::vector<Buffer<const int32_t*>> heads_lists;
  Activation final_[kMaxTokens];

  bool alone() const { return n == 1; }
  Lane& lane(int64_t thread, int64_t t) { return *lanes[alone() ? thread : t]; }
  // Whether this thread writes what leaves the core about a token.
  bool reports(int64_t thread) const { return !alone() || thread == 0; }

  void attention_decision(Lane& lane, const VesicleToken& token, int64_t l) {
    const VesiclePlanRow& planned = token.plan[l];
    std::copy(planned.channels, planned.channels + 2, lane.row.channels);
    std::copy(planned.bits, planned.bits + 2, lane.row.bits);
    lane.row.attention = planned.attention;
    lane.blocks = std::min(planned.kv_blocks, token.held[l]);
  }

  // The linear predictor and the effectors' rules, as in predictors/ and effectors/rules.py: the FFN of layer l and the
  // attention of the next. Threads that share a token each decide into a row of their own, and read none of the Plan's
  // that one of them writes.
  void release(Lane& lane, VesicleToken& token, int64_t l, bool reports) {
    const int64_t width = model->width, next = l + 1;
    const VesicleModulator* m = token.modulator;
    if (!m) {
      const VesiclePlanRow& planned = token.plan[l];
      std::copy(planned.channels + 2, planned.channels + 4, lane.row.channels + 2);
      std::copy(planned.bits + 2, planned.bits + 4, lane.row.bits + 2);
      lane.row.ffn = planned.ffn;
      if (next < model->n_layers) attention_decision(lane, token, next);
      else lane.head = planned.head;
      return;
    }
    const double scale = 1.0 / std::sqrt(static_cast<double>(k->dot(lane.after, lane.after, width)) / width + 1e-6);
    double levels[kTransmitters] = {1, 1, 1, 1, 1};
    bool known = true;
    for (int64_t a = 0; a < m->released; ++a) {
      const int64_t i = l * m->released + a;
      const double z = k->dot(m->weight + i * width, lane.after, width) * scale + m->offset[i] +
                       std::exp(static_cast<double>(m->log_slope[i])) * m->pressure + m->place_weight[i] * token.place;
      if (token.acting >> m->columns[a] & 1) levels[m->columns[a]] = std::nearbyint(1e6 / (1.0 + std::exp(z))) / 1e6;
      known = known && !std::isnan(z);
    }
    if (reports) std::copy(levels, levels + kTransmitters, token.levels + l * kTransmitters);
    if (!known) {  // nothing can be decided from what is no number, and the token's result shall say so
      std::fill(levels, levels + kTransmitters, 1.0);
      lane.after[0] = NAN;
    }
    const int64_t visible = token.position / kBlock + 1;
    for (const VesicleRule* r = m->rules; r < m->rules + m->n_rules; ++r) {
      const int64_t layer = r->next ? next : l;
      if (layer == model->n_layers || (r->last && layer + 1 < model->n_layers)) continue;
      const int32_t value = decided(*r, levels[r->transmitter], visible);
      reinterpret_cast<int32_t*>(&lane.row)[r->number] = value;
      if (reports && !r->last) reinterpret_cast<int32_t*>(&token.plan[layer])[r->number] = value;
    }
    if (next < model->n_layers) lane.blocks = std::min(lane.row.kv_blocks, token.held[next]);
    else lane.head = token.wants == 2 ? lane.row.head : 0;
  }

  // Calls f(token) for the tokens that this thread prepares, and meets the others where they share.
  template <typename F>
  void each(int64_t thread, F f) {
    if (alone()) return f(0);
    for (int64_t t = thread; t < n; t += pool->threads()) f(t);
    pool->barrier();
  }

  // The tokens for which `f` holds, and their activations.
  template <typename F>
  int64_t select(int64_t thread, F f, int64_t* which, Activation** x) {
    int64_t count = 0;
    for (int64_t t = 0; t < n; ++t) {
      if (!f(lane(thread, t))) continue;
      which[count] = t;
      x[count++] = &lane(thread, t).in;
    }
    return count;
  }

  void site(int64_t thread, const VesicleProjection& w, int s, const int64_t* which, Activation* const* x,
            int64_t count, Output* out) {
    int32_t bits[kMaxTokens];
    for (int64_t i = 0; i < count; ++i) bits[which[i]] = lane(thread, which[i]).row.bits[s];
    multiply(k, w, bits, x, which, count, n, out, thread, pool->threads());
  }

  void count_rows(VesicleToken& token, int64_t l, int s, int32_t rows, int64_t outputs) {
    token.rows[4 * l + s] = rows;
    token.outputs[4 * l + s] = outputs;
  }

  // This thread's rows of a stand-in's first map.
  void standin_down(int64_t thread, const VesicleStandIn* standin, int64_t l, int64_t t) {
    const int64_t threads = pool->threads(), rank = standin->rank, width = model->width;
    for (int64_t r = rank * thread / threads; r < rank * (thread + 1) / threads; ++r)
      inner[t * inner_rank + r] = k->dot(standin->down + (l * rank + r) * width, lane(thread, t).normed, width);
  }

  void standin_up(int64_t thread, const VesicleStandIn* standin, int64_t l, int64_t t, Output* out) {
    const int64_t threads = pool->threads(), rank = standin->rank, width = model->width;
    for (int64_t d = width * thread / threads; d < width * (thread + 1) / threads; ++d)
      out->of(t)[d] = standin->bias[l * width + d] +
                      k->dot(standin->up + (l * width + d) * rank, inner + t * inner_rank, rank);
  }

  // to = from + what a phase computed for the token; nothing was computed where a module is skipped outright.
  void residual(Output* out, int64_t t, bool main, bool standin, const float* from, float* to) {
    const int64_t width = model->width;
    if (main) {
      out->fetch(k, t, n, pool->threads(), width, to);
      k->add(to, from, width);
    } else if (standin) {
      std::memcpy(to, out->of(t), width * sizeof(float));
      k->add(to, from, width);
    } else {
      std::memcpy(to, from, width * sizeof(float));
    }
  }

  void finish_ffn(int64_t thread, int64_t t) {
    Lane& a = lane(thread, t);
    residual(&ffn_out, t, a.row.ffn == kBig, a.row.ffn == kSmall && tokens[t].ffn_standin, a.after, a.residual);
  }

  void layer(int64_t thread, int64_t l) {
    const VesicleLayer& w = model->layers[l];
    const int64_t threads = pool->threads(), width = model->width, size = model->size, heads = model->heads;
    const int64_t kv = model->kv_heads * size, q_width = heads * size, inner_width = model->ffn_width;
    int64_t which[kMaxTokens];
    Activation* x[kMaxTokens];

    // 1. Values, keys and queries.
    each(thread, [&](int64_t t) {
      Lane& a = lane(thread, t);
      if (l) {
        finish_ffn(thread, t);
      } else {
        head_row_values(model->embedding, tokens[t].id, a.residual);
        attention_decision(a, tokens[t], 0);
      }
      k->normalise(a.residual, w.attention_gain, model->eps, width, a.in.room(width));
      if (!a.row.attention) std::memcpy(a.normed, a.in.x, width * sizeof(float));
      const int32_t rows = a.in.prepare(k, width, a.row.channels[0], packed(w.value_key));
      if (reports(thread)) count_rows(tokens[t], l, 0, rows, 2 * kv + (a.row.attention ? q_width : 0));
    });
    int64_t count = select(thread, [](Lane&) { return true; }, which, x);
    site(thread, w.value_key, 0, which, x, count, &value_key);
    count = select(thread, [](Lane& a) { return a.row.attention != 0; }, which, x);
    site(thread, w.query, 0, which, x, count, &query);
    for (int64_t t = 0; t < n; ++t)
      if (!lane(thread, t).row.attention && tokens[t].attention_standin) standin_down(thread, tokens[t].attention_standin, l, t);
    pool->barrier();

    // 2. Attention, shared out by blocks.
    attention(thread, l);
    pool->barrier();

    // 3. Its output projection.
    each(thread, [&](int64_t t) {
      Lane& a = lane(thread, t);
      if (!a.row.attention) return;
      merge(t, a.blocks, a.in.room(q_width));
      const int32_t rows = a.in.prepare(k, q_width, a.row.channels[1], packed(w.attention_out));
      if (reports(thread)) count_rows(tokens[t], l, 1, rows, width);
    });
    count = select(thread, [](Lane& a) { return a.row.attention != 0; }, which, x);
    site(thread, w.attention_out, 1, which, x, count, &attention_out);
    for (int64_t t = 0; t < n; ++t)
      if (!lane(thread, t).row.attention && tokens[t].attention_standin)
        standin_up(thread, tokens[t].attention_standin, l, t, &attention_out);
    pool->barrier();

    // 4. Release, then the FFN's gate and up projections.
    each(thread, [&](int64_t t) {
      Lane& a = lane(thread, t);
      residual(&attention_out, t, a.row.attention, !a.row.attention && tokens[t].attention_standin, a.residual, a.after);
      if (reports(thread) && !a.row.attention && tokens[t].attention_standin) *tokens[t].standin += tokens[t].attention_standin->rank;
      release(a, tokens[t], l, reports(thread));
      if (a.row.ffn == 0) return;
      k->normalise(a.after, w.ffn_gain, model->eps, width, a.in.room(width));
      if (a.row.ffn == kSmall) {
        std::memcpy(a.normed, a.in.x, width * sizeof(float));
        if (reports(thread) && tokens[t].ffn_standin) *tokens[t].standin += tokens[t].ffn_standin->rank;
        return;
      }
      const int32_t rows = a.in.prepare(k, width, a.row.channels[2], packed(w.ffn_in));
      if (reports(thread)) count_rows(tokens[t], l, 2, rows, 2 * inner_width);
    });
    count = select(thread, [](Lane& a) { return a.row.ffn == kBig; }, which, x);
    site(thread, w.ffn_in, 2, which, x, count, &ffn_in);
    for (int64_t t = 0; t < n; ++t)
      if (lane(thread, t).row.ffn == kSmall && tokens[t].ffn_standin) standin_down(thread, tokens[t].ffn_standin, l, t);
    pool->barrier();

    // 5. Its down projection.
    each(thread, [&](int64_t t) {
      Lane& a = lane(thread, t);
      if (a.row.ffn != kBig) return;
      float* gate = a.in.room(2 * inner_width);
      ffn_in.fetch(k, t, n, threads, 2 * inner_width, gate);
      k->silu_gate(gate, gate + inner_width, inner_width);
      const int32_t rows = a.in.prepare(k, inner_width, a.row.channels[3], packed(w.ffn_out));
      if (reports(thread)) count_rows(tokens[t], l, 3, rows, width);
    });
    count = select(thread, [](Lane& a) { return a.row.ffn == kBig; }, which, x);
    site(thread, w.ffn_out, 3, which, x, count, &ffn_out);
    for (int64_t t = 0; t < n; ++t)
      if (lane(thread, t).row.ffn == kSmall && tokens[t].ffn_standin)
        standin_up(thread, tokens[t].ffn_standin, l, t, &ffn_out);
    pool->barrier();
  }

  // Summaries of KV head g of a token.
  char* summaries(const VesicleToken& token, int64_t l, int64_t g) {
    const int64_t bytes = model->summary_format == kF32 ? 4 : 2;
    return static_cast<char*>(token.summaries[l]) + g * token.room_summaries * token.vectors * model->size * bytes;
  }

  // Summarises the block at an index of a token's list, which has just been completed.
  void summarise(const KvView& view, const VesicleToken& token, int64_t l, int64_t index) {
    const int64_t bytes = model->summary_format == kF32 ? 4 : 2;
    const int64_t group = index / kBlock * kBlock * token.vectors * model->size * bytes;
    for (int64_t g = 0; g < model->kv_heads; ++g)
      k->summarise(&view, static_cast<int32_t>(model->kv_format), g, token.tables[l * token.room + index],
                   token.vectors, summaries(token, l, g) + group, index % kBlock);
  }

  // The rotated queries of a token, in this thread's scratch.
  float* queries(int64_t thread, const VesicleToken& token, int64_t l, int64_t t) {
    const VesicleLayer& w = model->layers[l];
    const int64_t size = model->size, heads = model->heads;
    float* q = joints[thread].get(0) + 2 * model->kv_heads * size;
    query.fetch(k, t, n, pool->threads(), heads * size, q);
    if (w.query_gain)
      for (int64_t h = 0; h < heads; ++h) k->normalise(q + h * size, w.query_gain, model->eps, size, q + h * size);
    if (w.rotates) k->rotate(q, heads, size, token.cosine, token.sine);
    return q;
  }

  bool chooses(int64_t thread, int64_t t, int64_t l) {
    return lane(thread, t).row.attention && lane(thread, t).blocks < tokens[t].held[l];
  }

  // Estimated scores (heads, row) of the blocks before the newest of a token that is to choose among them.
  float* estimates(int64_t t) { return scored + t * model->heads * scored_row; }

  // This thread's share of the estimates of all tokens.
  void estimate(int64_t thread, int64_t l) {
    const int64_t size = model->size, kv_heads = model->kv_heads, ratio = model->heads / kv_heads;
    const int64_t threads = pool->threads();
    for (int64_t t = 0; t < n; ++t) {
      if (!chooses(thread, t, l)) continue;
      const VesicleToken& token = tokens[t];
      const int64_t groups = padded(token.held[l] - 1, kBlock) / kBlock;
      const int64_t first = groups * thread / threads, last = groups * (thread + 1) / threads;
      if (first == last) continue;
      const float* q = queries(thread, token, l, t);
      for (int64_t g = 0; g < kv_heads; ++g)
        k->estimate(summaries(token, l, g), static_cast<int32_t>(model->summary_format), first, last, token.vectors, q + g * ratio * size,
                    ratio, size, estimates(t) + g * ratio * scored_row, scored_row);
    }
  }

  // Which pool blocks each KV head of a token reads, in order of positions: a list a head.
  const int32_t** list_blocks(int64_t thread, int64_t t, int64_t l) {
    const VesicleToken& token = tokens[t];
    const int64_t held = token.held[l], own = held - 1, kv_heads = model->kv_heads, ratio = model->heads / kv_heads;
    const int32_t* table = token.tables + l * token.room;
    const int32_t** listed = heads_lists[thread].get(2 * kv_heads);
    std::fill(listed, listed + kv_heads, table);
    if (!chooses(thread, t, l)) return listed;
    const int64_t row = padded(own, kBlock);
    float *mass = choices[thread].get(2 * row), *scratch = mass + row;
    int32_t* blocks = lists[thread].get(kv_heads * held);
    uint32_t *masks = chosen[thread].get(2 * row), *keys = masks + row;
    for (int64_t g = 0; g < kv_heads; ++g, blocks += held) {
      listed[g] = blocks;
      std::fill(mass, mass + own, 0.0f);
      for (int64_t r = 0; r < ratio; ++r)
        k->add_softmax(estimates(t) + (g * ratio + r) * scored_row, own, model->scale, mass, scratch);
      // The first block, the own one, and the n - 2 others of the largest estimated mass; see blocks.py. No mass is
      // chosen before this one, not even NaN.
      std::memset(mass, 0xff, sizeof *mass);
      k->choose(mass, own, lane(thread, t).blocks - 1, masks, keys);
      int32_t* next = blocks;
      for (int64_t word = 0; word * 32 < own; ++word)
        for (uint32_t left = masks[word]; left; left &= left - 1) *next++ = table[32 * word + __builtin_ctz(left)];
      *next = table[own];
    }
    return listed;
  }

  // How many blocks of a list of n one piece of work takes: an even number of pieces of about four. It depends on
  // nothing but n, so that results do not depend on the number of threads or on who else is in the batch.
  static int64_t segment(int64_t n) {
    const int64_t pieces = std::min(kSegments, std::max<int64_t>(2, (n / 4 + 1) / 2 * 2));
    return std::max<int64_t>(1, (n + pieces - 1) / pieces);
  }

  // A segment's results for one query head: (size) sums, then the top score and the total.
  float* part(int64_t t, int64_t h, int64_t s) {
    return partial + ((t * model->heads + h) * kSegments + s) * (model->size + 2);
  }

  void attention(int64_t thread, int64_t l) {
    const VesicleLayer& w = model->layers[l];
    const int64_t threads = pool->threads(), size = model->size, heads = model->heads, kv_heads = model->kv_heads;
    const int64_t ratio = heads / kv_heads, kv = kv_heads * size;
    const KvView view{model->keys,       model->values,       model->page_stride, model->key_scales,
                      model->value_scales, kv_heads, size};
    const int32_t format = static_cast<int32_t>(model->kv_format);
    int64_t total = 0;
    bool choosing = false;
    for (int64_t t = 0; t < n; ++t) {
      total += lane(thread, t).row.attention ? lane(thread, t).blocks : 1;
      choosing = choosing || chooses(thread, t, l);
    }
    if (choosing) {
      estimate(thread, l);
      pool->barrier();
    }
    // This thread takes the segments that begin in its share of all blocks.
    const int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
    int64_t unit = 0;
    float *vk = joints[thread].get(0), *q = vk + 2 * kv, *sums = mixes[thread].get(0), *top = sums + heads * size;
    for (int64_t t = 0; t < n; ++t) {
      const Lane& a = lane(thread, t);
      const VesicleToken& token = tokens[t];
      const int64_t blocks = a.row.attention ? a.blocks : 1, held = token.held[l], step = segment(blocks);
      const int32_t** listed = nullptr;
      for (int64_t from = 0; from < blocks; from += step) {
        if (unit + from < first || unit + from >= last) continue;
        const int64_t to = std::min(blocks, from + step), own = held - 1;
        const int64_t slot = token.position - token.starts[l * token.room + own];
        if (to == blocks) {  // whoever reads the newest block writes it first
          value_key.fetch(k, t, n, threads, 2 * kv, vk);
          float* key = vk + kv;
          if (w.key_gain)
            for (int64_t g = 0; g < kv_heads; ++g)
              k->normalise(key + g * size, w.key_gain, model->eps, size, key + g * size);
          if (w.rotates) k->rotate(key, kv_heads, size, token.cosine, token.sine);
          for (int64_t g = 0; g < kv_heads; ++g)
            k->store(&view, format, g, token.tables[l * token.room + own], slot, key + g * size, vk + g * size);
          if (token.summaries && slot == kBlock - 1) summarise(view, token, l, own);
        }
        if (!a.row.attention) continue;
        if (!listed) {
          queries(thread, token, l, t);
          listed = list_blocks(thread, t, l);
        }
        const int32_t** here = heads_lists[thread].get(2 * kv_heads) + kv_heads;
        for (int64_t g = 0; g < kv_heads; ++g) here[g] = listed[g] + from;
        const int64_t read = k->attend(&view, format, q, ratio, model->scale, here, to - from,
                                       blocks - from, to == blocks ? slot + 1 : kBlock, sums, top, top + heads);
        for (int64_t h = 0; h < heads; ++h) {
          float* p = part(t, h, from / step);
          std::memcpy(p, sums + h * size, size * sizeof(float));
          p[size] = top[h];
          p[size + 1] = top[heads + h];
        }
        visits(thread, t, l) += read;
      }
      unit += blocks;
    }
    for (int64_t t = thread; t < n; t += threads) {
      tokens[t].compared[l] = chooses(thread, t, l) ? (tokens[t].held[l] - 1) * tokens[t].vectors : 0;
    }
  }

  std::vector<int64_t> visits_;  // positions that a thread read for the first KV head
  int64_t& visits(int64_t thread, int64_t t, int64_t l) { return visits_[(thread * n + t) * model->n_layers + l]; }
  std::vector<Buffer<float>> joints, mixes;
  // The attention output of a token that reads `blocks` blocks, from its segments.
  void merge(int64_t t, int64_t blocks, float* out) {
    const int64_t size = model->size, segments = (blocks + segment(blocks) - 1) / segment(blocks);
    for (int64_t h = 0; h < model->heads; ++h) {
      float top = -INFINITY;
      for (int64_t s = 0; s < segments; ++s) top = std::max(top, part(t, h, s)[size]);
      float total = 0, *y = out + h * size;
      std::memset(y, 0, size * sizeof(float));
      for (int64_t s = 0; s < segments; ++s) {
        const float *p = part(t, h, s), share = std::exp(p[size] - top);
        total += share * p[size + 1];
        for (int64_t d = 0; d < size; ++d) y[d] += share * p[d];
      }
      const float inverse = 1.0f / total;
      for (int64_t d = 0; d < size; ++d) y[d] *= inverse;
    }
  }

  struct Candidate {
    float score;
    int32_t row;
    bool operator<(const Candidate& other) const {
      return score > other.score || (score == other.score && row < other.row);
    }
  };
  std::vector<std::vector<Candidate>> candidates;  // of (thread, token), the best first
  std::vector<Candidate>& candidate(int64_t thread, int64_t t) { return candidates[thread * kMaxTokens + t]; }

  // Rows of the head that this thread computes, in whole tiles.
  void head_range(int64_t thread, int64_t* first, int64_t* last) {
    const int64_t tiles = (model->vocabulary + kHeadTile - 1) / kHeadTile, threads = pool->threads();
    *first = tiles * thread / threads;
    *last = tiles * (thread + 1) / threads;
  }

  // The `count` best of y[first:last), best first; ties to the lower row. Row -1 where a number is not finite: such
  // numbers have no order.
  void best(const float* y, int64_t first, int64_t last, int64_t count, std::vector<Candidate>& out) {
    out.clear();
    if (first >= last) return;
    const float top = k->largest(y + first, last - first);
    if (std::isnan(top)) {
      out.push_back({top, -1});
      return;
    }
    if (count == 1) {
      const int64_t row = std::find(y + first, y + last, top) - y;
      out.push_back({top, static_cast<int32_t>(row)});
      return;
    }
    // Only what beats the worst of the kept heap is looked at again.
    for (int64_t i = first; i < last; ++i) {
      const Candidate c{y[i], static_cast<int32_t>(i)};
      if (static_cast<int64_t>(out.size()) < count) {
        out.push_back(c);
        std::push_heap(out.begin(), out.end());
      } else if (c < out.front()) {
        std::pop_heap(out.begin(), out.end());
        out.back() = c;
        std::push_heap(out.begin(), out.end());
      }
    }
    std::sort_heap(out.begin(), out.end());
  }

  // The likeliest row of a token's candidates; -1 where a logit is not finite.
  int64_t likeliest(std::vector<Candidate>& all, const Activation& x, int64_t survivors) {
    const auto doubtful = [](const Candidate& c) { return c.row < 0 || !std::isfinite(c.score); };
    if (std::any_of(all.begin(), all.end(), doubtful)) return -1;
    std::sort(all.begin(), all.end());
    if (survivors) {
      const float* bias = model->head.bias;
      all.resize(std::min<size_t>(all.size(), survivors));
      for (auto& c : all) c.score = head_logit(model->head, x.quantized, c.row) + (bias ? bias[c.row] : 0.0f);
      if (std::any_of(all.begin(), all.end(), doubtful)) return -1;
      std::sort(all.begin(), all.end());
    }
    return all.front().row;
  }

  void head(int64_t thread) {
    const int64_t threads = pool->threads(), width = model->width, vocabulary = model->vocabulary;
    const VesicleProjection& w = model->head;
    const int64_t groups = (w.n_in + kGroup - 1) / kGroup;
    each(thread, [&](int64_t t) {
      finish_ffn(thread, t);
      Lane& a = lane(thread, t);
      if (reports(thread)) {
        std::memcpy(tokens[t].hidden, a.residual, width * sizeof(float));
        tokens[t].plan[model->n_layers - 1].head = tokens[t].wants == 2 && w.format == kPacked8 ? a.head : 0;
      }
      if (!tokens[t].wants) return;
      k->normalise(a.residual, model->final_gain, model->eps, width, a.in.room(width));
      a.in.prepare(k, width, width, packed(w));
    });
    bool any = false, ranks = false;
    for (int64_t t = 0; t < n; ++t) {
      any = any || tokens[t].wants;
      ranks = ranks || tokens[t].wants == 2;
    }
    if (!any) return;
    int64_t first, last;
    head_range(thread, &first, &last);
    const int64_t room = padded(vocabulary, kHeadTile);
    float* logits = logits_.get(0);
    const auto staged = [&](int64_t t) {
      const int32_t m = lane(thread, t).head;
      return tokens[t].wants == 2 && w.format == kPacked8 && m > 0 && m < vocabulary;
    };
    if (packed(w)) {
      for (int stage = 0; stage < 2; ++stage) {  // exact, then the low-bit screens
        const Quantized* x[kMaxTokens];
        float* y[kMaxTokens];
        int64_t count = 0;
        for (int64_t t = 0; t < n; ++t) {
          if (!tokens[t].wants || staged(t) != (stage == 1)) continue;
          x[count] = &lane(thread, t).in.quantized;
          y[count++] = logits + t * room;
        }
        const Precision precision = precision_of(w.format, stage ? 4 : kFullBits);
        if (count)
          k->head_tiles(static_cast<const uint8_t*>(w.data), static_cast<const uint8_t*>(w.rest), groups, first, last,
                        &precision, x, count, y);
      }
    } else {
      for (int64_t row = first * kHeadTile; row < std::min(vocabulary, last * kHeadTile); ++row)
        for (int64_t t = 0; t < n; ++t) {
          if (!tokens[t].wants) continue;
          const float* x = lane(thread, t).in.x;
          logits[t * room + row] =
              w.format == kDense32 ? k->dot(x, static_cast<const float*>(w.data) + row * width, width)
                                   : k->dot_bf16(x, static_cast<const uint16_t*>(w.data) + row * width, width);
        }
    }
    const int64_t begin = first * kHeadTile, end = std::min(vocabulary, last * kHeadTile);
    for (int64_t t = 0; t < n; ++t) {
      if (!tokens[t].wants) continue;
      if (w.bias) k->add(logits + t * room + begin, w.bias + begin, end - begin);
      if (tokens[t].logits) std::memcpy(tokens[t].logits + begin, logits + t * room + begin, (end - begin) * sizeof(float));
      if (tokens[t].wants == 2)
        best(logits + t * room, begin, end, staged(t) ? lane(thread, t).head : 1, candidate(thread, t));
    }
    if (!ranks) return;
    pool->barrier();
    for (int64_t t = thread; t < n; t += threads) {  // one thread a token: the survivors are few
      if (tokens[t].wants != 2) continue;
      std::vector<Candidate> all;
      for (int64_t i = 0; i < threads; ++i) {
        const auto& more = candidate(i, t);
        all.insert(all.end(), more.begin(), more.end());
      }
      const Lane& a = lane(thread, t);
      tokens[t].token = likeliest(all, a.in, staged(t) ? a.head : 0);
    }
  }

  void run(int64_t thread) {
    for (int64_t l = 0; l < model->n_layers; ++l) layer(thread, l);
    if (thread == 0)
      for (int64_t t = 0; t < n; ++t)
        for (int64_t l = 0; l < model->n_layers; ++l) {
          tokens[t].visited[l] = 0;
          for (int64_t i = 0; i < pool->threads(); ++i) tokens[t].visited[l] += visits(i, t, l);
        }
    head(thread);
  }

  void prepare(const Kernels* kernels, ThreadPool* threads, const VesicleModel* m, VesicleToken* t, int64_t count) {
    k = kernels;
    pool = threads;
    model = m;
    tokens = t;
    n = count;
    const int64_t T = pool->threads(), width = m->width, kv = m->kv_heads * m->size, q = m->heads * m->size;
    while (static_cast<int64_t>(lanes.size()) < std::max(T, n)) lanes.emplace_back(new Lane);
    for (auto& lane : lanes) {
      lane->residual = lane->residual_.get(width);
      lane->after = lane->after_.get(width);
      lane->normed = lane->normed_.get(width);
    }
    value_key.room(2 * kv, n, T);
    query.room(q, n, T);
    attention_out.room(width, n, T);
    ffn_in.room(2 * m->ffn_width, n, T);
    ffn_out.room(width, n, T);
    inner_rank = 1;
    for (int64_t i = 0; i < n; ++i) {
      if (t[i].ffn_standin) inner_rank = std::max(inner_rank, t[i].ffn_standin->rank);
      if (t[i].attention_standin) inner_rank = std::max(inner_rank, t[i].attention_standin->rank);
    }
    inner = inner_.get(inner_rank * n);
    partial = partial_.get(n * m->heads * kSegments * (m->size + 2));
    scored_row = kBlock;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t l = 0; l < m->n_layers; ++l) scored_row = std::max(scored_row, padded(t[i].held[l], kBlock));
    scored = scored_.get(n * m->heads * scored_row);
    logits_.get(padded(m->vocabulary, kHeadTile) * n);
    choices.resize(T);
    lists.resize(T);
    chosen.resize(T);
    heads_lists.resize(T);
    joints.resize(T);
    mixes.resize(T);
    for (auto& joint : joints) joint.get(2 * kv + q);
    for (auto& mix : mixes) mix.get(q + 2 * m->heads);
    candidates.resize(T * kMaxTokens);
    visits_.assign(T * n * m->n_layers, 0);
  }
};

// y (T, columns) = bias + x (T, n_in), of which counts[t] channels at bits[t] bits, times a packed weight.
struct Product {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleProjection* w;
  const float* x;
  const int32_t *counts, *bits;
  int64_t tokens;
  float* y;
  int32_t* rows_read;
  Activation activations[kMaxTokens];
  Output out;

  void run(int64_t thread) {
    const int64_t threads = pool->threads();
    for (int64_t start = 0; start < tokens; start += kMaxTokens) {
      const int64_t n = std::min(kMaxTokens, tokens - start);
      for (int64_t i = thread; i < n; i += threads) {
        Activation& a = activations[i];
        std::memcpy(a.room(w->n_in), x + (start + i) * w->n_in, w->n_in * sizeof(float));
        rows_read[start + i] = a.prepare(k, w->n_in, counts[start + i], packed(*w));
      }
      pool->barrier();
      int64_t which[kMaxTokens];
      Activation* in[kMaxTokens];
      for (int64_t i = 0; i < n; ++i) {
        which[i] = i;
        in[i] = &activations[i];
      }
      multiply(k, *w, bits + start, in, which, n, n, &out, thread, threads);
      pool->barrier();
      for (int64_t i = thread; i < n; i += threads)
        out.fetch(k, i, n, threads, w->n_out, y + (start + i) * w->n_out);
    }
  }
};

// y (T, n_out) = x (T, n_in) times the rows of a packed head.
struct HeadProduct {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleProjection* w;
  const float* x;
  int64_t tokens;
  int32_t bits;
  float *y, *logits;
  Buffer<float> storage;
  Activation activations[kMaxTokens];

  void run(int64_t thread) {
    const int64_t threads = pool->threads(), room = padded(w->n_out, kHeadTile), tiles = room / kHeadTile;
    const int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
    const Precision precision = precision_of(w->format, bits);
    for (int64_t start = 0; start < tokens; start += kMaxTokens) {
      const int64_t n = std::min(kMaxTokens, tokens - start);
      for (int64_t i = thread; i < n; i += threads) {
        std::memcpy(activations[i].room(w->n_in), x + (start + i) * w->n_in, w->n_in * sizeof(float));
        activations[i].prepare(k, w->n_in, w->n_in, true);
      }
      pool->barrier();
      const Quantized* in[kMaxTokens];
      float* out[kMaxTokens];
      for (int64_t i = 0; i < n; ++i) {
        in[i] = &activations[i].quantized;
        out[i] = logits + i * room;
      }
      k->head_tiles(static_cast<const uint8_t*>(w->data), static_cast<const uint8_t*>(w->rest),
                    (w->n_in + kGroup - 1) / kGroup, first, last, &precision, in, n, out);
      const int64_t begin = first * kHeadTile, end = std::min(w->n_out, last * kHeadTile);
      for (int64_t i = 0; i < n && begin < end; ++i)
        std::memcpy(y + (start + i) * w->n_out + begin, out[i] + begin, (end - begin) * sizeof(float));
      pool->barrier();
    }
  }
};

// A packed weight as fp32 or bf16, channel-major.
struct Unpacking {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleProjection* w;
  int32_t bits;
  void* out;
  int64_t stride;
  bool bf16;

  void run(int64_t thread) {
    const int64_t groups = (w->n_in + kGroup - 1) / kGroup, tiles = (w->n_out + kTile - 1) / kTile;
    const Precision precision = precision_of(w->format, bits);
    for (int64_t t = thread; t < tiles; t += pool->threads()) {
      const int64_t left = w->n_out - t * kTile;
      const uint8_t* rest = static_cast<const uint8_t*>(w->rest);
      k->unpack_tile(static_cast<const uint8_t*>(w->data) + t * groups * (32 * kTile / 2 + 4 * kTile),
                     rest ? rest + t * groups * (32 * kTile / 2) : nullptr, left > kTile / 2 ? kTile : kTile / 2,
                     groups, w->n_in, std::min(kTile, left), &precision,
                     static_cast<char*>(out) + t * kTile * (bf16 ? 2 : 4), stride, bf16);
    }
  }
};

// Summaries of all complete blocks of a sequence, layer by layer.
struct Summaries {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleModel* model;
  const VesicleToken* token;

  void run(int64_t thread) {
    const int64_t size = model->size, bytes = token->vectors * size * (model->summary_format == kF32 ? 4 : 2);
    const KvView view{model->keys,         model->values,   model->page_stride, model->key_scales,
                      model->value_scales, model->kv_heads, size};
    for (int64_t l = thread; l < model->n_layers; l += pool->threads())
      for (int64_t index = 0; index + 1 < token->held[l]; ++index)
        for (int64_t g = 0; g < model->kv_heads; ++g)
          k->summarise(&view, static_cast<int32_t>(model->kv_format), g, token->tables[l * token->room + index],
                       token->vectors,
                       static_cast<char*>(token->summaries[l]) + (g * token->room_summaries + index / kBlock * kBlock) * bytes,
                       index % kBlock);
  }
};

struct Core {
  std::mutex mutex;  // one step at a time: the pool and the buffers are shared
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<Step> step;
  std::unique_ptr<Product> product;
  std::unique_ptr<HeadProduct> head;
  const Kernels* kernels = nullptr;
  int64_t owner = 0;

  void ready(int64_t threads) {
    if (!kernels) kernels = kernels_for(nullptr);
#if defined(__unix__) || defined(__APPLE__)
    if (owner != getpid()) {  // after a fork the threads are gone, and must not be joined
      pool.release();
      owner = getpid();
    }
#endif
    if (!pool || pool->threads() != threads) pool.reset(new ThreadPool(threads));
    if (!step) step.reset(new Step);
    if (!product) product.reset(new Product);
    if (!head) head.reset(new HeadProduct);
  }
};

Core& core() {
  static Core* instance = new Core;  // never destroyed: threads may outlive static destructors
  return *instance;
}

int64_t clamp_threads(int64_t threads) { return std::max<int64_t>(1, std::min(threads, kMaxThreads)); }

}  // namespace
}  // namespace vesicle

extern "C" {

uint64_t vesicle_plan_layout() { return kPlanLayout; }  // lets Python check its rows

int64_t vesicle_sizes(int64_t which) {  // lets Python check its mirrors
  const int64_t sizes[] = {sizeof(VesicleProjection), sizeof(VesicleLayer), sizeof(VesicleStandIn),
                           sizeof(VesicleModel),      sizeof(VesicleRule),  sizeof(VesicleModulator),
                           sizeof(VesicleToken)};
  return which >= 0 && which < 7 ? sizes[which] : -1;
}

// Limits the instruction set (generic, avx2, avx512; null for the best). Returns the name in use, or null.
const char* vesicle_instructions(const char* name) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  const vesicle::Kernels* kernels = vesicle::kernels_for(name);
  if (!kernels) return nullptr;
  core.kernels = kernels;
  return kernels->name;
}

// One decode step. The caller has checked shapes and reserved the pages.
void vesicle_step(const VesicleModel* model, VesicleToken* tokens, int64_t n, int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  core.step->prepare(core.kernels, core.pool.get(), model, tokens, n);
  core.pool->run(core.step.get());
}

void vesicle_multiply(const VesicleProjection* w, const float* x, const int32_t* counts, const int32_t* bits,
                      int64_t tokens, float* y, int32_t* rows_read, int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::Product& p = *core.product;
  p.k = core.kernels;
  p.pool = core.pool.get();
  p.w = w;
  p.x = x;
  p.counts = counts;
  p.bits = bits;
  p.tokens = tokens;
  p.y = y;
  p.rows_read = rows_read;
  p.out.room(w->n_out, vesicle::kMaxTokens, p.pool->threads());
  p.pool->run(&p);
}

// Fills the token's summaries with those of every block but the newest.
void vesicle_summarise(const VesicleModel* model, const VesicleToken* token, int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::Summaries s{core.kernels, core.pool.get(), model, token};
  core.pool->run(&s);
}

// y (T, V) = x (T, D) times the rows of a packed head at `bits` bits, without bias.
void vesicle_head(const VesicleProjection* w, const float* x, int64_t tokens, int32_t bits, float* y,
                  int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::HeadProduct& p = *core.head;
  p.k = core.kernels;
  p.pool = core.pool.get();
  p.w = w;
  p.x = x;
  p.tokens = tokens;
  p.bits = bits;
  p.y = y;
  p.logits = p.storage.get(vesicle::kMaxTokens * vesicle::padded(w->n_out, vesicle::kHeadTile));
  p.pool->run(&p);
}

void vesicle_unpack(const VesicleProjection* w, int32_t bits, void* out, int64_t stride, int32_t bf16,
                    int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::Unpacking u{core.kernels, core.pool.get(), w, bits, out, stride, bf16 != 0};
  core.pool->run(&u);
}

}  // extern "C"
