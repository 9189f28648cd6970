// Drives the native core without Python: random tiny models, texts and Plans.
//
// What is not a number must come out of the kernels that it went into. A token's results must be finite and depend on
// its own sequence alone: the same bits come out whether a text is read at once, in pieces or token by token, by itself
// or beside pieces of others, in one call or stage by stage, for any number of threads (the same number each time).
// KV heads of a layer without a window may hold different numbers of blocks. What a token reads is counted here once
// more, and what it makes of it is worked out slowly. Every instruction set of this processor is run and compared with
// the first one. Meant for sanitizers, which want neither Python nor PyTorch around them, and for processors that are
// only emulated.
//
//   driver [models [first seed [instruction set ...]]]

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "interface.h"
#include "kernels.h"

namespace vesicle {
void embed(const VesicleProjection& w, int64_t row, float* out);
}

namespace {

constexpr int64_t kBlock = vesicle::kBlock, kLevels = 5;

#define CHECK(condition, ...)                                                   \
  do {                                                                          \
    if (!(condition)) {                                                         \
      std::printf("seed %lld: %s does not hold: ", (long long)seed, #condition); \
      std::printf(__VA_ARGS__);                                                 \
      std::printf("\n");                                                        \
      std::exit(1);                                                             \
    }                                                                           \
  } while (0)

int64_t seed;

struct Random {
  uint64_t state;
  explicit Random(int64_t start) : state(0x9e3779b97f4a7c15ull * static_cast<uint64_t>(start + 1)) {
    for (int i = 0; i < 8; ++i) next();
  }
  uint32_t next() {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return static_cast<uint32_t>(state >> 32);
  }
  int64_t between(int64_t low, int64_t high) { return low + next() % static_cast<uint64_t>(high - low + 1); }
  bool chance(double p) { return next() < p * 4294967296.0; }
  float uniform(float low, float high) { return low + (high - low) * (static_cast<float>(next() >> 8) / 16777216.0f); }
};

uint16_t half(float x) {  // cut off; zero below the normal numbers
  if (std::abs(x) < 6.2e-5f) return 0;
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(((bits >> 16) & 0x8000) | ((((bits >> 23) & 255) - 112) << 10) | ((bits >> 13) & 1023));
}

float from_half(uint16_t x) {  // of a number that `half` made
  const float size = std::ldexp(static_cast<float>(1024 + (x & 1023)), (x >> 10 & 31) - 25);
  return x & 0x7fff ? (x & 0x8000 ? -size : size) : 0.0f;
}

// The i-th number of a KV format.
double number_of(const char* numbers, int64_t i, int64_t format) {
  if (format == vesicle::kI8) return reinterpret_cast<const int8_t*>(numbers)[i];
  float wide;
  if (format == vesicle::kF32) {
    std::memcpy(&wide, numbers + 4 * i, sizeof wide);
    return wide;
  }
  uint16_t small;
  std::memcpy(&small, numbers + 2 * i, sizeof small);
  const bool tiny = !(small & 0x7c00);
  if (format == vesicle::kF16 && tiny) return std::ldexp(small & 0x8000 ? -(small & 1023) : small & 1023, -24);
  if (format == vesicle::kF16) return from_half(small);
  const uint32_t bits = static_cast<uint32_t>(small) << 16;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

uint16_t bf16(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

std::vector<float> floats(Random& r, int64_t n, float low, float high) {
  std::vector<float> out(n);
  for (float& x : out) x = r.uniform(low, high);
  return out;
}

int64_t padded(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A scale and a low whose weights are of order 1 / sqrt(channels).
void numbers(Random& r, uint8_t* scales, uint8_t* lows, int64_t width, int64_t n_in, int64_t most) {
  for (int64_t o = 0; o < width; ++o) {
    const float scale = r.uniform(2.0f, 4.0f) / (std::sqrt(static_cast<float>(n_in)) * most);
    const uint16_t s = half(scale), l = half(-scale * most * r.uniform(0.4f, 0.6f));
    std::memcpy(scales + 2 * o, &s, sizeof s);
    std::memcpy(lows + 2 * o, &l, sizeof l);
  }
}

// A weight and its storage, to the byte, so that reading past it shows.
struct Weight {
  VesicleProjection view{};
  std::vector<float> dense, bias;
  std::vector<uint16_t> dense16;
  std::vector<uint8_t> high, trailing;

  void start(Random& r, int64_t n_in, int64_t n_out, int64_t format, bool with_bias) {
    view.n_in = n_in;
    view.n_out = n_out;
    view.format = format;
    if (with_bias) bias = floats(r, n_out, -0.3f, 0.3f);
    view.bias = with_bias ? bias.data() : nullptr;
  }

  void fill_dense(Random& r, int64_t stride) {
    view.stride = stride;
    const float size = 2.0f / std::sqrt(static_cast<float>(view.n_in));
    if (view.format == kDense32) {
      dense = floats(r, view.n_in * view.n_out, -size, size);
      view.data = dense.data();
    } else {
      for (int64_t i = 0; i < view.n_in * view.n_out; ++i) dense16.push_back(bf16(r.uniform(-size, size)));
      dense16.shrink_to_fit();
      view.data = dense16.data();
    }
  }

  void fill_planes(Random& r, int64_t high_bytes, int64_t trailing_bytes) {
    high.resize(high_bytes);
    for (uint8_t& x : high) x = static_cast<uint8_t>(r.next());
    view.data = high.data();
    if (view.format != kPacked8) return;
    trailing.resize(trailing_bytes);
    for (uint8_t& x : trailing) x = static_cast<uint8_t>(r.next());
    view.trailing = trailing.data();
  }

  void projection(Random& r, int64_t n_in, int64_t n_out, int64_t format, bool with_bias) {
    start(r, n_in, n_out, format, with_bias);
    if (format == kDense32 || format == kDenseBf16) return fill_dense(r, n_out);
    const int64_t groups = padded(n_in, 32) / 32, columns = padded(n_out, 64);
    fill_planes(r, columns / 64 * groups * 1280, columns / 2 * groups * 32);
    for (int64_t tile = 0; tile * 128 < columns; ++tile) {
      const int64_t width = std::min<int64_t>(128, columns - tile * 128);
      for (int64_t g = 0; g < groups; ++g) {
        uint8_t* scales = high.data() + tile * groups * 2560 + g * width * 20 + 16 * width;
        numbers(r, scales, scales + 2 * width, width, n_in, format == kPacked8 ? 255 : 15);
      }
    }
  }

  void head(Random& r, int64_t n_in, int64_t n_out, int64_t format, bool with_bias) {
    start(r, n_in, n_out, format, with_bias);
    if (format == kDense32 || format == kDenseBf16) return fill_dense(r, n_in);
    const int64_t blocks = padded(n_in, 32) / 32 * (padded(n_out, 16) / 16);
    fill_planes(r, blocks * 320, blocks * 256);
    for (int64_t b = 0; b < blocks; ++b) {
      uint8_t* scales = high.data() + b * 320 + 256;
      numbers(r, scales, scales + 32, 16, n_in, format == kPacked8 ? 255 : 15);
    }
  }

  // Swaps the first number of a row of an embedding, or its first scale, for `bits`.
  void swap_first(int64_t row, uint32_t* bits) {
    void* at = view.format == kDense32     ? static_cast<void*>(&dense[row * view.n_in])
               : view.format == kDenseBf16 ? static_cast<void*>(&dense16[row * view.n_in])
                                           : &high[row / 16 * (padded(view.n_in, 32) / 32) * 320 + 256 + row % 16 * 2];
    const size_t bytes = view.format == kDense32 ? 4 : 2;
    const uint32_t other = *bits;
    std::memcpy(bits, at, bytes);
    std::memcpy(at, &other, bytes);
  }
};

// A packed projection's weights (n_in, n_out), slowly.
std::vector<float> unpacked(const VesicleProjection& w) {
  const int64_t groups = padded(w.n_in, 32) / 32, columns = padded(w.n_out, 64);
  std::vector<float> out;
  for (int64_t i = 0; i < w.n_in; ++i)
    for (int64_t o = 0; o < w.n_out; ++o) {
      const int64_t tile = o / 128, width = std::min<int64_t>(128, columns - tile * 128), g = i / 32;
      // Eight sets of outputs lie side by side: of a row's 16 bytes, four in the low nibbles and four in the high ones.
      const int64_t set = o % 128 / (width / 8), place = o % 128 % (width / 8);
      const int64_t byte = i % 32 * (width / 2) + place / 4 * 16 + set % 4 * 4 + place % 4, shift = set / 4 * 4;
      const uint8_t* high = static_cast<const uint8_t*>(w.data) + tile * groups * 2560 + g * width * 20;
      int64_t code = high[byte] >> shift & 15;
      if (w.trailing)
        code = 16 * code +
               (static_cast<const uint8_t*>(w.trailing)[tile * groups * 2048 + g * width * 16 + byte] >> shift & 15);
      uint16_t scale, low;
      std::memcpy(&scale, high + 16 * width + 2 * (o % 128), sizeof scale);
      std::memcpy(&low, high + 18 * width + 2 * (o % 128), sizeof low);
      out.push_back(from_half(scale) * static_cast<float>(code) + from_half(low));
    }
  return out;
}

// A dense projection's.
std::vector<float> dense(const VesicleProjection& w) {
  std::vector<float> out;
  const int64_t format = w.format == kDense32 ? vesicle::kF32 : vesicle::kBf16;
  for (int64_t i = 0; i < w.n_in; ++i)
    for (int64_t o = 0; o < w.n_out; ++o)
      out.push_back(static_cast<float>(number_of(static_cast<const char*>(w.data), i * w.stride + o, format)));
  return out;
}

// Numbers of a KV format.
std::vector<char> stored(Random& r, int64_t n, int64_t format) {
  std::vector<char> out(n * (format == vesicle::kF32 ? 4 : format == vesicle::kI8 ? 1 : 2));
  for (int64_t i = 0; i < n; ++i) {
    const float x = r.uniform(-1.5f, 1.5f);
    const uint16_t small = format == vesicle::kF16 ? half(x) : bf16(x);
    if (format == vesicle::kF32) std::memcpy(&out[4 * i], &x, 4);
    if (format == vesicle::kF16 || format == vesicle::kBf16) std::memcpy(&out[2 * i], &small, 2);
    if (format == vesicle::kI8) out[i] = static_cast<char>(r.between(-127, 127));
  }
  return out;
}

// Not a number, in a KV format that has it.
void poison(std::vector<char>& numbers, int64_t i, int64_t format) {
  const uint32_t wide = 0x7fc00000;
  const uint16_t small = format == vesicle::kF16 ? 0x7e00 : 0x7fc0;
  if (format == vesicle::kF32) std::memcpy(&numbers[4 * i], &wide, 4);
  if (format == vesicle::kF16 || format == vesicle::kBf16) std::memcpy(&numbers[2 * i], &small, 2);
}

struct LayerStorage {
  Weight value_key, query, attention_out, ffn_in, ffn_out;
  std::vector<float> attention_gain, attention_bias, ffn_gain, ffn_bias, query_gain, key_gain;
};

// Low-rank maps of all layers, or small FFNs.
struct SmallStorage {
  std::vector<float> down, up, bias;
  std::vector<Weight> weights;
  std::vector<VesicleProjection> in, out;
  VesicleSmall view{};
  void fill(Random& r, const VesicleModel& m, bool ffn) {
    if (!ffn) {
      const int64_t rank = r.between(1, 9);
      down = floats(r, m.n_layers * rank * m.width, -0.3f, 0.3f);
      up = floats(r, m.n_layers * m.width * rank, -0.3f, 0.3f);
      bias = floats(r, m.n_layers * m.width, -0.3f, 0.3f);
      view = VesicleSmall{down.data(), up.data(), bias.data(), rank, nullptr, nullptr, 0};
      return;
    }
    const int64_t inner = r.between(1, r.chance(0.2) ? 400 : 40), format = r.between(kDense32, kPacked8);
    weights.resize(2 * m.n_layers);
    for (int64_t l = 0; l < m.n_layers; ++l) {
      weights[2 * l].projection(r, m.width, (m.gated ? 2 : 1) * inner, format, r.chance(0.3));
      weights[2 * l + 1].projection(r, inner, m.width, format, r.chance(0.3));
      in.push_back(weights[2 * l].view);
      out.push_back(weights[2 * l + 1].view);
    }
    view = VesicleSmall{nullptr, nullptr, nullptr, 0, in.data(), out.data(), inner};
  }
  bool coded() const { return view.in && view.in[0].format >= kPacked4; }
  int64_t weights_read(const VesicleModel& m) const {
    return m.width * (view.in ? (m.gated ? 3 : 2) * view.inner : 2 * view.rank);
  }
};

// Where a text begins, and how long it is.
struct Extent {
  int64_t position, n;
  int64_t visible() const { return (position + n - 1) / kBlock + 1; }
};

// Coordinates as directions, which are as right as any.
struct ScreenStorage {
  VesicleScreen view{};
  std::vector<float> directions, norms;
  std::vector<uint16_t> products;

  void fill(Random& r, const VesicleProjection& head) {
    view.k = r.between(1, std::min<int64_t>(head.n_in, vesicle::kMostDirections));
    directions.assign(view.k * head.n_in, 0.0f);
    for (int64_t d = 0; d < view.k; ++d) directions[d * head.n_in + d] = 1;
    const int64_t tiles = (head.n_out + 15) / 16;
    norms.assign(tiles * 16, NAN);
    products.assign(tiles * 16 * view.k, 0x7e00);
    view.slack = vesicle_screen(&head, directions.data(), view.k, products.data(), norms.data(), r.between(1, 3)) / 8192;
    float biggest = 0;
    for (int64_t row = 0; head.bias && row < head.n_out; ++row) biggest = std::max(biggest, std::fabs(head.bias[row]));
    view.offset = biggest * static_cast<float>(view.k + 8) / (1 << 23);
    view.directions = directions.data();
    view.norms = norms.data();
    view.products = products.data();
  }
};

struct Model {
  VesicleModel view{};
  std::vector<LayerStorage> storage;
  std::vector<VesicleLayer> layers;
  std::vector<float> final_gain, final_bias;
  Weight embedding, head;
  SmallStorage small_ffns[2], small_attention;
  ScreenStorage screen;
  std::vector<char> pages;  // (blocks, keys then values), each block of one KV head
  std::vector<uint16_t> key_scales, value_scales;
  int64_t blocks = 0;

  Model(Random& r, const std::vector<Extent>& extents) {
    VesicleModel& m = view;
    m.n_layers = r.between(1, 3);
    m.kv_heads = r.between(1, 3);
    m.heads = m.kv_heads * r.between(1, 8);
    m.size = 2 * r.between(1, 40);
    m.width = r.between(1, 200);
    m.ffn_width = r.between(1, 300);
    m.vocabulary = r.between(2, 300);
    m.eps = 1e-5f;
    m.scale = 1.0f / std::sqrt(static_cast<float>(m.size));
    m.rms = r.chance(0.6);
    m.parallel = r.chance(0.3);
    m.gated = r.chance(0.6);
    m.activation = r.chance(0.4) ? static_cast<int64_t>(kSilu) : r.between(kSilu, kRelu);
    m.rotated = r.chance(0.6) ? m.size : 2 * r.between(1, m.size / 2);
    const int64_t format = r.between(0, 3), q = m.heads * m.size, kv = m.kv_heads * m.size;
    const bool bias = r.chance(0.3), norms = r.chance(0.3), shifts = !m.rms && r.chance(0.7), post_norms = r.chance(0.3);
    const auto norm = [shifts](const std::vector<float>& gain, const std::vector<float>& shift) {
      return VesicleNorm{gain.data(), shifts ? shift.data() : nullptr};
    };
    storage.resize(m.n_layers);
    layers.resize(m.n_layers);
    for (int64_t l = 0; l < m.n_layers; ++l) {
      LayerStorage& s = storage[l];
      s.value_key.projection(r, m.width, 2 * kv, format, bias);
      s.query.projection(r, m.width, q, format, bias);
      s.attention_out.projection(r, q, m.width, format, bias);
      s.ffn_in.projection(r, m.width, (m.gated ? 2 : 1) * m.ffn_width, format, bias);
      s.ffn_out.projection(r, m.ffn_width, m.width, format, bias);
      s.attention_gain = floats(r, m.width, 0.5f, 1.5f);
      s.attention_bias = floats(r, m.width, -0.3f, 0.3f);
      s.ffn_gain = floats(r, m.width, 0.5f, 1.5f);
      s.ffn_bias = floats(r, m.width, -0.3f, 0.3f);
      s.query_gain = floats(r, m.size, 0.5f, 1.5f);
      s.key_gain = floats(r, m.size, 0.5f, 1.5f);
      VesicleLayer& layer = layers[l];
      layer.value_key = s.value_key.view;
      layer.query = s.query.view;
      layer.attention_out = s.attention_out.view;
      layer.ffn_in = s.ffn_in.view;
      layer.ffn_out = s.ffn_out.view;
      layer.attention_norm = norm(s.attention_gain, s.attention_bias);
      layer.ffn_norm = norm(s.ffn_gain, s.ffn_bias);
      if (norms) layer.query_norm.gain = s.query_gain.data();
      if (norms) layer.key_norm.gain = s.key_gain.data();
      if (post_norms) layer.attention_post_norm.gain = s.attention_gain.data();
      if (post_norms) layer.ffn_post_norm.gain = s.ffn_gain.data();
      layer.rotates = r.between(0, 4) % 3;
      layer.window = r.chance(0.3) ? r.between(1, 100) : 0;
    }
    m.embedding_scale = r.chance(0.7) ? 1.0f : 3.0f;
    m.layers = layers.data();
    final_gain = floats(r, m.width, 0.5f, 1.5f);
    final_bias = floats(r, m.width, -0.3f, 0.3f);
    m.final_norm = norm(final_gain, final_bias);
    embedding.head(r, m.width, m.vocabulary, r.between(0, 3), false);
    head.head(r, m.width, m.vocabulary, format < kPacked4 ? format : r.between(kPacked4, kPacked8), r.chance(0.3));
    m.embedding = embedding.view;
    m.head = head.view;
    if (m.head.format == kPacked8 && r.chance(0.7)) {
      screen.fill(r, m.head);
      m.screen = &screen.view;
    }
    for (SmallStorage& small : small_ffns) small.fill(r, m, r.chance(0.6));
    small_attention.fill(r, m, false);
    m.kv_format = r.between(0, 3);
    m.summary_format = m.kv_format == vesicle::kI8 ? static_cast<int64_t>(vesicle::kF16) : m.kv_format;
    for (const Extent& extent : extents) blocks += m.n_layers * m.kv_heads * extent.visible();
    pages = stored(r, blocks * 2 * m.size * kBlock, m.kv_format);
    if (m.kv_format == vesicle::kI8)
      for (int64_t i = 0; i < blocks * kBlock; ++i) {
        key_scales.push_back(half(r.uniform(0.005f, 0.01f)));
        value_scales.push_back(half(r.uniform(0.005f, 0.01f)));
      }
    m.page_stride = 2 * m.size * kBlock;
    m.keys = pages.data();
    m.values = pages.data() + pages.size() / (blocks * 2);
    m.key_scales = key_scales.empty() ? nullptr : key_scales.data();
    m.value_scales = value_scales.empty() ? nullptr : value_scales.data();
  }

  // Makes a position of a block one that has not been written.
  void forget(int64_t block, int64_t slot) {
    const VesicleModel& m = view;
    for (int64_t d = 0; d < m.size; ++d) {
      poison(pages, block * m.page_stride + d * kBlock + slot, m.kv_format);
      poison(pages, block * m.page_stride + m.size * kBlock + slot * m.size + d, m.kv_format);
    }
    if (m.kv_format == vesicle::kI8) key_scales[block * kBlock + slot] = value_scales[block * kBlock + slot] = 0x7e00;
  }

  static double scale_of(const std::vector<uint16_t>& scales, int64_t i) {
    return number_of(reinterpret_cast<const char*>(scales.data()), i, vesicle::kF16);
  }
  // Keys and values (16 n, size) of n blocks, as they are read back.
  std::vector<double> keys(const int32_t* blocks, int64_t n) const {
    return entries(blocks, n, 0, 1, kBlock, key_scales);
  }
  std::vector<double> values(const int32_t* blocks, int64_t n) const {
    return entries(blocks, n, view.size * kBlock, view.size, 1, value_scales);
  }
  std::vector<double> entries(const int32_t* blocks, int64_t n, int64_t first, int64_t by_slot, int64_t by_channel,
                              const std::vector<uint16_t>& scales) const {
    std::vector<double> out;
    for (int64_t i = 0; i < n * kBlock; ++i) {
      const int64_t block = blocks[i / kBlock], at = block * view.page_stride + first + i % kBlock * by_slot;
      const double scale = scales.empty() ? 1 : scale_of(scales, block * kBlock + i % kBlock);
      for (int64_t d = 0; d < view.size; ++d)
        out.push_back(scale * number_of(pages.data(), at + d * by_channel, view.kv_format));
    }
    return out;
  }
};

struct ModulatorStorage {
  std::vector<float> weight, offset, log_slope, place_weight;
  std::vector<VesicleRule> rules;
  std::vector<int32_t> most;  // KV blocks by layer
  VesicleModulator view{};
  ModulatorStorage(Random& r, const VesicleModel& m) {
    VesicleModulator& v = view;
    v.released = r.between(1, 3);
    const int64_t n = m.n_layers * v.released;
    const float size = 2.0f / std::sqrt(static_cast<float>(m.width));
    weight = floats(r, n * m.width, -size, size);
    offset = floats(r, n, -2, 1);
    log_slope = floats(r, n, -0.5f, 0.5f);
    place_weight = floats(r, n, -0.5f, 0.5f);
    v.weight = weight.data();
    v.offset = offset.data();
    v.log_slope = log_slope.data();
    v.place_weight = place_weight.data();
    v.logit = r.uniform(-1, 1);
    const int32_t columns[] = {0, 1, 2};
    std::copy(columns, columns + 3, v.columns);
    const int64_t widths[4] = {m.width, m.heads * m.size, m.width, m.ffn_width};
    const double floor = r.uniform(0.05f, 0.5f), bypass = r.uniform(0, 0.2f);
    for (int32_t site = 0; site < 4; ++site) {
      const int32_t channels = number(offsetof(VesiclePlanRow, channels)) + site;
      share(channels, 0, site < 2, widths[site], r.uniform(0.1f, 1.2f), floor, 0);
      ladder(number(offsetof(VesiclePlanRow, bits)) + site, 0, site < 2, {{1.0, 16}, {0.7, 16}, {0.5, 4}}, 2);
    }
    ladder(number(offsetof(VesiclePlanRow, ffn)), 1, false, {{r.uniform(0.2f, 0.5f), 2}, {bypass, 1}}, 0);
    ladder(number(offsetof(VesiclePlanRow, attention)), 1, true, {{r.uniform(0, 0.5f), 1}}, 0);
    share(number(offsetof(VesiclePlanRow, kv_blocks)), 2, true, 0, 1, 0, r.between(2, 4));
    const int64_t survivors = r.chance(0.5) ? r.between(1, m.vocabulary) : 0;
    ladder(number(offsetof(VesiclePlanRow, head)), 0, false, {{r.uniform(0.2f, 1), 0}},
           static_cast<int32_t>(survivors));
    rules.back().last = 1;
    v.rules = rules.data();
    v.n_rules = rules.size();
    for (int64_t l = 0; l < m.n_layers; ++l) most.push_back(static_cast<int32_t>(r.between(2, 40)));
    if (r.chance(0.4)) v.most = most.data();
  }

  static int32_t number(size_t offset) { return static_cast<int32_t>(offset / sizeof(int32_t)); }

  void share(int32_t number, int32_t transmitter, bool next, int64_t width, double rate, double floor, int64_t least) {
    VesicleRule rule{};
    rule.number = number;
    rule.transmitter = transmitter;
    rule.next = next;
    rule.width = width;
    rule.rate = rate;
    rule.floor = floor;
    rule.least = least;
    rule.steps = -1;
    rules.push_back(rule);
  }

  void ladder(int32_t number, int32_t transmitter, bool next, std::vector<std::pair<double, int32_t>> steps,
              int32_t below) {
    VesicleRule rule{};
    rule.number = number;
    rule.transmitter = transmitter;
    rule.next = next;
    for (const auto& step : steps) {
      rule.levels[rule.steps] = step.first;
      rule.values[rule.steps++] = step.second;
    }
    rule.below = below;
    rules.push_back(rule);
  }
};

// One sequence: what lies in its cache, its lists of blocks, of which each KV head of each layer may have lost some,
// and the text that it reads next, with what each token does.
struct Sequence {
  int64_t kv_heads, position, n, room, vectors, room_summaries;
  std::vector<int32_t> ids;
  // (L, KV heads, room) twice, (L, KV heads): blocks of a head that are older than the text's.
  std::vector<int32_t> tables, starts, before;
  std::vector<std::vector<char>> summaries;
  std::vector<void*> summary_pointers;
  bool summarised;
  std::vector<float> cosine, sine;
  std::vector<ModulatorStorage> modulator;  // none or one
  std::vector<int64_t> acting;              // by token
  int64_t small_ffn;  // which of the model's; -1 for none
  bool small_attention, reads;
  std::vector<float> received;  // (L, KV heads, 16 room) what each slot received, where the sequence `reads`
  int64_t observes;             // of how many of the newest tokens queries are kept
  std::vector<float> queries;   // (L, observes, heads * size) by position modulo `observes`
  std::vector<VesiclePlanRow> plan;  // (n, L)

  bool releases(int64_t place) const { return !modulator.empty() && acting[place]; }
  // A KV head's among those of all layers.
  int64_t row_of(int64_t l, int64_t g) const { return l * kv_heads + g; }
  const int32_t* table(int64_t l, int64_t g) const { return &tables[row_of(l, g) * room]; }
  // Blocks that a KV head holds up to that of the token at a place of the text.
  int64_t held(int64_t l, int64_t g, int64_t place) const {
    return before[row_of(l, g)] + (position + place) / kBlock - position / kBlock + 1;
  }
  // Whether the KV heads of a layer hold different numbers of blocks.
  bool uneven(int64_t l) const {
    return std::any_of(&before[l * kv_heads], &before[l * kv_heads] + kv_heads,
                       [&](int32_t blocks) { return blocks != before[l * kv_heads]; });
  }

  Sequence(Random& r, Model& model, const Extent& extent, std::vector<int32_t>& free)
      : kv_heads(model.view.kv_heads), position(extent.position), n(extent.n) {
    const VesicleModel& m = model.view;
    const int64_t L = m.n_layers, G = kv_heads, visible = extent.visible(), first = position / kBlock;
    for (int64_t i = 0; i < n; ++i) ids.push_back(static_cast<int32_t>(r.between(0, m.vocabulary - 1)));
    room = visible + r.between(0, 3);
    vectors = r.between(1, 2);
    room_summaries = padded(visible + r.between(0, 3), 16);
    tables.assign(L * G * room, 0);
    starts.assign(L * G * room, 0);
    for (int64_t l = 0; l < L; ++l) {
      // A windowed layer has left nothing but blocks behind that no token of the text sees.
      const int64_t window = m.layers[l].window;
      const int64_t left = window ? r.between(0, std::max<int64_t>(0, first * kBlock - window + 1) / kBlock) : 0;
      const bool evicts = !window && r.chance(0.6);
      // (KV heads, room / 16, vectors, size, 16): nothing is known of blocks that are yet to be completed.
      summaries.push_back(stored(r, G * room_summaries * vectors * m.size, m.summary_format));
      const int64_t group = vectors * m.size * 16;
      for (int64_t g = 0; g < G; ++g) {
        // Each head forgets what it will: much, all or nothing.
        const float shares[] = {0.0f, 0.1f, 0.3f, 0.3f, 0.6f, 0.9f, 1.0f};
        const float forgets = evicts ? shares[r.between(0, 6)] : 0.0f;
        int32_t* const list = &tables[row_of(l, g) * room];
        int32_t listed = 0;
        for (int64_t b = left; b < visible; ++b) {
          if (b < first && r.chance(forgets)) continue;
          if (b == first) before.push_back(listed);
          starts[row_of(l, g) * room + listed] = static_cast<int32_t>(b * kBlock);
          list[listed++] = free.back();
          free.pop_back();
        }
        const int64_t older = before.back();
        for (int64_t b = older; b < room_summaries; ++b)
          for (int64_t i = 0; i < vectors * m.size; ++i)
            poison(summaries.back(), (g * room_summaries / 16 + b / 16) * group + i * 16 + b % 16, m.summary_format);
        // Nor have the text's positions, and what follows them, been written.
        for (int64_t b = older; b < listed; ++b)
          for (int64_t slot = b == older ? position % kBlock : 0; slot < kBlock; ++slot) model.forget(list[b], slot);
      }
    }
    for (auto& s : summaries) summary_pointers.push_back(s.data());
    for (int64_t t = 0; t < n; ++t)
      for (int64_t i = 0; i < m.rotated; ++i) {
        const float angle = r.uniform(-3, 3);
        const bool leads = i < m.rotated / 2;
        cosine.push_back(leads ? std::cos(angle) : cosine[cosine.size() - m.rotated / 2]);
        sine.push_back(leads ? -std::sin(angle) : -sine[sine.size() - m.rotated / 2]);
      }
    small_ffn = r.between(-1, 1);
    small_attention = r.chance(0.5);
    reads = r.chance(0.5);
    received.resize(L * m.kv_heads * room * kBlock);
    observes = r.chance(0.6) ? r.between(r.chance(0.5) ? n : 1, 2 * n) : 0;
    queries.resize(L * observes * m.heads * m.size);
    const bool reads_all = r.chance(0.2);
    if (!reads_all && r.chance(0.4)) modulator.emplace_back(r, m);
    const int64_t most = r.between(0, 31);
    for (int64_t t = 0; t < n; ++t) acting.push_back(r.chance(0.8) ? most : r.chance(0.5) ? r.between(0, 31) : 0);
    summarised = !reads_all || r.chance(0.5);
    const int32_t same = r.chance(0.5) ? 16 : 0;
    const double rest = r.chance(0.6) ? 0.3 : 0.95;  // tokens at rest share what is read
    for (int64_t t = 0; t < n; ++t) {
      for (int64_t l = 0; l < L; ++l) plan.push_back(row(r, m, (position + t) / kBlock + 1, same, rest, reads_all));
      plan.back().head = static_cast<int32_t>(r.chance(0.5) ? 0 : r.between(1, m.vocabulary));
    }
  }

  static VesiclePlanRow row(Random& r, const VesicleModel& m, int64_t visible, int32_t same, double rest,
                            bool reads_all) {
    const int64_t widths[4] = {m.width, m.heads * m.size, m.width, m.ffn_width};
    const int32_t each[] = {16, 8, 4, 3, 2};
    VesiclePlanRow row{};
    for (int64_t site = 0; site < 4; ++site) {
      const int64_t width = widths[site];
      row.channels[site] = static_cast<int32_t>(r.chance(rest) ? width : r.chance(0.1) ? 1 : r.between(1, width));
      row.bits[site] = same ? same : r.chance(rest) ? 16 : each[r.between(0, 4)];
    }
    row.ffn = static_cast<int32_t>(r.chance(std::max(0.6, rest)) ? 2 : r.between(0, 1));
    row.attention = r.chance(std::max(0.8, rest));
    const bool all = reads_all || r.chance(std::max(0.4, rest));
    row.kv_blocks = static_cast<int32_t>(all ? visible : r.between(std::min<int64_t>(2, visible), visible));
    return row;
  }
};

// The next `n` tokens of a sequence, as part of a pass, and what is asked of the head.
struct Piece {
  int64_t who, n, wants;
};
typedef std::vector<std::vector<Piece>> Passes;

// Every text by itself, at once.
Passes at_once(const std::vector<Sequence>& sequences, int64_t wants) {
  Passes passes;
  for (const Sequence& s : sequences) passes.push_back({{static_cast<int64_t>(passes.size()), s.n, wants}});
  return passes;
}

// Every text by itself, the last `most` tokens of it one by one.
Passes one_by_one(const std::vector<Sequence>& sequences, int64_t most) {
  Passes passes;
  for (size_t who = 0; who < sequences.size(); ++who) {
    const int64_t n = sequences[who].n, singles = std::min(n, most), i = static_cast<int64_t>(who);
    if (n > singles) passes.push_back({{i, n - singles, kLikeliest}});
    for (int64_t t = 0; t < singles; ++t) passes.push_back({{i, 1, t % 3 ? kLogits : kLikeliest}});
  }
  return passes;
}

// All texts in random pieces, as they meet.
Passes in_pieces(Random& r, const std::vector<Sequence>& sequences) {
  Passes passes;
  std::vector<int64_t> left, open;
  for (const Sequence& s : sequences) {
    open.push_back(static_cast<int64_t>(open.size()));
    left.push_back(s.n);
  }
  while (!open.empty()) {
    for (size_t i = open.size() - 1; i > 0; --i) std::swap(open[i], open[r.between(0, i)]);
    std::vector<Piece> pass;
    int64_t space = vesicle::kMaxTokens;
    const bool alone = r.chance(0.3);
    for (int64_t who : open) {
      if (!space || (!pass.empty() && (alone || r.chance(0.3)))) continue;
      const int64_t most = std::min(space, left[who]);
      const int64_t n = r.chance(0.2) ? 1 : r.chance(0.2) ? most : r.between(1, std::min<int64_t>(most, 60));
      pass.push_back({who, n, r.chance(0.3) ? static_cast<int64_t>(kAllLogits) : r.between(kNothing, kLikeliest)});
      space -= n;
    }
    for (const Piece& p : pass) left[p.who] -= p.n;
    open.erase(std::remove_if(open.begin(), open.end(), [&](int64_t who) { return !left[who]; }), open.end());
    passes.push_back(pass);
  }
  return passes;
}

// All that the core says about a token.
struct Said {
  std::vector<VesiclePlanRow> plan;
  std::vector<double> levels;
  std::vector<int64_t> rows, outputs, visited, compared, small, coded, summed;
  // After the last layer's attention, or, where it was run stage by stage, each one's. Empty where not asked for.
  std::vector<float> hidden, halves, logits;
  bool ranked = false;  // the likeliest token was asked for
  int64_t likeliest = -1, head = 0;

  // What is not the same bit for bit; empty if all is that both were asked for.
  std::string unlike(const Said& other) const {
    std::string names;
    const auto compare = [&names](const char* name, const auto& a, const auto& b) {
      if (a.size() != b.size() || (!a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0])))
        names = names + " " + name;
    };
    compare("plan", plan, other.plan);
    compare("levels", levels, other.levels);
    compare("rows", rows, other.rows);
    compare("outputs", outputs, other.outputs);
    compare("visited", visited, other.visited);
    compare("compared", compared, other.compared);
    compare("small", small, other.small);
    compare("coded", coded, other.coded);
    compare("summed", summed, other.summed);
    if (!hidden.empty() && !other.hidden.empty()) compare("hidden", hidden, other.hidden);
    if (!halves.empty() && !other.halves.empty()) compare("halves", halves, other.halves);
    if (!logits.empty() && !other.logits.empty()) compare("logits", logits, other.logits);
    if (ranked && other.ranked && likeliest != other.likeliest) names += " likeliest";
    if (ranked && other.ranked && head != other.head) names += " head";
    return names;
  }
};

// A piece as the core sees it. What is of no concern to it is not there, or cannot be used.
struct Chunk {
  VesicleChunk view{};
  std::vector<int32_t> ids, tables, starts, held;
  std::vector<float> cosine, sine, hidden, halves, logits;
  std::vector<VesiclePlanRow> plan;
  std::vector<double> levels;
  std::vector<int64_t> rows, outputs, visited, compared, small, coded, summed, acting;

  template <typename T>
  static std::vector<T> part(const std::vector<T>& of, int64_t first, int64_t n, int64_t each) {
    return std::vector<T>(of.begin() + first * each, of.begin() + (first + n) * each);
  }

  // The next tokens of a sequence from the text's place `at`.
  Chunk(Model& model, Sequence& s, const Piece& piece, int64_t at) {
    const VesicleModel& m = model.view;
    const int64_t L = m.n_layers, n = piece.n;
    ids = part(s.ids, at, n, 1);
    cosine = part(s.cosine, at, n, m.rotated);
    sine = part(s.sine, at, n, m.rotated);
    plan = part(s.plan, at, n, L);
    if (!s.modulator.empty()) acting = part(s.acting, at, n, 1);
    tables = s.tables;
    starts = s.starts;
    for (int64_t row = 0; row < L * m.kv_heads; ++row) {
      held.push_back(static_cast<int32_t>(s.held(row / m.kv_heads, row % m.kv_heads, at + n - 1)));
      std::fill(&tables[row * s.room] + held[row], &tables[row * s.room] + s.room, INT32_MAX);
      std::fill(&starts[row * s.room] + held[row], &starts[row * s.room] + s.room, INT32_MAX);
    }
    levels.assign(n * L * kLevels, 1.0);
    rows.assign(n * L * 4, 0);
    outputs.assign(n * L * 4, 0);
    visited.assign(n * L, 0);
    compared.assign(n * L, 0);
    small.assign(n, 0);
    coded.assign(n, 0);
    summed.assign(n * L, 0);
    if (piece.wants != kNothing) hidden.assign(n * m.width, NAN);
    if (piece.wants == kLogits || piece.wants == kAllLogits)
      logits.assign((piece.wants == kLogits ? 1 : n) * m.vocabulary, NAN);
    view.ids = ids.data();
    view.n = n;
    view.position = s.position + at;
    view.room = s.room;
    view.vectors = s.vectors;
    view.room_summaries = s.room_summaries;
    view.cosine[0] = view.cosine[1] = cosine.data();
    view.sine[0] = view.sine[1] = sine.data();
    view.tables = tables.data();
    view.starts = starts.data();
    view.held = held.data();
    view.summaries = s.summarised ? s.summary_pointers.data() : nullptr;
    view.modulator = s.modulator.empty() ? nullptr : &s.modulator[0].view;
    view.small_ffn = s.small_ffn < 0 ? nullptr : &model.small_ffns[s.small_ffn].view;
    view.small_attention = s.small_attention ? &model.small_attention.view : nullptr;
    view.received = s.reads ? s.received.data() : nullptr;
    view.room_received = s.room * kBlock;
    view.summed = summed.data();
    view.queries = s.observes ? s.queries.data() : nullptr;
    view.room_queries = s.observes;
    view.plan = plan.data();
    view.levels = levels.data();
    view.rows = rows.data();
    view.outputs = outputs.data();
    view.visited = visited.data();
    view.compared = compared.data();
    view.small = small.data();
    view.coded = coded.data();
    view.hidden = hidden.empty() ? nullptr : hidden.data();
    view.logits = logits.empty() ? nullptr : logits.data();
    view.acting = acting.data();
    view.wants = piece.wants;
    view.likeliest = kUnasked;
  }

  static constexpr int64_t kUnasked = -7;

  bool releases(int64_t i) const { return view.modulator && acting[i]; }

  Said said(const VesicleModel& m, int64_t i) const {
    const int64_t L = m.n_layers, V = m.vocabulary;
    Said out;
    out.plan = part(plan, i, 1, L);
    out.head = out.plan.back().head;
    out.plan.back().head = 0;
    out.levels = part(levels, i, 1, L * kLevels);
    out.rows = part(rows, i, 1, L * 4);
    out.outputs = part(outputs, i, 1, L * 4);
    out.visited = part(visited, i, 1, L);
    out.compared = part(compared, i, 1, L);
    out.small = part(small, i, 1, 1);
    out.coded = part(coded, i, 1, 1);
    out.summed = part(summed, i, 1, L);
    if (!hidden.empty()) out.hidden = part(hidden, i, 1, m.width);
    for (int64_t l = 0; l * view.n * m.width < static_cast<int64_t>(halves.size()); ++l) {
      const auto half = part(halves, l * view.n + i, 1, m.width);
      out.halves.insert(out.halves.end(), half.begin(), half.end());
    }
    const bool last = i + 1 == view.n;
    if (view.wants == kAllLogits) out.logits = part(logits, i, 1, V);
    if (view.wants == kLogits && last) out.logits = logits;
    out.ranked = view.wants == kLikeliest && last;
    out.likeliest = view.likeliest;
    CHECK(out.ranked || !out.head, "%lld", (long long)out.head);
    return out;
  }
};

// Runs a pass in several calls. Of a Plan there is nothing before the stage that it decides about, and between the
// calls others may use the core.
void run_by_stages(Random& r, void* pass, const VesicleModel& m, std::vector<Chunk>& chunks,
                   std::vector<VesicleChunk>& views, int64_t threads) {
  const int64_t L = m.n_layers, end = 2 * L + 1, step = r.chance(0.7) ? 1 : r.between(2, end);
  std::vector<std::vector<VesiclePlanRow>> plans;
  for (Chunk& c : chunks) {
    plans.push_back(c.plan);
    for (int64_t t = 0; t < c.view.n; ++t)
      if (!c.releases(t)) std::memset(static_cast<void*>(&c.plan[t * L]), 0x80, L * sizeof c.plan[0]);
  }
  const auto decide = [&](int64_t l, bool ffn) {
    for (size_t i = 0; i < chunks.size(); ++i)
      for (int64_t t = 0; t < views[i].n; ++t) {
        if (chunks[i].releases(t)) continue;
        const VesiclePlanRow& from = plans[i][t * L + l];
        VesiclePlanRow& to = chunks[i].plan[t * L + l];
        if (!ffn) {  // all but what is decided after attention
          VesiclePlanRow row = from;
          std::copy(to.channels + 2, to.channels + 4, row.channels + 2);
          std::copy(to.bits + 2, to.bits + 4, row.bits + 2);
          row.ffn = to.ffn;
          row.head = to.head;
          to = row;
        } else {
          to = from;
        }
      }
  };
  for (int64_t first = 0; first < end; first += step) {
    const int64_t last = std::min(end, first + step);
    for (int64_t stage = first; stage < std::min(last, 2 * L); ++stage) decide(stage / 2, stage % 2);
    // Later stages do not let themselves be told how many threads to take.
    vesicle_pass(pass, &m, views.data(), views.size(), first, last, first ? r.between(1, 4) : threads);
    if (step == 1 && first % 2 == 0 && first < 2 * L)
      for (Chunk& c : chunks) c.halves.insert(c.halves.end(), c.hidden.begin(), c.hidden.end());
    if (!r.chance(0.05)) continue;
    const std::vector<float> x(m.width, 1.0f);
    std::vector<float> y(m.layers[0].query.n_out);
    const int32_t count = 1, bits = 16;
    int32_t read;
    vesicle_multiply(&m.layers[0].query, x.data(), &count, &bits, 1, y.data(), &read, threads % 4 + 1);
  }
}

// What became of the texts.
struct Reading {
  std::vector<std::vector<Said>> said;  // by sequence, by token
  std::vector<std::vector<float>> received;  // by sequence, see `Sequence`
  std::vector<std::vector<float>> queries;   // by sequence: see `kept_queries`
  std::vector<std::vector<char>> kept;  // by sequence: the pages of the text, and all summaries
  std::vector<int64_t> lost;            // by sequence: the first token whose residual stream is not finite, or -1
};

// What a sequence leaves in its cache.
std::vector<char> kept(const Model& model, const Sequence& s, std::vector<bool>& written) {
  std::vector<char> out;
  const int64_t page = model.pages.size() / model.blocks;
  for (int64_t l = 0; l < model.view.n_layers; ++l) {
    for (int64_t g = 0; g < s.kv_heads; ++g)
      for (int64_t b = s.before[s.row_of(l, g)]; b < s.held(l, g, s.n - 1); ++b) {
        const int64_t block = s.table(l, g)[b];
        written[block] = true;
        out.insert(out.end(), &model.pages[block * page], &model.pages[block * page] + page);
        for (const auto* pool : {&model.key_scales, &model.value_scales}) {
          if (pool->empty()) continue;
          const char* from = reinterpret_cast<const char*>(&(*pool)[block * kBlock]);
          out.insert(out.end(), from, from + kBlock * 2);
        }
      }
    out.insert(out.end(), s.summaries[l].begin(), s.summaries[l].end());
  }
  return out;
}

// Summaries that passes have made along the way are those of the pages, and there are no others.
void check_summaries(const VesicleModel& m, Sequence& s, const std::vector<std::vector<char>>& before,
                     int64_t threads) {
  const auto made = s.summaries;
  std::vector<int32_t> held;
  for (int64_t row = 0; row < m.n_layers * m.kv_heads; ++row)
    held.push_back(static_cast<int32_t>(s.held(row / m.kv_heads, row % m.kv_heads, s.n - 1)));
  VesicleChunk chunk{};
  chunk.room = s.room;
  chunk.vectors = s.vectors;
  chunk.room_summaries = s.room_summaries;
  chunk.tables = s.tables.data();
  chunk.held = held.data();
  chunk.summaries = s.summary_pointers.data();
  vesicle_summarise(&m, &chunk, threads);
  const int64_t bytes = m.summary_format == vesicle::kF32 ? 4 : 2, group = s.vectors * m.size * 16;
  for (int64_t l = 0; l < m.n_layers; ++l)
    for (int64_t i = 0; i < m.kv_heads * s.room_summaries * s.vectors * m.size; ++i) {
      const int64_t row = s.row_of(l, i / (s.room_summaries * s.vectors * m.size));
      const int64_t complete = s.before[row] + (s.position + s.n) / kBlock - s.position / kBlock;
      const int64_t b = i / group % (s.room_summaries / 16) * 16 + i % 16;
      const bool is_new = b >= s.before[row] && b < complete;
      const auto& expected = is_new ? s.summaries[l] : before[l];
      // What is summarised afterwards leaves the newest block out.
      if (!is_new || b + 1 < held[row])
        CHECK(!std::memcmp(&made[l][i * bytes], &expected[i * bytes], bytes), "block %lld of head %lld of layer %lld",
              (long long)b, (long long)(row - l * m.kv_heads), (long long)l);
    }
}

// The newest tokens' queries of a text that was read, of those that attend; nothing of a windowed layer is kept.
std::vector<float> kept_queries(const VesicleModel& m, const Sequence& s, const std::vector<Said>& said) {
  std::vector<float> out;
  const int64_t width = m.heads * m.size;
  for (int64_t l = 0; l < m.n_layers; ++l) {
    const float* ring = s.queries.data() + l * s.observes * width;
    for (int64_t i = 0; m.layers[l].window && i < s.observes * width; ++i) CHECK(std::isnan(ring[i]), "%g", ring[i]);
    for (int64_t t = std::max<int64_t>(0, s.n - s.observes); !m.layers[l].window && t < s.n; ++t) {
      const float* query = ring + (s.position + t) % s.observes * width;
      if (said[t].plan[l].attention) out.insert(out.end(), query, query + width);
    }
  }
  return out;
}

// How much was checked slowly: slots for what they received; outputs of attention; tokens of which some KV heads chose
// and others did not. And layers whose heads hold different numbers of blocks.
struct Checked {
  int64_t received = 0, outputs = 0, mixed = 0, uneven = 0;
} checked;

// The places that a token reads of a KV head's list when it reads `most`: its own, the first, and those of the largest
// estimated mass. Empty where nearly equal ones leave it open which these are.
std::vector<int64_t> places_read(const VesicleModel& m, const Sequence& s, int64_t l, int64_t g, int64_t own,
                                 int64_t most, const float* query) {
  std::vector<int64_t> places;
  if (most > own) {
    for (int64_t b = 0; b <= own; ++b) places.push_back(b);
    return places;
  }
  const int64_t ratio = m.heads / m.kv_heads, group = s.vectors * m.size * 16;
  std::vector<double> mass(own);
  for (int64_t i = 0; i < ratio; ++i) {
    std::vector<double> scores(own);
    for (int64_t b = 0; b < own; ++b)
      for (int64_t d = 0; d < m.size; ++d) {
        const double x = query[i * m.size + d];
        const int64_t vector = s.vectors == 2 && x > 0;  // of bounds the one that makes the score largest
        const int64_t at = (g * s.room_summaries / 16 + b / 16) * group + (vector * m.size + d) * 16 + b % 16;
        scores[b] += x * number_of(s.summaries[l].data(), at, m.summary_format) * m.scale;
      }
    const double top = *std::max_element(scores.begin(), scores.end());
    double total = 0;
    for (double& x : scores) total += x = std::exp(x - top);
    for (int64_t b = 0; b < own; ++b) mass[b] += scores[b] / total;
  }
  for (int64_t b = 1; b < own; ++b) places.push_back(b);
  std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return mass[a] > mass[b]; });
  const int64_t chosen = most - 2;
  if (chosen > 0) {
    const double last = mass[places[chosen - 1]], next = mass[places[chosen]];
    if (last < 1e-30 || last - next < 1e-3 * last) return {};
  }
  places.resize(chosen);
  places.push_back(0);
  places.push_back(own);
  std::sort(places.begin(), places.end());
  return places;
}

// What lies in a cache that was read to its end, and the queries that were kept, say what each slot has received, and
// what the first layer's attention has added to the residual stream.
void check_attention(const Model& model, const Sequence& s, const std::vector<Said>& said) {
  const VesicleModel& m = model.view;
  const int64_t ratio = m.heads / m.kv_heads, width = m.heads * m.size, slots = s.room * kBlock;
  std::vector<float> plain;
  for (int64_t l = 0; s.observes && l < m.n_layers; ++l) {
    if (m.layers[l].window) continue;
    const int64_t first = std::max<int64_t>(0, s.n - s.observes);
    std::vector<std::vector<double>> keys, values;
    for (int64_t g = 0; g < m.kv_heads; ++g) {
      keys.push_back(model.keys(s.table(l, g), s.held(l, g, s.n - 1)));
      values.push_back(model.values(s.table(l, g), s.held(l, g, s.n - 1)));
    }
    std::vector<double> sums(m.kv_heads * slots), mixed(s.n * width);
    std::vector<bool> read(m.kv_heads * slots), known(m.kv_heads, !first), clear(s.n, true);
    for (int64_t t = first; t < s.n; ++t) {
      const VesiclePlanRow& row = said[t].plan[l];
      if (!row.attention) continue;
      int64_t choosing = 0;
      for (int64_t g = 0; g < m.kv_heads; ++g) {
        const int64_t own = s.held(l, g, t) - 1;
        choosing += row.kv_blocks <= own;
        const float* query = &s.queries[(l * s.observes + (s.position + t) % s.observes) * width + g * ratio * m.size];
        const std::vector<int64_t> places = places_read(m, s, l, g, own, row.kv_blocks, query);
        if (places.empty()) {
          known[g] = clear[t] = false;
          continue;
        }
        const int64_t n = static_cast<int64_t>(places.size() - 1) * kBlock + (s.position + t) % kBlock + 1;
        for (int64_t h = 0; h < ratio; ++h) {
          double* out = &mixed[t * width + (g * ratio + h) * m.size];
          std::vector<double> scores(n);
          for (int64_t i = 0; i < n; ++i) {
            const int64_t slot = places[i / kBlock] * kBlock + i % kBlock;
            for (int64_t d = 0; d < m.size; ++d) scores[i] += query[h * m.size + d] * keys[g][slot * m.size + d];
            scores[i] *= m.scale;
          }
          const double top = *std::max_element(scores.begin(), scores.end());
          double total = 0;
          for (double& x : scores) total += x = std::exp(x - top);
          for (int64_t i = 0; i < n; ++i) {
            const int64_t slot = places[i / kBlock] * kBlock + i % kBlock;
            sums[g * slots + slot] += scores[i] / total;
            read[g * slots + slot] = true;
            for (int64_t d = 0; d < m.size; ++d) out[d] += scores[i] / total * values[g][slot * m.size + d];
          }
        }
      }
      checked.mixed += clear[t] && choosing && choosing < m.kv_heads;
    }
    for (int64_t i = 0; s.reads && i < m.kv_heads * slots; ++i) {
      if (!known[i / slots]) continue;
      const float found = s.received[l * m.kv_heads * slots + i];
      CHECK(read[i] ? std::abs(found - sums[i]) <= 1e-5 + 1e-3 * sums[i] : found == 0,
            "slot %lld of head %lld of layer %lld: %g, not %g", (long long)(i % slots), (long long)(i / slots),
            (long long)l, found, sums[i]);
      ++checked.received;
    }
    if (l || m.layers[0].attention_post_norm.gain) continue;
    const VesicleProjection& w = m.layers[0].attention_out;
    for (int64_t t = first; t < s.n; ++t) {
      const VesiclePlanRow& row = said[t].plan[0];
      if (!row.attention || !clear[t] || said[t].halves.empty()) continue;
      if (row.channels[1] < width || (w.format >= kPacked4 && row.bits[1] < 16)) continue;
      if (plain.empty()) plain = w.format < kPacked4 ? dense(w) : unpacked(w);
      std::vector<float> before(m.width);
      vesicle::embed(m.embedding, s.ids[t], before.data());
      double error = 0, size = 1e-20, beside = 0;
      for (int64_t o = 0; o < m.width; ++o) {
        double expected = w.bias ? w.bias[o] : 0;
        for (int64_t i = 0; i < width; ++i) {
          const double product = mixed[t * width + i] * plain[i * m.width + o];
          expected += product;
          size += product * product;
        }
        const double from = m.embedding_scale * before[o], apart = said[t].halves[o] - from - expected;
        error += apart * apart;
        beside += from * from + expected * expected;
      }
      const double allowed = (w.format >= kPacked4 ? 0.02 : 1e-4) * std::sqrt(size) + 1e-5 * std::sqrt(beside);
      CHECK(std::sqrt(error) <= allowed, "attention of token %lld: %g apart, of %g; format %lld", (long long)t,
            std::sqrt(error), std::sqrt(size), (long long)w.format);
      ++checked.outputs;
    }
  }
}

// Reads all texts, from a cache as it was at the start.
Reading read(Random& r, Model& model, std::vector<Sequence>& sequences, const Passes& passes, int64_t threads,
             bool sound = true) {
  const VesicleModel& m = model.view;
  const auto pages = model.pages;
  const auto key_scales = model.key_scales, value_scales = model.value_scales;
  std::vector<std::vector<std::vector<char>>> summaries;
  for (Sequence& s : sequences) {
    summaries.push_back(s.summaries);
    std::fill(s.received.begin(), s.received.end(), 0.0f);
    std::fill(s.queries.begin(), s.queries.end(), NAN);
  }
  Reading reading;
  reading.said.resize(sequences.size());
  reading.lost.assign(sequences.size(), -1);
  void* pass = vesicle_open();
  for (const std::vector<Piece>& pieces : passes) {
    std::vector<Chunk> chunks;
    std::vector<VesicleChunk> views;
    for (const Piece& p : pieces) {
      chunks.emplace_back(model, sequences[p.who], p, static_cast<int64_t>(reading.said[p.who].size()));
      views.push_back(chunks.back().view);
    }
    if (r.chance(0.3)) run_by_stages(r, pass, m, chunks, views, threads);
    else vesicle_pass(pass, &m, views.data(), views.size(), 0, 2 * m.n_layers + 1, threads);
    for (size_t i = 0; i < pieces.size(); ++i) {
      std::vector<Said>& said = reading.said[pieces[i].who];
      int64_t& lost = reading.lost[pieces[i].who];
      if (lost < 0 && views[i].lost >= 0) lost = static_cast<int64_t>(said.size()) + views[i].lost;
      CHECK((views[i].likeliest == Chunk::kUnasked) == (pieces[i].wants != kLikeliest), "%lld",
            (long long)views[i].likeliest);
      chunks[i].view = views[i];
      for (int64_t t = 0; t < pieces[i].n; ++t) said.push_back(chunks[i].said(m, t));
    }
  }
  vesicle_close(pass);
  std::vector<bool> written(model.blocks);
  for (const Sequence& s : sequences) {
    reading.kept.push_back(kept(model, s, written));
    reading.received.push_back(s.received);
    reading.queries.push_back(kept_queries(m, s, reading.said[reading.queries.size()]));
  }
  const int64_t page = pages.size() / model.blocks;
  for (int64_t block = 0; block < model.blocks; ++block) {
    if (written[block]) continue;
    CHECK(!std::memcmp(&pages[block * page], &model.pages[block * page], page), "block %lld", (long long)block);
    if (key_scales.empty()) continue;
    const auto same = [&](const std::vector<uint16_t>& a, const std::vector<uint16_t>& b) {
      return !std::memcmp(&a[block * kBlock], &b[block * kBlock], kBlock * sizeof a[0]);
    };
    CHECK(same(key_scales, model.key_scales) && same(value_scales, model.value_scales), "block %lld", (long long)block);
  }
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& s = sequences[i];
    if (sound) check_attention(model, s, reading.said[i]);
    if (s.summarised && r.chance(0.3)) check_summaries(m, s, summaries[i], threads);
    for (int64_t l = 0; l < m.n_layers; ++l)
      std::copy(summaries[i][l].begin(), summaries[i][l].end(), s.summaries[l].begin());
  }
  std::copy(pages.begin(), pages.end(), model.pages.begin());
  std::copy(key_scales.begin(), key_scales.end(), model.key_scales.begin());
  std::copy(value_scales.begin(), value_scales.end(), model.value_scales.begin());
  return reading;
}

