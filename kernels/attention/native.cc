// Causal grouped-query attention with the XSA epilogue on a CPU, float32: forward and backward; and the layers of a stack of parameters.
//
// One task per sequence and kv head, in the threads of XLA. In each, blocks of queries meet the keys that they see; scores stay in the
// cache and are computed again in the backward pass, which also gives dq.q / gain and dk.k of each row. Every product is one `tile` of
// registers: left operand read by broadcast, right operand in rows of vectors. Scores are in units of log2, so that exp2 is all that is
// needed.
// B batch, S queries (the last S of T positions), H query heads, G kv heads, K head_dim.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "xla/ffi/api/c_api.h"  // the C++ interface beside it would take longer to compile than all of this

namespace {

#ifdef __AVX512F__
constexpr int W = 16, ROWS = 8, COLS = 3;  // floats of a vector; a tile holds ROWS COLS + COLS + 1 of them in registers
#else
constexpr int W = 8, ROWS = 4, COLS = 2;
#endif
constexpr int PANEL = 48, BLOCK = 64;  // keys of a panel; queries of one head at a time
constexpr float LN2 = 0.693147181f;

typedef float Vec __attribute__((vector_size(4 * W), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * W), aligned(4)));
typedef uint32_t Bits __attribute__((vector_size(4 * W), aligned(4)));

const Ints IOTA = [] { Ints x; for (int i = 0; i < W; ++i) x[i] = i; return x; }();

inline Vec load(const float* p) { return *reinterpret_cast<const Vec*>(p); }
inline void store(float* p, Vec x) { *reinterpret_cast<Vec*>(p) = x; }

// C[M, N W] (+)= sum over k < depth of A[m am + k ak] B[k ldb + n].
template <int M, int N>
inline void tile(int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc, bool add) {
  Vec sum[M][N];
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) sum[m][n] = add ? load(c + m * ldc + n * W) : Vec{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[N];
    for (int n = 0; n < N; ++n) row[n] = load(b + k * ldb + n * W);
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) sum[m][n] += a[m * am + k * ak] * row[n];
  }
  for (int m = 0; m < M; ++m)
    for (int n = 0; n < N; ++n) store(c + m * ldc + n * W, sum[m][n]);
}

template <int M>
inline void tiles(int64_t width, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, float* c, int64_t ldc,
                  bool add) {
  int64_t n = 0;
  for (; n + COLS * W <= width && n + (COLS + 1) * W != width; n += COLS * W) tile<M, COLS>(depth, a, am, ak, b + n, ldb, c + n, ldc, add);
  for (; n + 2 * W <= width; n += 2 * W) tile<M, 2>(depth, a, am, ak, b + n, ldb, c + n, ldc, add);
  for (; n < width; n += W) tile<M, 1>(depth, a, am, ak, b + n, ldb, c + n, ldc, add);
}

// Fewer rows than ROWS, which is rare: compiled once, not wherever there is a product.
__attribute__((noinline)) void rest(int64_t count, int64_t width, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b,
                                    int64_t ldb, float* c, int64_t ldc, bool add) {
  for (int64_t m = 0; m < count; ++m) tiles<1>(width, depth, a + m * am, am, ak, b, ldb, c + m * ldc, ldc, add);
}

// The same for any width that W divides and any count of rows up to ROWS.
inline void product(int64_t count, int64_t width, int64_t depth, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb,
                    float* c, int64_t ldc, bool add = false) {
  if (count == ROWS) tiles<ROWS>(width, depth, a, am, ak, b, ldb, c, ldc, add);
  else rest(count, width, depth, a, am, ak, b, ldb, c, ldc, add);
}

template <int N, class F>
inline float fold(const float* x, F f) {
  typedef float Half __attribute__((vector_size(2 * N), aligned(4)));
  if constexpr (N == 2) return f(x[0], x[1]);
  else {
    const Half y = f(*reinterpret_cast<const Half*>(x), *reinterpret_cast<const Half*>(x + N / 2));
    return fold<N / 2>(reinterpret_cast<const float*>(&y), f);
  }
}
inline float sum(Vec x) { return fold<W>(reinterpret_cast<const float*>(&x), [](auto a, auto b) { return a + b; }); }
inline float top(Vec x) { return fold<W>(reinterpret_cast<const float*>(&x), [](auto a, auto b) { return a > b ? a : b; }); }

