// Codes of four channels, byte by byte: four registers become four others whose lanes hold the same byte of each channel, what a byte dot
// product takes; and activations as int8 digits of one segment.
//
// turn(a, b, c, d, t)   dword 4 q + i of t[r] holds byte 16 q + 4 r + i of a, b, c, d, in this order
// high(raw, low)        the sum over high nibbles, times kHigh: from sums over whole bytes and low nibbles, or over high nibbles themselves
// dot<WIDE>(c, x)       lane l: sum of c[4 l + i] x[4 l + i] of unsigned codes and 64 activations; codes above 15 only where WIDE (or raw)
// dot<WIDE>(c, x0, x1)  256 dot(c, x0) + dot(c, x1)
// spread(c, per)        c[0 .. per) over the sixteen lanes, 16 / per lanes each; per is 1, 2 or 4
#pragma once
#include <cmath>

#include "vector.h"

namespace effllm {

template <class V> struct Quads;

template <> struct Quads<Portable> {
  using W = Portable::W;
  static constexpr bool raw = false;  // whether sums over whole bytes stand in for those over high nibbles
  static constexpr float kHigh = 1.f;
  static void turn(const W& a, const W& b, const W& c, const W& d, W (&t)[4]) {
    const W* from[4] = {&a, &b, &c, &d};
    for (int r = 0; r < 4; ++r)
      for (int l = 0; l < 16; ++l)
        for (int s = 0; s < 4; ++s) t[r].v[4 * l + s] = from[s]->v[16 * (l / 4) + 4 * r + l % 4];
  }
  static Portable::I high(const Portable::I& sum, const Portable::I&) { return sum; }
  template <bool> static Portable::I dot(const W& c, const int8_t* x) {
    Portable::I s;
    for (int l = 0; l < 16; ++l) s.v[l] = c.v[4 * l] * x[4 * l] + c.v[4 * l + 1] * x[4 * l + 1] + c.v[4 * l + 2] * x[4 * l + 2] + c.v[4 * l + 3] * x[4 * l + 3];
    return s;
  }
  template <bool WIDE> static Portable::I dot(const W& c, const int8_t* x0, const int8_t* x1) { return Portable::shift_add(dot<WIDE>(c, x0), dot<WIDE>(c, x1)); }
  static Portable::F spread(const float* c, int64_t per) { Portable::F f; for (int l = 0; l < 16; ++l) f.v[l] = c[l * per / 16]; return f; }
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
template <> struct Quads<Avx2> {
  using W = Avx2::W;
  static constexpr bool raw = false;
  static constexpr float kHigh = 1.f;
  static void turn(const W& a, const W& b, const W& c, const W& d, W (&t)[4]) {
    auto half = [](__m256i p, __m256i q, __m256i r, __m256i s, __m256i (&o)[4]) {
      const __m256i pq = _mm256_unpacklo_epi8(p, q), rs = _mm256_unpacklo_epi8(r, s), PQ = _mm256_unpackhi_epi8(p, q), RS = _mm256_unpackhi_epi8(r, s);
      o[0] = _mm256_unpacklo_epi16(pq, rs), o[1] = _mm256_unpackhi_epi16(pq, rs), o[2] = _mm256_unpacklo_epi16(PQ, RS), o[3] = _mm256_unpackhi_epi16(PQ, RS);
    };
    __m256i lo[4], hi[4];
    half(a.a, b.a, c.a, d.a, lo), half(a.b, b.b, c.b, d.b, hi);
    for (int r = 0; r < 4; ++r) t[r] = {lo[r], hi[r]};
  }
  static Avx2::I high(const Avx2::I& sum, const Avx2::I&) { return sum; }
  static __m256i dot_half(__m256i c, const int8_t* x) {  // bytes above 127 would saturate the pair sums, so the top bit goes alone
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)), one = _mm256_set1_epi16(1), top = _mm256_set1_epi8(static_cast<char>(0x80));
    const __m256i low = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_andnot_si256(top, c), v), one);
    const __m256i half = _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c, 1), _mm256_set1_epi8(0x40)), v), one);
    return _mm256_add_epi32(low, _mm256_add_epi32(half, half));
  }
  static __m256i pair_sums(__m256i c, const int8_t* x) { return _mm256_maddubs_epi16(c, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x))); }
  static __m256i both(__m256i c, const int8_t* x0, const int8_t* x1) {  // of nibbles: the first digit's weight comes with the sum of its pairs
    return _mm256_add_epi32(_mm256_madd_epi16(pair_sums(c, x0), _mm256_set1_epi16(256)), _mm256_madd_epi16(pair_sums(c, x1), _mm256_set1_epi16(1)));
  }
  template <bool WIDE> static Avx2::I dot(const W& c, const int8_t* x) {
    if constexpr (WIDE) return {dot_half(c.a, x), dot_half(c.b, x + 32)};
    else return {_mm256_madd_epi16(pair_sums(c.a, x), _mm256_set1_epi16(1)), _mm256_madd_epi16(pair_sums(c.b, x + 32), _mm256_set1_epi16(1))};
  }
  template <bool WIDE> static Avx2::I dot(const W& c, const int8_t* x0, const int8_t* x1) {
    if constexpr (WIDE) return Avx2::shift_add(dot<true>(c, x0), dot<true>(c, x1));
    else return {both(c.a, x0, x1), both(c.b, x0 + 32, x1 + 32)};
  }
  static Avx2::F spread(const float* c, int64_t per) {
    if (per == 1) return {_mm256_set1_ps(c[0]), _mm256_set1_ps(c[0])};
    if (per == 2) return {_mm256_set1_ps(c[0]), _mm256_set1_ps(c[1])};
    return {_mm256_set_m128(_mm_set1_ps(c[1]), _mm_set1_ps(c[0])), _mm256_set_m128(_mm_set1_ps(c[3]), _mm_set1_ps(c[2]))};
  }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
