// Kernels of the CPU engine: projections that read only chosen input channels, and attention that reads only
// chosen KV blocks. Plain C interface over raw pointers, loaded with ctypes; no PyTorch headers.
//
// OpenMP symbols are left unresolved on purpose: PyTorch has loaded its OpenMP runtime into the global
// namespace, and sharing that one pool avoids two sets of threads fighting for the same cores.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif

namespace {

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

// Channels of the `count` largest |x|, in rising order; ties go to the lower channel.
void choose(const float* x, int64_t width, int64_t count, std::vector<uint32_t>& keys,
            std::vector<int32_t>& chosen) {
  chosen.clear();
  if (count >= width) {
    for (int64_t i = 0; i < width; ++i) chosen.push_back(static_cast<int32_t>(i));
    return;
  }
  // Positive floats order as their bit patterns do. A histogram of the leading bits finds the bucket of the
  // threshold; only that bucket is searched exactly.
  constexpr int kShift = 20;
  int32_t histogram[1 << (31 - kShift)];
  std::memset(histogram, 0, sizeof histogram);
  uint32_t highest = 0;
  for (int64_t i = 0; i < width; ++i) {
    uint32_t key;
    std::memcpy(&key, &x[i], sizeof key);
    key = (key & 0x7fffffffu) >> kShift;
    ++histogram[key];
    highest = std::max(highest, key);
  }
  int64_t above = 0;
  uint32_t bucket = highest;
  while (above + histogram[bucket] < count) above += histogram[bucket--];
  keys.clear();
  for (int64_t i = 0; i < width; ++i) {
    uint32_t key;
    std::memcpy(&key, &x[i], sizeof key);
    key &= 0x7fffffffu;
    if (key >> kShift == bucket) keys.push_back(key);
  }
  const int64_t wanted = count - above;  // from the bucket
  std::nth_element(keys.begin(), keys.begin() + (wanted - 1), keys.end(), std::greater<uint32_t>());
  const uint32_t threshold = keys[wanted - 1];
  for (int64_t i = 0; i < wanted; ++i) above += keys[i] > threshold;
  int64_t ties = count - above;
  for (int64_t i = 0; i < width; ++i) {
    uint32_t key;
    std::memcpy(&key, &x[i], sizeof key);
    key &= 0x7fffffffu;
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

inline __attribute__((always_inline)) float dot_body(const float* a, const float* b, int64_t n) {
  Vector sum = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) sum += load(a + i) * load(b + i);
  float total = 0;
  for (int j = 0; j < kLanes; ++j) total += sum[j];
  for (; i < n; ++i) total += a[i] * b[i];
  return total;
}

CLONES float dot(const float* a, const float* b, int64_t n) { return dot_body(a, b, n); }

// scores[r][0:n] of the query heads of one KV head against n keys in a row.
CLONES void score_rows(const float* query, const float* keys, int64_t ratio, int64_t size, int64_t n,
                       float scale, float* scores, int64_t row) {
  for (int64_t s = 0; s < n; ++s)
    for (int64_t r = 0; r < ratio; ++r)
      scores[r * row + s] = dot_body(query + r * size, keys + s * size, size) * scale;
}

CLONES void softmax(float* x, int64_t n) {
  float top = x[0];
  for (int64_t i = 1; i < n; ++i) top = x[i] > top ? x[i] : top;
  float total = 0;
  for (int64_t i = 0; i < n; ++i) {
    x[i] = std::exp(x[i] - top);
    total += x[i];
  }
  const float inverse = 1.0f / total;
  for (int64_t i = 0; i < n; ++i) x[i] *= inverse;
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
      float value = 0;
      if (vectors == 1) {
        value = dot(q, first, size);
      } else {
        for (int64_t d = 0; d < size; ++d) value += q[d] > 0 ? q[d] * first[size + d] : q[d] * first[d];
      }
      logits[b] = value * scale;
    }
    softmax(logits.data(), own);
    for (int32_t b = 0; b < own; ++b) mass[b] += logits[b];
  }
  order.clear();
  for (int32_t b = 1; b < own; ++b) order.push_back(b);
  const int64_t wanted = n - 2;
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return mass[a] > mass[b]; });
  list[0] = 0;
  std::copy(order.begin(), order.begin() + wanted, list + 1);
  std::sort(list + 1, list + 1 + wanted);
  list[wanted + 1] = own;
}

