// y[m, n] = sum_k x[m, k] * W[n, k] over bipolar-INT weights in the tile16 layout (runtime/layouts/tile16.py).
//
// Maths     per segment of columns (one weight scale, one activation step) the dot product of unsigned codes u and integer
//           activations is exact in int32; then
//               symmetric, integer   y += scale * (acc * step - zero * step * sum_x) * 2
//               affine               y += scale * (acc * step) * 2 + minimum * (step * sum_x)
//           `corr` in Activations is the last factor, -zero * step * sum_x or step * sum_x / 2, and the factor 2 comes once at the end.
// Bytes     N * K * bits / 8 + scales; the activations stay in cache.
// Work      per 64 codes: extraction (mask, shift) once, one byte dot product per token and digit.
// Paths     gemv: weights are unpacked in registers for up to 4 tokens. gemm: 32 rows are unpacked to bytes once and reused by
//           all tokens, from `unpack_from` tokens on, or where `prefer_gemm` finds fewer instructions. expand.h and narrow.h have others.
// Numerics  integer sums exact; fp32 across segments.
#pragma once
#include "narrow.h"
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include "lookup.h"
#endif

namespace effllm {

// Steps FROM .. TO of a block of T tiles, whose codes lie `stride` bytes apart: a broadcast activation serves all of them.
template <class V, int BITS, int D, int MR, int T, int FROM, int TO>
__attribute__((always_inline)) inline void dot_steps(const uint8_t* block, int64_t stride, const int8_t* const* x, typename V::I (*acc)[D][T]) {
  if constexpr (FROM < TO) {
    typename V::W w[T];
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) w[t] = codes_at<V, BITS, FROM>(block + t * stride);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) acc[m][d][t] = V::template dp<(BITS == 8)>(acc[m][d][t], w[t], x[m * D + d] + 4 * FROM);
    dot_steps<V, BITS, D, MR, T, FROM + 1, TO>(block, stride, x, acc);
  }
}

// Tokens m0 .. m0 + MR times the rows of T tiles side by side.
template <class V, int BITS, int D, int MR, int T>
void gemv_tile(const Weight& w, const Activations& x, int64_t tile, int64_t m0, const float* out_scale, const float* bias, void* y, Type type) {
  typename V::F sum[MR][T];
  const int8_t* row[MR * D];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 2
    for (int t = 0; t < T; ++t) sum[m][t] = V::zero_f();
    for (int d = 0; d < D; ++d) row[m * D + d] = x.row(m0 + m, d);
  }
  const int64_t stride = w.blocks * 64 * BITS;
  const uint8_t* block = w.codes + tile * stride;
  const int64_t per = x.seg < 32 ? 0 : x.seg / 32;  // blocks per segment; 0: two segments per block
  for (int64_t s = 0, b = 0; s < x.segs; ++s) {
    typename V::I acc[MR][D][T];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 3
      for (int d = 0; d < D; ++d)
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t) acc[m][d][t] = V::zero_i();
    const int8_t* at[MR * D];
    if (per == 0) {
      for (int i = 0; i < MR * D; ++i) at[i] = row[i] + b * 32;
      const uint8_t* here = block + b * 64 * BITS;
      if (s % 2 == 0) dot_steps<V, BITS, D, MR, T, 0, 4>(here, stride, at, acc);
      else dot_steps<V, BITS, D, MR, T, 4, 8>(here, stride, at, acc), ++b;
    } else {
      const int64_t end = std::min(w.blocks, b + per);
      for (; b < end; ++b) {
        for (int i = 0; i < MR * D; ++i) at[i] = row[i] + b * 32;
#pragma GCC unroll 2
        for (int t = 0; t < T; ++t)  // behind a tile's end come those of the next T, not its neighbour, which is read already
          fetch_ahead<BITS>(block + t * stride + b * 64 * BITS + (b * 64 * BITS + kAhead < stride ? 0 : (T - 1) * stride));
        dot_steps<V, BITS, D, MR, T, 0, 8>(block + b * 64 * BITS, stride, at, acc);
      }
    }
    fold_segment<V, D, MR, T>(w, x, s, tile, T, m0, sum, [&](int m, int t) { return joined<V, D>(acc[m][0][t], acc[m][D > 1 ? 1 : 0][t], acc[m][D - 1][t]); });
  }
  finish_tiles<V, MR, T>(w, tile, T, m0, sum, 2.f, out_scale, bias, y, type);
}

