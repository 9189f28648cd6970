// Attention of a pass, shared out among the threads by blocks of keys.

#include <cmath>

#include "pass.h"

namespace vesicle {

void Pass::prepare_attention() {
  const int64_t T = pool->threads(), heads = model->heads, size = model->size, kv = model->kv_heads * size;
  part_size = padded(size + 2, 8);
  partial = partial_.get(n * heads * kSegments * part_size);
  blocks_row = kBlock;
  for (const Token& token : tokens)
    for (int64_t l = 0; l < model->n_layers; ++l)
      for (int64_t g = 0; g < model->kv_heads; ++g)  // with the end of a list of all of them
        blocks_row = std::max(blocks_row, padded(token.held(l, g) + 1, kBlock));
  const bool may_choose = std::any_of(tokens.begin(), tokens.end(), [](const Token& t) { return t.chunk->summaries; });
  scored = scored_.get(may_choose ? n * heads * blocks_row : 0);
  const int64_t places = alone() ? T : n;
  rotated = rotated_.get(places * heads * size);
  lists = lists_.get(may_choose ? places * model->kv_heads * blocks_row : 0);
  scratch.resize(T);
  for (Scratch& s : scratch) {
    s.joint.get(2 * kv);
    s.mixed.get(heads * (size + 2 + kBlock));
  }
  visits_.assign(T * n * model->n_layers, 0);
  sums_.assign(visits_.size(), 0);
  runs.clear();
  for (int64_t t = 0; t < n; ++t) {
    const bool same = t && tokens[t].chunk == tokens[t - 1].chunk;
    if (same && tokens[t].behind == tokens[t - 1].behind) runs.back().last = t + 1;
    else runs.push_back({t, t + 1});
  }
}

KvView Pass::view() const {
  return {model->keys, model->values, model->page_stride, model->key_scales, model->value_scales, model->size};
}

// Summaries of KV head g of a sequence.
char* Pass::summaries(const VesicleChunk& chunk, int64_t l, int64_t g) {
  const int64_t bytes = model->summary_format == kF32 ? 4 : 2;
  return static_cast<char*>(chunk.summaries[l]) + g * chunk.room_summaries * chunk.vectors * model->size * bytes;
}

// Writes a token's keys and values of KV heads [first, last), and the summaries of the blocks that they complete.
void Pass::store(int64_t thread, int64_t l, int64_t t, int64_t first, int64_t last) {
  const VesicleLayer& w = model->layers[l];
  const Token& token = tokens[t];
  const int64_t size = model->size, kv = model->kv_heads * size, slot = token.offset(), heads = last - first;
  const int64_t bytes = model->summary_format == kF32 ? 4 : 2;
  const int32_t format = static_cast<int32_t>(model->kv_format);
  const KvView pages = view();
  float *vk = scratch[thread].joint.get(0), *keys = vk + kv + first * size;
  value_key.fetch(k, t, n, pool->threads(), 2 * kv, vk);
  if (w.key_norm.gain)
    for (int64_t i = 0; i < heads; ++i)
      k->normalise(keys + i * size, w.key_norm.gain, model->eps, size, keys + i * size);
  if (w.rotates) k->rotate(keys, heads, size, model->rotated, token.cosine[w.rotates - 1], token.sine[w.rotates - 1]);
  for (int64_t g = first; g < last; ++g) {
    const int64_t own = token.held(l, g) - 1;
    const int32_t block = token.table(l, g)[own];
    k->store(&pages, format, block, slot, vk + kv + g * size, vk + g * size);
    if (!token.chunk->summaries || slot < kBlock - 1) continue;
    const int64_t group = own / kBlock * kBlock * token.chunk->vectors * size * bytes;
    k->summarise(&pages, format, block, token.chunk->vectors, summaries(*token.chunk, l, g) + group, own % kBlock);
  }
}

// The rotated queries of a token: of one that is alone each thread has its own.
float* Pass::queries(int64_t thread, int64_t t) { return rotated + place(thread, t) * model->heads * model->size; }

void Pass::rotate_queries(int64_t thread, int64_t l, int64_t t) {
  if (!lane(thread, t).row.attention) return;
  const VesicleLayer& w = model->layers[l];
  const int64_t size = model->size, heads = model->heads;
  float* q = queries(thread, t);
  query.fetch(k, t, n, pool->threads(), heads * size, q);
  if (w.query_norm.gain)
    for (int64_t h = 0; h < heads; ++h) k->normalise(q + h * size, w.query_norm.gain, model->eps, size, q + h * size);
  if (w.rotates)
    k->rotate(q, heads, size, model->rotated, tokens[t].cosine[w.rotates - 1], tokens[t].sine[w.rotates - 1]);
  if (tokens[t].kept && !w.window && reports(thread))
    std::memcpy(tokens[t].kept + l * tokens[t].chunk->room_queries * heads * size, q, heads * size * sizeof(float));
}

// How many blocks of a KV head a token reads: all that it sees, or more, where its row says so; see plan/spread.py.
int64_t Pass::wanted(int64_t thread, int64_t t, int64_t l, int64_t g) {
  const int64_t blocks = lane(thread, t).blocks;
  const int32_t* spread = tokens[t].chunk->spread;
  if (!spread || blocks >= tokens[t].seen(l, g, window(l))) return blocks;
  return std::max(blocks * spread[l * model->kv_heads + g] / kSpreadUnit, std::min(blocks, kLeastOfHead));
}

// Whether a token reads fewer blocks of a KV head than it sees.
bool Pass::chooses(int64_t thread, int64_t t, int64_t l, int64_t g) {
  return lane(thread, t).row.attention && wanted(thread, t, l, g) < tokens[t].seen(l, g, window(l));
}

// The same of any KV head.
bool Pass::chooses(int64_t thread, int64_t t, int64_t l) {
  for (int64_t g = 0; g < model->kv_heads; ++g)
    if (chooses(thread, t, l, g)) return true;
  return false;
}

// Blocks of a KV head that a token goes through: those that it chooses, or all that any token of its block sees.
int64_t Pass::reads(int64_t thread, int64_t t, int64_t l, int64_t g) {
  return chooses(thread, t, l, g) ? wanted(thread, t, l, g) : span(t, l, g);
}

// Estimated scores (ratio, row) of a KV head's blocks before the newest, in groups [first, last) of 16.
void Pass::estimate(int64_t thread, int64_t l, int64_t t, int64_t g, int64_t first, int64_t last) {
  const int64_t size = model->size, ratio = model->heads / model->kv_heads;
  const VesicleChunk& chunk = *tokens[t].chunk;
  if (first >= last) return;
  k->estimate(summaries(chunk, l, g), static_cast<int32_t>(model->summary_format), first, last, chunk.vectors,
              queries(thread, t) + g * ratio * size, ratio, size, estimates(t) + g * ratio * blocks_row, blocks_row);
}

// Which blocks a KV head of a token reads that chooses, in order: their places in the sequence.
int32_t* Pass::chosen(int64_t thread, int64_t t, int64_t g) {
  return lists + (place(thread, t) * model->kv_heads + g) * blocks_row;
}

constexpr uint32_t kNear = 0x7fe00000;  // as a number, between the NaN of arithmetic and that of all ones

void Pass::choose_blocks(int64_t thread, int64_t l, int64_t t) {
  const int64_t kv_heads = model->kv_heads, ratio = model->heads / kv_heads;
  const int64_t first = tokens[t].whole(l, window(l));
  Scratch& s = scratch[thread];
  float *mass = s.choices.get(2 * blocks_row), *other = mass + blocks_row;
  uint32_t *masks = s.chosen.get(2 * blocks_row), *keys = masks + blocks_row;
  for (int64_t g = 0; g < kv_heads; ++g) {
    const int64_t own = tokens[t].held(l, g) - 1, count = own - first;  // those to choose among
    if (!chooses(thread, t, l, g)) {  // beside heads that hold more; in a windowed layer all choose, or none
      int32_t* list = chosen(thread, t, g);
      for (int64_t b = 0; b <= own; ++b) list[b] = static_cast<int32_t>(b);
      list[own + 1] = INT32_MAX;
      continue;
    }
    std::fill(mass, mass + count, 0.0f);
    for (int64_t r = 0; r < ratio; ++r)
      k->add_softmax(estimates(t) + (g * ratio + r) * blocks_row + first, count, model->scale, mass, other);
    // The text's first block, the own one, the nearest, and the others of the largest estimated mass; see blocks.py. No
    // mass is chosen before these, not even the NaN of one that cannot be estimated.
    const int64_t near = std::min(count, tokens[t].chunk->nearest - 1);
    for (int64_t b = count - near; b < count; ++b) std::memcpy(mass + b, &kNear, sizeof *mass);
    if (first == 0 && tokens[t].begins(l, window(l))) std::memset(mass, 0xff, sizeof *mass);
    k->choose(mass, count, wanted(thread, t, l, g) - 1, masks, keys);
    int32_t* list = chosen(thread, t, g);
    for (int64_t word = 0; word * 32 < count; ++word)
      for (uint32_t left = masks[word]; left; left &= left - 1)
        *list++ = static_cast<int32_t>(first + 32 * word + __builtin_ctz(left));
    *list++ = static_cast<int32_t>(own);
    *list = INT32_MAX;  // the end
  }
}

// Has every token that chooses know its blocks. Alone, a token's estimates are shared out, and each thread makes the
// list; otherwise the tokens are shared out.
void Pass::list_chosen(int64_t thread, int64_t l) {
  const int64_t threads = pool->threads();
  bool any = false;
  for (int64_t t = 0; t < n; ++t) {
    if (!chooses(thread, t, l)) continue;
    any = true;
    if (!alone() && t % threads != thread) continue;
    for (int64_t g = 0; g < model->kv_heads; ++g) {
      if (!chooses(thread, t, l, g)) continue;
      const int64_t groups = padded(tokens[t].held(l, g) - 1, kBlock) / kBlock;
      if (alone()) estimate(thread, l, t, g, groups * thread / threads, groups * (thread + 1) / threads);
      else estimate(thread, l, t, g, 0, groups);
    }
    if (!alone()) choose_blocks(thread, l, t);
  }
  if (any) pool->barrier();
  if (any && alone()) choose_blocks(thread, l, 0);
}

// How many of the n blocks that a token sees one piece of work takes: an even number of pieces of about four, or
// kSegments of them. It depends on nothing but n, so that results do not depend on the number of threads or on who else
// is in the batch; and pieces are the same for tokens side by side, whatever they choose, so that they read together.
int64_t Pass::segment(int64_t n) {
  const int64_t pieces = std::min(kSegments, std::max<int64_t>(2, (n / 4 + 1) / 2 * 2));
  return std::max<int64_t>(1, (n + pieces - 1) / pieces);
}

// Pieces of what a token sees of a KV head; in a windowed layer, of what any token of its block sees.
int64_t Pass::segments(int64_t t, int64_t l, int64_t g) {
  const int64_t blocks = span(t, l, g), step = segment(blocks);
  return (blocks + step - 1) / step;
}

// A segment's results for one query head: (size) sums, then the top score and the total.
float* Pass::part(int64_t t, int64_t h, int64_t s) {
  return partial + ((t * model->heads + h) * kSegments + s) * part_size;
}

// The segments that begin in [first, last) of a token that reads all that it sees, counted from `unit`. KV heads side by
// side that hold as many blocks go together: theirs lie side by side as well.
void Pass::attend_alone(int64_t thread, int64_t l, int64_t t, int64_t unit, int64_t first, int64_t last) {
  const Token& token = tokens[t];
  const int64_t size = model->size, ratio = model->heads / model->kv_heads, valid = token.offset() + 1;
  const int64_t base = token.base(l, window(l)), begin = token.first(l, window(l)) - base;
  const KvView pages = view();
  Scratch& s = scratch[thread];
  const int32_t** tables = s.tables.get(model->kv_heads);
  for (int64_t g = 0, next; g < model->kv_heads; g = next) {
    const int64_t blocks = span(t, l, g), step = segment(blocks);
    for (next = g + 1; next < model->kv_heads && span(t, l, next) == blocks;) ++next;
    const int64_t kv_heads = next - g, heads = kv_heads * ratio;
    float *sums = s.mixed.get(0), *top = sums + heads * size;
    for (int64_t from = 0; from < blocks; from += step) {
      if (unit + from * kv_heads < first || unit + from * kv_heads >= last) continue;
      const int64_t to = std::min(blocks, from + step), at = std::max(from, begin);  // nothing is read where at >= to
      if (to == blocks && alone()) store(thread, l, t, g, next);  // whoever reads the newest block writes it first
      for (int64_t i = 0; i < kv_heads; ++i) tables[i] = token.table(l, g + i) + base + at;
      const int64_t read = k->attend(&pages, static_cast<int32_t>(model->kv_format), kv_heads,
                                     queries(thread, t) + g * ratio * size, ratio, model->scale, tables,
                                     std::max<int64_t>(0, to - at), blocks - at, at == begin ? token.cut(window(l)) : 0,
                                     to == blocks ? valid : kBlock, sums, top, top + heads, top + 2 * heads);
      visits(thread, t, l) += kv_heads * read;
      for (int64_t h = 0; h < heads; ++h) {
        float* p = part(t, g * ratio + h, from / step);
        std::memcpy(p, sums + h * size, size * sizeof(float));
        p[size] = top[h];
        p[size + 1] = top[heads + h];
      }
    }
    unit += blocks * kv_heads;
  }
}

// The same for tokens of one block, whose segments are counted side by side.
void Pass::attend_whole(int64_t thread, int64_t l, const std::vector<int64_t>& members, int64_t unit, int64_t first,
                        int64_t last) {
  const int64_t size = model->size, ratio = model->heads / model->kv_heads;
  const int64_t count = static_cast<int64_t>(members.size()), rows = count * ratio;
  const int64_t base = tokens[members[0]].base(l, window(l));
  const KvView pages = view();
  Scratch& s = scratch[thread];
  float* room = s.together.get(kBlock * rows);
  Row* row = s.row.get(rows);
  const float* query[kBlock];
  float* parts[kBlock];
  int64_t tails[kBlock], begins[kBlock];
  for (int64_t i = 0; i < count; ++i) {
    tails[i] = tokens[members[i]].offset() + 1;
    begins[i] = tokens[members[i]].first(l, window(l)) - base;
  }
  // Members lie within one block, so that their windows begin within two.
  uint8_t hidden[2 * kBlock];
  for (int64_t g = 0; g < model->kv_heads; ++g) {
    const int64_t blocks = span(members[0], l, g), step = segment(blocks);
    uint16_t* readers = window(l) ? s.readers.get(step) : nullptr;
    for (int64_t from = 0; from < blocks; from += step) {
      const int64_t begin = unit + from * count;
      if (begin < first || begin >= last) continue;
      const int64_t to = std::min(blocks, from + step);
      const bool newest = to == blocks;
      const int64_t edges = window(l) ? std::max<int64_t>(0, std::min<int64_t>(2, to) - from) : 0;
      for (int64_t b = from; readers && b < to; ++b) {
        readers[b - from] = 0;
        for (int64_t i = 0; i < count; ++i) {
          if (begins[i] <= b) readers[b - from] |= static_cast<uint16_t>(1 << i);
          if (b - from < edges)
            hidden[(b - from) * kBlock + i] =
                static_cast<uint8_t>(begins[i] == b ? tokens[members[i]].cut(window(l)) : 0);
        }
      }
      for (int64_t i = 0; i < count; ++i) {
        query[i] = queries(thread, members[i]) + g * ratio * size;
        parts[i] = part(members[i], g * ratio, from / step);
      }
      const Shared shared = {query,
                             parts,
                             kSegments * part_size,
                             count,
                             ratio,
                             tokens[members[0]].table(l, g) + base + from,
                             to - from,
                             readers,
                             newest ? tails : nullptr,
                             hidden,
                             edges};
      k->attend_shared(&pages, static_cast<int32_t>(model->kv_format), &shared, model->scale, room, row);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = std::max(from, begins[i]);
        if (at >= to) continue;
        visits(thread, members[i], l) += (to - at - 1) * kBlock + (newest ? tails[i] : kBlock) -
                                         (at == begins[i] ? tokens[members[i]].cut(window(l)) : 0);
      }
    }
    unit += blocks * count;
  }
}