inline float dot(const float* a, const float* b, int64_t n) {
  Vec s{};
  for (int64_t k = 0; k < n; k += W) s += load(a + k) * load(b + k);
  return sum(s);
}

// 2^x to 1e-7 relative; below -126 the smallest normal number; above 127 anything, which only unseen keys have; NaN of NaN, which must not
// look like a weight.
inline Vec exp2(Vec x) {
  x = x < -126.0f ? Vec{} - 126.0f : x;
  const Vec shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f);  // adding 1.5 * 2^23 rounds to an integer
  Vec p = r * 1.535336188e-4f + 1.339887440e-3f;
  p = p * r + 9.618437357e-3f;
  p = p * r + 5.550332471e-2f;
  p = p * r + 2.402264791e-1f;
  p = p * r + 6.931472028e-1f;
  p = p * r + 1.0f;
  const Vec y = (Vec)(((Bits)shifted << 23) + (Bits)p);
  return x == x ? y : x;
}

// One head's side of a call: rows of K floats, `stride` apart.
struct Rows {
  float* at;
  int64_t stride;
  float* operator[](int64_t i) const { return at + i * stride; }
};

struct Shape {
  int64_t B, S, T, H, G, K, padded;
  Shape(const int64_t* q, const int64_t* k)
      : B(q[0]), S(q[1]), T(k[1]), H(q[2]), G(k[2]), K(q[3]), padded((T + PANEL - 1) / PANEL * PANEL) {}
  Rows query(const float* x, int64_t b, int64_t s, int64_t h) const { return {const_cast<float*>(x) + ((b * S + s) * H + h) * K, H * K}; }
  Rows key(const float* x, int64_t b, int64_t g) const { return {const_cast<float*>(x) + (b * T * G + g) * K, G * K}; }
};

// The transpose of [T, K] as panels [T / PANEL][K][PANEL]; what lies beyond T is zero.
void transpose(const Shape& s, Rows x, std::vector<float>& panels) {
  panels.assign(s.padded * s.K, 0.0f);
  for (int64_t t = 0; t < s.T; ++t)
    for (int64_t k = 0; k < s.K; ++k) panels[t / PANEL * PANEL * s.K + k * PANEL + t % PANEL] = x[t][k];
}

// Rows one after another: where they lie further apart their cache lines meet in few sets.
Rows together(const Shape& s, Rows x, std::vector<float>& kept) {
  kept.resize(s.T * s.K);
  for (int64_t t = 0; t < s.T; ++t) std::copy_n(x[t], s.K, &kept[t * s.K]);
  return {kept.data(), s.K};
}

struct Always {};
inline Vec pick(Always, Vec x, Vec) { return x; }
inline Vec pick(Ints seen, Vec x, Vec other) { return seen ? x : other; }

// A block of queries of one head: `count` of them from position `last` on; some of them see the keys from `from` on.
struct Block {
  const Shape& s;
  int64_t count, last, from;

  Block(const Shape& s, int64_t start, const int32_t* first)
      : s(s), count(std::min<int64_t>(BLOCK, s.S - start)), last(s.T - s.S + start), from(*std::min_element(first, first + count)) {}

