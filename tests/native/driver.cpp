// Drives the decode core without Python: random tiny models, sequences and Plans.
//
// What is not a number must come out of the kernels that it went into. A token's results must be finite and depend on
// its own sequence alone: the same bits come out whether it runs by itself, in a batch, or in a batch of other company,
// for any number of threads (the same number each time). Every instruction set of this processor is run and compared
// with the first one. Meant for sanitizers, which want neither Python nor PyTorch around them, and for processors that
// are only emulated.
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

#include "kernels.h"
#include "step.h"

extern "C" {
const char* vesicle_instructions(const char* name);
void vesicle_step(const VesicleModel* model, VesicleToken* tokens, int64_t n, int64_t threads);
void vesicle_summarise(const VesicleModel* model, const VesicleToken* token, int64_t threads);
void vesicle_multiply(const VesicleProjection* w, const float* x, const int32_t* counts, const int32_t* bits,
                      int64_t tokens, float* y, int32_t* rows_read, int64_t threads);
void vesicle_head(const VesicleProjection* w, const float* x, int64_t tokens, int32_t bits, float* y, int64_t threads);
void vesicle_unpack(const VesicleProjection* w, int32_t bits, void* out, int64_t stride, int32_t bf16,
                    int64_t threads);
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
  std::vector<uint8_t> high, rest;

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

  void fill_planes(Random& r, int64_t high_bytes, int64_t rest_bytes) {
    high.resize(high_bytes);
    for (uint8_t& x : high) x = static_cast<uint8_t>(r.next());
    view.data = high.data();
    if (view.format != kPacked8) return;
    rest.resize(rest_bytes);
    for (uint8_t& x : rest) x = static_cast<uint8_t>(r.next());
    view.rest = rest.data();
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
};

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
  std::vector<float> attention_gain, ffn_gain, query_gain, key_gain;
};

struct StandInStorage {
  std::vector<float> down, up, bias;
  VesicleStandIn view;
  void fill(Random& r, int64_t layers, int64_t width) {
    const int64_t rank = r.between(1, 9);
    down = floats(r, layers * rank * width, -0.3f, 0.3f);
    up = floats(r, layers * width * rank, -0.3f, 0.3f);
    bias = floats(r, layers * width, -0.3f, 0.3f);
    view = VesicleStandIn{down.data(), up.data(), bias.data(), rank};
  }
};

struct Model {
  VesicleModel view{};
  std::vector<LayerStorage> storage;
  std::vector<VesicleLayer> layers;
  std::vector<float> final_gain;
  Weight embedding, head;
  StandInStorage ffn_standin, attention_standin;
  std::vector<char> pages;  // (blocks, KV heads, keys then values)
  std::vector<uint16_t> key_scales, value_scales;
  int64_t blocks;

  Model(Random& r, int64_t n_blocks) : blocks(n_blocks) {
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
    const int64_t format = r.between(0, 3), q = m.heads * m.size, kv = m.kv_heads * m.size;
    const bool bias = r.chance(0.3), norms = r.chance(0.3);
    storage.resize(m.n_layers);
    layers.resize(m.n_layers);
    for (int64_t l = 0; l < m.n_layers; ++l) {
      LayerStorage& s = storage[l];
      s.value_key.projection(r, m.width, 2 * kv, format, bias);
      s.query.projection(r, m.width, q, format, bias);
      s.attention_out.projection(r, q, m.width, format, bias);
      s.ffn_in.projection(r, m.width, 2 * m.ffn_width, format, bias);
      s.ffn_out.projection(r, m.ffn_width, m.width, format, bias);
      s.attention_gain = floats(r, m.width, 0.5f, 1.5f);
      s.ffn_gain = floats(r, m.width, 0.5f, 1.5f);
      s.query_gain = floats(r, m.size, 0.5f, 1.5f);
      s.key_gain = floats(r, m.size, 0.5f, 1.5f);
      layers[l] = VesicleLayer{s.value_key.view, s.query.view,           s.attention_out.view,
                               s.ffn_in.view,    s.ffn_out.view,         s.attention_gain.data(),
                               s.ffn_gain.data(), norms ? s.query_gain.data() : nullptr,
                               norms ? s.key_gain.data() : nullptr, r.chance(0.8)};
    }
    m.layers = layers.data();
    final_gain = floats(r, m.width, 0.5f, 1.5f);
    m.final_gain = final_gain.data();
    embedding.head(r, m.width, m.vocabulary, r.between(0, 3), false);
    head.head(r, m.width, m.vocabulary, format < kPacked4 ? format : r.between(kPacked4, kPacked8), r.chance(0.3));
    m.embedding = embedding.view;
    m.head = head.view;
    ffn_standin.fill(r, m.n_layers, m.width);
    attention_standin.fill(r, m.n_layers, m.width);
    m.kv_format = r.between(0, 3);
    m.summary_format = m.kv_format == vesicle::kI8 ? static_cast<int64_t>(vesicle::kF16) : m.kv_format;
    pages = stored(r, blocks * 2 * kv * kBlock, m.kv_format);
    if (m.kv_format == vesicle::kI8)
      for (int64_t i = 0; i < blocks * m.kv_heads * kBlock; ++i) {
        key_scales.push_back(half(r.uniform(0.005f, 0.01f)));
        value_scales.push_back(half(r.uniform(0.005f, 0.01f)));
      }
    m.page_stride = 2 * m.size * kBlock;
    m.keys = pages.data();
    m.values = pages.data() + pages.size() / (blocks * m.kv_heads * 2);
    m.key_scales = key_scales.empty() ? nullptr : key_scales.data();
    m.value_scales = value_scales.empty() ? nullptr : value_scales.data();
  }
};