// The same for tokens of one block that choose, or for one. Neighbours choose much alike, so a block is read once for
// all that want it.
void Pass::attend_chosen(int64_t thread, int64_t l, const std::vector<int64_t>& members, int64_t unit, int64_t first,
                         int64_t last) {
  const int64_t size = model->size, ratio = model->heads / model->kv_heads;
  const int64_t count = static_cast<int64_t>(members.size()), rows = count * ratio;
  const int64_t base = tokens[members[0]].base(l, window(l));
  const KvView pages = view();
  Scratch& s = scratch[thread];
  float* room = s.together.get(kBlock * rows);
  Row* row = s.row.get(rows);
  const float* query[kBlock];
  float* parts[kBlock];
  int64_t tails[kBlock];
  const int32_t *here[kBlock], *end[kBlock];  // of each member's list, what lies in a segment
  for (int64_t i = 0; i < count; ++i) tails[i] = tokens[members[i]].offset() + 1;
  for (int64_t g = 0; g < model->kv_heads; ++g) {
    const int64_t own = tokens[members[0]].held(l, g) - 1, step = segment(own + 1 - base);
    const int32_t* table = tokens[members[0]].table(l, g);
    uint16_t* readers = s.readers.get(step);
    int32_t* blocks = s.blocks.get(step);
    for (int64_t i = 0; i < count; ++i) end[i] = chosen(thread, members[i], g);
    for (int64_t from = base; from <= own; from += step) {
      const int64_t to = std::min(own + 1, from + step), begin = unit;
      for (int64_t i = 0; i < count; ++i) {
        here[i] = end[i];
        while (*end[i] < to) ++end[i];
        unit += end[i] - here[i];
      }
      if (begin < first || begin >= last) continue;
      const bool newest = to > own;
      if (newest && alone()) store(thread, l, members[0], g, g + 1);
      std::memset(readers, 0, step * sizeof *readers);
      for (int64_t i = 0; i < count; ++i) {
        query[i] = queries(thread, members[i]) + g * ratio * size;
        parts[i] = part(members[i], g * ratio, (from - base) / step);
        for (const int32_t* b = here[i]; b < end[i]; ++b) readers[*b - from] |= static_cast<uint16_t>(1 << i);
      }
      int64_t n_blocks = 0;
      for (int64_t b = from; b < to; ++b) {
        if (!readers[b - from]) continue;
        readers[n_blocks] = readers[b - from];
        blocks[n_blocks++] = table[b];
      }
      const Shared shared = {query,  parts,    kSegments * part_size, count,                    ratio,
                             blocks, n_blocks, readers,               newest ? tails : nullptr, nullptr, 0};
      k->attend_shared(&pages, static_cast<int32_t>(model->kv_format), &shared, model->scale, room, row);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t read = end[i] - here[i];
        visits(thread, members[i], l) += newest ? (read - 1) * kBlock + tails[i] : read * kBlock;
      }
    }
  }
}

