// Tiles for instruction sets whose byte products do not accumulate in 32 bits (AVX2): a product of bytes there is three instructions.
//
// Words     16-bit activations as they are, not in digits, and 8-bit ones that meet 8-bit codes: codes are widened to 16 bits, even and odd bytes
//           apart, and a product of words is two instructions for two columns of 16 bits where two digits took six for four of 8.
// Short     8-bit activations and codes of up to 5 bits: pair sums stay in 16 bits while they fit (15 * 128 * 2 * 8 < 2^15, 31 * 128 * 2 * 4 < 2^15).
// Tokens    four at a time: their sums are half of the 16 registers, so a second tile has no room. Codes are taken apart again for every four
//           tokens, an eighth of the work, which costs less than to store and load them.
// Numerics  those of bipolar.h: the same integers, exact, folded by the same code.
#pragma once
#include "codes.h"

namespace effllm {

template <class V> constexpr bool takes_narrow(int bits, int digits) { return V::narrow && (digits == 2 || (digits == 1 && (bits == 8 || bits <= 5))); }

// Steps FROM .. TO of a block, words.
template <class V, int BITS, int MR, int FROM, int TO>
__attribute__((always_inline)) inline void word_steps(const uint8_t* block, const int16_t* const* x, int64_t at, typename V::I* acc) {
  if constexpr (FROM < TO) {
    const auto w = codes_at<V, BITS, FROM>(block);
    const auto even = V::even(w), odd = V::odd(w);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) acc[m] = V::dp_words(acc[m], even, x[m] + at + 4 * FROM);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) acc[m] = V::dp_words(acc[m], odd, x[m] + at + 4 * FROM + 2);
    word_steps<V, BITS, MR, FROM + 1, TO>(block, x, at, acc);
  }
}

template <class V, int BITS, int MR, int FROM, int TO>
__attribute__((always_inline)) inline void byte_steps(const uint8_t* block, const int8_t* const* x, int64_t at, typename V::S* part) {
  if constexpr (FROM < TO) {
    const auto w = codes_at<V, BITS, FROM>(block);
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) part[m] = V::dp_short(part[m], w, x[m] + at + 4 * FROM);
    byte_steps<V, BITS, MR, FROM + 1, TO>(block, x, at, part);
  }
}
// The same, short.
template <class V, int BITS, int MR, int FROM, int TO>
__attribute__((always_inline)) inline void short_steps(const uint8_t* block, const int8_t* const* x, int64_t at, typename V::I* acc) {
  constexpr int end = BITS <= 4 || TO - FROM <= 4 ? TO : FROM + 4;
  typename V::S part[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) part[m] = V::zero_s();
  byte_steps<V, BITS, MR, FROM, end>(block, x, at, part);
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) acc[m] = V::add_short(acc[m], part[m]);
  if constexpr (end < TO) short_steps<V, BITS, MR, end, TO>(block, x, at, acc);
}

// Tokens m0 .. m0 + MR times a tile.
template <class V, int BITS, int D, int MR>
void narrow_tile(const Weight& w, const Activations& x, int64_t tile, int64_t m0, const float* out_scale, const float* bias, void* y, Type type) {
  constexpr bool words = D == 2 || BITS == 8;
  typename V::F sum[MR][1];
  const int16_t* wide[MR];
  const int8_t* row[MR];
#pragma GCC unroll 4
  for (int m = 0; m < MR; ++m) sum[m][0] = V::zero_f(), wide[m] = x.word_row(m0 + m), row[m] = x.row(m0 + m, 0);
  const uint8_t* block = w.codes + tile * w.blocks * 64 * BITS;
  const int64_t per = x.seg < 32 ? 0 : x.seg / 32;  // blocks per segment; 0: two segments per block
  typename V::I acc[MR];
  auto steps = [&]<int FROM, int TO>(int64_t b) __attribute__((always_inline)) {
    if constexpr (words) word_steps<V, BITS, MR, FROM, TO>(block + b * 64 * BITS, wide, b * 32, acc);
    else short_steps<V, BITS, MR, FROM, TO>(block + b * 64 * BITS, row, b * 32, acc);
  };
  for (int64_t s = 0, b = 0; s < x.segs; ++s) {
#pragma GCC unroll 4
    for (int m = 0; m < MR; ++m) acc[m] = V::zero_i();
    if (per == 0) {
      if (s % 2 == 0) steps.template operator()<0, 4>(b);
      else steps.template operator()<4, 8>(b), ++b;
    } else {
      for (const int64_t end = std::min(w.blocks, b + per); b < end; ++b) {
        fetch_ahead<BITS, 3 * kAhead>(block + b * 64 * BITS);  // one stream, not one a tile: measured
        steps.template operator()<0, 8>(b);
      }
    }
    fold_segment<V, D, MR, 1>(w, x, s, tile, 1, m0, sum, [&](int m, int) { return V::to_float(acc[m]); });
  }
  finish_tiles<V, MR, 1>(w, tile, 1, m0, sum, 2.f, out_scale, bias, y, type);
}

template <class V, int BITS, int D>
void narrow_tiles(const Weight& w, const Activations& x, int64_t from, int64_t to, const float* out_scale, const float* bias, void* y, Type type, const Plan& plan) {
  const int64_t chunk = chunk_of(plan, (x.words ? 2 : 1) * x.stride());
  for (int64_t first = 0; first < x.m; first += chunk)
    for (int64_t t = from; t < to; ++t) {
      int64_t m = first;
      const int64_t end = std::min(x.m, first + chunk);
      for (; m + 4 <= end; m += 4) narrow_tile<V, BITS, D, 4>(w, x, t, m, out_scale, bias, y, type);
      if (end - m == 3) narrow_tile<V, BITS, D, 3>(w, x, t, m, out_scale, bias, y, type);
      else if (end - m == 2) narrow_tile<V, BITS, D, 2>(w, x, t, m, out_scale, bias, y, type);
      else if (end - m == 1) narrow_tile<V, BITS, D, 1>(w, x, t, m, out_scale, bias, y, type);
    }
}

}  // namespace effllm
