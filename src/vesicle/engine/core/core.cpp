// What Python calls: passes, and products by themselves. One thread pool serves them all.

#include <memory>
#include <mutex>

#include "encode.h"
#include "pass.h"

namespace vesicle {
namespace {

// y (T, columns) = bias + x (T, n_in), of which counts[t] channels at bits[t] bits, times a packed weight.
struct Product {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleProjection* w;
  const float* x;
  const int32_t *counts, *bits;
  int64_t tokens;
  float* y;
  int32_t* rows_read;
  Shelf shelf;
  Activation activations[kMaxTokens];
  Output out;

  void run(int64_t thread) {
    const int64_t threads = pool->threads();
    for (int64_t start = 0; start < tokens; start += kMaxTokens) {
      const int64_t n = std::min(kMaxTokens, tokens - start);
      for (int64_t i = thread; i < n; i += threads) {
        Activation& a = activations[i];
        std::memcpy(a.room(w->n_in), x + (start + i) * w->n_in, w->n_in * sizeof(float));
        rows_read[start + i] = a.prepare(k, w->n_in, counts[start + i], packed(*w), &shelf, i);
      }
      pool->barrier();
      int64_t which[kMaxTokens];
      Activation* in[kMaxTokens];
      for (int64_t i = 0; i < n; ++i) {
        which[i] = i;
        in[i] = &activations[i];
      }
      multiply(k, *w, bits + start, in, which, n, n, false, &out, thread, threads);
      pool->barrier();
      for (int64_t i = thread; i < n; i += threads)
        out.fetch(k, i, n, threads, w->n_out, y + (start + i) * w->n_out);
    }
  }
};

// y (T, n_out) = x (T, n_in) times the rows of a packed head.
struct HeadProduct {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleProjection* w;
  const float* x;
  int64_t tokens;
  int32_t bits;
  float *y, *logits;
  Buffer<float> storage;
  Shelf shelf;
  Activation activations[kMaxTokens];

  void run(int64_t thread) {
    const int64_t threads = pool->threads(), room = padded(w->n_out, kHeadTile), tiles = room / kHeadTile;
    const int64_t first = tiles * thread / threads, last = tiles * (thread + 1) / threads;
    const Precision precision = precision_of(w->format, bits);
    for (int64_t start = 0; start < tokens; start += kMaxTokens) {
      const int64_t n = std::min(kMaxTokens, tokens - start);
      for (int64_t i = thread; i < n; i += threads) {
        std::memcpy(activations[i].room(w->n_in), x + (start + i) * w->n_in, w->n_in * sizeof(float));
        activations[i].prepare(k, w->n_in, w->n_in, true, &shelf, i);
      }
      pool->barrier();
      const Quantized* in[kMaxTokens];
      float* out[kMaxTokens];
      for (int64_t i = 0; i < n; ++i) {
        in[i] = &activations[i].quantized;
        out[i] = logits + i * room;
      }
      k->head_tiles(static_cast<const uint8_t*>(w->data), static_cast<const uint8_t*>(w->trailing),
                    (w->n_in + kGroup - 1) / kGroup, first, last, &precision, in, n, out);
      const int64_t begin = first * kHeadTile, end = std::min(w->n_out, last * kHeadTile);
      for (int64_t i = 0; i < n && begin < end; ++i)
        std::memcpy(y + (start + i) * w->n_out + begin, out[i] + begin, (end - begin) * sizeof(float));
      pool->barrier();
    }
  }
};

// Summaries of all complete blocks of a sequence, layer by layer.
struct Summaries {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleModel* model;
  const VesicleChunk* chunk;

  void run(int64_t thread) {
    const int64_t size = model->size, bytes = chunk->vectors * size * (model->summary_format == kF32 ? 4 : 2);
    const KvView view{model->keys,       model->values, model->page_stride, model->key_scales,
                      model->value_scales, size};
    for (int64_t l = thread; l < model->n_layers; l += pool->threads())
      for (int64_t g = 0; chunk->summaries[l] && g < model->kv_heads; ++g) {
        const int64_t row = l * model->kv_heads + g;
        for (int64_t index = 0; index + 1 < chunk->held[row]; ++index)
          k->summarise(&view, static_cast<int32_t>(model->kv_format), chunk->tables[row * chunk->room + index],
                       chunk->vectors,
                       static_cast<char*>(chunk->summaries[l]) + (g * chunk->room_summaries + index / kBlock * kBlock) * bytes,
                       index % kBlock);
      }
  }
};

// What bounds a screened head's scores.
struct Screening {
  const Kernels* k;
  ThreadPool* pool;
  const VesicleProjection* w;
  const float* directions;
  int64_t directions_n;
  uint16_t* products;
  float* norms;
  std::vector<float> widest;  // of a thread

  void run(int64_t thread) {
    const int64_t tiles = (w->n_out + kHeadTile - 1) / kHeadTile;
    float whole[kHeadTile];
    for (int64_t tile = tiles * thread / pool->threads(); tile < tiles * (thread + 1) / pool->threads(); ++tile) {
      k->head_rest(static_cast<const uint8_t*>(w->data), static_cast<const uint8_t*>(w->trailing), w->n_in, tile,
                   directions, directions_n, products + tile * directions_n * kHeadTile, norms + tile * kHeadTile,
                   whole);
      widest[thread] = std::max(widest[thread], *std::max_element(whole, whole + kHeadTile));
    }
  }
};

struct Core {
  std::mutex mutex;  // one call at a time: the pool and the buffers are shared
  std::unique_ptr<ThreadPool> pool;
  std::unique_ptr<Product> product;
  std::unique_ptr<HeadProduct> head;
  const Kernels* kernels = nullptr;
  int64_t owner = 0;