void Pass::attention(int64_t thread, int64_t l) {
  const int64_t threads = pool->threads();
  if (alone()) {
    rotate_queries(thread, l, 0);
  } else {  // some may read what others of the pass write; a block is one thread's
    for (int64_t r = thread; r < static_cast<int64_t>(runs.size()); r += threads)
      for (int64_t t = runs[r].first; t < runs[r].last; ++t) store(thread, l, t);
    for (int64_t t = thread; t < n; t += threads) rotate_queries(thread, l, t);
    pool->barrier();
  }
  list_chosen(thread, l);
  const int64_t kv_heads = model->kv_heads;
  int64_t total = 0;  // blocks, of all KV heads
  const auto units = [&](int64_t t) {
    int64_t sum = 0;
    for (int64_t g = 0; g < kv_heads; ++g) sum += reads(thread, t, l, g);
    return sum;
  };
  for (int64_t t = 0; t < n; ++t) total += lane(thread, t).row.attention ? units(t) : 0;
  // This thread takes the segments that begin in its share.
  const int64_t first = total * thread / threads, last = total * (thread + 1) / threads;
  std::vector<int64_t>&whole = scratch[thread].whole, &choosing = scratch[thread].choosing;
  int64_t unit = 0;
  for (const Run& run : runs) {
    whole.clear();
    choosing.clear();
    for (int64_t t = run.first; t < run.last; ++t) {
      if (lane(thread, t).row.attention) (chooses(thread, t, l) ? choosing : whole).push_back(t);
      else if (alone() && thread == 0) store(thread, l, t);
    }
    if (whole.size() == 1) attend_alone(thread, l, whole[0], unit, first, last);
    if (whole.size() > 1) attend_whole(thread, l, whole, unit, first, last);
    for (const int64_t t : whole) unit += units(t);
    if (!choosing.empty()) attend_chosen(thread, l, choosing, unit, first, last);
    for (const int64_t t : choosing) unit += units(t);
  }
  for (int64_t t = thread; t < n; t += threads) {
    int64_t among = 0;
    for (int64_t g = 0; g < kv_heads; ++g)
      if (chooses(thread, t, l, g)) among += tokens[t].held(l, g) - 1 - tokens[t].whole(l, window(l));
    tokens[t].compared[l] = among * tokens[t].chunk->vectors;
  }
}

