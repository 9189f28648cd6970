// What Python hands to the core; mirrored in core/__init__.py. Pointers stay valid for a call.
#pragma once

#include <cstdint>

#include "plan_row.h"

extern "C" {

enum VesicleFormat : int32_t { kDense32 = 0, kDenseBf16 = 1, kPacked4 = 2, kPacked8 = 3 };

// A weight matrix with n_in channels and n_out outputs: channel-major rows of `stride` numbers, or packed.
struct VesicleProjection {
  const void *data, *trailing;  // `trailing`: the second plane of nibbles of 8-bit codes
  const float* bias;
  int64_t n_in, n_out, stride;
  int64_t format;
};

// Gain and bias of a norm; both are null where there is no norm, and the bias alone where it has none.
struct VesicleNorm {
  const float *gain, *bias;
};

struct VesicleLayer {
  VesicleProjection value_key, query, attention_out, ffn_in, ffn_out;  // of a gated FFN: the gate, then the rest
  VesicleNorm attention_norm, ffn_norm, query_norm, key_norm;          // the last two are RMSNorms of a head
  VesicleNorm attention_post_norm, ffn_post_norm;                      // of what is added to the residual stream
  int64_t rotates;  // which of the rotary phases turn queries and keys, counted from 1; 0 for none
  int64_t window;   // newest positions that a query sees, its own included; 0 for all
};

enum VesicleActivation : int64_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

// What a token takes in place of a whole module, of all layers: low-rank maps, down (L, rank, D), up (L, D, rank), bias
// (L, D); or FFNs like the model's own, with `inner` hidden units, their weights dense or packed.
struct VesicleSmall {
  const float *down, *up, *bias;
  int64_t rank;
  const VesicleProjection *in, *out;  // (L) of FFNs; null of maps
  int64_t inner;
};

// What bounds the error of scores that leave the trailing nibbles of an 8-bit head unread; see screen.py. By tile of 16
// rows, the last one padded.
struct VesicleScreen {
  const float* directions;   // (k, D) along which the head's inputs are large
  const uint16_t* products;  // (tiles, k, 16) fp16: what is left out of a row, times each direction
  const float* norms;        // (tiles, 16) of what is left out
  int64_t k;
  float slack, offset;       // of rounding, by norm of the input, and whatever the input
};

// What previews the head: directions (rank, D), and rows (V, rank) of what it makes of them; see previewed.py.
struct VesiclePreview {
  const float* down;
  VesicleProjection words;
};

struct VesicleModel {
  int64_t n_layers, width, heads, kv_heads, size, ffn_width, vocabulary;
  float eps, scale, embedding_scale;
  int64_t rms, parallel, gated, activation;  // RMSNorm or LayerNorm; attention and FFN read the same input; or not
  int64_t rotated;                           // leading numbers of a head that are rotated
  const VesicleLayer* layers;
  VesicleNorm final_norm;
  VesicleProjection embedding, head;  // dense: (V, D) rows; packed: tiles of 16
  const VesicleScreen* screen;        // null: the whole head is read
  const char *keys, *values;
  const uint16_t *key_scales, *value_scales;
  int64_t kv_format, summary_format, page_stride;
  double* seconds;  // (`kPhases`) added to by the first thread, waiting included; or null
};

// What a pass spends its time on; the decisions before each are part of it.
enum VesiclePhase : int64_t { kJointIn = 0, kAttention, kAttentionOut, kFfnIn, kFfnOut, kHeadPhase, kPhases };

// What becomes of one number of a row; see effectors/rules.py.
struct VesicleRule {
  int32_t number, transmitter, next, last;  // `next`: in the layer after; `last`: in the last layer alone
  int64_t width, least;                     // of a share; a width of 0 is the blocks that are visible
  double rate, floor;
  int64_t steps;  // of a ladder; -1 for a share
  double levels[8];
  int32_t values[8], below, unused;
};

// The linear predictor and what is made of its levels.
struct VesicleModulator {
  const float *weight, *offset, *log_slope, *place_weight;
  int64_t released;
  double logit;
  const VesicleRule* rules;
  int64_t n_rules;
  const int32_t* most;  // (L) KV blocks that a token reads at most, whatever its levels say; or null
  int32_t columns[8];
};

enum VesicleWanted : int64_t { kNothing = 0, kLogits = 1, kLikeliest = 2, kAllLogits = 3 };

// The next tokens of one sequence. Arrays are by token, then by layer, but those of the cache, which are by layer. Rows
// of the Plan come filled and are overwritten where the modulator decides.
struct VesicleChunk {
  const int32_t* ids;  // (n)
  int64_t n, position, room, vectors, room_summaries;
  int64_t nearest;   // blocks up to its own that a token reads before others that it chooses
  int64_t recorded;  // tokens before these in `acting`, in the arrays from `plan` to `coded`, and in `summed`
  const float *cosine[2], *sine[2];        // (n, rotated) of each of the rotary phases
  const int32_t *tables, *starts, *held;   // (L, G, room), (L, G, room), (L, G): the block of the last token included; of
                                           // a windowed layer from the first block on that any of the tokens sees
  void* const* summaries;  // (L) of complete blocks (G, room_summaries / 16, vectors, K, 16), kept up to date; or null
  const int32_t* spread;   // (L, G) what multiple of a row's blocks a KV head reads, of 65,536; or null
  const VesicleModulator* modulator;                      // null: nothing is released
  const int64_t* acting;                                  // (n) bit a: transmitter a acts; the others rest
  const VesicleSmall *small_ffn, *small_attention;        // null: skipped outright; the second holds maps alone
  const VesiclePreview* preview;                          // of the head; null: none
  VesiclePlanRow* plan;
  double* levels;                                          // (n, L, 5)
  // (n, L, 4), (n, L, 4), (n, L), (n, L), (n): weights of small modules, and those of them that are packed.
  int64_t *rows, *outputs, *visited, *compared, *small, *coded;
  float* received;        // (L, G, room_received) attention probability that each slot received, added to; or null
  int64_t room_received;  // slots
  int64_t* summed;        // (n, L) entries of all KV heads whose probabilities were added
  float* queries;         // (L, room_queries, heads * size) queries, unscaled, at their positions modulo room; or null
  int64_t room_queries;   // of the newest tokens; what lies there of those that skip attention, or in a windowed layer,
                          // stays
  float* hidden;   // (n, D) the residual stream after a layer's attention; or null
  float* logits;   // (V) of the last token, (n, V) of all, or null
  float* states;   // (n, D) what enters the head; or null
  const float* noise;  // (V) added to logits where the likeliest is asked for, so that it is drawn; or null
  int64_t wants;   // `VesicleWanted`
  int64_t likeliest;  // the token likeliest to follow, where asked for; -1 where a logit is not finite
  int64_t scored;     // rows of the head that were read whole to find it
  int64_t lost;       // the first token whose residual stream is not finite; -1 for none
};

// Rows of a weight that are to be packed, on a known grid: a code is `multiplier` round((w - origin) inverse), from 0 to
// `top` before it is multiplied. Numbers of groups are (n_out, groups).
struct VesicleEncoding {
  const float* weight;        // (rows, n_in) from row `first` on, a multiple of 128
  int64_t first, rows, n_in, n_out;
  const float *inverse, *origin;
  const uint16_t *scales, *lows;  // fp16, which are stored
  float top, multiplier;
  int64_t bits, head;         // of a code; whether for the LM head
  uint8_t *high, *trailing;   // of the whole weight; null: only the error is wanted
};

const char* vesicle_instructions(const char* name);
uint64_t vesicle_plan_layout();
int64_t vesicle_sizes(int64_t which);
// A pass goes through stages: attention and FFN of each layer by turns, and last the head. One call may run them all, or
// several calls some each, so that somebody else can read `hidden` between them and decide what comes next.
void* vesicle_open();
void vesicle_close(void* pass);
void vesicle_pass(void* pass, const VesicleModel* model, VesicleChunk* chunks, int64_t n, int64_t first, int64_t last,
                  int64_t threads);
// Returns the largest difference between a weight and what its code, scale and low give back.
float vesicle_encode(const VesicleEncoding* encoding, int64_t threads);
void vesicle_summarise(const VesicleModel* model, const VesicleChunk* chunk, int64_t threads);
void vesicle_multiply(const VesicleProjection* w, const float* x, const int32_t* counts, const int32_t* bits,
                      int64_t tokens, float* y, int32_t* rows_read, int64_t threads);
// Fills a screen's products and norms for some directions; returns the largest norm of a row.
float vesicle_screen(const VesicleProjection* head, const float* directions, int64_t k, uint16_t* products, float* norms,
                     int64_t threads);
void vesicle_head(const VesicleProjection* w, const float* x, int64_t tokens, int32_t bits, float* y, int64_t threads);

}  // extern "C"
