// Whole layers for the next tokens of one or several sequences, without returning to Python.
//
// A layer has five phases; between them the threads meet. What is cheap for one token (norms, decisions, choosing
// channels) every thread works out for itself; with several tokens it is shared out instead. Nothing that a Plan
// skips is computed: channels by their rows, modules and blocks whole.
//
// A token's results do not depend on the company it is in: read alone, or in a pass with others before, after or
// beside it, the same bits come out. So no kernel's order of sums may depend on the number of tokens.
#pragma once

#include <algorithm>
#include <chrono>
#include <vector>

#include "products.h"
#include "threads.h"

namespace vesicle {

constexpr int64_t kSegments = 16;
constexpr int64_t kSpreadUnit = 1 << 16, kLeastOfHead = 8;  // as in plan/spread.py

// One token of a chunk; pointers to what is reported about it.
struct Token {
  VesicleChunk* chunk;
  const VesicleModulator* modulator;  // null where none of its transmitters acts
  int64_t acting, id, position, behind;  // `behind`: blocks of later tokens of the chunk
  int64_t heads;                         // KV heads
  double place;
  const float *cosine[2], *sine[2];
  VesiclePlanRow* plan;
  double* levels;
  int64_t *rows, *outputs, *visited, *compared, *small, *coded, *summed;
  float *hidden, *logits, *states;
  float* kept;  // where its queries of the first layer are kept; or null
  int64_t wants;

  // Blocks of a KV head's list up to its own, which is the last of them.
  int64_t held(int64_t l, int64_t g) const { return chunk->held[l * heads + g] - behind; }
  // Of a windowed layer: the first block of which it sees anything; the first that any token of its own block sees, from
  // which on segments are counted; the first that it sees whole. Otherwise 0.
  int64_t first(int64_t l, int64_t window) const { return place_of(l, window, first_seen(position, window)); }
  int64_t base(int64_t l, int64_t window) const {
    return place_of(l, window, first_seen(position / kBlock * kBlock, window));
  }
  int64_t whole(int64_t l, int64_t window) const {
    return place_of(l, window, first_seen(position, window) + kBlock - 1);
  }
  // Leading positions of the first block that it does not see.
  int64_t cut(int64_t window) const { return first_seen(position, window) % kBlock; }
  // Blocks that it sees, its own included.
  int64_t seen(int64_t l, int64_t g, int64_t window) const { return held(l, g) - first(l, window); }
  // Whether its lists in a layer begin where the text does.
  bool begins(int64_t l, int64_t window) const { return !window || starts(l)[0] == 0; }
  const int32_t* table(int64_t l, int64_t g) const { return chunk->tables + (l * heads + g) * chunk->room; }
  // Its place in its own block.
  int64_t offset() const { return position % kBlock; }

  static int64_t first_seen(int64_t position, int64_t window) {
    return window ? std::max<int64_t>(0, position - window + 1) : 0;
  }

 private:
  // Of the first KV head: those of a windowed layer are alike.
  const int32_t* starts(int64_t l) const { return chunk->starts + l * heads * chunk->room; }
  int64_t place_of(int64_t l, int64_t window, int64_t at) const {
    return window ? at / kBlock - starts(l)[0] / kBlock : 0;
  }
};

// A token's state; each thread has its own copy when there is only one token.
struct Lane {
  Buffer<float> residual_, after_, normed_;
  float *residual, *after, *normed;
  Activation in;
  // Decisions for the layer at hand: attention for this layer, FFN for this layer.
  VesiclePlanRow row;
  int32_t blocks, head, words;  // blocks to be read, of those that are held; rows of the head, screened or previewed
  Activation low;               // what a preview makes of the head's input
  // For a screened head: products of its input with the screen's directions, how far what is left of the input reaches,
  // and what rounding may change.
  Buffer<float> along_;
  float *along, reach, slack;
};

struct Candidate {  // for the likeliest token
  float score;
  int32_t row;
  bool operator<(const Candidate& other) const {
    return score > other.score || (score == other.score && row < other.row);
  }
};

class Pass {
 public:
  // For stages [first, last); later ones of a pass need the same number of threads.
  void prepare(const Kernels* kernels, ThreadPool* threads, const VesicleModel* m, VesicleChunk* chunks, int64_t count,
               int64_t first, int64_t last);
  void run(int64_t thread);
  // After the last stage: tells the callers of all chunks what they asked.
  void finish();
  int64_t threads() const { return threads_; }