template <> struct Quads<Avx512> {
  using W = __m512i;
  static constexpr bool raw = true;  // bytes of 255 do not saturate here, so the shift is saved
  static constexpr float kHigh = 1.f / 16.f;
  static void turn(W a, W b, W c, W d, W (&t)[4]) {
    const W ab = _mm512_unpacklo_epi8(a, b), cd = _mm512_unpacklo_epi8(c, d), AB = _mm512_unpackhi_epi8(a, b), CD = _mm512_unpackhi_epi8(c, d);
    t[0] = _mm512_unpacklo_epi16(ab, cd), t[1] = _mm512_unpackhi_epi16(ab, cd), t[2] = _mm512_unpacklo_epi16(AB, CD), t[3] = _mm512_unpackhi_epi16(AB, CD);
  }
  static __m512i high(__m512i sum, __m512i low) { return _mm512_sub_epi32(sum, low); }
  template <bool> static __m512i dot(W c, const int8_t* x) { return _mm512_dpbusd_epi32(_mm512_setzero_si512(), c, _mm512_loadu_si512(x)); }
  template <bool WIDE> static __m512i dot(W c, const int8_t* x0, const int8_t* x1) { return _mm512_dpbusd_epi32(_mm512_slli_epi32(dot<WIDE>(c, x0), 8), c, _mm512_loadu_si512(x1)); }
  static __m512 spread(const float* c, int64_t per) {
    if (per == 1) return _mm512_set1_ps(c[0]);
    const __m512i lane = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    return _mm512_permutexvar_ps(per == 4 ? lane : _mm512_srli_epi32(lane, 1), _mm512_castps128_ps512(_mm_loadu_ps(c)));
  }
};
#endif

// x ~ step * (256 q0 + q1), or for three digits step * (65536 q0 + 256 q1 + q2): q[d][c] int8, most significant first. The sum is of x itself.
// At most 128 values. Returns false where x is not finite: the result is then NaN, as the dense product's would be.
inline bool digits_of_segment(const float* x, int64_t count, int digits, int8_t* const* q, float& step, float& sum) {
  const float top = digits == 2 ? 127.f * 256.f : 127.f * 65536.f;
  float big = 0;
  sum = 0;
  for (int64_t c = 0; c < count; ++c) {
    const float a = x[c] < 0 ? -x[c] : x[c];
    big = a > big ? a : big;
    sum += x[c];
  }
  step = big / top;
  if (!(std::fabs(sum) <= 3.4e38f) || !(big <= 3.4e38f)) return false;
  const float inverse = step > 1e-37f ? 1.f / step : 0.f;
  if (inverse == 0.f) step = 0.f;
  int32_t rest[128];
  for (int64_t c = 0; c < count; ++c) rest[c] = static_cast<int32_t>(std::nearbyint(x[c] * inverse));
  for (int d = digits - 1; d > 0; --d)
    for (int64_t c = 0; c < count; ++c) {
      const int32_t up = (rest[c] + 128) >> 8;
      q[d][c] = static_cast<int8_t>(rest[c] - up * 256);
      rest[c] = up;
    }
  for (int64_t c = 0; c < count; ++c) q[0][c] = static_cast<int8_t>(rest[c]);
  return true;
}