template <class V, int BITS, int STEP> inline void unpack_steps(const uint8_t* block, uint8_t* out) {
  if constexpr (STEP < 8) {
    V::store(out + STEP * 64, codes_at<V, BITS, STEP>(block));
    unpack_steps<V, BITS, STEP + 1>(block, out);
  }
}

// MR tokens times T tiles, `tiles` of which are there, whose codes lie as bytes in `flat` ([T][blocks * 8][64]).
template <class V, bool WIDE, int D, int MR, int T>
void gemm_block(const Weight& w, const Activations& x, const uint8_t* flat, int64_t tile, int tiles, int64_t m0, const float* out_scale, const float* bias, void* y, Type type) {
  typename V::F sum[MR][T];
#pragma GCC unroll 8
  for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
    for (int t = 0; t < T; ++t) sum[m][t] = V::zero_f();
  const int64_t steps = w.blocks * 8, per = x.seg / 4;
  const int8_t* row = x.row(m0, 0);
  const int64_t stride = x.stride();
  const uint8_t* at[T];
  for (int t = 0; t < T; ++t) at[t] = flat + (t < tiles ? t : 0) * steps * 64;
  for (int64_t s = 0; s < x.segs; ++s) {
    typename V::I acc[MR][T][D];
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m)
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) acc[m][t][d] = V::zero_i();
    const int64_t end = std::min(steps, (s + 1) * per);
    for (int64_t c = s * per; c < end; ++c) {
      typename V::W codes[T];
#pragma GCC unroll 4
      for (int t = 0; t < T; ++t) codes[t] = V::load(at[t] + c * 64);
#pragma GCC unroll 8
      for (int m = 0; m < MR; ++m)
#pragma GCC unroll 3
        for (int d = 0; d < D; ++d) {
          const int8_t* p = row + (m * D + d) * stride + c * 4;
#pragma GCC unroll 4
          for (int t = 0; t < T; ++t) acc[m][t][d] = V::template dp<WIDE>(acc[m][t][d], codes[t], p);
        }
    }
    fold_segment<V, D, MR, T>(w, x, s, tile, tiles, m0, sum, [&](int m, int t) { return joined<V, D>(acc[m][t][0], acc[m][t][D > 1 ? 1 : 0], acc[m][t][D - 1]); });
  }
  finish_tiles<V, MR, T>(w, tile, tiles, m0, sum, 2.f, out_scale, bias, y, type);
}

// Whether unpacking to bytes beats unpacking in registers: instructions per 64 codes, an unpack being `extract` of them.
template <class V, int BITS, int D> inline bool prefer_gemm(int64_t m) {
  constexpr int parts = part_width(BITS, 2) ? 3 : part_width(BITS, 1) ? 2 : 1;
  constexpr int extract = BITS == 8 ? 1 : 3 * parts;
  const int64_t passes = (m + 3) / 4, gemv = passes * extract + m * D;
  return extract + 2 + m * D < gemv;  // + 2: store and load again
}

// Tokens m .. m + MR where so many are left, then half of it, down to one.
template <class V, bool WIDE, int D, int MR, int T>
inline void gemm_rows(const Weight& w, const Activations& x, const uint8_t* flat, int64_t tile, int tiles, int64_t m, int64_t end, const float* out_scale, const float* bias, void* y, Type type) {
  for (; m + MR <= end; m += MR) gemm_block<V, WIDE, D, MR, T>(w, x, flat, tile, tiles, m, out_scale, bias, y, type);
  if constexpr (MR > 1)
    if (m < end) gemm_rows<V, WIDE, D, (MR > 4 ? 4 : MR > 2 ? 2 : 1), T>(w, x, flat, tile, tiles, m, end, out_scale, bias, y, type);
}

// The rows and tiles of a pass: as asked where that pass exists, else the nearest below. Passes are what 32 registers hold (vector.h).
template <class V, bool WIDE, int D>
inline void gemm_pass(const Plan& plan, const Weight& w, const Activations& x, const uint8_t* flat, int64_t tile, int tiles, int64_t m, int64_t end, const float* out_scale, const float* bias, void* y, Type type) {
  constexpr int MR = V::gemm_rows >= 6 && D == 2 ? 4 : V::gemm_rows / D > 0 ? V::gemm_rows / D : 1;
  const int64_t rows = plan.rows ? plan.rows : MR;
  if constexpr (V::gemm_rows >= 6) {
    if (plan.tiles == 4) return gemm_rows<V, WIDE, D, (D == 1 ? 4 : 2), 4>(w, x, flat, tile, tiles, m, end, out_scale, bias, y, type);
    if (D == 1 && rows >= 8) return gemm_rows<V, WIDE, D, (D == 1 ? 8 : 1), 2>(w, x, flat, tile, tiles, m, end, out_scale, bias, y, type);
    if (D == 1 && rows == 4) return gemm_rows<V, WIDE, D, (D == 1 ? 4 : 1), 2>(w, x, flat, tile, tiles, m, end, out_scale, bias, y, type);
    if (D == 2 && rows == 3) return gemm_rows<V, WIDE, D, (D == 2 ? 3 : 1), 2>(w, x, flat, tile, tiles, m, end, out_scale, bias, y, type);
  }
  gemm_rows<V, WIDE, D, MR, 2>(w, x, flat, tile, tiles, m, end, out_scale, bias, y, type);
}

