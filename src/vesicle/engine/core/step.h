// What Python hands to the core; mirrored in core/__init__.py. Pointers stay valid for a call.
#pragma once

#include <cstdint>

#include "plan_row.h"

extern "C" {

enum VesicleFormat : int32_t { kDense32 = 0, kDenseBf16 = 1, kPacked4 = 2, kPacked8 = 3 };

// A weight matrix with n_in channels and n_out outputs: channel-major rows of `stride` numbers, or packed.
struct VesicleProjection {
  const void *data, *rest;
  const float* bias;
  int64_t n_in, n_out, stride;
  int64_t format;
};

struct VesicleLayer {
  VesicleProjection value_key, query, attention_out, ffn_in, ffn_out;
  const float *attention_gain, *ffn_gain, *query_gain, *key_gain;  // the last two may be null
  int64_t rotates;
};

// Low-rank maps of all layers: down (L, rank, D), up (L, D, rank), bias (L, D).
struct VesicleStandIn {
  const float *down, *up, *bias;
  int64_t rank;
};

struct VesicleModel {
  int64_t n_layers, width, heads, kv_heads, size, ffn_width, vocabulary;
  float eps, scale;
  const VesicleLayer* layers;
  const float* final_gain;
  VesicleProjection embedding, head;  // dense: (V, D) rows; packed: tiles of 16
  const char *keys, *values;
  const uint16_t *key_scales, *value_scales;
  int64_t kv_format, summary_format, page_stride;
};

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
  double pressure;
  const VesicleRule* rules;
  int64_t n_rules;
  int32_t columns[8];
};

// One token of one sequence. Arrays are by layer; the rows of the Plan come filled and are overwritten where the
// modulator decides.
struct VesicleToken {
  int64_t id, position, room, vectors, room_summaries;
  double place;
  float* hidden;  // (D) the last layer's residual stream on return
  const float *cosine, *sine;
  const int32_t *tables, *starts, *held;  // (L, room), (L, room), (L): the newest block included
  void* const* summaries;  // (L) of complete blocks (G, room_summaries / 16, vectors, K, 16), kept up to date; or null
  const VesicleModulator* modulator;      // null: nothing is released
  const VesicleStandIn *ffn_standin, *attention_standin;  // null: skipped outright
  VesiclePlanRow* plan;
  double* levels;
  int64_t *rows, *outputs, *visited, *compared, *standin;  // (L, 4), (L, 4), (L), (L), (1)
  float* logits;                                           // (V) or null
  int64_t acting;  // bit a: transmitter a acts; the others rest
  int64_t wants;   // 0 nothing of the head, 1 logits, 2 the likeliest token alone
  int64_t token;  // the likeliest, where asked for; -1 where a logit is not finite
};

}  // extern "C"
