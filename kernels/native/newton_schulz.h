// The steps of Newton-Schulz, in float32, or in bfloat16 with products that add up in float32, two values at a time where the processor can
// (AVX512_BF16).
//
// On the right of a product a matrix [K, N] lies as words, of one float or of two bfloat16 below each other, panel after panel of c columns:
// [N / c][K / values per word][c].
#pragma once

#include <cstring>

#include "maps.h"

namespace {

typedef uint16_t Half;  // the upper half of a float
typedef Half Halves __attribute__((vector_size(2 * W), aligned(2)));

inline Vec value(const float* p) { return load(p); }
inline Vec value(const Half* p) { return (Vec)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16); }

// x as it is stored: bfloat16 to the nearest, ties to even.
inline Vec rounded(const float*, Vec x) { return x; }
inline Vec rounded(const Half*, Vec x) {
  const Bits bits = (Bits)x;
  return x == x ? (Vec)((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000) : x;
}
inline void store(Half* p, Vec x) { *reinterpret_cast<Halves*>(p) = __builtin_convertvector((Bits)rounded(p, x) >> 16, Halves); }

// sum + a b of the values of each word.
inline Vec add(Vec sum, Vec a, Vec b, const float*) { return sum + a * b; }
inline Vec add(Vec sum, Vec a, Vec b, const Half*) {
#ifdef __AVX512BF16__
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));  // its intrinsic needs a header that takes long to compile
  return sum;
#else
  const auto halves = [](Vec x, int of) { return (Vec)(of ? (Bits)x & 0xffff0000 : (Bits)x << 16); };
  return sum + halves(a, 0) * halves(b, 0) + halves(a, 1) * halves(b, 1);
#endif
}

// C[ROWS, N W] = ROWS rows of a times the panel b of so many words.
template <int N, class T>
inline void word_tile(int64_t words, const T* a, int64_t lda, const float* b, float* c) {
  Vec sum[ROWS][N] = {};
  for (int64_t k = 0; k < words; ++k) {
    Vec row[N];
    for (int n = 0; n < N; ++n) row[n] = load(b + (k * N + n) * W);
    for (int m = 0; m < ROWS; ++m) {
      int32_t word;
      std::memcpy(&word, a + m * lda + k * (4 / sizeof(T)), 4);
      const Vec all = (Vec)(Ints{} + word);
      for (int n = 0; n < N; ++n) sum[m][n] = add(sum[m][n], all, row[n], a);
    }
  }
  for (int m = 0; m < ROWS; ++m)
    for (int n = 0; n < N; ++n) store(c + (m * N + n) * W, sum[m][n]);
}

template <class T>
__attribute__((noinline)) void word_tiles(int64_t c, int64_t K, const T* a, const float* b, float* to) {
  const int64_t words = K * sizeof(T) / 4;
  if (c == 3 * W) word_tile<3>(words, a, K, b, to);
  else if (c == 2 * W) word_tile<2>(words, a, K, b, to);
  else word_tile<1>(words, a, K, b, to);
}

// f(row, first of W columns, their sums) for rows [rows, K] times columns n to n + c of what `right` holds, K rows of it.
template <class T, class F>
inline void multiply(int64_t rows, int64_t K, const T* a, const float* right, int64_t n, int64_t c, F f) {
  float sums[ROWS * 3 * W];
  for (int64_t m = 0; m < rows; m += ROWS) {
    word_tiles(c, K, a + m * K, right + n * K * sizeof(T) / 4, sums);
    for (int64_t i = 0; i < ROWS; ++i)
      for (int64_t j = 0; j < c; j += W) f(m + i, n + j, load(sums + i * c + j));
  }
}

// x [K, N] for the right of a product.
template <class T>
void rows_right(int64_t K, int64_t N, const T* x, float* right) {
  T* to = reinterpret_cast<T*>(right);
  constexpr int64_t each = 4 / sizeof(T);
  panels(N, [&](int64_t n, int64_t c) {
    for (int64_t k = 0; k < K; k += each, to += c * each)
      for (int64_t i = 0; i < c; ++i)
        for (int64_t e = 0; e < each; ++e) to[i * each + e] = x[(k + e) * N + n + i];
  });
}

// The transposed x [N, K] likewise.
template <class T>
void columns_right(int64_t K, int64_t N, const T* x, float* right) {
  constexpr int64_t each = 4 / sizeof(T);
  panels(N, [&](int64_t n, int64_t c) {
    for (int64_t k = 0; k < K; k += each, right += c)
      for (int64_t i = 0; i < c; ++i) std::memcpy(right + i, x + (n + i) * K + k, 4);
  });
}

// x [M, N] in place, M and N multiples of 16; rounded where golf_jax/optim/muon.py rounds.
template <class T>
void orthogonalize(int64_t M, int64_t N, T* x, const float* coefficients, int64_t steps, bool square_first) {
  std::vector<float> right(std::max(M * N, M * M) * sizeof(T) / 4);
  std::vector<T> gram(M * M), scaled(M * M), polynomial(M * M);
  for (int64_t step = 0; step < steps; ++step) {
    const float a = coefficients[3 * step], b = coefficients[3 * step + 1], c = coefficients[3 * step + 2];
    columns_right(N, M, x, right.data());
    panels(M, [&](int64_t n, int64_t width) {  // down to the diagonal; the rest by symmetry
      const int64_t rows = std::min(M, (n + width + ROWS - 1) / ROWS * ROWS);
      multiply(rows, N, x, right.data(), n, width, [&](int64_t i, int64_t j, Vec sum) { store(&gram[i * M + j], sum); });
    });
    for (int64_t m = 0; m < M; ++m)
      for (int64_t n = 0; n < m; ++n) gram[m * M + n] = gram[n * M + m];
    rows_right(M, M, gram.data(), right.data());
    for (int64_t i = 0; i < M * M; i += W) store(&scaled[i], (square_first ? 1.0f : c) * value(&gram[i]));
    panels(M, [&](int64_t n, int64_t width) {
      multiply(M, M, scaled.data(), right.data(), n, width, [&](int64_t i, int64_t j, Vec sum) {
        const T* g = &gram[i * M + j];
        const Vec square = rounded(g, sum);
        store(&polynomial[i * M + j], rounded(g, b * value(g)) + (square_first ? rounded(g, c * square) : square));
      });
    });
    rows_right(M, N, x, right.data());
    panels(N, [&](int64_t n, int64_t width) {
      multiply(M, M, polynomial.data(), right.data(), n, width, [&](int64_t i, int64_t j, Vec sum) {
        T* at = x + i * N + j;
        store(at, rounded(at, a * value(at)) + rounded(at, sum));
      });
    });
  }
}

// (x [L, M, N], coefficients [steps, 3]) -> x after the steps
template <class T>
void newton_schulz(const Call& call) {
  const XLA_FFI_Buffer& x = call.argument(0);
  const int64_t M = x.dims[1], N = x.dims[2], steps = call.argument(1).dims[0];
  const bool square_first = call.attribute<bool>();
  parallel(call, x.dims[0], [=, from = static_cast<const T*>(x.data)](int64_t layer) {
    T* to = reinterpret_cast<T*>(call.out(0)) + layer * M * N;
    std::copy_n(from + layer * M * N, M * N, to);
    orthogonalize(M, N, to, call.in(1), steps, square_first);
  });
}

}  // namespace