struct ModulatorStorage {
  std::vector<float> weight, offset, log_slope, place_weight;
  std::vector<VesicleRule> rules;
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
    v.pressure = r.uniform(-1, 1);
    const int32_t columns[] = {0, 1, 2};
    std::copy(columns, columns + 3, v.columns);
    const int64_t widths[4] = {m.width, m.heads * m.size, m.width, m.ffn_width};
    const double floor = r.uniform(0.05f, 0.5f), bypass = r.uniform(0, 0.2f);
    for (int32_t site = 0; site < 4; ++site) {
      share(number(offsetof(VesiclePlanRow, channels)) + site, 0, site < 2, widths[site], r.uniform(0.1f, 1.2f), floor, 0);
      ladder(number(offsetof(VesiclePlanRow, bits)) + site, 0, site < 2, {{1.0, 16}, {0.7, 16}, {0.5, 4}}, 2);
    }
    ladder(number(offsetof(VesiclePlanRow, ffn)), 1, false, {{r.uniform(0.2f, 0.5f), 2}, {bypass, 1}}, 0);
    ladder(number(offsetof(VesiclePlanRow, attention)), 1, true, {{r.uniform(0, 0.5f), 1}}, 0);
    share(number(offsetof(VesiclePlanRow, kv_blocks)), 2, true, 0, 1, 0, r.between(2, 4));
    const int64_t survivors = r.chance(0.5) ? r.between(1, m.vocabulary) : 0;
    ladder(number(offsetof(VesiclePlanRow, head)), 0, false, {{r.uniform(0.2f, 1), 0}}, static_cast<int32_t>(survivors));
    rules.back().last = 1;
    v.rules = rules.data();
    v.n_rules = rules.size();
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

// One sequence: its lists of blocks, of which each layer may have lost some, and what its next token does.
struct Sequence {
  int64_t id, position, room, vectors, room_summaries, wants, acting;
  std::vector<int32_t> tables, starts, held;
  std::vector<std::vector<char>> summaries;
  std::vector<void*> summary_pointers;
  std::vector<float> cosine, sine;
  std::vector<ModulatorStorage> modulator;  // none or one
  bool ffn_standin, attention_standin;
  std::vector<VesiclePlanRow> plan;