  // out[m, j] = x_m . y_j, for the panels that a tile of rows sees.
  void scores(const float* x, const std::vector<float>& panels, float* out) const {
    for (int64_t m = 0; m < count; m += ROWS) {
      const int64_t n = std::min<int64_t>(ROWS, count - m);
      for (int64_t p = from / PANEL * PANEL; p < last + m + n; p += PANEL)
        product(n, PANEL, s.K, x + m * s.K, s.K, 1, &panels[p * s.K], PANEL, out + m * s.padded + p, s.padded);
    }
  }
  // out[m] = sum over j of weights[m, j] y_j.
  void gather(const float* weights, Rows y, Rows out) const {
    for (int64_t m = 0; m < count; m += ROWS) {
      const int64_t n = std::min<int64_t>(ROWS, count - m);
      product(n, s.K, last + m + n - from, weights + m * s.padded + from, s.padded, 1, y[from], y.stride, out[m], out.stride);
    }
  }
  // out[j] += sum over m of weights[m, j] x_m.
  void scatter(const float* weights, const float* x, Rows out) const {
    for (int64_t j = from; j < last + count; j += ROWS) {
      const int64_t n = std::min<int64_t>(ROWS, last + count - j), m = std::max<int64_t>(0, j - last);
      product(n, s.K, count - m, weights + m * s.padded + j, 1, s.padded, x + m * s.K, s.K, out[j], out.stride, true);
    }
  }
  // f(j, seen) for the vectors of keys that row m looks at, in part or whole; zero(j) for the others that its products read.
  template <class F, class Z>
  inline void each(int64_t m, int32_t first, F f, Z zero) const {
    const int32_t end = last + count, mine = last + m;
    int32_t j = from / W * W;
    for (; j + W <= first; j += W) zero(j);
    for (; j <= mine; j += W) {
      if (j >= first && j + W - 1 <= mine) f(j, Always{});
      else f(j, (IOTA + j >= first) & (IOTA + j <= mine));
    }
    for (; j < end; j += W) zero(j);
  }
};

// u = v / max(|v|, 1e-12); returns 1 / max(|v|, 1e-12).
inline float unit(const float* v, int64_t K, float* u) {
  const float inverse = 1.0f / std::sqrt(std::max(dot(v, v, K), 1e-24f));
  for (int64_t k = 0; k < K; ++k) u[k] = v[k] * inverse;
  return inverse;
}

// A call by XLA. Types and shapes are those that native.py gives.
struct Call {
  XLA_FFI_CallFrame* frame;

  const XLA_FFI_Buffer& argument(int64_t i) const { return *static_cast<XLA_FFI_Buffer*>(frame->args.args[i]); }
  const float* in(int64_t i) const { return static_cast<const float*>(argument(i).data); }
  float* out(int64_t i) const { return static_cast<float*>(static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i])->data); }
  Shape shape() const { return {argument(0).dims, argument(1).dims}; }
  const int32_t* first() const { return static_cast<const int32_t*>(argument(3).data); }
  bool xsa() const { return *static_cast<const bool*>(static_cast<XLA_FFI_Scalar*>(frame->attrs.attrs[0])->value); }

  bool fails(XLA_FFI_Error* error) const {
    XLA_FFI_Error_Destroy_Args args{XLA_FFI_Error_Destroy_Args_STRUCT_SIZE, nullptr, error};
    if (error) frame->api->XLA_FFI_Error_Destroy(&args);
    return error;
  }
  int64_t threads() const {
    int64_t count = 0;
    XLA_FFI_ThreadPool_NumThreads_Args args{XLA_FFI_ThreadPool_NumThreads_Args_STRUCT_SIZE, nullptr, frame->ctx, &count};
    return fails(frame->api->XLA_FFI_ThreadPool_NumThreads(&args)) ? 1 : count;
  }
  template <class F>
  void schedule(F f) const {
    XLA_FFI_Task* task = [](void* data) { (*std::unique_ptr<F>(static_cast<F*>(data)))(); };
    XLA_FFI_ThreadPool_Schedule_Args args{XLA_FFI_ThreadPool_Schedule_Args_STRUCT_SIZE, nullptr, frame->ctx, task, new F(f)};
    if (fails(frame->api->XLA_FFI_ThreadPool_Schedule(&args))) task(args.data);
  }
};

// f(i) for all i < count, in this thread and in those of the pool that have time. Nothing waits for a thread that has not begun: those of
// the pool may all be waiting here.
template <class F>
void parallel(const Call& call, int64_t count, F f) {
  struct Shared {
    F f;
    const int64_t count;
    std::atomic<int64_t> next{0}, done{0};
    Shared(F f, int64_t count) : f(f), count(count) {}
    void work() {
      for (int64_t i; (i = next++) < count; ++done) f(i);
    }
  };
  auto shared = std::make_shared<Shared>(f, count);
  for (int64_t helpers = std::min(count, call.threads()) - 1; helpers > 0; --helpers) call.schedule([shared] { shared->work(); });
  shared->work();
  while (shared->done < count) std::this_thread::yield();
}