// The same bits as in the first reading, as far as both were asked.
void compare(const Reading& reading, const Reading& first, size_t who, size_t tokens, const char* how, const char* set,
             int64_t threads) {
  for (size_t t = 0; t < tokens; ++t) {
    const std::string unlike = reading.said[who][t].unlike(first.said[who][t]);
    CHECK(unlike.empty(), "%s, %lld threads: token %lld of %lld of sequence %lld, read %s:%s", set, (long long)threads,
          (long long)t, (long long)first.said[who].size(), (long long)who, how, unlike.c_str());
  }
  if (tokens < first.said[who].size()) return;
  const std::vector<float>&mine = reading.received[who], &others = first.received[who];
  CHECK(!std::memcmp(mine.data(), others.data(), mine.size() * sizeof(float)),
        "%s, %lld threads: attention received by sequence %lld, read %s", set, (long long)threads, (long long)who, how);
  CHECK(reading.queries[who] == first.queries[who],
        "%s, %lld threads: queries of sequence %lld, read %s", set, (long long)threads, (long long)who, how);
  CHECK(reading.kept[who] == first.kept[who],
        "%s, %lld threads: pages or summaries of sequence %lld, read %s", set, (long long)threads, (long long)who, how);
}

void compare(const Reading& reading, const Reading& first, const char* how, const char* set, int64_t threads) {
  for (size_t who = 0; who < first.said.size(); ++who) {
    CHECK(reading.lost[who] < 0, "%s: sequence %lld read %s", set, (long long)who, how);
    compare(reading, first, who, first.said[who].size(), how, set, threads);
    for (const Said& said : reading.said[who]) {
      for (float x : said.hidden) CHECK(std::isfinite(x), "hidden %g", x);
      for (float x : said.logits) CHECK(std::isfinite(x), "logit %g", x);
    }
  }
}

