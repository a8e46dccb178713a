// Linear maps and the MLP, float32, without gradients, of weights that are packed once; and the layers of a stack of parameters.
//
// A packed matrix [I, O], O a multiple of 16, has the columns that one tile takes side by side, panel after panel: [O / c][I][c], c smaller
// at the end. M rows of the activations.
#pragma once

#include "tiles.h"

namespace {

// Columns of the next panel, where so many are left.
inline int64_t columns(int64_t left) { return left >= COLS * W && left != (COLS + 1) * W ? COLS * W : left >= 2 * W ? 2 * W : W; }

// f(n, c) for the panels of a matrix with so many columns.
template <class F>
inline void panels(int64_t width, F f) {
  for (int64_t n = 0, c; n < width; n += c) f(n, c = columns(width - n));
}

// (x [L, ...]) -> its L parts; packed: of [L, I, O].
void unstack(const Call& call) {
  const XLA_FFI_Buffer& x = call.argument(0);
  int64_t size = 1;
  for (int64_t i = 1; i < x.rank; ++i) size *= x.dims[i];
  const bool packed = call.attribute<bool>();
  parallel(call, x.dims[0], [=, &x](int64_t layer) {
    const float* from = call.in(0) + layer * size;
    float* to = call.out(layer);
    if (!packed) std::copy_n(from, size, to);
    else
      panels(x.dims[2], [&](int64_t n, int64_t c) {
        for (int64_t i = 0; i < x.dims[1]; ++i) std::copy_n(from + i * x.dims[2] + n, c, to + n * x.dims[1] + i * c);
      });
  });
}

// A product of its own, compiled once: between these shapes and those of attention nothing is shared.
__attribute__((noinline)) void panel(int64_t rows, int64_t c, int64_t I, const float* x, const float* w, float* y, int64_t O) {
  for (int64_t m = 0; m < rows; m += ROWS) product(std::min<int64_t>(ROWS, rows - m), c, I, x + m * I, I, 1, w, c, y + m * O, O);
}

// y [rows, O] = x [rows, I] w; then f(m, first column, columns) for what has just been written.
template <class F>
inline void map(int64_t rows, int64_t I, int64_t O, const float* x, const float* w, float* y, F f) {
  panels(O, [&](int64_t n, int64_t c) {
    panel(rows, c, I, x, w + n * I, y + n, O);
    for (int64_t m = 0; m < rows; ++m) f(y + m * O + n, m, c);
  });
}

// (x [M, I], w [I, O]) -> y [M, O]
void linear(const Call& call) {
  const int64_t M = call.argument(0).dims[0], I = call.argument(1).dims[0], O = call.argument(1).dims[1];
  parallel(call, (M + BLOCK - 1) / BLOCK, [=](int64_t task) {
    const int64_t m = task * BLOCK;
    map(std::min<int64_t>(BLOCK, M - m), I, O, call.in(0) + m * I, call.in(1), call.out(0) + m * O, [](float*, int64_t, int64_t) {});
  });
}

// (x [M, I], r [M], up [I, F], down [F, O]) -> leaky_relu(r x up)^2 down [M, O]; what lies between is never in memory as a whole.
void mlp(const Call& call) {
  const int64_t M = call.argument(0).dims[0], I = call.argument(2).dims[0], F = call.argument(2).dims[1], O = call.argument(3).dims[1];
  const float slope = call.attribute<float>();
  parallel(call, (M + BLOCK - 1) / BLOCK, [=](int64_t task) {
    const int64_t m = task * BLOCK, rows = std::min<int64_t>(BLOCK, M - m);
    const float* r = call.in(1) + m;
    std::vector<float> hidden(rows * F);
    map(rows, I, F, call.in(0) + m * I, call.in(2), hidden.data(), [=](float* at, int64_t m, int64_t c) {
      for (int64_t i = 0; i < c; i += W) {
        const Vec u = load(at + i) * r[m], leaky = u > 0.0f ? u : u * slope;
        store(at + i, leaky * leaky);
      }
    });
    map(rows, F, O, hidden.data(), call.in(3), call.out(0) + m * O, [](float*, int64_t, int64_t) {});
  });
}

}  // namespace