template <class V, int BITS, int D, int MR, int T>
inline void gemv_rows(const Weight& w, const Activations& x, int64_t tile, int64_t m, const float* out_scale, const float* bias, void* y, Type type) {
  for (; m + MR <= x.m; m += MR) gemv_tile<V, BITS, D, MR, T>(w, x, tile, m, out_scale, bias, y, type);
  if constexpr (MR > 1)
    if (m < x.m) gemv_rows<V, BITS, D, MR / 2, T>(w, x, tile, m, out_scale, bias, y, type);
}

template <class V, int BITS, int D>
void wide_tiles(const Weight& w, const Activations& x, int64_t from, int64_t to, const float* out_scale, const float* bias, void* y, Type type, const Plan& plan) {
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
  if constexpr (D == 1 && V::fast_single)
    if (x.m == 1 && single_wanted(BITS, plan)) { gemv_single<V, BITS>(w, x, from, to, out_scale, bias, y, type, plan); return; }
#endif
  if (plan.unpack_from > 0 ? x.m < plan.unpack_from : !prefer_gemm<V, BITS, D>(x.m)) {
    int64_t t = from;
    if constexpr (V::gemm_rows >= 6 && D < 3)
      if (plan.rows == 8)
        for (; t < to; ++t) gemv_rows<V, BITS, D, 8, 1>(w, x, t, 0, out_scale, bias, y, type);
    if constexpr (V::gemm_rows >= 6 && D == 2)  // eight rows of digits: their broadcasts are worth sharing, and two tiles fill 32 registers
      if (x.m > 2)
        for (; t + 2 <= to; t += 2) gemv_rows<V, BITS, D, 4, 2>(w, x, t, 0, out_scale, bias, y, type);
    constexpr int tokens = V::narrow && D == 3 ? 2 : 4;  // three digits of four tokens are more sums than 16 registers hold
    for (; t < to; ++t) gemv_rows<V, BITS, D, tokens, 1>(w, x, t, 0, out_scale, bias, y, type);
    return;
  }
  const int64_t steps = w.blocks * 8, side = V::gemm_rows >= 6 && plan.tiles == 4 ? 4 : 2;
  std::vector<uint8_t> flat(static_cast<size_t>(side * steps * 64 + 64));
  uint8_t* aligned = flat.data() + (64 - reinterpret_cast<uintptr_t>(flat.data()) % 64) % 64;
  const int64_t chunk = chunk_of(plan, D * x.stride());  // unpacking again costs about as much as one token
  for (int64_t m0 = 0; m0 < x.m; m0 += chunk)
    for (int64_t t = from; t < to; t += side) {
      const int tiles = static_cast<int>(std::min<int64_t>(side, to - t));
      for (int i = 0; i < tiles; ++i)
        for (int64_t b = 0; b < w.blocks; ++b)
          unpack_steps<V, BITS, 0>(w.codes + ((t + i) * w.blocks + b) * 64 * BITS, aligned + (i * steps + b * 8) * 64);
      gemm_pass<V, BITS == 8, D>(plan, w, x, aligned, t, tiles, m0, std::min(x.m, m0 + chunk), out_scale, bias, y, type);
    }
}

// Tiles from .. to of w times prepared activations.
template <class V, int BITS, int D>
void multiply_tiles(const Weight& w, const Activations& x, int64_t from, int64_t to, const float* out_scale, const float* bias, void* y, Type type, const Plan& plan) {
  if constexpr (takes_narrow<V>(BITS, D)) narrow_tiles<V, BITS, D>(w, x, from, to, out_scale, bias, y, type, plan);
  else wide_tiles<V, BITS, D>(w, x, from, to, out_scale, bias, y, type, plan);
}

}  // namespace effllm