  void ready(int64_t threads) {
    if (!kernels) kernels = kernels_for(nullptr);
#if defined(__unix__) || defined(__APPLE__)
    if (owner != getpid()) {  // after a fork the threads are gone, and must not be joined
      pool.release();
      owner = getpid();
    }
#endif
    if (!pool || pool->threads() != threads) pool.reset(new ThreadPool(threads));
    if (!product) product.reset(new Product);
    if (!head) head.reset(new HeadProduct);
  }
};

Core& core() {
  static Core* instance = new Core;  // never destroyed: threads may outlive static destructors
  return *instance;
}

int64_t clamp_threads(int64_t threads) { return std::max<int64_t>(1, std::min(threads, kMaxThreads)); }

}  // namespace
}  // namespace vesicle

extern "C" {

uint64_t vesicle_plan_layout() { return kPlanLayout; }  // lets Python check its rows

int64_t vesicle_sizes(int64_t which) {  // lets Python check its mirrors
  const int64_t sizes[] = {sizeof(VesicleProjection), sizeof(VesicleNorm), sizeof(VesicleLayer),
                           sizeof(VesicleSmall),      sizeof(VesicleModel), sizeof(VesicleRule),
                           sizeof(VesicleModulator),  sizeof(VesicleScreen), sizeof(VesiclePreview),
                           sizeof(VesicleChunk),      sizeof(VesicleEncoding)};
  return which >= 0 && which < 11 ? sizes[which] : -1;
}

// Limits the instruction set (generic, avx2, avx512; null for the best). Returns the name in use, or null.
const char* vesicle_instructions(const char* name) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  const vesicle::Kernels* kernels = vesicle::kernels_for(name);
  if (!kernels) return nullptr;
  core.kernels = kernels;
  return kernels->name;
}

void* vesicle_open() { return new vesicle::Pass; }

void vesicle_close(void* pass) { delete static_cast<vesicle::Pass*>(pass); }

// The caller has checked shapes and reserved the pages. Stages that follow others run on as many threads as they did,
// since the threads' shares of the state are theirs.
void vesicle_pass(void* pass, const VesicleModel* model, VesicleChunk* chunks, int64_t n, int64_t first, int64_t last,
                  int64_t threads) {
  vesicle::Core& core = vesicle::core();
  vesicle::Pass& p = *static_cast<vesicle::Pass*>(pass);
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(first ? p.threads() : vesicle::clamp_threads(threads));
  p.prepare(core.kernels, core.pool.get(), model, chunks, n, first, last);
  core.pool->run(&p);
  p.finish();
}

float vesicle_encode(const VesicleEncoding* encoding, int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::Encode e{core.pool.get(), encoding, std::vector<float>(core.pool->threads())};
  core.pool->run(&e);
  return *std::max_element(e.worst.begin(), e.worst.end());
}

void vesicle_multiply(const VesicleProjection* w, const float* x, const int32_t* counts, const int32_t* bits,
                      int64_t tokens, float* y, int32_t* rows_read, int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::Product& p = *core.product;
  p.k = core.kernels;
  p.pool = core.pool.get();
  p.w = w;
  p.x = x;
  p.counts = counts;
  p.bits = bits;
  p.tokens = tokens;
  p.y = y;
  p.rows_read = rows_read;
  p.out.room(w->n_out, std::min(tokens, vesicle::kMaxTokens), p.pool->threads());
  p.shelf.room(std::min(tokens, vesicle::kMaxTokens), w->n_in);
  p.pool->run(&p);
}

// Fills a sequence's summaries with those of every block but the newest, in the layers where there is room for them.
void vesicle_summarise(const VesicleModel* model, const VesicleChunk* chunk, int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::Summaries s{core.kernels, core.pool.get(), model, chunk};
  core.pool->run(&s);
}

float vesicle_screen(const VesicleProjection* head, const float* directions, int64_t k, uint16_t* products, float* norms,
                     int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::Screening s{core.kernels, core.pool.get(), head,  directions,
                       k,            products,        norms, std::vector<float>(core.pool->threads())};
  core.pool->run(&s);
  return *std::max_element(s.widest.begin(), s.widest.end());
}

// y (T, V) = x (T, D) times the rows of a packed head at `bits` bits, without bias.
void vesicle_head(const VesicleProjection* w, const float* x, int64_t tokens, int32_t bits, float* y,
                  int64_t threads) {
  vesicle::Core& core = vesicle::core();
  std::lock_guard<std::mutex> lock(core.mutex);
  core.ready(vesicle::clamp_threads(threads));
  vesicle::HeadProduct& p = *core.head;
  p.k = core.kernels;
  p.pool = core.pool.get();
  p.w = w;
  p.x = x;
  p.tokens = tokens;
  p.bits = bits;
  p.y = y;
  p.shelf.room(std::min(tokens, vesicle::kMaxTokens), w->n_in);
  p.logits = p.storage.get(vesicle::kMaxTokens * vesicle::padded(w->n_out, vesicle::kHeadTile));
  p.pool->run(&p);
}

}  // extern "C"