// What the head says about a token is what was asked for, and the likeliest token is that of the largest logit unless
// the Plan has it screened.
void check_heads(const VesicleModel& m, const std::vector<Sequence>& sequences, const Reading& reading) {
  for (size_t who = 0; who < sequences.size(); ++who)
    for (int64_t t = 0; t < sequences[who].n; ++t) {
      const Said& said = reading.said[who][t];
      const int64_t planned = m.head.format == kPacked8 ? sequences[who].plan[(t + 1) * m.n_layers - 1].head : 0;
      if (!said.ranked) continue;
      CHECK(said.head == planned || sequences[who].releases(t), "%lld, not %lld", (long long)said.head,
            (long long)planned);
      CHECK(said.likeliest >= 0 && said.likeliest < m.vocabulary, "%lld", (long long)said.likeliest);
      if (said.head > 0 && said.head < m.vocabulary) continue;
      const int64_t largest = std::max_element(said.logits.begin(), said.logits.end()) - said.logits.begin();
      CHECK(said.likeliest == largest, "%lld, not %lld", (long long)said.likeliest, (long long)largest);
    }
}

// Entries of all KV heads of a layer that a token reads, and summaries that it compares to choose among their blocks.
void count_read(const VesicleModel& m, const Sequence& s, int64_t l, int64_t t, const VesiclePlanRow& row,
                int64_t* visited, int64_t* compared) {
  const int64_t position = s.position + t, window = m.layers[l].window;
  const int64_t unseen = window ? std::max<int64_t>(0, position + 1 - window) : 0;  // positions
  *visited = *compared = 0;
  for (int64_t g = 0; row.attention && g < m.kv_heads; ++g) {
    // In a windowed layer nothing is forgotten that is seen.
    const int64_t blocks = window ? position / kBlock - unseen / kBlock + 1 : s.held(l, g, t);
    const int64_t entries = window ? position + 1 - unseen : (blocks - 1) * kBlock + position % kBlock + 1;
    const bool chooses = row.kv_blocks < blocks;
    *visited += chooses ? (row.kv_blocks - 1) * kBlock + position % kBlock + 1 : entries;
    if (chooses) *compared += s.vectors * (blocks - 1 - (unseen % kBlock != 0));
  }
}

