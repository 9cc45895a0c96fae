// Many tokens of bf16: the codes of a few rows are expanded to bf16, and multiplied by the tokens as they lie, two columns a 32-bit lane.
//
// Maths     W[n, k] = 2 scale (u - zero), or 2 scale u + minimum, rounded to bf16 once: what a dense bf16 model holds.
// Layout    a tile of 16 rows as [k / 2][16] pairs of columns, kTilesWide tiles side by side, in a thread's own memory; x is read in place.
// Bytes     the packed weight once, its expanded tiles from the second-level cache for every kRowsHigh tokens.
// Work      32 multiply-adds an instruction, as two int8 digits have, without their folding: nothing is left to do between columns.
// Numerics  products exact, sums fp32 over all columns, one rounding to the output's dtype.
#pragma once
#include "bipolar.h"

namespace effllm {

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
constexpr int kTilesWide = 2, kRowsHigh = 14;  // 28 accumulators of 32 registers

// The four columns of a step as two vectors of pairs.
template <class V, int BITS, int STEP>
inline void expand_steps(const uint8_t* block, const Weight& w, int64_t tile, int64_t b, int64_t k, float zero, uint8_t* out) {
  if constexpr (STEP < 8) {
    const int64_t first = b * 32 + 4 * STEP;
    if (first >= k) return;
    const int64_t g = (tile * w.groups + (w.group ? first / w.group : 0)) * 16;
    const auto step = V::axpb(load_scale<V>(w.scale, g, w.half), 2.f, 0.f);
    const auto low = w.minimum ? load_scale<V>(w.minimum, g, w.half) : V::axpb(step, -zero, 0.f);
    const auto u = codes_at<V, BITS, STEP>(block);
    auto column = [&]<int C>() { return first + C < k ? V::fma(V::template column<C>(u), step, low) : V::zero_f(); };
    V::store_pairs(out + STEP * 128, column.template operator()<0>(), column.template operator()<1>());
    V::store_pairs(out + STEP * 128 + 64, column.template operator()<2>(), column.template operator()<3>());
    expand_steps<V, BITS, STEP + 1>(block, w, tile, b, k, zero, out);
  }
}

// One tile of w at `out`, w.blocks * 1024 bytes.
template <class V, int BITS> void expand_tile(const Weight& w, int64_t k, float zero, int64_t tile, uint8_t* out) {
  for (int64_t b = 0; b < w.blocks; ++b) expand_steps<V, BITS, 0>(w.codes + (tile * w.blocks + b) * 64 * BITS, w, tile, b, k, zero, out + b * 1024);
}

// MR tokens from x (ld elements apart) times T expanded tiles, `tiles` of which are there.
template <class V, int MR, int T>
inline void expanded_block(const Weight& w, const uint16_t* x, int64_t ld, int64_t pairs, const uint8_t* flat, int64_t stride, int64_t tile, int tiles, int64_t m0, const float* bias, void* y, Type type) {
  typename V::F sum[MR][T];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[m][t] = V::zero_f();
  for (int64_t c = 0; c < pairs; ++c) {
    typename V::W wide[T];
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) wide[t] = V::load(flat + t * stride + c * 64);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) sum[m][t] = V::dot_pairs(sum[m][t], wide[t], x + m * ld + 2 * c);
  }
  finish_tiles<V, MR, T>(w, tile, tiles, m0, sum, 1.f, nullptr, bias, y, type);
}

template <class V, int MR>
inline void expanded_rows(const Weight& w, const uint16_t* x, int64_t ld, int64_t pairs, const uint8_t* flat, int64_t stride, int64_t tile, int tiles, int64_t m, int64_t end, const float* bias, void* y, Type type) {
  for (; m + MR <= end; m += MR) expanded_block<V, MR, kTilesWide>(w, x + m * ld, ld, pairs, flat, stride, tile, tiles, m, bias, y, type);
  if constexpr (MR > 1)
    if (m < end) expanded_rows<V, (MR > 6 ? 6 : MR > 2 ? 2 : 1)>(w, x, ld, pairs, flat, stride, tile, tiles, m, end, bias, y, type);
}

// Tiles from .. to of w times m tokens of x, whose rows have k columns, ld apart; columns up to the next even number are read.
template <class V, int BITS>
void multiply_expanded(const Weight& w, const uint16_t* x, int64_t m, int64_t k, int64_t ld, float zero, int64_t from, int64_t to, const float* bias, void* y, Type type) {
  static thread_local std::vector<uint8_t> memory;
  const int64_t stride = w.blocks * 1024, pairs = (k + 1) / 2;
  if (static_cast<int64_t>(memory.size()) < kTilesWide * stride + 64) memory.resize(static_cast<size_t>(kTilesWide * stride + 64));
  uint8_t* flat = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  const int64_t chunk = std::max<int64_t>(4 * kRowsHigh, kChunkBytes / (2 * ld) / kRowsHigh * kRowsHigh);  // tokens that stay in the second-level cache
  for (int64_t m0 = 0; m0 < m; m0 += chunk)
    for (int64_t t = from; t < to; t += kTilesWide) {
      const int tiles = static_cast<int>(std::min<int64_t>(kTilesWide, to - t));
      for (int i = 0; i < tiles; ++i) expand_tile<V, BITS>(w, k, zero, t + i, flat + i * stride);
      expanded_rows<V, kRowsHigh>(w, x, ld, pairs, flat, stride, t, tiles, m0, std::min(m, m0 + chunk), bias, y, type);
    }
}
#endif

}  // namespace effllm