 private:
  const Kernels* k;
  ThreadPool* pool;
  const VesicleModel* model;
  std::vector<Token> tokens;
  int64_t n;  // tokens
  int64_t first_, last_, threads_ = 1;
  std::vector<std::unique_ptr<Lane>> lanes;
  Shelf shelf;
  Output value_key, query, attention_out, ffn_in, ffn_out;
  Buffer<float> inner_;
  float* inner;
  int64_t inner_rank;

  bool alone() const { return n == 1; }
  int64_t place(int64_t thread, int64_t t) const { return alone() ? thread : t; }
  Lane& lane(int64_t thread, int64_t t) { return *lanes[place(thread, t)]; }
  // Whether this thread writes what leaves the core about a token.
  bool reports(int64_t thread) const { return !alone() || thread == 0; }

  // Calls f(token) for the tokens that this thread prepares, and meets the others where they share.
  template <typename F>
  void each(int64_t thread, F f) {
    if (alone()) return f(0);
    for (int64_t t = thread; t < n; t += pool->threads()) f(t);
    pool->barrier();
  }

  // pass.cpp
  std::chrono::steady_clock::time_point marked_;
  void mark(int64_t thread, VesiclePhase phase);
  void attention_decision(Lane& lane, const Token& token, int64_t l);
  void release(Lane& lane, Token& token, int64_t l, bool reports);
  template <typename F>
  int64_t select(int64_t thread, F f, int64_t* which, Activation** x);
  void site(int64_t thread, const VesicleProjection& w, int s, const int64_t* which, Activation* const* x,
            int64_t count, Output* out);
  void map_down(int64_t thread, const VesicleSmall* small, int64_t l, int64_t t);
  void map_up(int64_t thread, const VesicleSmall* small, int64_t l, int64_t t, Output* out);
  const VesicleSmall* small_ffn(int64_t thread, int64_t t);
  void small_site(int64_t thread, int64_t l, bool second, Output* out);
  void residual(Output* out, const VesicleNorm& post, int64_t t, bool main, bool small, const float* from, float* to);
  void finish_ffn(int64_t thread, int64_t l, int64_t t);
  void norm(const VesicleNorm& norm, const float* x, float* y);
  void attention_half(int64_t thread, int64_t l);
  void ffn_half(int64_t thread, int64_t l);

  // pass_attention.cpp
  struct Scratch {  // of a thread
    Buffer<float> joint, mixed, choices, together;
    Buffer<uint32_t> chosen;
    Buffer<const int32_t*> tables;
    Buffer<Row> row;
    Buffer<uint16_t> readers;
    Buffer<int32_t> blocks;
    std::vector<int64_t> whole, choosing;  // tokens of a run
  };
  struct Run {  // tokens of one chunk that lie in one block
    int64_t first, last;
  };
  std::vector<Scratch> scratch;
  std::vector<Run> runs;
  Buffer<float> partial_, scored_, rotated_;
  Buffer<int32_t> lists_;
  float *partial, *scored, *rotated;
  int32_t* lists;
  int64_t blocks_row, part_size;  // room for what is said of each block of a token, and for a segment's results
  std::vector<int64_t> visits_, sums_;  // entries of all KV heads that a thread read, and added to `received`

