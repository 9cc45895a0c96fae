// gemv_single: the loop over tiles of the one-token path; its pieces and their reasons are in lookup.h.
#pragma once
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#include "bipolar.h"

namespace effllm {

template <int BITS> struct SingleAcc {
  __m512i first[4], second[4], bit;
  void clear() {
    for (int i = 0; i < 4; ++i) first[i] = second[i] = _mm512_setzero_si512();
    bit = _mm512_setzero_si512();
  }
  static constexpr int a = part_width(BITS, 0), b = part_width(BITS, 1), c = part_width(BITS, 2);
  static constexpr int last = c ? 2 : b ? 1 : 0;
  static constexpr bool has_bit = part_width(BITS, last) == 1;

  template <int FROM, int TO> inline void block(const uint8_t* codes, const int8_t* x, const uint8_t* tables) {
    if constexpr (a > 1) masked_steps<a, FROM, TO>(first, codes, x);
    if constexpr (b > 1) masked_steps<b, FROM, TO>(second, codes + 64 * a, x);
    if constexpr (has_bit) bit = lookup_unit<FROM / 4, TO / 4>(bit, _mm512_loadu_si512(codes + 64 * (BITS - 1)), tables);
  }
  inline __m512i total() const {
    __m512i r = bit;
    if constexpr (a > 1) r = _mm512_add_epi32(r, _mm512_slli_epi32(join_fields<a>(first), BITS - a));
    if constexpr (b > 1) r = _mm512_add_epi32(r, _mm512_slli_epi32(join_fields<b>(second), BITS - a - b));
    return r;
  }
};

// TILES tiles side by side share table loads and run as many streams of codes; their accumulators fill the registers, which costs more than
// it gains unless memory is what limits.
template <class V, int BITS, int TILES, bool AFFINE, bool HALF>
inline void single_tiles(const Weight& w, const Activations& x, const uint8_t* tables, int64_t tile, float factor, const float* bias, void* y, Type type) {
  __m512 sum[TILES];
  const uint8_t* base[TILES];
  for (int t = 0; t < TILES; ++t) sum[t] = _mm512_setzero_ps(), base[t] = w.codes + (tile + t) * w.blocks * 64 * BITS;
  const int8_t* row = x.row(0, 0);
  const int64_t per = x.seg < 32 ? 0 : x.seg / 32;
  for (int64_t s = 0, b = 0; s < x.segs; ++s) {
    SingleAcc<BITS> acc[TILES];
    for (int t = 0; t < TILES; ++t) acc[t].clear();
    if (per == 0) {
      for (int t = 0; t < TILES; ++t) {
        if (s % 2 == 0) acc[t].template block<0, 4>(base[t] + b * 64 * BITS, row + b * 32, tables + b * 256);
        else acc[t].template block<4, 8>(base[t] + b * 64 * BITS, row + b * 32, tables + b * 256);
      }
      b += s % 2;
    } else {
      const int64_t end = std::min(w.blocks, b + per);
      for (; b < end; ++b)
        for (int t = 0; t < TILES; ++t) acc[t].template block<0, 8>(base[t] + b * 64 * BITS, row + b * 32, tables + b * 256);
    }
    const int64_t g = s * 16;  // a segment is a group here
    const float corr = x.corr[static_cast<size_t>(s)];
    for (int t = 0; t < TILES; ++t) {
      const int64_t at = (tile + t) * w.groups * 16 + g;
      const __m512i total = acc[t].total();
      const auto scale = load_scale<V>(w.scale, at, HALF);
      const auto low = AFFINE ? load_scale<V>(w.minimum, at, HALF) : V::zero_f();
      sum[t] = fold<V, 1>(V::to_float(total), sum[t], scale, low, AFFINE, 1.f, corr);
    }
  }
  for (int t = 0; t < TILES; ++t) {
    const int64_t first = (tile + t) * 16;
    finish<V>(sum[t], factor, bias ? bias + first : nullptr, y, w.col + first, std::min<int64_t>(16, w.n - first), type);
  }
}

template <class V, int BITS, int TILES, bool AFFINE, bool HALF>
void single_range(const Weight& w, const Activations& x, int64_t t, int64_t to, const float* out_scale, const float* bias, void* y, Type type) {
  const float factor = out_scale ? 2.f * out_scale[0] : 2.f;
  const uint8_t* tables = x.tables.empty() ? nullptr : x.aligned_tables();
  for (; t + TILES <= to; t += TILES) single_tiles<V, BITS, TILES, AFFINE, HALF>(w, x, tables, t, factor, bias, y, type);
  for (; t < to; ++t) single_tiles<V, BITS, 1, AFFINE, HALF>(w, x, tables, t, factor, bias, y, type);
}

template <class V, int BITS, int TILES>
void single_any(const Weight& w, const Activations& x, int64_t from, int64_t to, const float* out_scale, const float* bias, void* y, Type type) {
  const auto go = w.half ? (w.minimum ? single_range<V, BITS, TILES, true, true> : single_range<V, BITS, TILES, false, true>)
                         : (w.minimum ? single_range<V, BITS, TILES, true, false> : single_range<V, BITS, TILES, false, false>);
  go(w, x, from, to, out_scale, bias, y, type);
}

template <class V, int BITS>
void gemv_single(const Weight& w, const Activations& x, int64_t from, int64_t to, const float* out_scale, const float* bias, void* y, Type type, const Plan& plan) {
  const int64_t tiles = plan.tiles ? plan.tiles : 1;
  const auto go = tiles >= 4 ? single_any<V, BITS, 4> : tiles >= 2 ? single_any<V, BITS, 2> : single_any<V, BITS, 1>;
  go(w, x, from, to, out_scale, bias, y, type);
}

}  // namespace effllm
#endif
