// Many tokens of fp32 where no instruction accumulates products of bytes: codes are expanded to fp32, and multiplied as dense weights are.
//
// Maths     W[n, k] = 2 scale (u - zero), or 2 scale u + minimum, in fp32.
// Layout    a tile of 16 rows as [k][16] floats, kColumns of them at a time, in a thread's own memory; x is read in place.
// Bytes     the packed weight once for every chunk of tokens, its expanded columns from the first-level cache for every six tokens.
// Work      8 multiply-adds an instruction; three digits take about twice as long. Two digits, of 16-bit activations, are as fast in narrow.h.
// Numerics  sums fp32 over all columns.
#pragma once
#include "bipolar.h"

namespace effllm {

constexpr int kColumns = 256, kRowsWide = 6;  // 16 KB of a tile; 6 x 16 sums are 12 of 16 registers

// Whether so many tokens of a type are multiplied by expanded weights: in fp32 here, or in bf16 (expand.h).
template <class V> inline bool expands(const Plan& how, int64_t m, Type type) {
  return how.expand_from > 0 && m >= how.expand_from && (V::narrow ? type == Type::f32 : V::fast_bf16 && type == Type::bf16);
}

// The four columns of a step.
template <class V, int BITS, int STEP>
inline void float_steps(const uint8_t* block, const Weight& w, int64_t tile, int64_t b, int64_t k, float zero, float* out) {
  if constexpr (STEP < 8) {
    const int64_t first = b * 32 + 4 * STEP;
    if (first >= k) return;
    const int64_t g = (tile * w.groups + (w.group ? first / w.group : 0)) * 16;
    const auto step = V::axpb(load_scale<V>(w.scale, g, w.half), 2.f, 0.f);
    const auto low = w.minimum ? load_scale<V>(w.minimum, g, w.half) : V::axpb(step, -zero, 0.f);
    const auto u = codes_at<V, BITS, STEP>(block);
    auto column = [&]<int C>() { V::store_f(out + (4 * STEP + C) * 16, V::fma(V::template column<C>(u), step, low)); };
    column.template operator()<0>(), column.template operator()<1>(), column.template operator()<2>(), column.template operator()<3>();
    float_steps<V, BITS, STEP + 1>(block, w, tile, b, k, zero, out);
  }
}

// MR tokens times `columns` expanded ones of a tile, added to their sums, MR x 16. A function of its own: inlined, a sum is left without a register.
template <class V, int MR> __attribute__((noinline)) void wide_sums(const float* x, int64_t ld, int64_t columns, const float* flat, float* sums) {
  typename V::F acc[MR];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) acc[m] = V::load_f(sums + m * 16);
  for (int64_t c = 0; c < columns; ++c) {
    const auto wide = V::load_f(flat + c * 16);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) acc[m] = V::fma1(wide, x[m * ld + c], acc[m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) V::store_f(sums + m * 16, acc[m]);
}

template <class V, int MR> inline void wide_rows(const float* x, int64_t ld, int64_t columns, const float* flat, float* sums, int64_t m) {
  for (; m >= MR; m -= MR, x += MR * ld, sums += MR * 16) wide_sums<V, MR>(x, ld, columns, flat, sums);
  if constexpr (MR > 1)
    if (m > 0) wide_rows<V, (MR > 3 ? 3 : 1)>(x, ld, columns, flat, sums, m);
}

// Tiles from .. to of w times m tokens of x, rows of k columns.
template <class V, int BITS>
void multiply_wide(const Weight& w, const float* x, int64_t m, int64_t k, float zero, int64_t from, int64_t to, const float* bias, void* y) {
  static thread_local std::vector<float> memory;
  const int64_t chunk = std::max<int64_t>(16 * kRowsWide, kChunkBytes / (4 * k) / kRowsWide * kRowsWide);  // tokens that stay in the second-level cache
  const size_t held = static_cast<size_t>((kColumns + std::min(m, chunk)) * 16 + 16);
  if (memory.size() < held) memory.resize(held);
  float* flat = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 4;
  float* sums = flat + kColumns * 16;
  for (int64_t m0 = 0; m0 < m; m0 += chunk)
    for (int64_t t = from; t < to; ++t) {
      const int64_t rows = std::min(chunk, m - m0);
      std::fill_n(sums, rows * 16, 0.f);
      for (int64_t c = 0; c < k; c += kColumns) {
        const int64_t end = std::min(k, c + kColumns);
        for (int64_t b = c / 32; b * 32 < end; ++b) float_steps<V, BITS, 0>(w.codes + (t * w.blocks + b) * 64 * BITS, w, t, b, k, zero, flat + (b * 32 - c) * 16);
        wide_rows<V, kRowsWide>(x + m0 * k + c, k, end - c, flat, sums, rows);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const typename V::F sum[1][1] = {{V::load_f(sums + i * 16)}};
        finish_tiles<V, 1, 1>(w, t, 1, m0 + i, sum, 1.f, nullptr, bias, y, Type::f32);
      }
    }
}

}  // namespace effllm