// What attention, small modules and gathering are said to have cost is what was decided, and every query that attends
// gives away a probability of 1.
void check_received(const Model& model, const std::vector<Sequence>& sequences, const Reading& reading) {
  const VesicleModel& m = model.view;
  for (size_t who = 0; who < sequences.size(); ++who) {
    const Sequence& s = sequences[who];
    std::vector<int64_t> attending(m.n_layers);
    for (const Said& said : reading.said[who]) {
      int64_t small = 0, coded = 0;
      for (int64_t l = 0; l < m.n_layers; ++l) {
        const VesiclePlanRow& row = said.plan[l];
        if (row.ffn == 1 && s.small_ffn >= 0) {
          const SmallStorage& taken = model.small_ffns[s.small_ffn];
          small += taken.weights_read(m);
          if (taken.coded()) coded += taken.weights_read(m);
        }
        if (!row.attention && s.small_attention) small += model.small_attention.weights_read(m);
        attending[l] += row.attention;
        int64_t visited, compared;
        count_read(m, s, l, &said - reading.said[who].data(), row, &visited, &compared);
        CHECK(said.visited[l] == visited, "%lld, not %lld", (long long)said.visited[l], (long long)visited);
        CHECK(said.compared[l] == compared, "%lld, not %lld", (long long)said.compared[l], (long long)compared);
        const bool told = s.reads && !m.layers[l].window;  // nothing but its window forgets there
        const int64_t expected = told ? visited : 0;
        CHECK(said.summed[l] == expected, "%lld, not %lld", (long long)said.summed[l], (long long)expected);
      }
      CHECK(said.small[0] == small, "%lld, not %lld", (long long)said.small[0], (long long)small);
      CHECK(said.coded[0] == coded, "%lld, not %lld", (long long)said.coded[0], (long long)coded);
    }
    for (const float x : reading.queries[who]) CHECK(std::isfinite(x), "query %g", x);
    const int64_t slots = s.room * kBlock;
    for (int64_t i = 0; i < m.n_layers * m.kv_heads; ++i) {
      double total = 0;
      for (int64_t j = 0; j < slots; ++j) total += s.reads ? reading.received[who][i * slots + j] : 0;
      const bool told = s.reads && !m.layers[i / m.kv_heads].window;
      const double given = told ? static_cast<double>(attending[i / m.kv_heads] * (m.heads / m.kv_heads)) : 0;
      CHECK(std::abs(total - given) <= 1e-3 * given, "%g, not %g", total, given);
    }
  }
}

