// Kernels of the CPU engine: projections that read only chosen input channels, and attention that reads only
// chosen KV blocks. Plain C interface over raw pointers, loaded with ctypes; no PyTorch headers.
//
// OpenMP symbols are left unresolved on purpose: PyTorch has loaded its OpenMP runtime into the global
// namespace, and sharing that one pool avoids two sets of threads fighting for the same cores.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "core/exponential.h"

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

using vesicle::exponential;

// y[0:n] += sum over r < 4 of x[r] * w[r][0:n]
CLONES void add_four(float* __restrict y, const float* const* w, const float* x, int64_t n) {
  const float *a = w[0], *b = w[1], *c = w[2], *d = w[3];
  const float xa = x[0], xb = x[1], xc = x[2], xd = x[3];
  for (int64_t o = 0; o < n; ++o) y[o] += xa * a[o] + xb * b[o] + xc * c[o] + xd * d[o];
}

CLONES void add_one(float* __restrict y, const float* w, float x, int64_t n) {
  for (int64_t o = 0; o < n; ++o) y[o] += x * w[o];
}

inline float widen(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

CLONES void add_four(float* __restrict y, const uint16_t* const* w, const float* x, int64_t n) {
  const uint16_t *a = w[0], *b = w[1], *c = w[2], *d = w[3];
  const float xa = x[0], xb = x[1], xc = x[2], xd = x[3];
  for (int64_t o = 0; o < n; ++o)
    y[o] += xa * widen(a[o]) + xb * widen(b[o]) + xc * widen(c[o]) + xd * widen(d[o]);
}

CLONES void add_one(float* __restrict y, const uint16_t* w, float x, int64_t n) {
  for (int64_t o = 0; o < n; ++o) y[o] += x * widen(w[o]);
}

// Floats without their sign order as their bit patterns do, and NaN is the largest.
inline uint32_t magnitude(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits & 0x7fffffffu;
}

// Channels of the `count` largest |x|, in rising order; ties go to the lower channel.
void choose(const float* x, int64_t width, int64_t count, std::vector<uint32_t>& keys,
            std::vector<int32_t>& chosen) {
  chosen.clear();
  if (count >= width) {
    for (int64_t i = 0; i < width; ++i) chosen.push_back(static_cast<int32_t>(i));
    return;
  }
  // A histogram of the leading bits finds the bucket of the threshold; only that bucket is searched exactly.
  constexpr int kShift = 20;
  int32_t histogram[1 << (31 - kShift)];
  std::memset(histogram, 0, sizeof histogram);
  uint32_t highest = 0;
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t key = magnitude(x[i]) >> kShift;
    ++histogram[key];
    highest = std::max(highest, key);
  }
  int64_t above = 0;
  uint32_t bucket = highest;
  while (above + histogram[bucket] < count) above += histogram[bucket--];
  keys.clear();
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t key = magnitude(x[i]);
    if (key >> kShift == bucket) keys.push_back(key);
  }
  const int64_t wanted = count - above;  // from the bucket
  std::nth_element(keys.begin(), keys.begin() + (wanted - 1), keys.end(), std::greater<uint32_t>());
  const uint32_t threshold = keys[wanted - 1];
  for (int64_t i = 0; i < wanted; ++i) above += keys[i] > threshold;
  int64_t ties = count - above;
  for (int64_t i = 0; i < width; ++i) {
    const uint32_t key = magnitude(x[i]);
    if (key > threshold) {
      chosen.push_back(static_cast<int32_t>(i));
    } else if (key == threshold && ties > 0) {
      chosen.push_back(static_cast<int32_t>(i));
      --ties;
    }
  }
}

// y[0:n] = bias + sum over chosen channels of x[i] * w[i, 0:n], at most kTile columns at a time: long
// enough to stream whole rows, short enough for y to stay in the first-level cache.
constexpr int64_t kTile = 4096;

template <typename Weight>
void accumulate(const float* x, const std::vector<int32_t>& chosen, const Weight* w, int64_t stride,
                const float* bias, float* y, int64_t n) {
  for (int64_t start = 0; start < n; start += kTile) {
    const int64_t size = std::min(kTile, n - start);
    float* out = y + start;
    if (bias) {
      std::memcpy(out, bias + start, size * sizeof(float));
    } else {
      std::memset(out, 0, size * sizeof(float));
    }
    size_t i = 0;
    for (; i + 4 <= chosen.size(); i += 4) {
      const Weight* rows[4];
      float values[4];
      for (int r = 0; r < 4; ++r) {
        rows[r] = w + chosen[i + r] * stride + start;
        values[r] = x[chosen[i + r]];
      }
      add_four(out, rows, values, size);
    }
    for (; i < chosen.size(); ++i) add_one(out, w + chosen[i] * stride + start, x[chosen[i]], size);
  }
}