CLONES void normalise(const float* x, const float* gain, float eps, int64_t n, float* y) {
  float squares = 0;
  for (int64_t i = 0; i < n; ++i) squares += x[i] * x[i];
  const float scale = 1.0f / std::sqrt(squares / n + eps);
  for (int64_t i = 0; i < n; ++i) y[i] = x[i] * scale * gain[i];
}

CLONES void add(float* y, const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) y[i] += x[i];
}

CLONES void silu_gate(float* gate, const float* up, int64_t n) {
  for (int64_t i = 0; i < n; ++i) gate[i] = gate[i] / (1.0f + std::exp(-gate[i])) * up[i];
}

// x (heads, size) rotated in place by cosines and signed sines (size), half-split layout.
void rotate(float* x, int64_t heads, int64_t size, const float* cosine, const float* sine) {
  const int64_t half = size / 2;
  for (int64_t h = 0; h < heads; ++h) {
    float* row = x + h * size;
    for (int64_t i = 0; i < half; ++i) {
      const float a = row[i], b = row[i + half];
      row[i] = a * cosine[i] + b * sine[i];
      row[i + half] = b * cosine[i + half] + a * sine[i + half];
    }
  }
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

// One decoding step of one layer. Weights are channel-major; biases may be null.
struct Layer {
  int64_t width, heads, kv_heads, size, ffn_width;
  float eps, scale;
  const float *attention_gain, *attention_in, *attention_in_bias, *attention_out, *attention_out_bias;
  const float *ffn_gain, *ffn_in, *ffn_in_bias, *ffn_out, *ffn_out_bias;
};

// What a step runs with, and what it read.
struct Step {
  int64_t position, capacity, room, vectors;
  int32_t channels[2];  // at the two sites of this half of the layer
  int32_t n_blocks;
  int32_t rows_read[2], visited, compared;
  const float *hidden, *cosine, *sine, *summaries;  // cosine is null where the layer does not rotate
  float *keys, *values, *after;
};

}  // extern "C"

