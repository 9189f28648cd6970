// The arithmetic of the core, compiled once per instruction set and chosen at run time.
#pragma once

#include <cstdint>

namespace vesicle {

constexpr int64_t kGroup = 32;    // input channels that share a scale
constexpr int64_t kTile = 128;    // outputs side by side in a packed projection
constexpr int64_t kHeadTile = 16; // the same for the LM head
constexpr int64_t kMostDirections = 32;  // of a screen
constexpr int64_t kBlock = 16;    // positions of a KV block
constexpr int64_t kMaxTokens = 128;  // of a pass

enum KvFormat : int32_t { kF32 = 0, kF16 = 1, kBf16 = 2, kI8 = 3 };

// Activations of one token at one site, quantized per group of 32 channels; only chosen channels are listed. Those of
// `step` tokens lie side by side, group by group, as products of many tokens read them.
struct Quantized {
  int8_t* codes_;   // (groups, step, 32), the chosen channels of each group first, padded with zeros to quads
  uint8_t* rows_;   // (groups, step, 32), their rows within the group; padding repeats a chosen row
  uint8_t* quads_;  // (groups, step), quads of chosen channels
  float* scales_;   // (groups, step)
  float* sums_;     // (groups, step), scale times the sum of the codes
  int64_t step;
  bool dense;  // rows are 0..31 in every group: every channel is chosen, or the others' codes are zeros