// The same for a narrow strip of columns, with sums kept in registers.
constexpr int64_t kStrip = 64;
constexpr int64_t kGroup = 128;

typedef float Vector __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

inline Vector load(const float* p) {
  Vector v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Vector load(const uint16_t* p) {
  Vector v;
  for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
  return v;
}

template <typename Weight>
inline __attribute__((always_inline)) void strip_body(const float* x, const int32_t* chosen, size_t n,
                                                      const Weight* w, int64_t stride, const float* bias,
                                                      float* y, int64_t size) {
  if (size == kStrip) {
    Vector a = {}, b = {}, c = {}, d = {};
    if (bias) a = load(bias), b = load(bias + 16), c = load(bias + 32), d = load(bias + 48);
    for (size_t i = 0; i < n; ++i) {
      const Weight* row = w + chosen[i] * stride;
      const float value = x[chosen[i]];
      a += value * load(row);
      b += value * load(row + 16);
      c += value * load(row + 32);
      d += value * load(row + 48);
    }
    std::memcpy(y, &a, sizeof a);
    std::memcpy(y + 16, &b, sizeof b);
    std::memcpy(y + 32, &c, sizeof c);
    std::memcpy(y + 48, &d, sizeof d);
    return;
  }
  for (int64_t o = 0; o < size; ++o) y[o] = bias ? bias[o] : 0.0f;
  for (size_t i = 0; i < n; ++i) add_one(y, w + chosen[i] * stride, x[chosen[i]], size);
}

CLONES void strip(const float* x, const int32_t* chosen, size_t n, const float* w, int64_t stride,
                  const float* bias, float* y, int64_t size) {
  strip_body(x, chosen, n, w, stride, bias, y, size);
}

CLONES void strip(const float* x, const int32_t* chosen, size_t n, const uint16_t* w, int64_t stride,
                  const float* bias, float* y, int64_t size) {
  strip_body(x, chosen, n, w, stride, bias, y, size);
}

template <typename Weight>
void sparse_linear(const float* x, const int32_t* counts, int64_t tokens, int64_t width, const Weight* w,
                   int64_t stride, int64_t columns, const float* bias, float* y, int32_t* rows_read) {
  if (tokens == 1) {
    static thread_local std::vector<uint32_t> keys;
    static thread_local std::vector<int32_t> kept;
    std::vector<int32_t>& chosen = kept;  // shared with the threads below
    choose(x, width, counts[0], keys, chosen);
    rows_read[0] = static_cast<int32_t>(chosen.size());
    // Multiples of 16 columns keep each part on cache-line boundaries.
    const int64_t parts = columns >= 256 ? 2 : 1;
    const int64_t part = (columns / parts + 15) / 16 * 16;
#pragma omp parallel for schedule(static) if (parts > 1)
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t start = p * part, size = std::min(part, columns - start);
      if (size > 0)
        accumulate(x, chosen, w + start, stride, bias ? bias + start : nullptr, y + start, size);
    }
    return;
  }
  std::vector<std::vector<int32_t>> lists(tokens);
#pragma omp parallel
  {
    std::vector<uint32_t> keys;
#pragma omp for schedule(static)
    for (int64_t t = 0; t < tokens; ++t) {
      choose(x + t * width, width, counts[t], keys, lists[t]);
      rows_read[t] = static_cast<int32_t>(lists[t].size());
    }
    // A strip of columns of w stays in the second-level cache while a group of tokens passes over it.
    const int64_t strips = (columns + kStrip - 1) / kStrip, groups = (tokens + kGroup - 1) / kGroup;
#pragma omp for collapse(2) schedule(dynamic, 1)
    for (int64_t s = 0; s < strips; ++s) {
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t start = s * kStrip, size = std::min(kStrip, columns - start);
        const int64_t last = std::min(tokens, (g + 1) * kGroup);
        for (int64_t t = g * kGroup; t < last; ++t)
          strip(x + t * width, lists[t].data(), lists[t].size(), w + start, stride,
                bias ? bias + start : nullptr, y + t * columns + start, size);
      }
    }
  }
}

// Sums and maxima are written out: compilers keep the order of a plain loop.
inline __attribute__((always_inline)) float sum(Vector v) {
  typedef float Half __attribute__((vector_size(32)));
  typedef float Quarter __attribute__((vector_size(16)));
  Half halves[2];
  std::memcpy(halves, &v, sizeof v);
  halves[0] += halves[1];
  Quarter quarters[2];
  std::memcpy(quarters, halves, sizeof quarters);
  const Quarter q = quarters[0] + quarters[1];
  return (q[0] + q[2]) + (q[1] + q[3]);
}