// A token of which an embedding is not finite is lost, in every sequence that has it; nothing before it is, and nobody
// beside it.
void damaged_text(Random& r, Model& model, std::vector<Sequence>& sequences, const Reading& sound, const char* set,
                  int64_t threads) {
  const Sequence& s = sequences[r.between(0, sequences.size() - 1)];
  const int32_t id = s.ids[r.between(0, s.n - 1)];
  const int64_t format = model.view.embedding.format;
  uint32_t bits = format == kDense32 ? 0x7fc00000 : format == kDenseBf16 ? 0x7fc0 : 0x7e00;
  model.embedding.swap_first(id, &bits);
  for (const bool whole : {true, false}) {
    const Passes passes = whole ? at_once(sequences, kLikeliest) : in_pieces(r, sequences);
    const Reading reading = read(r, model, sequences, passes, threads, false);
    for (size_t who = 0; who < sequences.size(); ++who) {
      const auto& ids = sequences[who].ids;
      const int64_t n = sequences[who].n, first = std::find(ids.begin(), ids.end(), id) - ids.begin();
      CHECK(reading.lost[who] == (first < n ? first : -1), "%s: %lld, not %lld of %lld", set,
            (long long)reading.lost[who], (long long)first, (long long)n);
      compare(reading, sound, who, first, "beside a damaged token", set, threads);
      if (first == n) continue;
      const Said& lost = reading.said[who][first];
      CHECK(!lost.ranked || lost.likeliest == -1, "%s: %lld", set, (long long)lost.likeliest);
      for (float x : lost.logits) CHECK(!std::isfinite(x), "%s: %g", set, x);
    }
  }
  model.embedding.swap_first(id, &bits);
}