  Sequence(Random& r, Model& model, int64_t* free_block) {
    const VesicleModel& m = model.view;
    const int64_t L = m.n_layers, widths[4] = {m.width, m.heads * m.size, m.width, m.ffn_width};
    id = r.between(0, m.vocabulary - 1);
    position = r.chance(0.3) ? r.between(0, 20) : r.between(0, 200);
    wants = r.between(0, 2);
    acting = r.between(0, 31);
    const int64_t visible = position / kBlock + 1;
    room = visible + r.between(0, 3);
    vectors = r.between(1, 2);
    room_summaries = padded(visible + r.between(0, 3), 16);
    tables.assign(L * room, 0);
    starts.assign(L * room, 0);
    for (int64_t l = 0; l < L; ++l) {
      const bool evicts = r.chance(0.4);
      int32_t n = 0;
      for (int64_t b = 0; b < visible; ++b) {
        if (b + 1 < visible && evicts && r.chance(0.3)) continue;
        tables[l * room + n] = static_cast<int32_t>((*free_block)++);
        starts[l * room + n++] = static_cast<int32_t>(b * kBlock);
      }
      held.push_back(n);
      // (KV heads, room / 16, vectors, size, 16): nothing is known of the own block and of what is to come.
      summaries.push_back(stored(r, m.kv_heads * room_summaries * vectors * m.size, m.summary_format));
      const int64_t group = vectors * m.size * 16;
      for (int64_t g = 0; g < m.kv_heads; ++g)
        for (int64_t b = n - 1; b < room_summaries; ++b)
          for (int64_t i = 0; i < vectors * m.size; ++i)
            poison(summaries.back(), (g * room_summaries / 16 + b / 16) * group + i * 16 + b % 16, m.summary_format);
      // Nor have later positions of the own block been written.
      for (int64_t g = 0; g < m.kv_heads; ++g)
        for (int64_t slot = position % kBlock + 1; slot < kBlock; ++slot) {
          const int64_t head = tables[l * room + n - 1] * m.kv_heads + g;
          for (int64_t d = 0; d < m.size; ++d) {
            poison(model.pages, head * m.page_stride + d * kBlock + slot, m.kv_format);
            poison(model.pages, head * m.page_stride + m.size * kBlock + slot * m.size + d, m.kv_format);
          }
          if (m.kv_format == vesicle::kI8) model.key_scales[head * kBlock + slot] = 0x7e00;
          if (m.kv_format == vesicle::kI8) model.value_scales[head * kBlock + slot] = 0x7e00;
        }
    }
    for (auto& s : summaries) summary_pointers.push_back(s.data());
    for (int64_t i = 0; i < m.size; ++i) {
      const float angle = r.uniform(-3, 3);
      cosine.push_back(i < m.size / 2 ? std::cos(angle) : cosine[i - m.size / 2]);
      sine.push_back(i < m.size / 2 ? -std::sin(angle) : -sine[i - m.size / 2]);
    }
    ffn_standin = r.chance(0.5);
    attention_standin = r.chance(0.5);
    if (r.chance(0.4)) modulator.emplace_back(r, m);
    const int32_t each[] = {16, 8, 4, 3, 2};
    const int32_t same = r.chance(0.5) ? 16 : 0;
    for (int64_t l = 0; l < L; ++l) {
      VesiclePlanRow row{};
      for (int64_t site = 0; site < 4; ++site) {
        const int64_t width = widths[site];
        row.channels[site] = static_cast<int32_t>(r.chance(0.3) ? width : r.chance(0.1) ? 1 : r.between(1, width));
        row.bits[site] = same ? same : each[r.between(0, 4)];
      }
      row.ffn = static_cast<int32_t>(r.chance(0.6) ? 2 : r.between(0, 1));
      row.attention = r.chance(0.8);
      row.kv_blocks = static_cast<int32_t>(
          r.chance(0.4) ? visible : r.between(std::min<int64_t>(2, visible), visible));
      plan.push_back(row);
    }
    plan.back().head = static_cast<int32_t>(r.chance(0.5) ? 0 : r.between(1, m.vocabulary));
  }
};

// All that the core says about a token.
struct Result {
  std::vector<float> hidden, logits;
  std::vector<VesiclePlanRow> plan;
  int64_t likeliest = -1;
  std::vector<double> levels;
  std::vector<int64_t> counts;  // rows, outputs, visited, compared, standin
  std::vector<char> pages;      // the own blocks and all summaries

  // What is not the same bit for bit; empty if all is.
  std::string unlike(const Result& other) const {
    std::string names;
    const auto compare = [&names](const char* name, const auto& a, const auto& b) {
      if (a.size() != b.size() || (!a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof a[0])))
        names = names + " " + name;
    };
    compare("hidden", hidden, other.hidden);
    compare("logits", logits, other.logits);
    compare("plan", plan, other.plan);
    if (likeliest != other.likeliest) names += " likeliest";
    compare("levels", levels, other.levels);
    compare("counts", counts, other.counts);
    compare("pages", pages, other.pages);
    return names;
  }
};

