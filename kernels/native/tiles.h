// What the calls in C++ have in common: vectors, tiles of registers, and calls by XLA whose work is split over its threads.
#pragma once

#include <algorithm>
#include <atomic>
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
constexpr int BLOCK = 64;  // rows that are worked on at a time, while they lie in the cache

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

// A call by XLA. Types and shapes are those that the Python beside gives.
struct Call {
  XLA_FFI_CallFrame* frame;

  const XLA_FFI_Buffer& argument(int64_t i) const { return *static_cast<XLA_FFI_Buffer*>(frame->args.args[i]); }
  const float* in(int64_t i) const { return static_cast<const float*>(argument(i).data); }
  float* out(int64_t i) const { return static_cast<float*>(static_cast<XLA_FFI_Buffer*>(frame->rets.rets[i])->data); }
  template <class T>
  T attribute() const { return *static_cast<const T*>(static_cast<XLA_FFI_Scalar*>(frame->attrs.attrs[0])->value); }  // there is one

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