double distance(const std::vector<float>& a, const std::vector<float>& b) {  // relative, by length
  double apart = 0, length = 1e-20;
  for (size_t i = 0; i < a.size(); ++i) {
    apart += (a[i] - b[i]) * (a[i] - b[i]);
    length += b[i] * b[i];
  }
  return std::sqrt(apart / length);
}

// Products alone and in a batch, and against the unpacked weight.
void products(Random& r, const VesicleProjection& w, int64_t threads) {
  const int64_t n = r.chance(0.1) ? r.between(100, 140) : r.between(1, 20);
  const auto x = floats(r, n * w.n_in, -2, 2);
  std::vector<int32_t> counts, bits, read(n), one(1);
  const int32_t each[] = {16, 8, 4, 3, 2};
  for (int64_t t = 0; t < n; ++t) {
    const bool rests = !t || r.chance(0.3);
    counts.push_back(static_cast<int32_t>(rests ? w.n_in : r.between(1, w.n_in)));
    bits.push_back(rests ? 16 : each[r.between(0, 4)]);
  }
  std::vector<float> y(n * w.n_out, NAN), alone(w.n_out, NAN);
  vesicle_multiply(&w, x.data(), counts.data(), bits.data(), n, y.data(), read.data(), threads);
  for (int64_t t = 0; t < n; ++t) {
    vesicle_multiply(&w, x.data() + t * w.n_in, &counts[t], &bits[t], 1, alone.data(), one.data(), threads);
    CHECK(read[t] == counts[t] && one[0] == counts[t], "%d, %d of %d channels", read[t], one[0], counts[t]);
    CHECK(!std::memcmp(alone.data(), y.data() + t * w.n_out, w.n_out * sizeof(float)), "token %lld", (long long)t);
  }
  const std::vector<float> plain = unpacked(w);
  std::vector<float> expected(w.n_out, 0);
  if (w.bias) expected.assign(w.bias, w.bias + w.n_out);
  double error = 0, size = 1e-20;  // against the products' size, not that of sums in which they may cancel
  for (int64_t i = 0; i < w.n_in; ++i)
    for (int64_t o = 0; o < w.n_out; ++o) {
      const float product = x[i] * plain[i * w.n_out + o];
      expected[o] += product;
      size += product * product;
    }
  for (int64_t o = 0; o < w.n_out; ++o) error += (y[o] - expected[o]) * (y[o] - expected[o]);
  const double apart = std::sqrt(error / size);
  CHECK(apart < 0.02, "%lld x %lld: %g", (long long)w.n_in, (long long)w.n_out, apart);
}