inline __attribute__((always_inline)) float dot_body(const float* a, const float* b, int64_t n) {
  Vector total = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) total += load(a + i) * load(b + i);
  float rest = 0;
  for (; i < n; ++i) rest += a[i] * b[i];
  return sum(total) + rest;
}

CLONES float dot(const float* a, const float* b, int64_t n) { return dot_body(a, b, n); }

// sum over i of the larger of q[i] least[i] and q[i] most[i], by the sign of q[i].
CLONES float bound(const float* q, const float* least, const float* most, int64_t n) {
  Vector total = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vector v = load(q + i);
    total += v * (v > 0 ? load(most + i) : load(least + i));
  }
  float rest = 0;
  for (; i < n; ++i) rest += q[i] * (q[i] > 0 ? most[i] : least[i]);
  return sum(total) + rest;
}

// scores[r][0:n] of the query heads of one KV head against n keys in a row.
CLONES void score_rows(const float* query, const float* keys, int64_t ratio, int64_t size, int64_t n,
                       float scale, float* scores, int64_t row) {
  for (int64_t s = 0; s < n; ++s)
    for (int64_t r = 0; r < ratio; ++r)
      scores[r * row + s] = dot_body(query + r * size, keys + s * size, size) * scale;
}

CLONES void softmax(float* x, int64_t n) {
  Vector tops = Vector{} - 3.0e38f;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Vector v = load(x + i);
    tops = v > tops ? v : tops;
  }
  float top = -3.0e38f;
  for (int64_t j = 0; j < kLanes; ++j) top = tops[j] > top ? tops[j] : top;
  for (; i < n; ++i) top = x[i] > top ? x[i] : top;
  for (i = 0; i < n; ++i) x[i] = exponential(x[i] - top);
  Vector total = {};
  for (i = 0; i + kLanes <= n; i += kLanes) total += load(x + i);
  float rest = 0;
  for (; i < n; ++i) rest += x[i];
  const float inverse = 1.0f / (sum(total) + rest);
  for (i = 0; i < n; ++i) x[i] *= inverse;
}

// y[0:size] += sum over n of weight[i] * values[i, 0:size]
CLONES void weigh_rows(float* y, const float* weights, const float* values, int64_t size, int64_t n) {
  int64_t d = 0;
  for (; d + 64 <= size; d += 64) {
    Vector a = load(y + d), b = load(y + d + 16), c = load(y + d + 32), e = load(y + d + 48);
    for (int64_t i = 0; i < n; ++i) {
      const float* v = values + i * size + d;
      a += weights[i] * load(v);
      b += weights[i] * load(v + 16);
      c += weights[i] * load(v + 32);
      e += weights[i] * load(v + 48);
    }
    std::memcpy(y + d, &a, sizeof a);
    std::memcpy(y + d + 16, &b, sizeof b);
    std::memcpy(y + d + 32, &c, sizeof c);
    std::memcpy(y + d + 48, &e, sizeof e);
  }
  for (; d < size; ++d)
    for (int64_t i = 0; i < n; ++i) y[d] += weights[i] * values[i * size + d];
}

// The `ratio` query heads of one KV head over listed blocks (rising) up to `position`; returns positions read.
int64_t attend(const float* query, const float* keys, const float* values, const int32_t* list, int64_t n_list,
               int64_t position, int64_t ratio, int64_t size, float scale, float* out,
               std::vector<float>& scores) {
  const int64_t row = n_list * 16;
  scores.resize(ratio * row);
  int64_t n = 0;
  for (int64_t b = 0; b < n_list; ++b) {
    const int64_t first = static_cast<int64_t>(list[b]) * 16;
    const int64_t count = std::min<int64_t>(16, position + 1 - first);
    score_rows(query, keys + first * size, ratio, size, count, scale, scores.data() + n, row);
    n += count;
  }
  for (int64_t r = 0; r < ratio; ++r) {
    float* y = out + r * size;
    const float* weights = scores.data() + r * row;
    softmax(scores.data() + r * row, n);
    std::memset(y, 0, size * sizeof(float));
    int64_t i = 0;
    for (int64_t b = 0; b < n_list; ++b) {
      const int64_t first = static_cast<int64_t>(list[b]) * 16;
      const int64_t count = std::min<int64_t>(16, position + 1 - first);
      weigh_rows(y, weights + i, values + first * size, size, count);
      i += count;
    }
  }
  return n;
}

