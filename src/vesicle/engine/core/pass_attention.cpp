// Attention of a pass, shared out among the threads by blocks of keys.

#include <cmath>

#include "pass.h"

namespace vesicle {

void Pass::prepare_attention() {
  const int64_t T = pool->threads(), heads = model->heads, size = model->size, kv = model->kv_heads * size;
  partial = partial_.get(n * heads * kSegments * (size + 2));
  scored_row = kBlock;
  for (const Token& token : tokens)
    for (int64_t l = 0; l < model->n_layers; ++l) scored_row = std::max(scored_row, padded(token.held(l), kBlock));
  const bool may_choose = std::any_of(tokens.begin(), tokens.end(), [](const Token& t) { return t.chunk->summaries; });
  scored = scored_.get(may_choose ? n * heads * scored_row : 0);
  scratch.resize(T);
  for (Scratch& s : scratch) {
    s.joint.get(2 * kv + heads * size);
    s.mixed.get(heads * (size + 2 + kBlock));
  }
  visits_.assign(T * n * model->n_layers, 0);
  sums_.assign(visits_.size(), 0);
  runs.clear();
  stores_first = false;
  for (int64_t t = 0; t < n; ++t) {
    const bool same = t && tokens[t].chunk == tokens[t - 1].chunk;
    stores_first = stores_first || same;
    if (same && tokens[t].behind == tokens[t - 1].behind) runs.back().last = t + 1;
    else runs.push_back({t, t + 1});
  }
}

KvView Pass::view() const {
  return {model->keys,         model->values,   model->page_stride, model->key_scales,
          model->value_scales, model->kv_heads, model->size};
}

// Summaries of KV head g of a sequence.
char* Pass::summaries(const VesicleChunk& chunk, int64_t l, int64_t g) {
  const int64_t bytes = model->summary_format == kF32 ? 4 : 2;
  return static_cast<char*>(chunk.summaries[l]) + g * chunk.room_summaries * chunk.vectors * model->size * bytes;
}

// Writes a token's keys and values, and the summary of the block that they complete.
void Pass::store(int64_t thread, int64_t l, int64_t t) {
  const VesicleLayer& w = model->layers[l];
  const Token& token = tokens[t];
  const int64_t size = model->size, kv_heads = model->kv_heads, kv = kv_heads * size;
  const int64_t own = token.held(l) - 1, slot = token.offset(l);
  const int32_t format = static_cast<int32_t>(model->kv_format), block = token.table(l)[own];
  const KvView pages = view();
  float *vk = scratch[thread].joint.get(0), *key = vk + kv;
  value_key.fetch(k, t, n, pool->threads(), 2 * kv, vk);
  if (w.key_norm.gain)
    for (int64_t g = 0; g < kv_heads; ++g)
      k->normalise(key + g * size, w.key_norm.gain, model->eps, size, key + g * size);
  if (w.rotates) k->rotate(key, kv_heads, size, model->rotated, token.cosine, token.sine);
  for (int64_t g = 0; g < kv_heads; ++g) k->store(&pages, format, g, block, slot, key + g * size, vk + g * size);
  if (!token.chunk->summaries || slot < kBlock - 1) return;
  const int64_t bytes = model->summary_format == kF32 ? 4 : 2;
  const int64_t group = own / kBlock * kBlock * token.chunk->vectors * size * bytes;
  for (int64_t g = 0; g < kv_heads; ++g)
    k->summarise(&pages, format, g, block, token.chunk->vectors, summaries(*token.chunk, l, g) + group, own % kBlock);
}

// The rotated queries of a token, in this thread's scratch.
float* Pass::queries(int64_t thread, int64_t l, int64_t t) {
  const VesicleLayer& w = model->layers[l];
  const int64_t size = model->size, heads = model->heads;
  float* q = scratch[thread].joint.get(0) + 2 * model->kv_heads * size;
  query.fetch(k, t, n, pool->threads(), heads * size, q);
  if (w.query_norm.gain)
    for (int64_t h = 0; h < heads; ++h) k->normalise(q + h * size, w.query_norm.gain, model->eps, size, q + h * size);
  if (w.rotates) k->rotate(q, heads, size, model->rotated, tokens[t].cosine, tokens[t].sine);
  return q;
}

bool Pass::chooses(int64_t thread, int64_t t, int64_t l) {
  return lane(thread, t).row.attention && lane(thread, t).blocks < tokens[t].held(l);
}

// This thread's share of the estimated scores (heads, row) of the blocks before the newest, of tokens that choose.
void Pass::estimate(int64_t thread, int64_t l) {
  const int64_t size = model->size, kv_heads = model->kv_heads, ratio = model->heads / kv_heads;
  const int64_t threads = pool->threads();
  const int32_t format = static_cast<int32_t>(model->summary_format);
  for (int64_t t = 0; t < n; ++t) {
    if (!chooses(thread, t, l)) continue;
    const Token& token = tokens[t];
    const int64_t groups = padded(token.held(l) - 1, kBlock) / kBlock;
    // Alone, a token's groups are shared out; otherwise the tokens are.
    if (!alone() && t % threads != thread) continue;
    const int64_t first = alone() ? groups * thread / threads : 0;
    const int64_t last = alone() ? groups * (thread + 1) / threads : groups;
    if (first == last) continue;
    const float* q = queries(thread, l, t);
    for (int64_t g = 0; g < kv_heads; ++g)
      k->estimate(summaries(*token.chunk, l, g), format, first, last, token.chunk->vectors, q + g * ratio * size,
                  ratio, size, estimates(t) + g * ratio * scored_row, scored_row);
  }
}

// Which blocks each KV head of a token reads, in order of positions: a list a head.
Pass::Listed Pass::list_blocks(int64_t thread, int64_t t, int64_t l) {
  const Token& token = tokens[t];
  const int64_t held = token.held(l), own = held - 1, kv_heads = model->kv_heads, ratio = model->heads / kv_heads;
  const int32_t* table = token.table(l);
  Scratch& s = scratch[thread];
  const int32_t **listed = s.heads_lists.get(3 * kv_heads), **places = listed + kv_heads;
  std::fill(listed, places, table);
  std::fill(places, places + kv_heads, nullptr);
  if (!chooses(thread, t, l)) return {listed, places};
  const int64_t row = padded(own, kBlock);
  float *mass = s.choices.get(2 * row), *other = mass + row;
  int32_t *blocks = s.lists.get(2 * kv_heads * held), *numbers = blocks + kv_heads * held;
  uint32_t *masks = s.chosen.get(2 * row), *keys = masks + row;
  for (int64_t g = 0; g < kv_heads; ++g, blocks += held, numbers += held) {
    listed[g] = blocks;
    places[g] = numbers;
    std::fill(mass, mass + own, 0.0f);
    for (int64_t r = 0; r < ratio; ++r)
      k->add_softmax(estimates(t) + (g * ratio + r) * scored_row, own, model->scale, mass, other);
    // The first block, the own one, and the n - 2 others of the largest estimated mass; see blocks.py. No mass is
    // chosen before this one, not even NaN.
    std::memset(mass, 0xff, sizeof *mass);
    k->choose(mass, own, lane(thread, t).blocks - 1, masks, keys);
    int64_t count = 0;
    for (int64_t word = 0; word * 32 < own; ++word)
      for (uint32_t left = masks[word]; left; left &= left - 1) numbers[count++] = 32 * word + __builtin_ctz(left);
    numbers[count++] = static_cast<int32_t>(own);
    for (int64_t i = 0; i < count; ++i) blocks[i] = table[numbers[i]];
  }
  return {listed, places};
}

// How many blocks of a list of n one piece of work takes: an even number of pieces of about four. It depends on
// nothing but n, so that results do not depend on the number of threads or on who else is in the batch.
int64_t Pass::segment(int64_t n) {
  const int64_t pieces = std::min(kSegments, std::max<int64_t>(2, (n / 4 + 1) / 2 * 2));
  return std::max<int64_t>(1, (n + pieces - 1) / pieces);
}

// A segment's results for one query head: (size) sums, then the top score and the total.
float* Pass::part(int64_t t, int64_t h, int64_t s) {
  return partial + ((t * model->heads + h) * kSegments + s) * (model->size + 2);
}

// The segments that begin in [first, last) of a token whose blocks are counted from `unit`.
void Pass::attend_alone(int64_t thread, int64_t l, int64_t t, int64_t unit, int64_t first, int64_t last) {
  const Lane& a = lane(thread, t);
  const Token& token = tokens[t];
  const int64_t size = model->size, heads = model->heads, kv_heads = model->kv_heads;
  const int64_t blocks = a.row.attention ? a.blocks : 1, step = segment(blocks), valid = token.offset(l) + 1;
  const KvView pages = view();
  Scratch& s = scratch[thread];
  float *sums = s.mixed.get(0), *top = sums + heads * size, *q = nullptr;
  const int32_t** listed = nullptr;
  for (int64_t from = 0; from < blocks; from += step) {
    if (unit + from < first || unit + from >= last) continue;
    const int64_t to = std::min(blocks, from + step);
    if (to == blocks && !stores_first) store(thread, l, t);  // whoever reads the newest block writes it first
    if (!a.row.attention) continue;
    if (!listed) {
      q = queries(thread, l, t);
      listed = list_blocks(thread, t, l).blocks;
    }
    const int32_t** here = listed + 2 * kv_heads;
    for (int64_t g = 0; g < kv_heads; ++g) here[g] = listed[g] + from;
    visits(thread, t, l) += k->attend(&pages, static_cast<int32_t>(model->kv_format), q, heads / kv_heads,
                                      model->scale, here, to - from, blocks - from, to == blocks ? valid : kBlock,
                                      sums, top, top + heads, top + 2 * heads);
    for (int64_t h = 0; h < heads; ++h) {
      float* p = part(t, h, from / step);
      std::memcpy(p, sums + h * size, size * sizeof(float));
      p[size] = top[h];
      p[size + 1] = top[heads + h];
    }
  }
}

// The same for tokens of one block that read all that they see, whose segments are counted side by side.
void Pass::attend_together(int64_t thread, int64_t l, const int64_t* members, int64_t count, int64_t unit,
                           int64_t first, int64_t last) {
  const int64_t size = model->size, heads = model->heads, kv_heads = model->kv_heads, ratio = heads / kv_heads;
  const int64_t blocks = tokens[members[0]].held(l), step = segment(blocks), rows = heads * count;
  const KvView pages = view();
  float* q = scratch[thread].together.get(2 * rows * size + 2 * rows + 2 * kBlock * (size + ratio * count));
  float *sums = q + rows * size, *top = sums + rows * size, *total = top + rows, *room = total + rows;
  int64_t tails[kBlock];
  bool ready = false;
  for (int64_t from = 0; from < blocks; from += step) {
    if (unit + from * count < first || unit + from * count >= last) continue;
    if (!ready) {
      for (int64_t i = 0; i < count; ++i) {
        const float* own = queries(thread, l, members[i]);
        for (int64_t g = 0; g < kv_heads; ++g)
          std::memcpy(q + (g * count + i) * ratio * size, own + g * ratio * size, ratio * size * sizeof(float));
        tails[i] = tokens[members[i]].offset(l) + 1;
      }
      ready = true;
    }
    const int64_t to = std::min(blocks, from + step);
    const bool newest = to == blocks;
    k->attend_together(&pages, static_cast<int32_t>(model->kv_format), q, count, ratio, model->scale,
                       tokens[members[0]].table(l) + from, to - from, newest ? tails : nullptr, sums, top, total, room);
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t row = (h / ratio * count + i) * ratio + h % ratio;
        float* p = part(members[i], h, from / step);
        std::memcpy(p, sums + row * size, size * sizeof(float));
        p[size] = top[row];
        p[size + 1] = total[row];
      }
      visits(thread, members[i], l) += (to - from - 1) * kBlock + (newest ? tails[i] : kBlock);
    }
  }
}