  void prepare_attention();
  int64_t counter(int64_t thread, int64_t t, int64_t l) const { return (thread * n + t) * model->n_layers + l; }
  int64_t& visits(int64_t thread, int64_t t, int64_t l) { return visits_[counter(thread, t, l)]; }
  KvView view() const;
  char* summaries(const VesicleChunk& chunk, int64_t l, int64_t g);
  void store(int64_t thread, int64_t l, int64_t t, int64_t first, int64_t last);
  void store(int64_t thread, int64_t l, int64_t t) { store(thread, l, t, 0, model->kv_heads); }
  float* queries(int64_t thread, int64_t t);
  void rotate_queries(int64_t thread, int64_t l, int64_t t);
  int64_t wanted(int64_t thread, int64_t t, int64_t l, int64_t g);
  bool chooses(int64_t thread, int64_t t, int64_t l, int64_t g);
  bool chooses(int64_t thread, int64_t t, int64_t l);
  int64_t reads(int64_t thread, int64_t t, int64_t l, int64_t g);
  float* estimates(int64_t t) { return scored + t * model->heads * blocks_row; }
  void estimate(int64_t thread, int64_t l, int64_t t, int64_t g, int64_t first, int64_t last);
  void choose_blocks(int64_t thread, int64_t l, int64_t t);
  int32_t* chosen(int64_t thread, int64_t t, int64_t g);
  void list_chosen(int64_t thread, int64_t l);
  static int64_t segment(int64_t n);
  int64_t window(int64_t l) const { return model->layers[l].window; }
  int64_t span(int64_t t, int64_t l, int64_t g) const { return tokens[t].held(l, g) - tokens[t].base(l, window(l)); }
  int64_t segments(int64_t t, int64_t l, int64_t g);
  float* part(int64_t t, int64_t h, int64_t s);
  void attend_alone(int64_t thread, int64_t l, int64_t t, int64_t unit, int64_t first, int64_t last);
  void attend_whole(int64_t thread, int64_t l, const std::vector<int64_t>& members, int64_t unit, int64_t first,
                    int64_t last);
  void attend_chosen(int64_t thread, int64_t l, const std::vector<int64_t>& members, int64_t unit, int64_t first,
                     int64_t last);
  void attention(int64_t thread, int64_t l);
  void merge(int64_t t, int64_t l, float* out);
  void softmax(int64_t l, int64_t t, int64_t i, int64_t count, float* top, float* inverse);
  void receive_from(int64_t thread, int64_t l, const int64_t* members, int64_t count);
  void receive(int64_t thread, int64_t l);

  // pass_head.cpp
  Buffer<float> logits_;
  std::vector<int64_t> wanting;  // tokens of which something of the head is asked
  std::vector<std::vector<Candidate>> candidates;  // of (thread, token that wants), the best first
  std::vector<uint8_t> lost_;                      // of each token: its residual stream is not finite

  Buffer<float> tops_, uppers_;  // of tiles of the head, of tokens side by side
  std::vector<Candidate> reached_;  // of (thread, token that wants): the likeliest row scores as much at least
  std::vector<int64_t> counted_;  // of the same: rows that were read whole
  void prepare_head();
  Shelf low_shelf;
  void decide_head(Lane& lane, const Token& token, const VesiclePlanRow& row);
  float exact(const Lane& lane, int64_t row) const;
  bool previewed(int64_t thread, int64_t t) { return lane(thread, t).words > 0; }
  void preview_part(int64_t thread, const int64_t* which, int64_t count, int64_t first, int64_t last);
  std::vector<uint32_t> bins_;  // of (thread, token of those together): how many scores are where
  std::vector<float> floors_;   // of the same: scores from which on they were counted
  std::vector<std::vector<float>> samples_;  // of a thread
  bool count_scores(int64_t thread, int64_t i, const float* y, int64_t first, int64_t last, int64_t count);
  void shortlist(int64_t i, const float* y, int64_t first, int64_t last, int64_t count, std::vector<Candidate>& out);
  Candidate rank(int64_t thread, int64_t t, int64_t i, int64_t at, int64_t count, float* y);
  bool staged(int64_t thread, int64_t t);
  bool screened(int64_t thread, int64_t t);
  void bound(Lane& lane);
  Candidate score(const Activation& x, int64_t first, int64_t last, float* y);
  Candidate reached(int64_t thread, int64_t t, int64_t i, int64_t first, int64_t last);
  Candidate survive(int64_t thread, int64_t t, int64_t i, int64_t first, int64_t last, float least,
                    Candidate best, int64_t* count);
  void best(const float* y, int64_t first, int64_t last, int64_t count, std::vector<Candidate>& out);
  int64_t likeliest(std::vector<Candidate>& all, const Lane& lane, int64_t survivors);
  void head(int64_t thread);
  void head_part(int64_t thread, const int64_t* which, int64_t count, int64_t first, int64_t last);
};

// A row of the embedding.
void embed(const VesicleProjection& w, int64_t row, float* out);

}  // namespace vesicle