// Runs one step of the sequences `who`, from pages as they were at the start.
std::vector<Result> step(Model& model, std::vector<Sequence>& sequences, const std::vector<int64_t>& who,
                         int64_t threads) {
  const VesicleModel& m = model.view;
  const int64_t L = m.n_layers, n = who.size();
  const auto pages = model.pages;
  const auto key_scales = model.key_scales, value_scales = model.value_scales;
  std::vector<std::vector<std::vector<char>>> summaries;
  std::vector<Result> results(n);
  std::vector<VesicleToken> tokens(n);
  for (int64_t i = 0; i < n; ++i) {
    Sequence& s = sequences[who[i]];
    Result& r = results[i];
    r.plan = s.plan;
    r.hidden.assign(m.width, NAN);
    if (s.wants == 1) r.logits.assign(m.vocabulary, NAN);
    r.levels.assign(L * kLevels, 1.0);
    r.counts.assign(L * 10 + 1, 0);
    int64_t* counts = r.counts.data();
    VesicleToken& t = tokens[i];
    t = VesicleToken{};
    t.id = s.id;
    t.position = s.position;
    t.room = s.room;
    t.vectors = s.vectors;
    t.room_summaries = s.room_summaries;
    t.place = std::log2((s.position + 1) / 16.0) / 8;
    t.hidden = r.hidden.data();
    t.cosine = s.cosine.data();
    t.sine = s.sine.data();
    t.tables = s.tables.data();
    t.starts = s.starts.data();
    t.held = s.held.data();
    t.summaries = s.summary_pointers.data();
    summaries.push_back(s.summaries);
    t.modulator = s.modulator.empty() ? nullptr : &s.modulator[0].view;
    t.ffn_standin = s.ffn_standin ? &model.ffn_standin.view : nullptr;
    t.attention_standin = s.attention_standin ? &model.attention_standin.view : nullptr;
    t.plan = r.plan.data();
    t.levels = r.levels.data();
    t.rows = counts;
    t.outputs = counts + 4 * L;
    t.visited = counts + 8 * L;
    t.compared = counts + 9 * L;
    t.standin = counts + 10 * L;
    t.logits = r.logits.empty() ? nullptr : r.logits.data();
    t.acting = s.acting;
    t.wants = s.wants;
  }
  vesicle_step(&m, tokens.data(), n, threads);
  for (int64_t i = 0; i < n; ++i) {
    Sequence& s = sequences[who[i]];
    Result& r = results[i];
    if (s.wants == 2) {
      r.likeliest = tokens[i].token;
      CHECK(tokens[i].token >= 0 && tokens[i].token < m.vocabulary, "%lld", (long long)tokens[i].token);
    }
    std::vector<std::vector<char>> written = s.summaries;
    vesicle_summarise(&m, &tokens[i], threads);
    const int64_t page = pages.size() / model.blocks, scales = m.kv_heads * kBlock;
    for (int64_t l = 0; l < L; ++l) {
      const int64_t own = s.tables[l * s.room + s.held[l] - 1];
      for (const auto* made : {&written[l], &s.summaries[l]})
        r.pages.insert(r.pages.end(), made->begin(), made->end());
      std::copy(summaries[i][l].begin(), summaries[i][l].end(), s.summaries[l].begin());
      const char* now = model.pages.data() + own * page;
      r.pages.insert(r.pages.end(), now, now + page);
      for (const auto* pool : {&model.key_scales, &model.value_scales}) {
        if (pool->empty()) continue;
        const char* from = reinterpret_cast<const char*>(pool->data() + own * scales);
        r.pages.insert(r.pages.end(), from, from + scales * 2);
      }
    }
    for (float x : r.hidden) CHECK(std::isfinite(x), "hidden %g", x);
    for (float x : r.logits) CHECK(std::isfinite(x), "logit %g", x);
  }
  std::copy(pages.begin(), pages.end(), model.pages.begin());
  std::copy(key_scales.begin(), key_scales.end(), model.key_scales.begin());
  std::copy(value_scales.begin(), value_scales.end(), model.value_scales.begin());
  return results;
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
  const int64_t n = r.between(1, 20);
  const auto x = floats(r, n * w.n_in, -2, 2);
  std::vector<int32_t> counts, bits, read(n), one(1);
  const int32_t each[] = {16, 8, 4, 3, 2};
  for (int64_t t = 0; t < n; ++t) {
    counts.push_back(static_cast<int32_t>(t ? r.between(1, w.n_in) : w.n_in));
    bits.push_back(t ? each[r.between(0, 4)] : 16);
  }
  std::vector<float> y(n * w.n_out, NAN), alone(w.n_out, NAN);
  vesicle_multiply(&w, x.data(), counts.data(), bits.data(), n, y.data(), read.data(), threads);
  for (int64_t t = 0; t < n; ++t) {
    vesicle_multiply(&w, x.data() + t * w.n_in, &counts[t], &bits[t], 1, alone.data(), one.data(), threads);
    CHECK(read[t] == counts[t] && one[0] == counts[t], "%d, %d of %d channels", read[t], one[0], counts[t]);
    CHECK(!std::memcmp(alone.data(), y.data() + t * w.n_out, w.n_out * sizeof(float)), "token %lld", (long long)t);
  }
  std::vector<float> plain(w.n_in * w.n_out, NAN), expected(w.n_out, 0);
  vesicle_unpack(&w, 16, plain.data(), w.n_out, 0, threads);
  std::vector<uint16_t> plain16(plain.size());
  vesicle_unpack(&w, 16, plain16.data(), w.n_out, 1, threads);
  for (size_t i = 0; i < plain.size(); ++i)
    CHECK(std::abs(bf16(plain[i]) - plain16[i]) <= 1, "bf16 of %g is %x", plain[i], plain16[i]);
  if (w.bias) expected.assign(w.bias, w.bias + w.n_out);
  for (int64_t i = 0; i < w.n_in; ++i)
    for (int64_t o = 0; o < w.n_out; ++o) expected[o] += x[i] * plain[i * w.n_out + o];
  y.resize(w.n_out);
  const double apart = distance(y, expected);
  CHECK(apart < 0.03, "%lld x %lld: %g", (long long)w.n_in, (long long)w.n_out, apart);
}