// The attention output of a token, from its segments. Of some it may read nothing.
void Pass::merge(int64_t t, int64_t l, float* out) {
  const int64_t size = model->size, ratio = model->heads / model->kv_heads;
  for (int64_t h = 0; h < model->heads; ++h) {
    const int64_t pieces = segments(t, l, h / ratio);
    float top = -INFINITY;
    for (int64_t s = 0; s < pieces; ++s) top = std::max(top, part(t, h, s)[size]);
    float total = 0, *y = out + h * size;
    std::memset(y, 0, size * sizeof(float));
    for (int64_t s = 0; s < pieces; ++s) {
      const float* p = part(t, h, s);
      if (p[size + 1] == 0) continue;
      const float share = std::exp(p[size] - top);
      total += share * p[size + 1];
      for (int64_t d = 0; d < size; ++d) y[d] += share * p[d];
    }
    const float inverse = 1.0f / total;
    for (int64_t d = 0; d < size; ++d) y[d] *= inverse;
  }
}

// Largest scores and inverse totals of a token's query heads, by KV head (KV heads, `count` tokens, ratio) as the i-th.
void Pass::softmax(int64_t l, int64_t t, int64_t i, int64_t count, float* top, float* inverse) {
  const int64_t size = model->size, heads = model->heads, ratio = heads / model->kv_heads;
  for (int64_t h = 0; h < heads; ++h) {
    const int64_t pieces = segments(t, l, h / ratio);
    const int64_t row = (h / ratio * count + i) * ratio + h % ratio;
    top[row] = -INFINITY;
    for (int64_t s = 0; s < pieces; ++s) top[row] = std::max(top[row], part(t, h, s)[size]);
    float total = 0;
    for (int64_t s = 0; s < pieces; ++s) total += std::exp(part(t, h, s)[size] - top[row]) * part(t, h, s)[size + 1];
    inverse[row] = 1.0f / total;
  }
}

