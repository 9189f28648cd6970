// The LM head of a pass: whole, previewed by few directions, or screened by leading bits where the likeliest token alone
// is asked for.

#include <algorithm>
#include <cmath>
#include <functional>

#include "pass.h"

namespace vesicle {
namespace {

// Tokens that go through the head together: their logits stay in the cache.
constexpr int64_t kTogether = 16;

// Most of them that are screened by a bound: more read nearly every line anyhow, and bounding takes longer.
constexpr int64_t kScreened = 4;

// Scores are counted by their leading bits: sign, exponent, and four of the fraction.
constexpr int64_t kBins = 1 << 13;

// Which of them a finite score is of; larger scores are of no lower one.
int64_t bin_of(float score) {
  uint32_t bits;
  score += 0.0f;  // there is one zero
  std::memcpy(&bits, &score, sizeof bits);
  return (bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u)) >> 19;
}

// Of so many scores one is looked at to tell where the best begin.
constexpr int64_t kStride = 32;

// Calls f(row) for rows of y[first:last) that are not below `least`, in order.
template <typename F>
void each_above(const float* y, int64_t first, int64_t last, float least, F f) {
  constexpr int64_t kRun = 32;
  for (int64_t start = first; start < last; start += kRun) {
    const int64_t stop = std::min(last, start + kRun);
    if (stop - start == kRun) {
      float most[8];
      std::memcpy(most, y + start, sizeof most);
      for (int64_t row = start + 8; row < stop; row += 8)
        for (int64_t i = 0; i < 8; ++i) most[i] = most[i] < y[row + i] ? y[row + i] : most[i];
      bool any = false;
      for (int64_t i = 0; i < 8; ++i) any |= !(most[i] < least);
      if (!any) continue;
    }
    for (int64_t row = start; row < stop; ++row)
      if (!(y[row] < least)) f(row);
  }
}

float from_half(const uint8_t* at) {
  uint16_t bits;
  std::memcpy(&bits, at, sizeof bits);
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16, exponent = (bits >> 10) & 31;
  uint32_t wide = sign | ((exponent + 112) << 23) | (static_cast<uint32_t>(bits & 0x3ff) << 13);
  if (exponent == 31) wide |= 0x7f800000u;  // infinity or NaN
  float value;
  if (!exponent) {  // zero or subnormal, in units of 2^-24
    const float tiny = static_cast<float>(bits & 0x3ff) * 5.9604644775390625e-8f;
    std::memcpy(&wide, &tiny, sizeof wide);
    wide |= sign;
  }
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// The 32 codes of one group of a row of a packed head, and their scale and low.
void head_codes(const VesicleProjection& w, int64_t row, int64_t g, int32_t* codes, float* scale, float* low) {
  const int64_t groups = (w.n_in + kGroup - 1) / kGroup, block = row / kHeadTile * groups + g, o = row % kHeadTile;
  const uint8_t* high = static_cast<const uint8_t*>(w.data) + block * 320;
  const uint8_t* trailing = w.format == kPacked8 ? static_cast<const uint8_t*>(w.trailing) + block * 256 : nullptr;
  for (int64_t j = 0; j < 4; ++j)
    for (int64_t c = 0; c < 4; ++c) {
      int32_t a = high[64 * j + 4 * o + c] & 15, b = high[64 * j + 4 * o + c] >> 4;
      if (trailing) {
        a = 16 * a + (trailing[64 * j + 4 * o + c] & 15);
        b = 16 * b + (trailing[64 * j + 4 * o + c] >> 4);
      }
      codes[8 * j + c] = a;
      codes[8 * j + 4 + c] = b;
    }
  *scale = from_half(high + 256 + 2 * o);
  *low = from_half(high + 256 + 2 * (kHeadTile + o));
}

// What a token's logits are moved by, where the likeliest is drawn; or null.
const float* noise_of(const Token& token) { return token.wants == kLikeliest ? token.chunk->noise : nullptr; }

}  // namespace

void embed(const VesicleProjection& w, int64_t row, float* out) {
  if (w.format == kDense32) {
    std::memcpy(out, static_cast<const float*>(w.data) + row * w.n_in, w.n_in * sizeof(float));
    return;
  }
  if (w.format == kDenseBf16) {
    const uint16_t* from = static_cast<const uint16_t*>(w.data) + row * w.n_in;
    for (int64_t i = 0; i < w.n_in; ++i) {
      const uint32_t bits = static_cast<uint32_t>(from[i]) << 16;
      std::memcpy(out + i, &bits, sizeof bits);
    }
    return;
  }
  int32_t codes[kGroup];
  float scale, low;
  for (int64_t start = 0; start < w.n_in; start += kGroup) {
    head_codes(w, row, start / kGroup, codes, &scale, &low);
    for (int64_t i = 0; i < kGroup && start + i < w.n_in; ++i)
      out[start + i] = scale * static_cast<float>(codes[i]) + low;
  }
}

void Pass::prepare_head() {
  const int64_t T = pool->threads();
  wanting.clear();
  for (int64_t t = 0; t < n; ++t)
    if (tokens[t].wants) wanting.push_back(t);
  const int64_t most = std::min<int64_t>(kTogether, wanting.size());
  logits_.get(padded(model->vocabulary, kHeadTile) * most);
  const int64_t each = T * std::max<int64_t>(1, wanting.size());
  candidates.resize(each);
  counted_.assign(each, 0);
  lost_.assign(n, 0);
  int64_t rank = 0;
  for (const int64_t t : wanting)
    if (tokens[t].chunk->preview) rank = std::max(rank, tokens[t].chunk->preview->words.n_in);
  if (rank) {
    low_shelf.room(alone() ? T : n, rank);
    bins_.resize(T * kTogether * kBins);
    floors_.resize(T * kTogether);
    samples_.resize(T);
    reached_.assign(each, {-INFINITY, -1});
  }
  if (!model->screen) return;
  const int64_t tiles = (model->vocabulary + kHeadTile - 1) / kHeadTile;
  reached_.assign(each, {-INFINITY, -1});
  tops_.get(tiles * most);
  uppers_.get(tiles * most);
}

// What a row says of the head: how many of its rows are computed exactly, and how the others are left out.
void Pass::decide_head(Lane& lane, const Token& token, const VesiclePlanRow& row) {
  const bool likeliest = token.wants == kLikeliest;
  lane.words = !token.chunk->preview || !token.wants ? 0 : likeliest ? row.likeliest : row.logits;
  lane.head = likeliest && !lane.words && !noise_of(token) ? row.head : 0;
}

// The logit of a row of the head.
float Pass::exact(const Lane& lane, int64_t row) const {
  const VesicleProjection& w = model->head;
  const float bias = w.bias ? w.bias[row] : 0.0f;
  if (packed(w))
    return k->head_row(static_cast<const uint8_t*>(w.data), static_cast<const uint8_t*>(w.trailing),
                       (w.n_in + kGroup - 1) / kGroup, row, &lane.in.quantized) + bias;
  return (w.format == kDense32 ? k->dot(lane.in.x, static_cast<const float*>(w.data) + row * w.n_in, w.n_in)
                               : k->dot_bf16(lane.in.x, static_cast<const uint16_t*>(w.data) + row * w.n_in, w.n_in)) + bias;
}

// Scores of rows [first, last) of the head's tiles by the previews of some tokens, each preview with all of its tokens.
void Pass::preview_part(int64_t thread, const int64_t* which, int64_t count, int64_t first, int64_t last) {
  const int64_t room = padded(model->vocabulary, kHeadTile);
  const int64_t begin = first * kHeadTile, end = std::min(model->vocabulary, last * kHeadTile);
  bool done[kTogether] = {};
  for (int64_t i = 0; i < count; ++i) {
    if (done[i] || !previewed(thread, which[i])) continue;
    const VesicleProjection& words = tokens[which[i]].chunk->preview->words;
    const Quantized* x[kTogether];
    float* y[kTogether];
    int64_t chosen = 0;
    for (int64_t j = i; j < count; ++j) {
      if (!previewed(thread, which[j]) || &tokens[which[j]].chunk->preview->words != &words) continue;
      done[j] = true;
      Activation& low = lane(thread, which[j]).low;
      x[chosen] = &low.quantized;
      float* to = y[chosen++] = logits_.get(0) + j * room;
      if (packed(words)) continue;
      for (int64_t row = begin; row < end; ++row)
        to[row] = words.format == kDense32
                      ? k->dot(low.x, static_cast<const float*>(words.data) + row * words.n_in, words.n_in)
                      : k->dot_bf16(low.x, static_cast<const uint16_t*>(words.data) + row * words.n_in, words.n_in);
    }
    const Precision precision = precision_of(words.format, kFullBits);
    if (packed(words))
      k->head_tiles(static_cast<const uint8_t*>(words.data), static_cast<const uint8_t*>(words.trailing),
                    (words.n_in + kGroup - 1) / kGroup, first, last, &precision, x, chosen, y);
  }
}

// Counts the scores y[first:last) of a token by bins; false where one is not finite, and there is no order. Scores that
// are most likely too low to be among the `count` best are passed over: those below what a few of them say.
bool Pass::count_scores(int64_t thread, int64_t i, const float* y, int64_t first, int64_t last, int64_t count) {
  const int64_t at = thread * kTogether + i;
  uint32_t* bins = bins_.data() + at * kBins;
  std::fill(bins, bins + kBins, 0);
  floors_[at] = -INFINITY;
  if (first >= last) return true;
  if (std::isnan(k->largest(y + first, last - first))) return false;
  const int64_t wanted = 4 * (count / pool->threads() / kStride + 8);
  if ((last - first) / kStride > 2 * wanted) {
    std::vector<float>& some = samples_[thread];
    some.clear();
    for (int64_t row = first; row < last; row += kStride) some.push_back(y[row]);
    std::nth_element(some.begin(), some.begin() + wanted, some.end(), std::greater<float>());
    floors_[at] = some[wanted];
  }
  each_above(y, first, last, floors_[at], [&](int64_t row) { ++bins[bin_of(y[row])]; });
  return true;
}

// After all threads have counted: those of y[first:last) of which no `count` others are in higher bins, rows rising.
void Pass::shortlist(int64_t i, const float* y, int64_t first, int64_t last, int64_t count, std::vector<Candidate>& out) {
  const int64_t threads = pool->threads();
  float floor = -INFINITY;
  for (int64_t other = 0; other < threads; ++other) floor = std::max(floor, floors_[other * kTogether + i]);
  const int64_t stop = floor == -INFINITY ? 0 : bin_of(floor) + 1;  // bins from here on were counted whole
  int64_t lowest = kBins, above = 0;
  while (lowest > stop && above < count) {
    --lowest;
    for (int64_t other = 0; other < threads; ++other) above += bins_[(other * kTogether + i) * kBins + lowest];
  }
  float least = -INFINITY;  // all, where too many were passed over
  if (above >= count && lowest > 0) {
    uint32_t bits = static_cast<uint32_t>(lowest) << 19;  // the smallest score of the bin
    bits ^= bits >> 31 ? 0x80000000u : 0xffffffffu;
    std::memcpy(&least, &bits, sizeof least);
  }
  out.clear();
  each_above(y, first, last, least, [&](int64_t row) { out.push_back({y[row], static_cast<int32_t>(row)}); });
}

// After all threads have their shortlists by a token's preview: computes those exactly that are best of all, of this
// thread's rows, into y. The best of them; a score that is not finite where there is no order, row -1 where none is of this thread.
Candidate Pass::rank(int64_t thread, int64_t t, int64_t i, int64_t at, int64_t count, float* y) {
  std::vector<Candidate> all;
  for (int64_t other = 0; other < pool->threads(); ++other) {
    const auto& more = candidates[other * count + i];
    all.insert(all.end(), more.begin(), more.end());
  }
  if (std::any_of(all.begin(), all.end(), [](const Candidate& c) { return c.row < 0; })) return {NAN, -1};
  const Lane& a = lane(thread, t);
  const int64_t most = std::min<int64_t>(a.words, all.size());
  std::nth_element(all.begin(), all.begin() + (most - 1), all.end());
  const Candidate cut = all[most - 1];
  Candidate found{-INFINITY, -1};
  const float* noise = noise_of(tokens[t]);
  for (const Candidate& c : candidates[at]) {
    if (cut < c) continue;
    const Candidate here{y[c.row] = exact(a, c.row) + (noise ? noise[c.row] : 0.0f), c.row};
    if (!std::isfinite(here.score)) return {NAN, -1};
    if (found.row < 0 || here < found) found = here;
  }
  return found;
}

// Whether a token's logits are screened first.
bool Pass::staged(int64_t thread, int64_t t) {
  const int32_t m = lane(thread, t).head;
  return tokens[t].wants == kLikeliest && model->head.format == kPacked8 && m > 0 && m < model->vocabulary;
}

// Whether the rows that cannot be the likeliest are found out by their leading bits, and the others read whole.
bool Pass::screened(int64_t thread, int64_t t) {
  return tokens[t].wants == kLikeliest && !tokens[t].logits && !noise_of(tokens[t]) && model->screen &&
         static_cast<int64_t>(wanting.size()) <= kScreened && !staged(thread, t) && !previewed(thread, t);
}

// How far a token's screened scores may be from the exact ones. What is left unread of a row, e, changes its score by
// e x = sum (e direction) (direction x) + e rest, of which all but the last term is known, and that is |e| |rest| at most.
void Pass::bound(Lane& lane) {
  const VesicleScreen& screen = *model->screen;
  const Quantized& q = lane.in.quantized;
  const int64_t width = model->width;
  float* x = lane.normed;
  for (int64_t i = 0; i < width; ++i) x[i] = q.scale(i / kGroup) * q.codes(i / kGroup)[i % kGroup];
  const float norm = std::sqrt(k->dot(x, x, width));
  lane.along = lane.along_.get(screen.k);
  for (int64_t d = 0; d < screen.k; ++d) {
    const float* direction = screen.directions + d * width;
    const float along = lane.along[d] = k->dot(direction, x, width);
    for (int64_t i = 0; i < width; ++i) x[i] -= along * direction[i];
  }
  // The products are rounded to fp16, by 2^-11 of themselves at most.
  lane.reach = 1.0001f * std::sqrt(k->dot(x, x, width)) + norm / 1024;
  lane.slack = screen.slack * norm + screen.offset;
}

// Reads tiles [first, last) whole, into y. The best of their rows.
Candidate Pass::score(const Activation& x, int64_t first, int64_t last, float* y) {
  const VesicleProjection& w = model->head;
  const Quantized* in = &x.quantized;
  const Precision precision = precision_of(w.format, kFullBits);
  k->head_tiles(static_cast<const uint8_t*>(w.data), static_cast<const uint8_t*>(w.trailing),
                (w.n_in + kGroup - 1) / kGroup, first, last, &precision, &in, 1, &y);
  const int64_t begin = first * kHeadTile, end = std::min(model->vocabulary, last * kHeadTile);
  if (w.bias) k->add(y + begin, w.bias + begin, end - begin);
  Candidate best{-INFINITY, -1};
  for (int64_t row = begin; row < end; ++row)
    if (best.row < 0 || y[row] > best.score || std::isnan(y[row])) best = {y[row], static_cast<int32_t>(row)};
  return best;
}

// Reads the tile whole that holds the row of this thread's with the largest screened score. The best of its rows, NaN where
// a score is not finite; row -1 where the thread has no tiles.
Candidate Pass::reached(int64_t thread, int64_t t, int64_t i, int64_t first, int64_t last) {
  const int64_t vocabulary = model->vocabulary, tiles = (vocabulary + kHeadTile - 1) / kHeadTile;
  const int64_t begin = first * kHeadTile, end = std::min(vocabulary, last * kHeadTile);
  if (begin >= end) return {-INFINITY, -1};
  const VesicleScreen& screen = *model->screen;
  Lane& a = lane(thread, t);
  float *y = logits_.get(0) + i * tiles * kHeadTile, *top = tops_.get(0) + i * tiles;
  if (std::isnan(k->largest(y + begin, end - begin))) return {NAN, -1};
  k->head_bounds(screen.products, screen.norms, screen.k, a.along, a.reach, first, last, y, top,
                 uppers_.get(0) + i * tiles);
  if (last * kHeadTile > vocabulary) {  // rows that are none
    top[last - 1] = -INFINITY;
    for (int64_t row = (last - 1) * kHeadTile; row < vocabulary; ++row) top[last - 1] = std::max(top[last - 1], y[row]);
  }
  const int64_t tile = std::max_element(top + first, top + last) - top;
  return score(a.in, tile, tile + 1, y);
}

// Reads the tiles whole that may hold the likeliest row, since their bound comes up to a score that was reached. The best of
// them and of what this thread reached itself; how many rows were read.
Candidate Pass::survive(int64_t thread, int64_t t, int64_t i, int64_t first, int64_t last, float least, Candidate best,
                        int64_t* count) {
  const int64_t tiles = (model->vocabulary + kHeadTile - 1) / kHeadTile;
  const Lane& a = lane(thread, t);
  float* y = logits_.get(0) + i * tiles * kHeadTile;
  const float* upper = uppers_.get(0) + i * tiles;
  const auto survives = [&](int64_t tile) { return !(upper[tile] + a.slack < least); };
  for (int64_t tile = first; tile < last; ++tile) {
    if (!survives(tile)) continue;
    int64_t end = tile + 1;
    while (end < last && survives(end)) ++end;
    const Candidate here = score(a.in, tile, end, y);
    if (here < best || std::isnan(here.score)) best = here;
    *count += (end - tile) * kHeadTile;
    tile = end;
  }
  return best;
}

// The `count` best of y[first:last), best first; ties to the lower row. Row -1 where a number is not finite: such
// numbers have no order.
void Pass::best(const float* y, int64_t first, int64_t last, int64_t count, std::vector<Candidate>& out) {
  out.clear();
  if (first >= last) return;
  const float top = k->largest(y + first, last - first);
  if (std::isnan(top)) {
    out.push_back({top, -1});
    return;
  }
  if (count == 1) {
    const int64_t row = std::find(y + first, y + last, top) - y;
    out.push_back({top, static_cast<int32_t>(row)});
    return;
  }
  // Only what beats the worst of the kept heap is looked at again.
  for (int64_t i = first; i < last; ++i) {
    const Candidate c{y[i], static_cast<int32_t>(i)};
    if (static_cast<int64_t>(out.size()) < count) {
      out.push_back(c);
      std::push_heap(out.begin(), out.end());
    } else if (c < out.front()) {
      std::pop_heap(out.begin(), out.end());
      out.back() = c;
      std::push_heap(out.begin(), out.end());
    }
  }
  std::sort_heap(out.begin(), out.end());
}

// The likeliest row of a token's candidates; -1 where a logit is not finite.
int64_t Pass::likeliest(std::vector<Candidate>& all, const Lane& lane, int64_t survivors) {
  const auto doubtful = [](const Candidate& c) { return c.row < 0 || !std::isfinite(c.score); };
  if (std::any_of(all.begin(), all.end(), doubtful)) return -1;
  std::sort(all.begin(), all.end());
  if (survivors) {
    all.resize(std::min<size_t>(all.size(), survivors));
    for (auto& c : all) c.score = exact(lane, c.row);
    if (std::any_of(all.begin(), all.end(), doubtful)) return -1;
    std::sort(all.begin(), all.end());
  }
  return all.front().row;
}

// Logits of rows [first, last) of the head's tiles for some of the tokens that want them, and their best.
void Pass::head_part(int64_t thread, const int64_t* which, int64_t count, int64_t first, int64_t last) {
  const VesicleProjection& w = model->head;
  const int64_t width = model->width, vocabulary = model->vocabulary, room = padded(vocabulary, kHeadTile);
  const int64_t begin = first * kHeadTile, end = std::min(vocabulary, last * kHeadTile);
  float* logits = logits_.get(0);
  if (packed(w)) {
    for (int stage = 0; stage < 2; ++stage) {  // all bits, then the leading ones alone
      const Quantized* x[kTogether];
      float* y[kTogether];
      int64_t chosen = 0;
      for (int64_t i = 0; i < count; ++i) {
        if (previewed(thread, which[i])) continue;
        if ((staged(thread, which[i]) || screened(thread, which[i])) != (stage == 1)) continue;
        x[chosen] = &lane(thread, which[i]).in.quantized;
        y[chosen++] = logits + i * room;
      }
      const Precision precision = precision_of(w.format, stage ? 4 : kFullBits);
      if (chosen)
        k->head_tiles(static_cast<const uint8_t*>(w.data), static_cast<const uint8_t*>(w.trailing),
                      (w.n_in + kGroup - 1) / kGroup, first, last, &precision, x, chosen, y);
    }
  } else {
    for (int64_t row = begin; row < end; ++row)
      for (int64_t i = 0; i < count; ++i) {
        if (previewed(thread, which[i])) continue;
        const float* x = lane(thread, which[i]).in.x;
        logits[i * room + row] =
            w.format == kDense32 ? k->dot(x, static_cast<const float*>(w.data) + row * width, width)
                                 : k->dot_bf16(x, static_cast<const uint16_t*>(w.data) + row * width, width);
      }
  }
  preview_part(thread, which, count, first, last);
  for (int64_t i = 0; i < count && begin < end; ++i) {
    const Token& token = tokens[which[i]];
    float* y = logits + i * room;
    if (w.bias) k->add(y + begin, w.bias + begin, end - begin);
    if (const float* noise = noise_of(token)) k->add(y + begin, noise + begin, end - begin);
    if (token.logits && !previewed(thread, which[i])) std::memcpy(token.logits + begin, y + begin, (end - begin) * sizeof(float));
  }
}

void Pass::head(int64_t thread) {
  const int64_t threads = pool->threads(), width = model->width;
  const VesicleProjection& w = model->head;
  each(thread, [&](int64_t t) {
    finish_ffn(thread, model->n_layers - 1, t);
    Lane& a = lane(thread, t);
    if (reports(thread)) {
      lost_[t] = std::isnan(k->largest(a.residual, width));
      VesiclePlanRow& told = tokens[t].plan[model->n_layers - 1];
      const bool likeliest = tokens[t].wants == kLikeliest;
      told.head = w.format == kPacked8 ? a.head : 0;
      told.likeliest = likeliest ? a.words : 0;
      told.logits = likeliest ? 0 : a.words;
    }
    if (tokens[t].states && reports(thread)) norm(model->final_norm, a.residual, tokens[t].states);
    if (!tokens[t].wants) return;
    norm(model->final_norm, a.residual, a.in.room(width));
    a.in.prepare(k, width, width, packed(w), &shelf, place(thread, t));
    if (screened(thread, t)) bound(a);
    if (!previewed(thread, t)) return;
    const VesiclePreview& preview = *tokens[t].chunk->preview;
    const int64_t rank = preview.words.n_in;
    float* low = a.low.room(rank);
    for (int64_t d = 0; d < rank; ++d) low[d] = k->dot(preview.down + d * width, a.in.x, width);
    a.low.prepare(k, rank, rank, packed(preview.words), &low_shelf, place(thread, t));
  });
  const int64_t tiles = (model->vocabulary + kHeadTile - 1) / kHeadTile, count = wanting.size();
  const int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
  const int64_t begin = first * kHeadTile, end = std::min(model->vocabulary, last * kHeadTile);
  const int64_t room = padded(model->vocabulary, kHeadTile);
  bool ranks = false;
  for (int64_t start = 0; start < count; start += kTogether) {
    const int64_t here = std::min(kTogether, count - start);
    head_part(thread, wanting.data() + start, here, first, last);
    bool screens = false, previews = false;
    for (int64_t i = 0; i < here; ++i) {
      const int64_t t = wanting[start + i], at = thread * count + start + i;
      if (previewed(thread, t)) {
        previews = true;
        candidates[at].clear();
        const float* y = logits_.get(0) + i * room;
        if (!count_scores(thread, i, y, begin, end, lane(thread, t).words)) candidates[at].push_back({NAN, -1});
      }
      if (tokens[t].wants != kLikeliest) continue;
      ranks = true;
      if (previewed(thread, t)) continue;
      if (screened(thread, t)) {
        screens = true;
        reached_[at] = reached(thread, t, i, first, last);
        continue;
      }
      best(logits_.get(0) + i * room, begin, end, staged(thread, t) ? lane(thread, t).head : 1, candidates[at]);
    }
    if (!screens && !previews) continue;
    pool->barrier();
    for (int64_t i = 0; previews && i < here; ++i) {
      const int64_t t = wanting[start + i], at = thread * count + start + i;
      if (previewed(thread, t) && candidates[at].empty())
        shortlist(i, logits_.get(0) + i * room, begin, end, lane(thread, t).words, candidates[at]);
    }
    if (previews) pool->barrier();
    for (int64_t i = 0; i < here; ++i) {
      const int64_t t = wanting[start + i], at = thread * count + start + i;
      if (previewed(thread, t)) {
        float *y = logits_.get(0) + i * room, *to = tokens[t].logits;
        reached_[at] = rank(thread, t, start + i, at, count, y);
        if (to && begin < end) std::memcpy(to + begin, y + begin, (end - begin) * sizeof(float));
      }
      if (!screened(thread, t)) continue;
      float least = -INFINITY;
      bool known = true;
      for (int64_t other = 0; other < threads; ++other) {
        const float score = reached_[other * count + start + i].score;
        known = known && !std::isnan(score);
        least = std::max(least, score);
      }
      candidates[at].clear();
      if (!known) candidates[at].push_back({NAN, -1});
      else if (begin < end)
        candidates[at].push_back(survive(thread, t, i, first, last, least, reached_[at], &counted_[at]));
    }
    if (start + kTogether < count) pool->barrier();  // before the logits are written over
  }
  if (!ranks) return;
  pool->barrier();
  for (int64_t i = thread; i < count; i += threads) {  // one thread a token: the survivors are few
    const int64_t t = wanting[i];
    if (tokens[t].wants != kLikeliest) continue;
    std::vector<Candidate> all;
    int64_t scored = 0;
    for (int64_t other = 0; other < threads; ++other) {
      const int64_t at = other * count + i;
      scored += counted_[at];
      if (!previewed(thread, t)) all.insert(all.end(), candidates[at].begin(), candidates[at].end());
      else if (reached_[at].row >= 0 || std::isnan(reached_[at].score)) all.push_back(reached_[at]);
    }
    const Lane& a = lane(thread, t);
    tokens[t].chunk->likeliest = likeliest(all, a, staged(thread, t) ? a.head : 0);
    tokens[t].chunk->scored = previewed(thread, t)  ? a.words
                              : screened(thread, t) ? scored
                              : staged(thread, t)   ? a.head
                                                    : model->vocabulary;
  }
}

}  // namespace vesicle