void heads(Random& r, const VesicleProjection& w, int64_t threads) {
  const int64_t n = r.chance(0.1) ? r.between(100, 140) : r.between(1, 20);
  const auto x = floats(r, n * w.n_in, -2, 2);
  std::vector<float> y(n * w.n_out, NAN), alone(w.n_out, NAN);
  const int32_t bits = r.chance(0.5) ? 16 : 4;
  vesicle_head(&w, x.data(), n, bits, y.data(), threads);
  for (int64_t t = 0; t < n; ++t) {
    vesicle_head(&w, x.data() + t * w.n_in, 1, bits, alone.data(), threads);
    CHECK(!std::memcmp(alone.data(), y.data() + t * w.n_out, w.n_out * sizeof(float)), "token %lld", (long long)t);
  }
}

// Tokens that share the reading of blocks, some of which only some of them read, get what each gets alone.
void readers(const char* set, int64_t tokens, int64_t ratio) {
  const vesicle::Kernels* k = vesicle::kernels_for(set);
  constexpr int64_t kSize = 23, kBlocks = 9, kKvHeads = 2;
  Random r(seed);
  for (int32_t format : {vesicle::kF32, vesicle::kF16, vesicle::kBf16, vesicle::kI8}) {
    const int64_t bytes = format == vesicle::kF32 ? 4 : format == vesicle::kI8 ? 1 : 2, page = kBlock * kSize;
    std::vector<char> pages(2 * kBlocks * kKvHeads * page * bytes);
    std::vector<uint16_t> scales(2 * kBlocks * kKvHeads * kBlock);
    const vesicle::KvView kv{pages.data(),  pages.data() + kBlocks * kKvHeads * page * bytes,  page,
                             scales.data(), scales.data() + kBlocks * kKvHeads * kBlock, kSize};
    for (int64_t i = 0; i < kBlocks * kKvHeads * kBlock; ++i)
      k->store(&kv, format, i / kBlock, i % kBlock, floats(r, kSize, -1, 1).data(), floats(r, kSize, -1, 1).data());
    const std::vector<float> query = floats(r, tokens * kKvHeads * ratio * kSize, -3, 3);
    const int64_t rows = tokens * ratio;
    std::vector<const float*> queries(tokens);
    std::vector<int64_t> tails(tokens);
    for (auto& tail : tails) tail = r.between(1, kBlock);
    for (int64_t g = 0; g < kKvHeads; ++g) {
      // Each head has blocks of its own, as many as it likes.
      std::vector<std::vector<int32_t>> lists(tokens);
      std::vector<int32_t> blocks;
      std::vector<uint16_t> readers;
      for (int64_t left = r.between(1, kBlocks); left; --left) {
        const int32_t block = static_cast<int32_t>((left - 1) * kKvHeads + g);
        uint16_t these = 0;
        for (int64_t t = 0; t < tokens; ++t)
          if (left == 1 || r.chance(0.4)) these |= 1 << t, lists[t].push_back(block);
        if (!these) continue;
        blocks.push_back(block);
        readers.push_back(these);
      }
      // Results lie apart, with something else between that stays.
      constexpr int64_t kStep = kSize + 5;
      std::vector<float> parts(rows * kStep, 77), room(kBlock * rows);
      std::vector<float*> part(tokens);
      std::vector<vesicle::Row> row(rows);
      for (int64_t t = 0; t < tokens; ++t) {
        queries[t] = query.data() + (t * kKvHeads + g) * ratio * kSize;
        part[t] = &parts[t * ratio * kStep];
      }
      const vesicle::Shared shared{queries.data(), part.data(), kStep, tokens, ratio, blocks.data(),
                                   static_cast<int64_t>(blocks.size()), readers.data(), tails.data(),
                                   nullptr, 0};
      k->attend_shared(&kv, format, &shared, 0.2f, room.data(), row.data());
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t n = static_cast<int64_t>(lists[t].size());
        std::vector<float> alone(ratio * kSize), top(ratio), total(ratio), its_room(kBlock * ratio);
        const int32_t* list = lists[t].data();
        const int64_t read = k->attend(&kv, format, 1, queries[t], ratio, 0.2f, &list, n, n, 0, tails[t],
                                       alone.data(), top.data(), total.data(), its_room.data());
        CHECK(read == (n - 1) * kBlock + tails[t], "%s, format %d: %lld", set, format, (long long)read);
        for (int64_t i = 0; i < ratio; ++i) {
          const float* p = part[t] + i * kStep;
          CHECK(!std::memcmp(&alone[i * kSize], p, kSize * sizeof(float)) && p[kSize] == top[i] &&
                    p[kSize + 1] == total[i] && p[kSize + 2] == 77,
                "%s, format %d, token %lld of %lld, head %lld of KV head %lld", set, format, (long long)t,
                (long long)tokens, (long long)i, (long long)g);
        }
      }
    }
  }
}