// Adds to what each slot has received from tokens of one block, side by side where all read all that they see, else
// one at a time. A slot is one thread's, and takes its queries in order, so that sums do not depend on
// how a text is cut.
void Pass::receive_from(int64_t thread, int64_t l, const int64_t* members, int64_t count) {
  const int64_t threads = pool->threads(), size = model->size, heads = model->heads, kv_heads = model->kv_heads;
  const int64_t ratio = heads / kv_heads, rows = heads * count;
  const VesicleChunk& chunk = *tokens[members[0]].chunk;
  const KvView pages = view();
  float* q = scratch[thread].together.get(rows * size + 2 * rows + kBlock * (size + ratio * count));
  float *top = q + rows * size, *inverse = top + rows, *room = inverse + rows;
  int64_t tails[kBlock];
  for (int64_t i = 0; i < count; ++i) {
    const float* own = queries(thread, members[i]);
    for (int64_t g = 0; g < kv_heads; ++g)
      std::memcpy(q + (g * count + i) * ratio * size, own + g * ratio * size, ratio * size * sizeof(float));
    softmax(l, members[i], i, count, top, inverse);
    tails[i] = tokens[members[i]].offset() + 1;
  }
  for (int64_t g = 0; g < kv_heads; ++g) {
    const int64_t first = g * count * ratio, blocks = reads(thread, members[0], l, g);
    const bool choosing = chooses(thread, members[0], l, g);
    const int32_t* table = tokens[members[0]].table(l, g);
    float* row = chunk.received + (l * kv_heads + g) * chunk.room_received;
    for (int64_t b = 0; b < blocks; ++b) {
      const int64_t place = choosing ? chosen(thread, members[0], g)[b] : b;
      if (place % threads != thread) continue;
      const bool newest = b + 1 == blocks;
      k->receive(&pages, static_cast<int32_t>(model->kv_format), table[place], q + first * size, count, ratio,
                 model->scale, newest ? tails : nullptr, top + first, inverse + first, row + place * kBlock, room);
      for (int64_t i = 0; i < count; ++i)
        sums_[counter(thread, members[i], l)] += newest ? tails[i] : kBlock;
    }
  }
}

// The same for all tokens whose chunks ask.
void Pass::receive(int64_t thread, int64_t l) {
  std::vector<int64_t>& members = scratch[thread].whole;
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
