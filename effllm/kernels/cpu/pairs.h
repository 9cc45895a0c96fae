// Codes as 16-bit numbers: two at a time in the halves of a 32-bit lane, which multiply-add with two 16-bit activations.
//
// join(a, b)     lanes of two registers to halves: low (b's low half above a's) and high (a's high half below b's)
// half<W, F>(c)  field F of W bits of every 16-bit half
// dot(acc, c, x) lane l of acc += c[2l] x[2l] + c[2l + 1] x[2l + 1], of int16
#pragma once
#include <cmath>

#include "vector.h"

namespace effllm {

template <class V> struct Pairs;

template <> struct Pairs<Portable> {
  using W = Portable::W;
  using I = Portable::I;
  static void join(const W& a, const W& b, W& low, W& high) {
    for (int l = 0; l < 16; ++l) {
      uint32_t x, y; std::memcpy(&x, a.v + 4 * l, 4); std::memcpy(&y, b.v + 4 * l, 4);
      const uint32_t lo = (x & 0xFFFF) | (y << 16), hi = (x >> 16) | (y & 0xFFFF0000u);
      std::memcpy(low.v + 4 * l, &lo, 4); std::memcpy(high.v + 4 * l, &hi, 4);
    }
  }
  template <int WIDTH, int FIELD> static W half(const W& c) {
    W r;
    for (int l = 0; l < 32; ++l) {
      uint16_t h; std::memcpy(&h, c.v + 2 * l, 2);
      const uint16_t f = (h >> (WIDTH * FIELD)) & ((1 << WIDTH) - 1);
      std::memcpy(r.v + 2 * l, &f, 2);
    }
    return r;
  }
  static W both(int32_t x) { W r; for (int l = 0; l < 16; ++l) std::memcpy(r.v + 4 * l, &x, 4); return r; }
  static I dot(I acc, const W& c, const W& x) {
    for (int l = 0; l < 16; ++l) {
      int16_t p[2], q[2]; std::memcpy(p, c.v + 4 * l, 4); std::memcpy(q, x.v + 4 * l, 4);
      acc.v[l] += p[0] * q[0] + p[1] * q[1];
    }
    return acc;
  }
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
template <> struct Pairs<Avx2> {
  using W = Avx2::W;
  using I = Avx2::I;
  static void join(const W& a, const W& b, W& low, W& high) {
    low = {_mm256_blend_epi16(a.a, _mm256_slli_epi32(b.a, 16), 0xAA), _mm256_blend_epi16(a.b, _mm256_slli_epi32(b.b, 16), 0xAA)};
    high = {_mm256_blend_epi16(_mm256_srli_epi32(a.a, 16), b.a, 0xAA), _mm256_blend_epi16(_mm256_srli_epi32(a.b, 16), b.b, 0xAA)};
  }
  template <int WIDTH, int FIELD> static __m256i part(__m256i c) {
    if constexpr (FIELD > 0) c = _mm256_srli_epi16(c, WIDTH * FIELD);
    if constexpr (WIDTH * (FIELD + 1) < 16) c = _mm256_and_si256(c, _mm256_set1_epi16((1 << WIDTH) - 1));
    return c;
  }
  template <int WIDTH, int FIELD> static W half(const W& c) { return {part<WIDTH, FIELD>(c.a), part<WIDTH, FIELD>(c.b)}; }
  static W both(int32_t x) { const __m256i v = _mm256_set1_epi32(x); return {v, v}; }
  static I dot(const I& acc, const W& c, const W& x) {
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(c.a, x.a)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(c.b, x.b))};
  }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
template <> struct Pairs<Avx512> {
  using W = __m512i;
  using I = __m512i;
  static void join(W a, W b, W& low, W& high) {
    low = _mm512_mask_blend_epi16(0xAAAAAAAA, a, _mm512_slli_epi32(b, 16));
    high = _mm512_mask_blend_epi16(0xAAAAAAAA, _mm512_srli_epi32(a, 16), b);
  }
  template <int WIDTH, int FIELD> static W half(W c) {
    if constexpr (FIELD > 0) c = _mm512_srli_epi16(c, WIDTH * FIELD);
    if constexpr (WIDTH * (FIELD + 1) < 16) c = _mm512_and_si512(c, _mm512_set1_epi16((1 << WIDTH) - 1));
    return c;
  }
  static W both(int32_t x) { return _mm512_set1_epi32(x); }
  static I dot(I acc, W c, W x) { return _mm512_dpwssd_epi32(acc, c, x); }
};
#endif

// Activations of one vector in one segment of columns as int16 digits: x ~ step * q, or for fp32 step * (q0 + q1 / 65534).
// Returns false where x is not finite: the vector's result is then NaN, as the dense product's would be.
inline bool quantize16(const float* x, int64_t count, int digits, int16_t* const* q, float& step, float& sum) {
  float big = 0;
  bool finite = true;
  for (int64_t c = 0; c < count; ++c) {
    const float a = x[c] < 0 ? -x[c] : x[c];
    finite &= a <= 3.4e38f;
    big = a > big ? a : big;
  }
  step = sum = 0;
  if (!finite) return false;
  step = big / 32767.f;
  const float inverse = step > 1e-37f ? 1.f / step : 0.f;
  if (inverse == 0.f) step = 0.f;
  for (int64_t c = 0; c < count; ++c) {
    const float scaled = x[c] * inverse, whole = std::nearbyint(scaled);
    q[0][c] = static_cast<int16_t>(whole);
    sum += x[c];
    if (digits > 1) q[1][c] = static_cast<int16_t>(std::nearbyint((scaled - whole) * 65534.f));
  }
  return true;
}

}  // namespace effllm