void heads(Random& r, const VesicleProjection& w, int64_t threads) {
  const int64_t n = r.between(1, 20);
  const auto x = floats(r, n * w.n_in, -2, 2);
  std::vector<float> y(n * w.n_out, NAN), alone(w.n_out, NAN);
  const int32_t bits = r.chance(0.5) ? 16 : 4;
  vesicle_head(&w, x.data(), n, bits, y.data(), threads);
  for (int64_t t = 0; t < n; ++t) {
    vesicle_head(&w, x.data() + t * w.n_in, 1, bits, alone.data(), threads);
    CHECK(!std::memcmp(alone.data(), y.data() + t * w.n_out, w.n_out * sizeof(float)), "token %lld", (long long)t);
  }
}

// What is not a number comes out of every kernel that it goes into.
void damage(const char* set) {
  const vesicle::Kernels* k = vesicle::kernels_for(set);
  constexpr int64_t kSize = 23, kPositions = 29, kHeads = 5;
  Random r(seed);
  const std::vector<float> query = floats(r, kHeads * kSize, -1, 1);
  for (const float bad : {NAN, -NAN, INFINITY}) {
    for (int32_t format : {vesicle::kF32, vesicle::kF16, vesicle::kBf16, vesicle::kI8}) {
      for (const bool in_key : {true, false}) {
        const int64_t bytes = format == vesicle::kF32 ? 4 : format == vesicle::kI8 ? 1 : 2;
        std::vector<char> pages(2 * 2 * kBlock * kSize * bytes);
        std::vector<uint16_t> scales(4 * kBlock);
        const vesicle::KvView kv{pages.data(),  pages.data() + kBlock * kSize * bytes, 2 * kBlock * kSize,
                                 scales.data(), scales.data() + 2 * kBlock,            1,
                                 kSize};
        for (int64_t i = 0; i < kPositions; ++i) {
          std::vector<float> key = floats(r, kSize, -1, 1), value = floats(r, kSize, -1, 1);
          if (i == 7) (in_key ? key : value)[kSize - 1] = bad;
          k->store(&kv, format, 0, i / kBlock, i % kBlock, key.data(), value.data());
        }
        const int32_t list[] = {0, 1};
        const int32_t* const lists[] = {list};
        std::vector<float> out(kHeads * kSize), top(kHeads), total(kHeads);
        k->attend(&kv, format, query.data(), kHeads, 0.2f, lists, 2, 2, kPositions - kBlock, out.data(), top.data(),
                  total.data());
        // An infinite key gives scores of either infinity; an infinite one spoils the value that it is in.
        for (int64_t h = 0; h < kHeads; ++h) {
          const float last = out[h * kSize + kSize - 1] / total[h];
          const bool nothing = in_key && std::isinf(bad) && format != vesicle::kI8 && query[h * kSize + kSize - 1] < 0;
          CHECK(nothing || !std::isfinite(last), "%s, format %d, %g in a %s", set, format, bad, in_key ? "key" : "value");
        }
        if (!in_key) continue;
        for (int64_t vectors : {1, 2}) {
          std::vector<float> group(vectors * kSize * kBlock), scores(kHeads * kBlock), mass(kBlock), scratch(kBlock);
          k->summarise(&kv, format, 0, 0, vectors, group.data(), 3);
          const int32_t held = format == vesicle::kI8 ? static_cast<int32_t>(vesicle::kF16) : format;
          k->estimate(group.data(), held, 0, 1, vectors, query.data(), kHeads, kSize, scores.data(), kBlock);
          for (int64_t h = 0; h < kHeads; ++h) k->add_softmax(scores.data() + h * kBlock, 8, 0.2f, mass.data(), scratch.data());
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
      int8_t codes[64];
      uint8_t rows[64], quads[2];
      float group_scales[2], sums[2];
      vesicle::Quantized q{codes, rows, quads, group_scales, sums, false};
      k->quantize(x.data(), 37, all, &q);
      CHECK(std::isnan(group_scales[place / 32]) && std::isnan(sums[place / 32]), "%s, %g", set, bad);
      CHECK(std::isfinite(group_scales[1 - place / 32]), "%s, %g", set, bad);
      CHECK(std::isnan(k->largest(x.data(), 37)), "%s, %g", set, bad);
      k->silu_gate(x.data(), up.data(), 37);
      CHECK(!std::isfinite(x[place]), "%s, %g", set, bad);
    }
  }
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
    const int64_t n = r.between(1, seed % 5 ? 6 : 16);
    Model model(r, n * 3 * 14);
    std::vector<Sequence> sequences;
    int64_t free_block = 0;
    std::vector<int64_t> everyone, some;
    for (int64_t i = 0; i < n; ++i) {
      sequences.emplace_back(r, model, &free_block);
      everyone.push_back(i);
    }
    for (int64_t i = n - 1; i >= 0; --i)
      if (r.chance(0.6)) some.push_back(i);
    const int64_t threads = r.between(1, 4);
    std::vector<Result> standard;
    for (const std::string& set : sets) {
      CHECK(vesicle_instructions(set.c_str()), "%s", set.c_str());
      const std::vector<Result> together = step(model, sequences, everyone, threads);
      for (int64_t i : everyone) {
        const std::string unlike = step(model, sequences, {i}, threads)[0].unlike(together[i]);
        CHECK(unlike.empty(), "%s, %lld threads: token %lld alone and with %lld others:%s", set.c_str(),
              (long long)threads, (long long)i, (long long)n - 1, unlike.c_str());
      }
      if (!some.empty()) {
        const std::vector<Result> part = step(model, sequences, some, threads);
        for (size_t i = 0; i < some.size(); ++i) {
          const std::string unlike = part[i].unlike(together[some[i]]);
          CHECK(unlike.empty(), "%s, %lld threads: token %lld in another batch:%s", set.c_str(), (long long)threads,
                (long long)some[i], unlike.c_str());
        }
      }
      run += n;
      if (set == sets[0]) standard = together;
      for (int64_t i = 0; i < n; ++i) {
        const double d = distance(together[i].hidden, standard[i].hidden);
        ++compared;
        // A rounding, a choice of channels or a decision may fall the other way, though seldom.
        apart += d > 1e-4;
      }
      if (model.view.layers[0].ffn_in.format >= kPacked4) {
        Random same(seed);
        products(same, model.view.layers[0].ffn_in, threads);
        products(same, model.view.layers[0].attention_out, threads);
        heads(same, model.view.head, threads);
      }
    }
  }
  std::printf("%lld tokens", (long long)run);
  for (const std::string& set : sets) std::printf(" %s", set.c_str());
  std::printf(": %lld of %lld apart from %s\n", (long long)apart, (long long)compared, sets[0].c_str());
  if (apart * 10 > compared) {
    std::printf("instruction sets disagree\n");
    return 1;
  }
  return 0;
}