// The first block, the query's own, and the n - 2 others of the largest estimated mass (see blocks.py, which
// this follows), in rising order.
//   summaries (room, vectors, size) of one KV head's complete blocks
void choose_blocks(const float* query, const float* summaries, int64_t n, int32_t own, int64_t ratio,
                   int64_t size, int64_t vectors, float scale, int32_t* list, std::vector<float>& mass,
                   std::vector<float>& logits, std::vector<int32_t>& order) {
  mass.assign(own, 0.0f);
  logits.resize(own);
  for (int64_t r = 0; r < ratio; ++r) {
    const float* q = query + r * size;
    for (int32_t b = 0; b < own; ++b) {
      const float* first = summaries + b * vectors * size;
      logits[b] = scale * (vectors == 1 ? dot(q, first, size) : bound(q, first, first + size, size));
      if (!(logits[b] < INFINITY)) {  // a block that cannot be estimated is read
        mass[b] = NAN;
        logits[b] = -INFINITY;
      }
    }
    softmax(logits.data(), own);
    for (int32_t b = 0; b < own; ++b) mass[b] += logits[b];
  }
  order.clear();
  for (int32_t b = 1; b < own; ++b) order.push_back(b);
  const int64_t wanted = n - 2;
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return magnitude(mass[a]) > magnitude(mass[b]); });
  list[0] = 0;
  std::copy(order.begin(), order.begin() + wanted, list + 1);
  std::sort(list + 1, list + 1 + wanted);
  list[wanted + 1] = own;
}

}  // namespace

extern "C" {

// y (tokens, columns) = bias + x (tokens, width) restricted to counts[t] channels, times w (width, stride).
void vesicle_sparse_linear_f32(const float* x, const int32_t* counts, int64_t tokens, int64_t width,
                               const float* w, int64_t stride, int64_t columns, const float* bias, float* y,
                               int32_t* rows_read) {
  sparse_linear(x, counts, tokens, width, w, stride, columns, bias, y, rows_read);
}

void vesicle_sparse_linear_bf16(const float* x, const int32_t* counts, int64_t tokens, int64_t width,
                                const uint16_t* w, int64_t stride, int64_t columns, const float* bias,
                                float* y, int32_t* rows_read) {
  sparse_linear(x, counts, tokens, width, w, stride, columns, bias, y, rows_read);
}

// Which blocks each query reads.
//   query (tokens, heads, size); summaries (kv_heads, room, vectors, size) of complete blocks
//   n_blocks, positions (tokens); listed (tokens, kv_heads, most), rising; compared (tokens)
void vesicle_choose_blocks_f32(const float* query, const float* summaries, const int32_t* n_blocks,
                               const int32_t* positions, int64_t tokens, int64_t heads, int64_t kv_heads,
                               int64_t size, int64_t room, int64_t vectors, int64_t most, float scale,
                               int32_t* listed, int32_t* compared) {
  const int64_t ratio = heads / kv_heads;
#pragma omp parallel if (tokens > 1)
  {
    std::vector<float> mass, logits;
    std::vector<int32_t> order;
#pragma omp for schedule(dynamic, 8)
    for (int64_t t = 0; t < tokens; ++t) {
      const int32_t own = positions[t] / 16;
      const bool all = n_blocks[t] >= own + 1;
      compared[t] = all ? 0 : own;
      for (int64_t g = 0; g < kv_heads; ++g) {
        int32_t* list = listed + (t * kv_heads + g) * most;
        if (all) {
          for (int32_t b = 0; b <= own; ++b) list[b] = b;
        } else {
          choose_blocks(query + (t * heads + g * ratio) * size, summaries + g * room * vectors * size,
                        n_blocks[t], own, ratio, size, vectors, scale, list, mass, logits, order);
        }
      }
    }
  }
}

// Attention of each query over its own list of KV blocks.
//   query (tokens, heads, size); keys, values (kv_heads, capacity, size)
//   blocks (tokens, kv_heads, most) with the first n_blocks[t] entries valid; positions (tokens)
//   out (tokens, heads, size); visited (tokens): positions read, by the first KV head
void vesicle_block_attention_f32(const float* query, const float* keys, const float* values,
                                 const int32_t* blocks, const int32_t* n_blocks, const int32_t* positions,
                                 int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size,
                                 int64_t capacity, int64_t most, float scale, float* out,
                                 int32_t* visited) {
  const int64_t ratio = heads / kv_heads;
#pragma omp parallel if (tokens > 1)
  {
    std::vector<float> scores;
#pragma omp for collapse(2) schedule(dynamic, 4)
    for (int64_t t = 0; t < tokens; ++t) {
      for (int64_t g = 0; g < kv_heads; ++g) {
        const int64_t n = attend(query + (t * heads + g * ratio) * size, keys + g * capacity * size,
                                 values + g * capacity * size, blocks + (t * kv_heads + g) * most,
                                 n_blocks[t], positions[t], ratio, size, scale,
                                 out + (t * heads + g * ratio) * size, scores);
        if (g == 0) visited[t] = static_cast<int32_t>(n);
      }
    }
  }
}

}  // extern "C"