  int8_t* codes(int64_t g) const { return codes_ + g * step * kGroup; }
  uint8_t* rows(int64_t g) const { return rows_ + g * step * kGroup; }
  uint8_t& quads(int64_t g) const { return quads_[g * step]; }
  float& scale(int64_t g) const { return scales_[g * step]; }
  float& sum(int64_t g) const { return sums_[g * step]; }
};

// How codes are read: b bits of the stored S.
struct Precision {
  int32_t mask;     // of the leading nibble
  float factor;     // the leading nibble's worth
  float offset;     // added to the code: half of what is cut off
  bool use_trailing;    // the trailing nibble is read as well
};

struct KvView {
  const char *keys, *values;  // of the pool, each block of one KV head: keys (blocks, K, 16), values (blocks, 16, K)
  int64_t stride;             // numbers from one block's to the next one's
  const uint16_t *key_scales, *value_scales;  // (blocks, 16) for int8
  int64_t size;
};

// A query head of a token, and what it has attended to so far.
struct Row {
  const float* query;
  float *out, *top, *lanes;  // values by weight, the largest score, and the total of the weights, by lane
};

// What several tokens, kBlock at most, read of the blocks of a KV head.
struct Shared {
  const float* const* query;  // of each token (ratio, size)
  float* const* parts;        // of each token (ratio) results: (size) sums, the top score, the total of the weights; of
                              // one that reads nothing the total is 0, and there are no sums
  int64_t step;               // from one result of a token to the next
  int64_t tokens, ratio;
  const int32_t* blocks;    // (n) of the pool
  int64_t n;
  const uint16_t* readers;  // (n) bit t: token t reads the block; null where all read all
  const int64_t* tails;     // positions of the last block that count for each token; null where all of it does
  const uint8_t* hidden;    // (edges, kBlock) leading positions of the first blocks that do not count for each token
  int64_t edges;
};

struct Kernels {
  const char* name;
  // Chooses the `count` largest |x| of n (ties to the lower channel) into bit masks, one word per 32 channels.
  void (*choose)(const float* x, int64_t n, int64_t count, uint32_t* masks, uint32_t* keys);
  void (*quantize)(const float* x, int64_t n, const uint32_t* masks, Quantized* out);
  // y[t][0:width] += the products of groups [first, last) of a tile of `width` outputs (128 or 64).
  void (*tile)(const uint8_t* high, const uint8_t* trailing, int64_t width, int64_t first, int64_t last,
               const Precision* precision, const Quantized* const* x, int64_t tokens, float* const* y);
  // y[t] of tiles [first, last) of the LM head.
  void (*head_tiles)(const uint8_t* high, const uint8_t* trailing, int64_t groups, int64_t first, int64_t last,
                     const Precision* precision, const Quantized* const* x, int64_t tokens, float* const* y);
  // The logit of one row of it, of all stored bits; `trailing` is null where there are four.
  float (*head_row)(const uint8_t* high, const uint8_t* trailing, int64_t groups, int64_t row, const Quantized* x);
  // What the trailing nibbles of a tile of an 8-bit head are worth beside their middle: its products (k, 16) in fp16
  // with directions (k, n_in), its norms (16), and the norms (16) of the whole rows.
  void (*head_rest)(const uint8_t* high, const uint8_t* trailing, int64_t n_in, int64_t tile, const float* directions,
                    int64_t k, uint16_t* products, float* norms, float* whole);
  // Adds to the scores y of tiles [first, last) what is known of the rest, `along` (k) being the input's products with
  // the directions. Of each tile: the largest score, and the largest with norms times `reach` added.
  void (*head_bounds)(const uint16_t* products, const float* norms, int64_t k, const float* along, float reach,
                      int64_t first, int64_t last, float* y, float* top, float* upper);
  // y[0:n] += sum over listed rows of x[row] * w[row][0:n]
  void (*rows_f32)(const float* x, const int32_t* rows, int64_t n_rows, const float* w, int64_t stride, float* y,
                   int64_t n);
  void (*rows_bf16)(const float* x, const int32_t* rows, int64_t n_rows, const uint16_t* w, int64_t stride,
                    float* y, int64_t n);
  // The same for tokens that read every channel, which share the reading; `every` lists 0 to n_in - 1.
  void (*strips_f32)(const float* const* x, int64_t tokens, const int32_t* every, int64_t n_in, const float* w,
                     int64_t stride, float* const* y, int64_t n);
  void (*strips_bf16)(const float* const* x, int64_t tokens, const int32_t* every, int64_t n_in, const uint16_t* w,
                      int64_t stride, float* const* y, int64_t n);
  void (*add)(float* y, const float* x, int64_t n);
  float (*dot)(const float* a, const float* b, int64_t n);
  float (*dot_bf16)(const float* a, const uint16_t* b, int64_t n);
  void (*normalise)(const float* x, const float* gain, float eps, int64_t n, float* y);
  // LayerNorm; `bias` may be null.
  void (*standardise)(const float* x, const float* gain, const float* bias, float eps, int64_t n, float* y);
  // x = activation(x), times `up` unless that is null; kinds as in interface.h.
  void (*activate)(int64_t kind, float* x, const float* up, int64_t n);
  // The leading `rotated` numbers of each head.
  void (*rotate)(float* x, int64_t heads, int64_t size, int64_t rotated, const float* cosine, const float* sine);
  // Unnormalised attention of the query heads of some KV heads, `ratio` to each, over n of the blocks of each.
  //   blocks (KV heads): lists of pool blocks, `listed` long, to be read next beyond n; all positions of a block
  //   count but in the n-th, where the first `tail` do, and in the first, where the first `hidden` do not.
  //   query, out (heads, size), top, total (heads), room (16, heads). Returns positions read of one KV head.
  int64_t (*attend)(const KvView* kv, int32_t format, int64_t kv_heads, const float* query, int64_t ratio, float scale,
                    const int32_t* const* blocks, int64_t n, int64_t listed, int64_t hidden, int64_t tail, float* out,
                    float* top, float* total, float* room);
  // The same of several tokens, which share the reading of blocks.
  //   room (16 tokens ratio), row (tokens ratio)
  void (*attend_shared)(const KvView* kv, int32_t format, const Shared* shared, float scale, float* room, Row* row);
  // received[0:16] += the attention probabilities of a block's positions, the first tails[t] for a token (all where
  // `tails` is null), of the query heads of one KV head, row after row. Of each row the largest score and the inverse
  // of its total are known.
  //   query (tokens, ratio, size); top, inverse (tokens, ratio); room (16 (size + tokens ratio))
  void (*receive)(const KvView* kv, int32_t format, int64_t block, const float* query, int64_t tokens,
                  int64_t ratio, float scale, const int64_t* tails, const float* top, const float* inverse,
                  float* received, float* room);
  // Writes one position's key and value (K) into a block.
  void (*store)(const KvView* kv, int32_t format, int64_t block, int64_t slot, const float* key,
                const float* value);
  // Writes the summary of a complete block's keys into a column of a group (vectors, K, 16) of summaries.
  void (*summarise)(const KvView* kv, int32_t format, int64_t block, int64_t vectors, void* out, int64_t column);
  // Estimated scores (ratio, row) of blocks in groups [first, last) of 16 for the query heads of one KV head.
  //   summaries (groups, vectors, K, 16) of `format`.
  void (*estimate)(const void* summaries, int32_t format, int64_t first, int64_t last, int64_t vectors,
                   const float* query, int64_t ratio, int64_t size, float* scores, int64_t row);
  // mass[0:n] += softmax(scale scores[0:n]); NaN where a score is NaN or infinite.
  void (*add_softmax)(const float* scores, int64_t n, float scale, float* mass, float* scratch);
  // The largest of x[0:n]; NaN where any is not finite.
  float (*largest)(const float* x, int64_t n);
};

const Kernels* kernels_generic();
const Kernels* kernels_avx2();    // null where this build has none
const Kernels* kernels_avx512();
const Kernels* kernels_neon();

// The best that this CPU runs; `name` (generic, avx2, avx512, neon) limits the choice, null for no limit.
const Kernels* kernels_for(const char* name);

}  // namespace vesicle