// (q, k, v, first, gain) -> y, o.u, lse
void forward(const Call& call) {
  const Shape s = call.shape();
  const float *q = call.in(0), *k = call.in(1), *v = call.in(2), *gain = call.in(4);
  float *y = call.out(0), *along = call.out(1), *lse = call.out(2);
  const int32_t* first = call.first();
  const bool xsa = call.xsa();
  const float scale = 1.0f / (std::sqrt((float)s.K) * LN2);
  parallel(call, s.B * s.G, [=](int64_t task) mutable {
    const int64_t b = task / s.G, g = task % s.G;
    std::vector<float> keys, own, weights(BLOCK * s.padded), scaled(BLOCK * s.K), u(s.K);
    const Rows values = together(s, s.key(v, b, g), own);
    transpose(s, s.key(k, b, g), keys);
    for (int64_t start = 0; start < s.S; start += BLOCK) {
      const int32_t* f = first + b * s.S + start;
      const Block block(s, start, f);
      const int64_t count = block.count;
      for (int64_t h = g * s.H / s.G; h < (g + 1) * s.H / s.G; ++h) {
        const Rows from = s.query(q, b, start, h), out = s.query(y, b, start, h);
        const float factor = scale * gain[h];
        for (int64_t m = 0; m < count; ++m)
          for (int64_t i = 0; i < s.K; i += W) store(&scaled[m * s.K + i], load(from[m] + i) * factor);
        block.scores(scaled.data(), keys, weights.data());
        float inverse[BLOCK];
        for (int64_t m = 0; m < count; ++m) {
          float* w = &weights[m * s.padded];
          Vec most = Vec{} - INFINITY, total{};
          block.each(m, f[m], [&](int64_t j, auto seen) {
            const Vec x = pick(seen, load(w + j), most);
            most = x > most ? x : most;
          }, [](int64_t) {});
          const float shift = top(most);
          block.each(m, f[m], [&](int64_t j, auto seen) {
            const Vec e = pick(seen, exp2(load(w + j) - shift), Vec{});
            store(w + j, e);
            total += e;
          }, [&](int64_t j) { store(w + j, Vec{}); });
          const float all = sum(total);
          inverse[m] = 1 / all;
          lse[(b * s.S + start + m) * s.H + h] = shift + std::log2(all);
        }
        block.gather(weights.data(), values, out);
        for (int64_t m = 0; m < count; ++m) {
          float part = 0;
          if (xsa) {
            unit(values[block.last + m], s.K, u.data());
            part = dot(out[m], u.data(), s.K) * inverse[m];
          }
          along[(b * s.S + start + m) * s.H + h] = part;
          for (int64_t i = 0; i < s.K; i += W) store(out[m] + i, load(out[m] + i) * inverse[m] - load(&u[i]) * part);
        }
      }
    }
  });
}