void Pass::attention(int64_t thread, int64_t l) {
  const int64_t threads = pool->threads();
  if (stores_first) {  // a block is one thread's
    for (int64_t r = thread; r < static_cast<int64_t>(runs.size()); r += threads)
      for (int64_t t = runs[r].first; t < runs[r].last; ++t) store(thread, l, t);
    pool->barrier();
  }
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
  std::vector<int64_t>& members = scratch[thread].members;
  int64_t unit = 0;
  for (const Run& run : runs) {
    members.clear();
    for (int64_t t = run.first; run.last - run.first > 1 && t < run.last; ++t)
      if (lane(thread, t).row.attention && !chooses(thread, t, l)) members.push_back(t);
    const int64_t count = static_cast<int64_t>(members.size());
    if (count > 1) {
      attend_together(thread, l, members.data(), count, unit, first, last);
      unit += count * tokens[members[0]].held(l);
    }
    for (int64_t t = run.first; t < run.last; ++t) {
      const Lane& a = lane(thread, t);
      if (count > 1 && a.row.attention && !chooses(thread, t, l)) continue;
      attend_alone(thread, l, t, unit, first, last);
      unit += a.row.attention ? a.blocks : 1;
    }
  }
  for (int64_t t = thread; t < n; t += threads)
    tokens[t].compared[l] = chooses(thread, t, l) ? (tokens[t].held(l) - 1) * tokens[t].chunk->vectors : 0;
}