namespace {

// after = hidden + attention(norm(hidden)); writes this token's key and value into the cache.
void attention_step(const Layer* layer, Step* step) {
  const int64_t size = layer->size, kv = layer->kv_heads * size, width = layer->width;
  const int64_t ratio = layer->heads / layer->kv_heads;
  const int64_t outputs = 2 * kv + layer->heads * size;
  static thread_local std::vector<float> x, joint, mixed;
  static thread_local std::vector<int32_t> listed;
  x.resize(width);
  joint.resize(outputs);
  mixed.resize(layer->heads * size);
  normalise(step->hidden, layer->attention_gain, layer->eps, width, x.data());
  sparse_linear(x.data(), &step->channels[0], 1, width, layer->attention_in, outputs, outputs,
                layer->attention_in_bias, joint.data(), &step->rows_read[0]);
  float *value = joint.data(), *key = value + kv, *query = key + kv;
  if (step->cosine) rotate(key, layer->kv_heads + layer->heads, size, step->cosine, step->sine);
  for (int64_t g = 0; g < layer->kv_heads; ++g) {
    const int64_t slot = (g * step->capacity + step->position) * size;
    std::memcpy(step->keys + slot, key + g * size, size * sizeof(float));
    std::memcpy(step->values + slot, value + g * size, size * sizeof(float));
  }
  const int32_t own = static_cast<int32_t>(step->position / 16);
  const int64_t n = std::min<int64_t>(step->n_blocks, own + 1);
  const bool all = n == own + 1;
  step->compared = all ? 0 : own;
  listed.resize(layer->kv_heads * n);
  int32_t* const lists = listed.data();
  float* const out = mixed.data();
#pragma omp parallel if (n * layer->kv_heads > 24)
  {
    std::vector<float> scores, mass, logits;
    std::vector<int32_t> order;
#pragma omp for schedule(dynamic, 1)
    for (int64_t g = 0; g < layer->kv_heads; ++g) {
      int32_t* list = lists + g * n;
      const float* q = query + g * ratio * size;
      if (all) {
        for (int32_t b = 0; b <= own; ++b) list[b] = b;
      } else {
        choose_blocks(q, step->summaries + g * step->room * step->vectors * size, n, own, ratio, size,
                      step->vectors, layer->scale, list, mass, logits, order);
      }
      const int64_t offset = g * step->capacity * size;
      const int64_t read = attend(q, step->keys + offset, step->values + offset, list, n, step->position,
                                  ratio, size, layer->scale, out + g * ratio * size, scores);
      if (g == 0) step->visited = static_cast<int32_t>(read);
    }
  }
  sparse_linear(out, &step->channels[1], 1, layer->heads * size, layer->attention_out, width, width,
                layer->attention_out_bias, step->after, &step->rows_read[1]);
  add(step->after, step->hidden, width);
}

// after = hidden + FFN(norm(hidden)), a gated FFN with SiLU.
void ffn_step(const Layer* layer, Step* step) {
  const int64_t width = layer->width, inner = layer->ffn_width;
  static thread_local std::vector<float> x, joint;
  x.resize(width);
  joint.resize(2 * inner);
  normalise(step->hidden, layer->ffn_gain, layer->eps, width, x.data());
  sparse_linear(x.data(), &step->channels[0], 1, width, layer->ffn_in, 2 * inner, 2 * inner,
                layer->ffn_in_bias, joint.data(), &step->rows_read[0]);
  silu_gate(joint.data(), joint.data() + inner, inner);
  sparse_linear(joint.data(), &step->channels[1], 1, inner, layer->ffn_out, width, width,
                layer->ffn_out_bias, step->after, &step->rows_read[1]);
  add(step->after, step->hidden, width);
}

}  // namespace

extern "C" {

// One token through all layers. Arrays are by layer; `weight` is null where nothing is released.
struct Token {
  int64_t n_layers, layer, half, position, vectors, released;
  const Layer* layers;
  float* const* keys;
  float* const* values;
  const int64_t* capacities;
  const float* const* summaries;
  const int64_t* rooms;
  const int64_t* rotates;
  const float *cosine, *sine;
  float *hidden, *after;
  int32_t *channels, *module, *run, *kv_blocks;
  double* levels;
  int64_t *rows, *outputs, *visited, *compared;
  const float *weight, *offset, *log_slope, *place_weight;
  double pressure, place, rates[4], floor, ffn_below, attention_below, bypass_below;
  int64_t least;
  int32_t columns[8];
};

}  // extern "C"