// What is not a number comes out of every kernel that it goes into.
void damage(const char* set) {
  const vesicle::Kernels* k = vesicle::kernels_for(set);
  constexpr int64_t kSize = 23, kPositions = 29, kHeads = 5, kTokens = 3;
  Random r(seed);
  const std::vector<float> query = floats(r, kTokens * kHeads * kSize, -1, 1);
  for (const float bad : {NAN, -NAN, INFINITY}) {
    for (int32_t format : {vesicle::kF32, vesicle::kF16, vesicle::kBf16, vesicle::kI8}) {
      for (const bool in_key : {true, false}) {
        const int64_t bytes = format == vesicle::kF32 ? 4 : format == vesicle::kI8 ? 1 : 2;
        std::vector<char> pages(2 * 2 * kBlock * kSize * bytes);
        std::vector<uint16_t> scales(4 * kBlock);
        const vesicle::KvView kv{pages.data(),  pages.data() + kBlock * kSize * bytes, 2 * kBlock * kSize,
                                 scales.data(), scales.data() + 2 * kBlock,            kSize};
        for (int64_t i = 0; i < kPositions; ++i) {
          std::vector<float> key = floats(r, kSize, -1, 1), value = floats(r, kSize, -1, 1);
          if (i == 7) (in_key ? key : value)[kSize - 1] = bad;
          k->store(&kv, format, i / kBlock, i % kBlock, key.data(), value.data());
        }
        const int32_t list[] = {0, 1};
        constexpr int64_t kRows = kTokens * kHeads;
        std::vector<float> out(kRows * kSize), top(kRows), total(kRows), room(32 * (kSize + kRows));
        // An infinite key gives scores of either infinity; an infinite one spoils the value that it is in.
        const auto check = [&](int64_t row, bool sees, const char* how) {
          const float last = out[row * kSize + kSize - 1] / total[row];
          const bool below = query[row * kSize + kSize - 1] < 0;
          const bool nothing = in_key && std::isinf(bad) && format != vesicle::kI8 && below;
          CHECK((sees && nothing) || std::isfinite(last) != sees, "%s, format %d, %g in a %s, %s, row %lld", set,
                format, bad, in_key ? "key" : "value", how, (long long)row);
        };
        const int32_t* both = list;
        k->attend(&kv, format, 1, query.data(), kHeads, 0.2f, &both, 2, 2, 0, kPositions - kBlock, out.data(),
                  top.data(), total.data(), room.data());
        for (int64_t h = 0; h < kHeads; ++h) check(h, true, "alone");
        // Tokens of one block do not see the positions after theirs.
        const int64_t tails[kTokens] = {7, 8, kBlock}, later[kTokens] = {1, kPositions - kBlock, 3};
        for (const int64_t blocks : {1, 2}) {
          const float* queries[kTokens];
          float* parts[kTokens];
          std::vector<float> results(kRows * (kSize + 2));
          for (int64_t t = 0; t < kTokens; ++t) {
            queries[t] = query.data() + t * kHeads * kSize;
            parts[t] = &results[t * kHeads * (kSize + 2)];
          }
          const vesicle::Shared shared{queries, parts, kSize + 2, kTokens, kHeads, list, blocks, nullptr,
                                       blocks == 1 ? tails : later, nullptr, 0};
          std::vector<vesicle::Row> row(kRows);
          k->attend_shared(&kv, format, &shared, 0.2f, room.data(), row.data());
          for (int64_t i = 0; i < kRows; ++i) {
            const float* p = &results[i * (kSize + 2)];
            std::copy(p, p + kSize, &out[i * kSize]);
            total[i] = p[kSize + 1];
            check(i, blocks == 2 || i >= kHeads, "together");
          }
        }
        if (!in_key) continue;
        for (int64_t vectors : {1, 2}) {
          std::vector<float> group(vectors * kSize * kBlock), scores(kHeads * kBlock), mass(kBlock), scratch(kBlock);
          k->summarise(&kv, format, 0, vectors, group.data(), 3);
          const int32_t held = format == vesicle::kI8 ? static_cast<int32_t>(vesicle::kF16) : format;
          k->estimate(group.data(), held, 0, 1, vectors, query.data(), kHeads, kSize, scores.data(), kBlock);
          for (int64_t h = 0; h < kHeads; ++h)
            k->add_softmax(scores.data() + h * kBlock, 8, 0.2f, mass.data(), scratch.data());
          uint32_t chosen, keys[64];
          k->choose(mass.data(), 8, 1, &chosen, keys);
          CHECK(chosen == 8, "%s, format %d, %g in a block of keys: %u is chosen", set, format, bad, chosen);
        }
      }
    }
    for (int64_t place : {0, 31, 36}) {
      std::vector<float> x = floats(r, 64, -1, 1), up = floats(r, 64, -1, 1);
      x[place] = bad;
      const uint32_t all[] = {0xffffffffu, 0x1f};
      // Beside another token, whose numbers are its own.
      std::vector<int8_t> codes(2 * 64, 77);
      std::vector<uint8_t> rows(2 * 64, 77), quads(4, 77);
      std::vector<float> scales(4, 77), sums(4, 77);
      vesicle::Quantized q{codes.data() + 32, rows.data() + 32, &quads[1], &scales[1], &sums[1], 2, false};
      k->quantize(x.data(), 37, all, &q);
      const int64_t g = place / 32;
      CHECK(std::isnan(q.scale(g)) && std::isnan(q.sum(g)), "%s, %g", set, bad);
      CHECK(std::isfinite(q.scale(1 - g)), "%s, %g", set, bad);
      for (int64_t i : {0, 2}) {
        CHECK(quads[i] == 77 && scales[i] == 77 && sums[i] == 77, "%s, group %lld", set, (long long)i / 2);
        for (int64_t j = 0; j < 32; ++j)
          CHECK(codes[32 * i + j] == 77 && rows[32 * i + j] == 77, "%s, group %lld", set, (long long)i / 2);
      }
      CHECK(std::isnan(k->largest(x.data(), 37)), "%s, %g", set, bad);
      const auto spoils = [&](const char* what, std::vector<float> y) {
        CHECK(!std::isfinite(y[place]), "%s, %g, %s", set, bad, what);
      };
      for (const int64_t kind : {kSilu, kGelu, kGeluTanh, kRelu})
        for (const bool gated : {true, false}) {
          std::vector<float> y = x;
          k->activate(kind, y.data(), gated ? up.data() : nullptr, 37);
          spoils("activation", y);
        }
      std::vector<float> y(37);
      k->normalise(x.data(), up.data(), 1e-5f, 37, y.data());
      spoils("RMSNorm", y);
      k->standardise(x.data(), up.data(), nullptr, 1e-5f, 37, y.data());
      spoils("LayerNorm", y);
      // Products with every channel, of tokens that share the reading: the others' stay numbers.
      constexpr int64_t kOut = 41, kSharing = 6;
      const std::vector<float> w = floats(r, 37 * kOut, -1, 1);
      std::vector<uint16_t> w16;
      for (const float number : w) w16.push_back(bf16(number));
      std::vector<int32_t> every;
      for (int32_t i = 0; i < 37; ++i) every.push_back(i);
      for (int64_t t = 0; t < kSharing; ++t) {
        const float* from[kSharing];
        float* to[kSharing];
        std::vector<float> out(kSharing * kOut);
        for (int64_t i = 0; i < kSharing; ++i) {
          from[i] = i == t ? x.data() : up.data();
          to[i] = &out[i * kOut];
        }
        for (const bool wide : {true, false}) {
          std::fill(out.begin(), out.end(), 0.0f);
          if (wide) k->strips_f32(from, kSharing, every.data(), 37, w.data(), kOut, to, kOut);
          else k->strips_bf16(from, kSharing, every.data(), 37, w16.data(), kOut, to, kOut);
          for (int64_t i = 0; i < kSharing * kOut; ++i)
            CHECK(std::isfinite(out[i]) == (i / kOut != t), "%s, %g, token %lld of strips", set, bad,
                  (long long)i / kOut);
        }
      }
    }
  }
}

// Where texts begin: some blocks in; where another group of 16 blocks begins; or where there is little before them.
std::vector<Extent> extents(Random& r) {
  std::vector<Extent> out;
  const int64_t n = r.between(1, seed % 5 ? 3 : 16);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t longest = n == 1 ? vesicle::kMaxTokens : n < 4 ? 60 : 8;
    Extent e{0, r.between(1, r.chance(0.3) ? longest : std::min<int64_t>(longest, 20))};
    e.position = r.chance(0.3)   ? r.between(0, 20)
                 : r.chance(0.2) ? 16 * kBlock * r.between(1, 2) - r.between(0, e.n)
                                 : r.between(0, 200);
    out.push_back(e);
  }
  return out;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t models = argc > 1 ? std::atoll(argv[1]) : 40, first = argc > 2 ? std::atoll(argv[2]) : 0;
  std::vector<std::string> sets;
  for (const char* name : {"generic", "neon", "avx2", "avx512"}) {
    bool wanted = argc <= 3;
    for (int i = 3; i < argc; ++i) wanted = wanted || !std::strcmp(argv[i], name);
    if (wanted && vesicle_instructions(name)) sets.push_back(name);
  }
  if (sets.empty()) {
    std::printf("this processor or build has no such instructions\n");
    return 1;
  }
  for (const std::string& set : sets) damage(set.c_str());
  int64_t compared = 0, apart = 0, run = 0;
  for (seed = first; seed < first + models; ++seed) {
    Random r(seed);
    const std::vector<Extent> texts = extents(r);
    Model model(r, texts);
    std::vector<int32_t> free;
    for (int64_t i = 0; i < model.blocks; ++i) free.push_back(static_cast<int32_t>(i));
    for (size_t i = free.size() - 1; i > 0; --i) std::swap(free[i], free[r.between(0, i)]);
    std::vector<Sequence> sequences;
    for (const Extent& text : texts) {
      sequences.emplace_back(r, model, text, free);
      for (int64_t l = 0; l < model.view.n_layers; ++l) checked.uneven += sequences.back().uneven(l);
      run += text.n * static_cast<int64_t>(sets.size());
    }
    // More threads than processors wait for each other most of the time.
    const int64_t threads = r.between(1, r.chance(0.5) ? 4 : 2);
    std::vector<std::vector<float>> standard;
    for (const std::string& name : sets) {
      const char* set = name.c_str();
      CHECK(vesicle_instructions(set), "%s", set);
      Random same(seed);  // every set of instructions does the same
      Reading whole = read(same, model, sequences, at_once(sequences, kAllLogits), threads);
      compare(whole, whole, "at once", set, threads);
      check_received(model, sequences, whole);
      const Reading single = read(same, model, sequences, one_by_one(sequences, threads > 2 ? 5 : 12), threads);
      compare(single, whole, "token by token", set, threads);
      for (size_t who = 0; who < sequences.size(); ++who)
        for (int64_t t = 0; t < sequences[who].n; ++t) {
          const Said& from = single.said[who][t];
          Said& to = whole.said[who][t];
          to.ranked = from.ranked;
          to.likeliest = from.likeliest;
          to.head = from.head;
          if (to.halves.empty()) to.halves = from.halves;
        }
      check_heads(model.view, sequences, whole);
      readers(set, same.between(1, kBlock), same.between(1, 4));
      compare(read(same, model, sequences, in_pieces(same, sequences), threads), whole, "in pieces", set, threads);
      if (same.chance(0.3)) damaged_text(same, model, sequences, whole, set, threads);
      for (size_t who = 0; who < sequences.size(); ++who) {
        // Of the first token: later ones read keys that may have been rounded otherwise.
        const std::vector<float>& logits = whole.said[who][0].logits;
        if (name == sets[0]) standard.push_back(logits);
        ++compared;
        // A rounding, a choice of channels or a decision may fall the other way, though seldom.
        apart += distance(logits, standard[who]) > 1e-4;
      }
      if (model.view.layers[0].ffn_in.format >= kPacked4) {
        products(same, model.view.layers[0].ffn_in, threads);
        products(same, model.view.layers[0].attention_out, threads);
        heads(same, model.view.head, threads);
      }
    }
  }
  std::printf("%lld tokens", (long long)run);
  for (const std::string& set : sets) std::printf(" %s", set.c_str());
  std::printf(": %lld of %lld apart from %s\n", (long long)apart, (long long)compared, sets[0].c_str());
  std::printf("%lld uneven layers; checked slowly: %lld slots, %lld outputs, %lld tokens some of whose heads choose\n",
              (long long)checked.uneven, (long long)checked.received, (long long)checked.outputs,
              (long long)checked.mixed);
  if (models >= 100 && !(checked.uneven && checked.received && checked.outputs && checked.mixed)) {
    std::printf("too little was checked\n");
    return 1;
  }
  if (apart * 10 > compared) {
    std::printf("instruction sets disagree\n");
    return 1;
  }
  return 0;
}
