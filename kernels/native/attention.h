// Causal grouped-query attention with the XSA epilogue on a CPU, float32: forward and backward.
//
// One task per sequence and kv head, in the threads of XLA. In each, blocks of queries meet the keys that they see; scores stay in the
// cache and are computed again in the backward pass, which also gives dq.q / gain and dk.k of each row. Every product is one `tile` of
// registers: left operand read by broadcast, right operand in rows of vectors. Scores are in units of log2, so that exp2 is all that is
// needed.
// B batch, S queries (the last S of T positions), H query heads, G kv heads, K head_dim.

#pragma once

#include <cmath>

#include "tiles.h"

namespace {

constexpr int PANEL = 48;  // keys of a panel
constexpr float LN2 = 0.693147181f;

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

// (q, k, v, first, gain) -> y, o.u, lse
void forward(const Call& call) {
  const Shape s(call.argument(0).dims, call.argument(1).dims);
  const float *q = call.in(0), *k = call.in(1), *v = call.in(2), *gain = call.in(4);
  float *y = call.out(0), *along = call.out(1), *lse = call.out(2);
  const int32_t* first = static_cast<const int32_t*>(call.argument(3).data);
  const bool xsa = call.attribute<bool>();
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
  const Shape s(call.argument(0).dims, call.argument(1).dims);
  const float *q = call.in(0), *k = call.in(1), *v = call.in(2), *gain = call.in(4);
  const float *y = call.in(5), *along = call.in(6), *lse = call.in(7), *dy = call.in(8);
  float *dq = call.out(0), *dk = call.out(1), *dv = call.out(2), *q_dot = call.out(3), *k_dot = call.out(4);
  const int32_t* first = static_cast<const int32_t*>(call.argument(3).data);
  const bool xsa = call.attribute<bool>();
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

}  // namespace
