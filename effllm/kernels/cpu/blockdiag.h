// Block-diagonal bf16 matrices around an N:M core (ARMOR): out = D x for one block, x and out fp32 in the first-level cache.
//
// Layout    (blocks, d / 16, d / 2, 16, 2) bf16: a lane of 32 bits holds two neighbouring columns of one row
// Numerics  products and sums in fp32: the numbers between wrapper and core are not rounded, except where the core takes bf16.
#pragma once
#include "bipolar.h"

namespace effllm {

template <class V> struct Pair { typename V::F low, high; };
inline Pair<Portable> load_pair(Portable, const uint32_t* p) {
  Pair<Portable> r;
  for (int i = 0; i < 16; ++i) {
    const uint32_t low = p[i] << 16, high = p[i] & 0xFFFF0000u;
    std::memcpy(r.low.v + i, &low, 4);
    std::memcpy(r.high.v + i, &high, 4);
  }
  return r;
}
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
inline Pair<Avx2> load_pair(Avx2, const uint32_t* p) {
  const auto q = reinterpret_cast<const __m256i*>(p);
  const __m256i a = _mm256_loadu_si256(q), b = _mm256_loadu_si256(q + 1), mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  return {{_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))},
          {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))}};
}
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline Pair<Avx512> load_pair(Avx512, const uint32_t* p) {
  const __m512i a = _mm512_loadu_si512(p);
  return {_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)), _mm512_castsi512_ps(_mm512_and_si512(a, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))))};
}
#endif

// One block of d rows and columns; four row tiles side by side hide the latency of the sums.
template <class V, int COUNT> inline void block_tiles(const uint32_t* w, int64_t d, const float* x, float* out) {
  typename V::F acc[COUNT][2];
  for (int t = 0; t < COUNT; ++t) acc[t][0] = acc[t][1] = V::zero_f();
  for (int64_t c = 0; c < d / 2; ++c)
#pragma GCC unroll 4
    for (int t = 0; t < COUNT; ++t) {
      const auto p = load_pair(V{}, w + (t * (d / 2) + c) * 16);
      acc[t][0] = V::fma1(p.low, x[2 * c], acc[t][0]);
      acc[t][1] = V::fma1(p.high, x[2 * c + 1], acc[t][1]);
    }
  for (int t = 0; t < COUNT; ++t) V::store_f(out + 16 * t, V::fma1(acc[t][0], 1.f, acc[t][1]));
}
template <class V> inline void block_times(const uint32_t* w, int64_t d, const float* x, float* out) {
  int64_t t = 0;
  for (; t + 4 <= d / 16; t += 4) block_tiles<V, 4>(w + t * d * 8, d, x, out + 16 * t);
  for (; t < d / 16; ++t) block_tiles<V, 1>(w + t * d * 8, d, x, out + 16 * t);
}

}  // namespace effllm