// The same with the instructions of a class: a segment's few dozen values are otherwise a chain of dependent additions and maxima. Up to 15
// bytes past the count become zero.
template <class V> inline bool digits_by(const float* x, int64_t count, int digits, int8_t* const* q, float& step, float& sum) { return digits_of_segment(x, count, digits, q, step, sum); }

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
template <> inline bool digits_by<Avx2>(const float* x, int64_t count, int digits, int8_t* const* q, float& step, float& sum) {
  __m256 most = _mm256_setzero_ps(), total = most;
  const __m256 sign = _mm256_set1_ps(-0.f);
  alignas(32) static constexpr int32_t ones[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
  auto at = [&](int64_t c) {
    return count - c >= 8 ? _mm256_loadu_ps(x + c) : _mm256_maskload_ps(x + c, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones + 8 - (count - c))));
  };
  for (int64_t c = 0; c < count; c += 8) {
    const __m256 f = at(c);
    most = _mm256_max_ps(_mm256_andnot_ps(sign, f), most);  // of a NaN the other operand; the sum is NaN then
    total = _mm256_add_ps(total, f);
  }
  float all[8], sums[8], big = 0;
  _mm256_storeu_ps(all, most), _mm256_storeu_ps(sums, total);
  for (int i = 0; i < 8; ++i) big = all[i] > big ? all[i] : big;
  sum = ((sums[0] + sums[4]) + (sums[1] + sums[5])) + ((sums[2] + sums[6]) + (sums[3] + sums[7]));
  step = big / (digits == 2 ? 127.f * 256.f : 127.f * 65536.f);
  if (!(std::fabs(sum) <= 3.4e38f) || !(big <= 3.4e38f)) return false;
  const float inverse = step > 1e-37f ? 1.f / step : 0.f;
  if (inverse == 0.f) step = 0.f;
  for (int64_t c = 0; c < count; c += 8) {
    __m256i rest = _mm256_cvtps_epi32(_mm256_mul_ps(at(c), _mm256_set1_ps(inverse)));
    auto store = [&](__m256i v, int8_t* to) {  // eight small integers as bytes
      const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
      _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(w, w));
    };
    for (int d = digits - 1; d > 0; --d) {
      const __m256i up = _mm256_srai_epi32(_mm256_add_epi32(rest, _mm256_set1_epi32(128)), 8);
      store(_mm256_sub_epi32(rest, _mm256_slli_epi32(up, 8)), q[d] + c);
      rest = up;
    }
    store(rest, q[0] + c);
  }
  return true;
}
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
template <> inline bool digits_by<Avx512>(const float* x, int64_t count, int digits, int8_t* const* q, float& step, float& sum) {
  __m512 f[8], most = _mm512_setzero_ps(), total = most;
  const int64_t vectors = (count + 15) / 16;
  for (int64_t v = 0; v < vectors; ++v) {
    f[v] = _mm512_maskz_loadu_ps(count - 16 * v >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << (count - 16 * v)) - 1), x + 16 * v);
    most = _mm512_max_ps(_mm512_abs_ps(f[v]), most);  // of a NaN the other operand; the sum is NaN then
    total = _mm512_add_ps(total, f[v]);
  }
  const float big = _mm512_reduce_max_ps(most);
  sum = _mm512_reduce_add_ps(total);
  step = big / (digits == 2 ? 127.f * 256.f : 127.f * 65536.f);
  if (!(std::fabs(sum) <= 3.4e38f) || !(big <= 3.4e38f)) return false;
  const float inverse = step > 1e-37f ? 1.f / step : 0.f;
  if (inverse == 0.f) step = 0.f;
  for (int64_t v = 0; v < vectors; ++v) {
    __m512i rest = _mm512_cvtps_epi32(_mm512_mul_ps(f[v], _mm512_set1_ps(inverse)));
    for (int d = digits - 1; d > 0; --d) {
      const __m512i up = _mm512_srai_epi32(_mm512_add_epi32(rest, _mm512_set1_epi32(128)), 8);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(q[d] + 16 * v), _mm512_cvtepi32_epi8(_mm512_sub_epi32(rest, _mm512_slli_epi32(up, 8))));
      rest = up;
    }
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q[0] + 16 * v), _mm512_cvtepi32_epi8(rest));
  }
  return true;
}
#endif

}  // namespace effllm