namespace {

constexpr int kTransmitters = 5, kDopamine = 0, kSerotonin = 1, kGaba = 2;
constexpr int kSkip = 0, kSmall = 1, kBig = 2;

int32_t channels_read(double level, double rate, double floor, int64_t width) {
  const double share = std::min(1.0, std::max(floor, 1.0 - rate * (1.0 - level)));
  return static_cast<int32_t>(std::ceil(share * width - 1e-9));
}

// The linear predictor and the effectors' decisions, as in predictors/ and effectors/.
void release(Token* t, int64_t l) {
  const Layer& layer = t->layers[l];
  const int64_t width = layer.width;
  const double scale = 1.0 / std::sqrt(static_cast<double>(dot(t->after, t->after, width)) / width + 1e-6);
  double* levels = t->levels + l * kTransmitters;
  for (int64_t a = 0; a < t->released; ++a) {
    const int64_t i = l * t->released + a;
    const double z = dot(t->weight + i * width, t->after, width) * scale + t->offset[i] +
                     std::exp(static_cast<double>(t->log_slope[i])) * t->pressure +
                     t->place_weight[i] * t->place;
    levels[t->columns[a]] = std::nearbyint(1e6 / (1.0 + std::exp(z))) / 1e6;
  }
  int32_t* here = t->channels + l * 4;
  here[2] = channels_read(levels[kDopamine], t->rates[2], t->floor, width);
  here[3] = channels_read(levels[kDopamine], t->rates[3], t->floor, layer.ffn_width);
  const double serotonin = levels[kSerotonin];
  t->module[l] = serotonin < t->bypass_below ? kSkip : serotonin < t->ffn_below ? kSmall : kBig;
  if (l + 1 == t->n_layers) return;
  here[4] = channels_read(levels[kDopamine], t->rates[0], t->floor, width);
  here[5] = channels_read(levels[kDopamine], t->rates[1], t->floor, layer.heads * layer.size);
  t->run[l + 1] = serotonin >= t->attention_below;
  const int64_t visible = t->position / 16 + 1;
  const int64_t wanted = static_cast<int64_t>(std::ceil(levels[kGaba] * visible - 1e-9));
  t->kv_blocks[l + 1] =
      static_cast<int32_t>(std::min(visible, std::max(std::min(visible, t->least), wanted)));
}

}  // namespace

extern "C" {

// Runs layers from (layer, half) on: half 0 is attention, from `hidden` to `after`; half 1 is release and FFN,
// from `after` to `hidden`. Returns 1, with layer and half set, where a stand-in must run instead of the
// attention (half 0) or of the FFN (half 1, release done); 0 at the end.
int32_t vesicle_decode_token_f32(Token* t) {
  for (int64_t l = t->layer; l < t->n_layers; ++l) {
    const Layer* layer = t->layers + l;
    const int64_t kv = layer->kv_heads * layer->size;
    Step step;
    step.position = t->position;
    if (t->half == 0) {
      if (!t->run[l]) {
        t->layer = l;
        return 1;
      }
      step.capacity = t->capacities[l];
      step.room = t->rooms[l];
      step.vectors = t->vectors;
      step.channels[0] = t->channels[l * 4];
      step.channels[1] = t->channels[l * 4 + 1];
      step.n_blocks = t->kv_blocks[l];
      step.hidden = t->hidden;
      step.cosine = t->rotates[l] ? t->cosine : nullptr;
      step.sine = t->sine;
      step.summaries = t->summaries[l];
      step.keys = t->keys[l];
      step.values = t->values[l];
      step.after = t->after;
      attention_step(layer, &step);
      t->rows[l * 4] = step.rows_read[0];
      t->rows[l * 4 + 1] = step.rows_read[1];
      t->outputs[l * 4] = 2 * kv + layer->heads * layer->size;
      t->outputs[l * 4 + 1] = layer->width;
      t->visited[l] = step.visited;
      t->compared[l] = step.compared * t->vectors;
    }
    t->half = 1;
    if (t->weight) release(t, l);
    if (t->module[l] != kBig) {
      t->layer = l;
      return 1;
    }
    step.channels[0] = t->channels[l * 4 + 2];
    step.channels[1] = t->channels[l * 4 + 3];
    step.hidden = t->after;
    step.after = t->hidden;
    ffn_step(layer, &step);
    t->rows[l * 4 + 2] = step.rows_read[0];
    t->rows[l * 4 + 3] = step.rows_read[1];
    t->outputs[l * 4 + 2] = 2 * layer->ffn_width;
    t->outputs[l * 4 + 3] = layer->width;
    t->half = 0;
  }
  return 0;
}

}  // extern "C"
