#include "pass.h"

#include <cmath>

#include "rules.h"

namespace vesicle {
namespace {

constexpr int kTransmitters = 5;
constexpr int kSmall = 1, kBig = 2;

void count_rows(Token& token, int64_t l, int s, int32_t rows, int64_t outputs) {
  token.rows[4 * l + s] = rows;
  token.outputs[4 * l + s] = outputs;
}

}  // namespace

void Pass::attention_decision(Lane& lane, const Token& token, int64_t l) {
  const VesiclePlanRow& planned = token.plan[l];
  std::copy(planned.channels, planned.channels + 2, lane.row.channels);
  std::copy(planned.bits, planned.bits + 2, lane.row.bits);
  lane.row.attention = planned.attention;
  lane.blocks = planned.kv_blocks;
}

// The linear predictor and the effectors' rules, as in predictors/ and effectors/rules.py: the FFN of layer l and the
// attention of the next. Threads that share a token each decide into a row of their own, and read none of the Plan's
// that one of them writes.
void Pass::release(Lane& lane, Token& token, int64_t l, bool reports) {
  const int64_t width = model->width, next = l + 1;
  const VesicleModulator* m = token.modulator;
  if (!m) {
    const VesiclePlanRow& planned = token.plan[l];
    std::copy(planned.channels + 2, planned.channels + 4, lane.row.channels + 2);
    std::copy(planned.bits + 2, planned.bits + 4, lane.row.bits + 2);
    lane.row.ffn = planned.ffn;
    if (next == model->n_layers) decide_head(lane, token, planned);
    return;
  }
  const double scale = 1.0 / std::sqrt(static_cast<double>(k->dot(lane.after, lane.after, width)) / width + 1e-6);
  double levels[kTransmitters] = {1, 1, 1, 1, 1};
  bool known = true;
  for (int64_t a = 0; a < m->released; ++a) {
    const int64_t i = l * m->released + a;
    const double z = k->dot(m->weight + i * width, lane.after, width) * scale + m->offset[i] +
                     std::exp(static_cast<double>(m->log_slope[i])) * m->logit + m->place_weight[i] * token.place;
    if (token.acting >> m->columns[a] & 1) levels[m->columns[a]] = std::nearbyint(1e6 / (1.0 + std::exp(z))) / 1e6;
    known = known && !std::isnan(z);
  }
  if (reports) std::copy(levels, levels + kTransmitters, token.levels + l * kTransmitters);
  if (!known) {  // nothing can be decided from what is no number, and the token's result shall say so
    std::fill(levels, levels + kTransmitters, 1.0);
    lane.after[0] = NAN;
  }
  for (const VesicleRule* r = m->rules; r < m->rules + m->n_rules; ++r) {
    const int64_t layer = r->next ? next : l;
    if (layer == model->n_layers || (r->last && layer + 1 < model->n_layers)) continue;
    const int64_t visible = token.position / kBlock - Token::first_seen(token.position, window(layer)) / kBlock + 1;
    const int32_t value = decided(*r, levels[r->transmitter], visible);
    reinterpret_cast<int32_t*>(&lane.row)[r->number] = value;
    if (reports && !r->last) reinterpret_cast<int32_t*>(&token.plan[layer])[r->number] = value;
  }
  if (next == model->n_layers) {
    decide_head(lane, token, lane.row);
    return;
  }
  if (m->most) {
    lane.row.kv_blocks = std::min(lane.row.kv_blocks, m->most[next]);
    if (reports) token.plan[next].kv_blocks = lane.row.kv_blocks;
  }
  lane.blocks = lane.row.kv_blocks;
}

// The tokens for which `f` holds, and their activations.
template <typename F>
int64_t Pass::select(int64_t thread, F f, int64_t* which, Activation** x) {
  int64_t count = 0;
  for (int64_t t = 0; t < n; ++t) {
    if (!f(lane(thread, t))) continue;
    which[count] = t;
    x[count++] = &lane(thread, t).in;
  }
  return count;
}

void Pass::site(int64_t thread, const VesicleProjection& w, int s, const int64_t* which, Activation* const* x,
          int64_t count, Output* out) {
  int32_t bits[kMaxTokens];
  for (int64_t i = 0; i < count; ++i) bits[which[i]] = lane(thread, which[i]).row.bits[s];
  multiply(k, w, bits, x, which, count, n, false, out, thread, pool->threads());
}

// This thread's rows of the first of two low-rank maps.
void Pass::map_down(int64_t thread, const VesicleSmall* small, int64_t l, int64_t t) {
  const int64_t threads = pool->threads(), rank = small->rank, width = model->width;
  for (int64_t r = rank * thread / threads; r < rank * (thread + 1) / threads; ++r)
    inner[t * inner_rank + r] = k->dot(small->down + (l * rank + r) * width, lane(thread, t).normed, width);
}

void Pass::map_up(int64_t thread, const VesicleSmall* small, int64_t l, int64_t t, Output* out) {
  const int64_t threads = pool->threads(), rank = small->rank, width = model->width;
  for (int64_t d = width * thread / threads; d < width * (thread + 1) / threads; ++d)
    out->of(t)[d] = small->bias[l * width + d] +
                    k->dot(small->up + (l * width + d) * rank, inner + t * inner_rank, rank);
}

// On what a token lands whose FFN is small; null where it lands on nothing.
const VesicleSmall* Pass::small_ffn(int64_t thread, int64_t t) {
  return lane(thread, t).row.ffn == kSmall ? tokens[t].chunk->small_ffn : nullptr;
}

// The first or second projection of small FFNs, each with all of its tokens together. No two threads share a tile, so
// that results are complete in `out` (see `Output`), whatever the big one's are.
void Pass::small_site(int64_t thread, int64_t l, bool second, Output* out) {
  int64_t which[kMaxTokens];
  Activation* x[kMaxTokens];
  bool done[kMaxTokens] = {};
  int32_t bits[kMaxTokens];
  std::fill(bits, bits + n, kFullBits);
  for (int64_t t = 0; t < n; ++t) {
    const VesicleSmall* small = small_ffn(thread, t);
    if (done[t] || !small || !small->in) continue;
    int64_t count = 0;
    for (int64_t u = t; u < n; ++u) {
      if (small_ffn(thread, u) != small) continue;
      done[u] = true;
      which[count] = u;
      x[count++] = &lane(thread, u).in;
    }
    multiply(k, (second ? small->out : small->in)[l], bits, x, which, count, n, true, out, thread, pool->threads());
  }
}

// to = from + what a phase computed for the token; nothing was computed where a module is skipped outright.
void Pass::residual(Output* out, const VesicleNorm& post, int64_t t, bool main, bool small, const float* from,
                    float* to) {
  const int64_t width = model->width;
  if (main) {
    out->fetch(k, t, n, pool->threads(), width, to);
    if (post.gain) norm(post, to, to);
    k->add(to, from, width);
  } else if (small) {
    std::memcpy(to, out->of(t), width * sizeof(float));
    k->add(to, from, width);
  } else {
    std::memcpy(to, from, width * sizeof(float));
  }
}

void Pass::finish_ffn(int64_t thread, int64_t l, int64_t t) {
  Lane& a = lane(thread, t);
  const bool small = small_ffn(thread, t) != nullptr;
  residual(&ffn_out, model->layers[l].ffn_post_norm, t, a.row.ffn == kBig, small, a.after, a.residual);
}

void Pass::norm(const VesicleNorm& norm, const float* x, float* y) {
  if (model->rms) k->normalise(x, norm.gain, model->eps, model->width, y);
  else k->standardise(x, norm.gain, norm.bias, model->eps, model->width, y);
}

// A phase ends here: the time since the last one is its own.
void Pass::mark(int64_t thread, VesiclePhase phase) {
  if (thread || !model->seconds) return;
  const auto now = std::chrono::steady_clock::now();
  model->seconds[phase] += std::chrono::duration<double>(now - marked_).count();
  marked_ = now;
}

void Pass::attention_half(int64_t thread, int64_t l) {
  const VesicleLayer& w = model->layers[l];
  const int64_t width = model->width, kv = model->kv_heads * model->size, q_width = model->heads * model->size;
  int64_t which[kMaxTokens];
  Activation* x[kMaxTokens];
  const auto attends = [](Lane& a) { return a.row.attention != 0; };
  const auto lands = [&](int64_t t) -> const VesicleSmall* {  // on what a token lands that skips attention
    return lane(thread, t).row.attention ? nullptr : tokens[t].chunk->small_attention;
  };

  // 1. Values, keys and queries.
  each(thread, [&](int64_t t) {
    Lane& a = lane(thread, t);
    if (l) {
      finish_ffn(thread, l - 1, t);
    } else {
      embed(model->embedding, tokens[t].id, a.residual);
      for (int64_t d = 0; model->embedding_scale != 1 && d < width; ++d) a.residual[d] *= model->embedding_scale;
    }
    if (!l || !tokens[t].modulator) attention_decision(a, tokens[t], l);
    norm(w.attention_norm, a.residual, a.in.room(width));
    if (!a.row.attention) std::memcpy(a.normed, a.in.x, width * sizeof(float));
    const int32_t rows = a.in.prepare(k, width, a.row.channels[0], packed(w.value_key), &shelf, place(thread, t));
    if (reports(thread)) count_rows(tokens[t], l, 0, rows, 2 * kv + (a.row.attention ? q_width : 0));
  });
  int64_t count = select(thread, [](Lane&) { return true; }, which, x);
  site(thread, w.value_key, 0, which, x, count, &value_key);
  count = select(thread, attends, which, x);
  site(thread, w.query, 0, which, x, count, &query);
  for (int64_t t = 0; t < n; ++t)
    if (lands(t)) map_down(thread, lands(t), l, t);
  pool->barrier();
  mark(thread, kJointIn);

  // 2. Attention, shared out by blocks.
  attention(thread, l);
  pool->barrier();
  mark(thread, kAttention);

  // 3. Its output projection.
  each(thread, [&](int64_t t) {
    Lane& a = lane(thread, t);
    if (!a.row.attention) return;
    merge(t, l, a.in.room(q_width));
    const int32_t rows = a.in.prepare(k, q_width, a.row.channels[1], packed(w.attention_out), &shelf, place(thread, t));
    if (reports(thread)) count_rows(tokens[t], l, 1, rows, width);
  });
  if (!w.window) receive(thread, l);
  count = select(thread, attends, which, x);
  site(thread, w.attention_out, 1, which, x, count, &attention_out);
  for (int64_t t = 0; t < n; ++t)
    if (lands(t)) map_up(thread, lands(t), l, t, &attention_out);
  pool->barrier();
  mark(thread, kAttentionOut);
  each(thread, [&](int64_t t) {
    Lane& a = lane(thread, t);
    residual(&attention_out, w.attention_post_norm, t, a.row.attention, lands(t) != nullptr, a.residual, a.after);
    if (!reports(thread)) return;
    if (lands(t)) *tokens[t].small += 2 * width * lands(t)->rank;
    if (tokens[t].hidden) std::memcpy(tokens[t].hidden, a.after, width * sizeof(float));
  });
}

void Pass::ffn_half(int64_t thread, int64_t l) {
  const VesicleLayer& w = model->layers[l];
  const int64_t threads = pool->threads(), width = model->width, inner_width = model->ffn_width;
  const int64_t outputs = model->gated ? 2 * inner_width : inner_width;
  int64_t which[kMaxTokens];
  Activation* x[kMaxTokens];
  const auto big = [](Lane& a) { return a.row.ffn == kBig; };
  const auto maps = [&](int64_t t) -> const VesicleSmall* {
    const VesicleSmall* small = small_ffn(thread, t);
    return small && !small->in ? small : nullptr;
  };

  // 4. Release, then the FFN's gate and up projections.
  each(thread, [&](int64_t t) {
    Lane& a = lane(thread, t);
    release(a, tokens[t], l, reports(thread));
    if (a.row.ffn == 0) return;
    norm(w.ffn_norm, model->parallel ? a.residual : a.after, a.in.room(width));
    if (a.row.ffn == kSmall) {
      const VesicleSmall* small = small_ffn(thread, t);
      if (!small) return;
      if (small->in) a.in.prepare(k, width, width, packed(small->in[l]), &shelf, place(thread, t));
      else std::memcpy(a.normed, a.in.x, width * sizeof(float));
      const int64_t weights = width * (small->in ? (model->gated ? 3 : 2) * small->inner : 2 * small->rank);
      if (!reports(thread)) return;
      *tokens[t].small += weights;
      if (small->in && packed(small->in[l])) *tokens[t].coded += weights;
      return;
    }
    const int32_t rows = a.in.prepare(k, width, a.row.channels[2], packed(w.ffn_in), &shelf, place(thread, t));
    if (reports(thread)) count_rows(tokens[t], l, 2, rows, outputs);
  });
  int64_t count = select(thread, big, which, x);
  site(thread, w.ffn_in, 2, which, x, count, &ffn_in);
  small_site(thread, l, false, &ffn_in);
  for (int64_t t = 0; t < n; ++t)
    if (maps(t)) map_down(thread, maps(t), l, t);
  pool->barrier();
  mark(thread, kFfnIn);

  // 5. Its down projection.
  each(thread, [&](int64_t t) {
    Lane& a = lane(thread, t);
    if (const VesicleSmall* small = small_ffn(thread, t); small && small->in) {
      const int64_t units = small->inner, all = model->gated ? 2 * units : units;
      float* x = a.in.room(all);
      std::memcpy(x, ffn_in.of(t), all * sizeof(float));
      k->activate(model->activation, x, model->gated ? x + units : nullptr, units);
      a.in.prepare(k, units, units, packed(small->out[l]), &shelf, place(thread, t));
    }
    if (a.row.ffn != kBig) return;
    float* inner_x = a.in.room(outputs);
    ffn_in.fetch(k, t, n, threads, outputs, inner_x);
    k->activate(model->activation, inner_x, model->gated ? inner_x + inner_width : nullptr, inner_width);
    const int32_t rows = a.in.prepare(k, inner_width, a.row.channels[3], packed(w.ffn_out), &shelf, place(thread, t));
    if (reports(thread)) count_rows(tokens[t], l, 3, rows, width);
  });
  count = select(thread, big, which, x);
  site(thread, w.ffn_out, 3, which, x, count, &ffn_out);
  small_site(thread, l, true, &ffn_out);
  for (int64_t t = 0; t < n; ++t)
    if (maps(t)) map_up(thread, maps(t), l, t, &ffn_out);
  pool->barrier();
  mark(thread, kFfnOut);
}

void Pass::run(int64_t thread) {
  const int64_t end = 2 * model->n_layers;
  if (thread == 0) marked_ = std::chrono::steady_clock::now();
  for (int64_t stage = first_; stage < last_; ++stage) {
    if (stage == end) head(thread), mark(thread, kHeadPhase);
    else if (stage % 2) ffn_half(thread, stage / 2);
    else attention_half(thread, stage / 2);
  }
}

void Pass::finish() {
  if (last_ <= 2 * model->n_layers) return;
  for (int64_t t = 0; t < n; ++t) {
    const Token& token = tokens[t];
    for (int64_t l = 0; l < model->n_layers; ++l) {
      token.visited[l] = 0;
      for (int64_t i = 0; i < pool->threads(); ++i) token.visited[l] += visits(i, t, l);
      if (!token.summed) continue;
      token.summed[l] = 0;
      for (int64_t i = 0; i < pool->threads(); ++i) token.summed[l] += sums_[counter(i, t, l)];
    }
    if (lost_[t] && token.chunk->lost < 0) token.chunk->lost = token.position - token.chunk->position;
  }
}

void Pass::prepare(const Kernels* kernels, ThreadPool* threads, const VesicleModel* m, VesicleChunk* chunks,
                   int64_t count, int64_t first, int64_t last) {
  first_ = first;
  last_ = last;
  pool = threads;
  if (first) return;  // the next stages of the pass that was begun
  k = kernels;
  model = m;
  threads_ = pool->threads();
  const int64_t T = pool->threads(), width = m->width, kv = m->kv_heads * m->size, q = m->heads * m->size;
  tokens.clear();
  for (VesicleChunk* c = chunks; c < chunks + count; ++c) {
    c->lost = -1;
    const int64_t L = m->n_layers, newest = (c->position + c->n - 1) / kBlock;
    for (int64_t i = 0; i < c->n; ++i) {
      const int64_t position = c->position + i, last = i + 1 == c->n, all = c->wants == kAllLogits;
      const int64_t r = c->recorded + i, acting = c->modulator ? c->acting[r] : 0;
      Token token{c, acting ? c->modulator : nullptr, acting, c->ids[i], position, newest - position / kBlock, m->kv_heads};
      token.place = std::log2(static_cast<double>(position + 1) / kBlock) / 8;
      for (int which = 0; which < 2 && c->cosine[which]; ++which) {
        token.cosine[which] = c->cosine[which] + i * m->rotated;
        token.sine[which] = c->sine[which] + i * m->rotated;
      }
      token.plan = c->plan + r * L;
      token.levels = c->levels + r * L * kTransmitters;
      token.rows = c->rows + r * L * 4;
      token.outputs = c->outputs + r * L * 4;
      token.visited = c->visited + r * L;
      token.compared = c->compared + r * L;
      token.small = c->small + r;
      token.coded = c->coded + r;
      token.summed = c->summed ? c->summed + r * L : nullptr;
      token.hidden = c->hidden ? c->hidden + i * m->width : nullptr;
      token.states = c->states ? c->states + i * m->width : nullptr;
      // An older one's place is that of a newer one.
      const bool kept = c->queries && i >= c->n - c->room_queries;
      token.kept = kept ? c->queries + position % c->room_queries * q : nullptr;
      token.wants = all ? kLogits : last ? c->wants : kNothing;
      token.logits = token.wants && c->logits ? c->logits + (all ? i * m->vocabulary : 0) : nullptr;
      tokens.push_back(token);
    }
  }
  n = static_cast<int64_t>(tokens.size());
  while (static_cast<int64_t>(lanes.size()) < std::max(T, n)) lanes.emplace_back(new Lane);
  for (auto& lane : lanes) {
    lane->residual = lane->residual_.get(width);
    lane->after = lane->after_.get(width);
    lane->normed = lane->normed_.get(width);
  }
  value_key.room(2 * kv, n, T);
  query.room(q, n, T);
  attention_out.room(width, n, T);
  ffn_out.room(width, n, T);
  int64_t units = m->ffn_width;
  inner_rank = 1;
  for (const VesicleChunk* c = chunks; c < chunks + count; ++c) {
    if (c->small_ffn) inner_rank = std::max(inner_rank, c->small_ffn->rank);
    if (c->small_attention) inner_rank = std::max(inner_rank, c->small_attention->rank);
    if (c->small_ffn && c->small_ffn->in) units = std::max(units, c->small_ffn->inner);
  }
  ffn_in.room((m->gated ? 2 : 1) * units, n, T);
  shelf.room(alone() ? T : n, std::max({width, q, units}));
  inner = inner_.get(inner_rank * n);
  prepare_attention();
  prepare_head();
}

}  // namespace vesicle
