// Coded N:M rows times a few tokens without decoding them first (VBMI2): 64 columns of a row at a time.
//
// Maths     y[r] = sum over groups g of step_g * (sum of u x) + (low_g - step_g zero) * (sum of x), both sums over the kept columns of g
// Work      a word of the bitmap spreads its codes to their columns (vpexpandb), which become fp32 four times sixteen; two fused sums each,
//           four rows side by side for one token. Four-bit codes are spread to bytes first.
// Limits    a group of codes must be whole words of columns: `aligned`. Other patterns (6:8 with groups of 32) take rows_times.
// Numerics  fp32 sums; codes are exact.
#pragma once
#include "nm_rows.h"

namespace effllm {

inline bool aligned(const NmRows& w) { return w.bits > 0 && w.per16 > 0 && (w.group == 0 || w.group % (4 * w.per16) == 0); }

#ifdef EFFLLM_NM_WIDE
// Up to 64 codes from `p`, `count` of them there, at the columns of `keep`; zero elsewhere.
template <bool NIBBLES> inline __m512i spread_codes(const uint8_t* p, int count, uint64_t keep) {
  if constexpr (NIBBLES) {
    const __mmask32 have = static_cast<__mmask32>((uint64_t{1} << ((count + 1) / 2)) - 1);
    const __m512i pair = _mm512_cvtepu8_epi16(_mm256_maskz_loadu_epi8(have, p));  // 0x00hl
    const __m512i both = _mm512_and_si512(_mm512_or_si512(pair, _mm512_slli_epi16(pair, 4)), _mm512_set1_epi16(0x0F0F));
    return _mm512_maskz_expand_epi8(keep, both);
  } else {
    const __mmask64 have = count >= 64 ? ~__mmask64{0} : (uint64_t{1} << count) - 1;
    return _mm512_maskz_expand_epi8(keep, _mm512_maskz_loadu_epi8(have, p));
  }
}

inline __m512 floats_of(__m128i bytes) { return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)); }

// R rows times one token x (fp32, zeros past k): out[r]. `step` and `rest` (R, groups): what the sums of u x and of x count.
template <int R, bool NIBBLES> inline void rows_codes(const NmRows& w, int64_t row, const float* step, const float* rest, const float* x, float* out) {
  const int per = static_cast<int>(4 * w.per16);
  const int64_t span = w.group ? w.group / per : w.words;  // words of a group
  __m512 total[R], ux[R], sx[R];
  const uint8_t* codes[R];
  const uint64_t* keep[R];
  for (int r = 0; r < R; ++r) {
    codes[r] = static_cast<const uint8_t*>(w.values) + (row + r) * w.width;
    keep[r] = w.index + (row + r) * w.words;
    total[r] = _mm512_setzero_ps();
  }
  const auto word = [&](int64_t i, auto count) {
    const float* at = x + i * 64;
    const __m512 x0 = _mm512_loadu_ps(at), x1 = _mm512_loadu_ps(at + 16), x2 = _mm512_loadu_ps(at + 32), x3 = _mm512_loadu_ps(at + 48);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint64_t bits = keep[r][i];
      const __m512i u = spread_codes<NIBBLES>(codes[r] + i * per / (NIBBLES ? 2 : 1), count(bits), bits);
      ux[r] = _mm512_fmadd_ps(floats_of(_mm512_castsi512_si128(u)), x0, ux[r]);
      ux[r] = _mm512_fmadd_ps(floats_of(_mm512_extracti32x4_epi32(u, 1)), x1, ux[r]);
      ux[r] = _mm512_fmadd_ps(floats_of(_mm512_extracti32x4_epi32(u, 2)), x2, ux[r]);
      ux[r] = _mm512_fmadd_ps(floats_of(_mm512_extracti32x4_epi32(u, 3)), x3, ux[r]);
      sx[r] = _mm512_mask_add_ps(sx[r], static_cast<__mmask16>(bits), sx[r], x0);
      sx[r] = _mm512_mask_add_ps(sx[r], static_cast<__mmask16>(bits >> 16), sx[r], x1);
      sx[r] = _mm512_mask_add_ps(sx[r], static_cast<__mmask16>(bits >> 32), sx[r], x2);
      sx[r] = _mm512_mask_add_ps(sx[r], static_cast<__mmask16>(bits >> 48), sx[r], x3);
    }
  };
  for (int64_t g = 0, i = 0; i < w.words; ++g) {
    for (int r = 0; r < R; ++r) ux[r] = sx[r] = _mm512_setzero_ps();
    const int64_t to = std::min(w.words, i + span);
    for (const int64_t whole = std::min(to, w.full); i < whole; ++i) word(i, [per](uint64_t) { return per; });
    for (; i < to; ++i) word(i, [](uint64_t bits) { return std::popcount(bits); });  // the last word, where padding is
    for (int r = 0; r < R; ++r) {
      total[r] = _mm512_fmadd_ps(_mm512_set1_ps(step[r * w.groups + g]), ux[r], total[r]);
      total[r] = _mm512_fmadd_ps(_mm512_set1_ps(rest[r * w.groups + g]), sx[r], total[r]);
    }
  }
  for (int r = 0; r < R; ++r) out[r] = _mm512_reduce_add_ps(total[r]);
}

// Rows from .. to times m tokens x (fp32, `ld` apart): out[token * ldo + row - from].
inline void rows_times_codes(const NmRows& w, int64_t from, int64_t to, const float* x, int64_t ld, int64_t m, float* out, int64_t ldo) {
  std::vector<float> step(static_cast<size_t>(4 * w.groups)), rest(step.size());
  const auto some = [&](auto rows, int64_t r) {
    constexpr int R = decltype(rows)::value;
    for (int64_t i = 0; i < R * w.groups; ++i) {
      step[static_cast<size_t>(i)] = 2.f * half_to_float(w.scale, r * w.groups + i, w.half);
      rest[static_cast<size_t>(i)] = w.minimum ? half_to_float(w.minimum, r * w.groups + i, w.half) : -w.zero * step[static_cast<size_t>(i)];
    }
    for (int64_t t = 0; t < m; ++t) {
      float* o = out + t * ldo + r - from;
      if (w.bits > 4) rows_codes<R, false>(w, r, step.data(), rest.data(), x + t * ld, o);
      else rows_codes<R, true>(w, r, step.data(), rest.data(), x + t * ld, o);
    }
  };
  int64_t r = from;
  for (; r + 4 <= to; r += 4) some(std::integral_constant<int, 4>{}, r);
  for (; r < to; ++r) some(std::integral_constant<int, 1>{}, r);
}
#endif

}  // namespace effllm
