// One token of int8 activations on AVX-512 VBMI: the decode path, where extraction costs as much as the products.
//
// Parts of 8, 4 and 2 bits: fields are masked but not shifted; each field position has its own accumulator, whose weight 2^(field
// bit) is taken out once per segment.
// Parts of 1 bit: four columns at a time by table. A byte of a unit holds columns i, 4+i, ..., 28+i; its low nibble is a 4-bit code of
// columns {i, 4+i, 8+i, 12+i}. For each i the 16 possible sums of those activations form a table; the four tables fill one register,
// and vpermb with index i * 16 + nibble looks up 64 sums at once. Sums of int8 do not fit a byte, so x = 16 hi + lo with nibbles in
// [-8, 8], two tables, and vpdpbusd adds four looked-up bytes with weight 1 (lo) or 16 (hi).
#pragma once
#include <immintrin.h>

namespace effllm {

struct Weight;
constexpr int part_width(int bits, int part);
constexpr int part_above(int bits, int part);

// Tables of all blocks of one token: per block low-nibble lo, hi, high-nibble lo, hi, 64 bytes each.
inline void build_tables(const int8_t* x, int64_t blocks, uint8_t* out) {
  alignas(64) static const uint8_t lane[64] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1,
                                               2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3, 3};
  const __m512i spread = _mm512_load_si512(lane);
  const __mmask64 bit[4] = {0xAAAAAAAAAAAAAAAAull, 0xCCCCCCCCCCCCCCCCull, 0xF0F0F0F0F0F0F0F0ull, 0xFF00FF00FF00FF00ull};
  for (int64_t b = 0; b < blocks; ++b)
    for (int half = 0; half < 2; ++half) {
      __m512i lo = _mm512_setzero_si512(), hi = lo;
      for (int f = 0; f < 4; ++f) {
        int32_t four;
        std::memcpy(&four, x + b * 32 + half * 16 + f * 4, 4);
        const __m512i v = _mm512_shuffle_epi8(_mm512_set1_epi32(four), spread);
        const __m512i h16 = _mm512_and_si512(_mm512_add_epi8(v, _mm512_set1_epi8(8)), _mm512_set1_epi8(static_cast<char>(0xF0)));
        const __m512i l = _mm512_sub_epi8(v, h16);  // [-8, 7]; for v >= 120 the nibble above wraps to -128, mended below
        const __mmask64 wrap = _mm512_cmpge_epi8_mask(v, _mm512_set1_epi8(120));
        // h16 / 16, signed, without the wrap
        __m512i h = _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(_mm512_add_epi8(h16, _mm512_set1_epi8(static_cast<char>(0x80))), 4), _mm512_set1_epi8(15)), _mm512_set1_epi8(8));
        h = _mm512_mask_mov_epi8(h, wrap, _mm512_set1_epi8(8));
        lo = _mm512_mask_add_epi8(lo, bit[f], lo, l);
        hi = _mm512_mask_add_epi8(hi, bit[f], hi, h);
      }
      _mm512_store_si512(out + b * 256 + half * 128, lo);
      _mm512_store_si512(out + b * 256 + half * 128 + 64, hi);
    }
}

// acc += the 1-bit unit times the block's activations; FROM, TO in units of nibbles (0..2).
template <int FROM, int TO> inline __m512i lookup_unit(__m512i acc, __m512i unit, const uint8_t* tables) {
  const __m512i low = _mm512_set1_epi8(15), which = _mm512_set1_epi32(0x30201000);
  const __m512i one = _mm512_set1_epi8(1), sixteen = _mm512_set1_epi8(16);
  if constexpr (FROM == 0) {
    const __m512i i = _mm512_ternarylogic_epi32(unit, low, which, 0xEA);  // (unit & low) | which
    acc = _mm512_dpbusd_epi32(acc, one, _mm512_permutexvar_epi8(i, _mm512_load_si512(tables)));
    acc = _mm512_dpbusd_epi32(acc, sixteen, _mm512_permutexvar_epi8(i, _mm512_load_si512(tables + 64)));
  }
  if constexpr (TO == 2) {
    const __m512i i = _mm512_ternarylogic_epi32(_mm512_srli_epi16(unit, 4), low, which, 0xEA);
    acc = _mm512_dpbusd_epi32(acc, one, _mm512_permutexvar_epi8(i, _mm512_load_si512(tables + 128)));
    acc = _mm512_dpbusd_epi32(acc, sixteen, _mm512_permutexvar_epi8(i, _mm512_load_si512(tables + 192)));
  }
  return acc;
}

// Steps FROM..TO of a part of WIDTH bits: one accumulator per field position.
template <int WIDTH, int FROM, int TO> inline void masked_steps(__m512i* acc, const uint8_t* units, const int8_t* x) {
  constexpr int fields = 8 / WIDTH;
#pragma GCC unroll 8
  for (int step = FROM; step < TO; ++step) {
    const int f = step % fields;
    __m512i u = _mm512_loadu_si512(units + 64 * (step / fields));
    if (WIDTH < 8) u = _mm512_and_si512(u, _mm512_set1_epi8(static_cast<char>(((1 << WIDTH) - 1) << (f * WIDTH))));
    int32_t four;
    std::memcpy(&four, x + 4 * step, 4);
    acc[f] = _mm512_dpbusd_epi32(acc[f], u, _mm512_set1_epi32(four));
  }
}

template <int WIDTH> inline __m512i join_fields(const __m512i* acc) {
  __m512i r = acc[0];
  if constexpr (WIDTH == 4) r = _mm512_add_epi32(r, _mm512_srai_epi32(acc[1], 4));
  if constexpr (WIDTH == 2)
    r = _mm512_add_epi32(_mm512_add_epi32(r, _mm512_srai_epi32(acc[1], 2)), _mm512_add_epi32(_mm512_srai_epi32(acc[2], 4), _mm512_srai_epi32(acc[3], 6)));
  return r;
}

template <class V, int BITS> void gemv_single(const Weight& w, const Activations& x, int64_t from, int64_t to, const float* out_scale, const float* bias, void* y, Type type);

}  // namespace effllm