// Of y = o - (o.u) u: do = dy - (dy.u) u, and do . o = do . y because do is orthogonal to u (kernels/attention/xsa.py).
// (q, k, v, first, gain, y, o.u, lse, dy) -> dq, dk, dv, dq.q / gain, dk.k
void backward(const Call& call) {
  const Shape s = call.shape();
  const float *q = call.in(0), *k = call.in(1), *v = call.in(2), *gain = call.in(4);
  const float *y = call.in(5), *along = call.in(6), *lse = call.in(7), *dy = call.in(8);
  float *dq = call.out(0), *dk = call.out(1), *dv = call.out(2), *q_dot = call.out(3), *k_dot = call.out(4);
  const int32_t* first = call.first();
  const bool xsa = call.xsa();
  const float scale = 1.0f / (std::sqrt((float)s.K) * LN2);
  parallel(call, s.B * s.G, [=](int64_t task) mutable {
    const int64_t b = task / s.G, g = task % s.G;
    std::vector<float> keys, values, own, p(BLOCK * s.padded), ds(BLOCK * s.padded), scaled(BLOCK * s.K), grad(BLOCK * s.K), u(s.K);
    std::vector<float> sums(2 * s.T * s.K);
    const Rows key = together(s, s.key(k, b, g), own), value = s.key(v, b, g);
    const Rows to_key{sums.data(), s.K}, to_value{&sums[s.T * s.K], s.K};
    transpose(s, key, keys);
    transpose(s, value, values);
    for (int64_t start = 0; start < s.S; start += BLOCK) {
      const int32_t* f = first + b * s.S + start;
      const Block block(s, start, f);
      const int64_t count = block.count;
      for (int64_t h = g * s.H / s.G; h < (g + 1) * s.H / s.G; ++h) {
        const Rows from = s.query(q, b, start, h), out = s.query(y, b, start, h);
        const Rows given = s.query(dy, b, start, h), to = s.query(dq, b, start, h);
        const float factor = scale * gain[h];
        float inner[BLOCK];
        for (int64_t m = 0; m < count; ++m) {
          float a = 0, c = 0, inverse = 0, *sum = to_value[block.last + m];
          if (xsa) {
            inverse = unit(value[block.last + m], s.K, u.data());
            a = dot(given[m], u.data(), s.K);
            c = along[(b * s.S + start + m) * s.H + h];
          }
          for (int64_t i = 0; i < s.K; i += W) {
            const Vec d = load(given[m] + i) - load(&u[i]) * a;
            store(&scaled[m * s.K + i], load(from[m] + i) * factor);
            store(&grad[m * s.K + i], d);
            store(sum + i, load(sum + i) - (load(out[m] + i) * a + d * c) * inverse);
          }
          inner[m] = dot(given[m], out[m], s.K);
        }
        block.scores(scaled.data(), keys, p.data());
        block.scores(grad.data(), values, ds.data());
        for (int64_t m = 0; m < count; ++m) {
          const float shift = lse[(b * s.S + start + m) * s.H + h];
          float *w = &p[m * s.padded], *d = &ds[m * s.padded];
          block.each(m, f[m], [&](int64_t j, auto seen) {
            const Vec e = pick(seen, exp2(load(w + j) - shift), Vec{});
            store(w + j, e);
            store(d + j, pick(seen, e * (load(d + j) - inner[m]) * LN2, Vec{}));
          }, [&](int64_t j) { store(w + j, Vec{}); store(d + j, Vec{}); });
        }
        block.gather(ds.data(), key, to);
        block.scatter(ds.data(), scaled.data(), to_key);
        block.scatter(p.data(), grad.data(), to_value);
        for (int64_t m = 0; m < count; ++m) {
          q_dot[(b * s.S + start + m) * s.H + h] = dot(to[m], from[m], s.K) * scale;
          for (int64_t i = 0; i < s.K; i += W) store(to[m] + i, load(to[m] + i) * factor);
        }
      }
    }
    for (int64_t t = 0; t < s.T; ++t) {
      k_dot[(b * s.T + t) * s.G + g] = dot(to_key[t], key[t], s.K);
      std::copy_n(to_key[t], s.K, s.key(dk, b, g)[t]);
      std::copy_n(to_value[t], s.K, s.key(dv, b, g)[t]);
    }
  });
}

// (x [L, ...]) -> its L parts.
void unstack(const Call& call) {
  const XLA_FFI_Buffer& x = call.argument(0);
  int64_t size = 1;
  for (int64_t i = 1; i < x.rank; ++i) size *= x.dims[i];
  parallel(call, x.dims[0], [=](int64_t i) { std::copy_n(call.in(0) + i * size, size, call.out(i)); });
}

// Asked about itself a handler says which interface it was compiled for, else it works.
template <class F>
XLA_FFI_Error* handle(XLA_FFI_CallFrame* frame, F work) {
  if (frame->extension_start && frame->extension_start->type == XLA_FFI_Extension_Metadata) {
    XLA_FFI_Metadata& about = *reinterpret_cast<XLA_FFI_Metadata_Extension*>(frame->extension_start)->metadata;
    about.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR};
    about.traits = 0;
  } else {
    work(Call{frame});
  }
  return nullptr;
}

}  // namespace

extern "C" XLA_FFI_Error* golf_xsa_forward(XLA_FFI_CallFrame* frame) { return handle(frame, forward); }
extern "C" XLA_FFI_Error* golf_xsa_backward(XLA_FFI_CallFrame* frame) { return handle(frame, backward); }
extern "C" XLA_FFI_Error* golf_unstack(XLA_FFI_CallFrame* frame) { return handle(frame, unstack); }