// The attention output of a token that reads `blocks` blocks, from its segments.
void Pass::merge(int64_t t, int64_t blocks, float* out) {
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

// Largest scores and inverse totals of a token's query heads, by KV head (KV heads, `count` tokens, ratio) as the i-th.
void Pass::softmax(int64_t thread, int64_t t, int64_t i, int64_t count, float* top, float* inverse) {
  const int64_t size = model->size, heads = model->heads, ratio = heads / model->kv_heads;
  const int64_t blocks = lane(thread, t).blocks, segments = (blocks + segment(blocks) - 1) / segment(blocks);
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t row = (h / ratio * count + i) * ratio + h % ratio;
    top[row] = -INFINITY;
    for (int64_t s = 0; s < segments; ++s) top[row] = std::max(top[row], part(t, h, s)[size]);
    float total = 0;
    for (int64_t s = 0; s < segments; ++s) total += std::exp(part(t, h, s)[size] - top[row]) * part(t, h, s)[size + 1];
    inverse[row] = 1.0f / total;
  }
}

// Adds to what each slot has received from tokens of one block, side by side where all read all that they see, else
// one at a time. A slot is one thread's, and takes its queries in order, so that sums do not depend on
// how a text is cut.
void Pass::receive_from(int64_t thread, int64_t l, const int64_t* members, int64_t count) {
  const int64_t threads = pool->threads(), size = model->size, heads = model->heads, kv_heads = model->kv_heads;
  const int64_t ratio = heads / kv_heads, rows = heads * count, blocks = lane(thread, members[0]).blocks;
  const VesicleChunk& chunk = *tokens[members[0]].chunk;
  const KvView pages = view();
  float* q = scratch[thread].together.get(rows * size + 2 * rows + kBlock * (size + ratio * count));
  float *top = q + rows * size, *inverse = top + rows, *room = inverse + rows;
  int64_t tails[kBlock];
  for (int64_t i = 0; i < count; ++i) {
    const float* own = queries(thread, l, members[i]);
    for (int64_t g = 0; g < kv_heads; ++g)
      std::memcpy(q + (g * count + i) * ratio * size, own + g * ratio * size, ratio * size * sizeof(float));
    softmax(thread, members[i], i, count, top, inverse);
    tails[i] = tokens[members[i]].offset(l) + 1;
  }
  const Listed listed = list_blocks(thread, members[0], l);
  for (int64_t g = 0; g < kv_heads; ++g) {
    const int64_t first = g * count * ratio;
    float* row = chunk.received + (l * kv_heads + g) * chunk.room_received;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t place = listed.places[g] ? listed.places[g][b] : b;
      if (place % threads != thread) continue;
      const bool newest = b + 1 == blocks;
      k->receive(&pages, static_cast<int32_t>(model->kv_format), g, listed.blocks[g][b], q + first * size, count, ratio,
                 model->scale, newest ? tails : nullptr, top + first, inverse + first, row + place * kBlock, room);
      for (int64_t i = 0; g == 0 && i < count; ++i)
        sums_[counter(thread, members[i], l)] += newest ? tails[i] : kBlock;
    }
  }
}

// The same for all tokens whose chunks ask.
void Pass::receive(int64_t thread, int64_t l) {
  std::vector<int64_t>& members = scratch[thread].members;
  for (const Run& run : runs) {
    if (!tokens[run.first].chunk->received) continue;
    members.clear();
    bool choosing = false;
    for (int64_t t = run.first; t < run.last; ++t) {
      if (!lane(thread, t).row.attention) continue;
      members.push_back(t);
      choosing = choosing || chooses(thread, t, l);
    }
    const int64_t count = static_cast<int64_t>(members.size()), step = choosing ? 1 : count;
    for (int64_t i = 0; i < count; i += step) receive_from(thread, l, members.data() + i, step);
  }
}

}  // namespace vesicle
