// Sums of two channels at a time in 16 bits, for processors whose byte products make those: no four-byte dot product, and few registers.
//
// Maths     lane l of a register of pairs holds codes (a_l, b_l) of two channels; a byte product with digits (x_a, x_b) is u_a x_a + u_b x_b, at
//           most 15 * 128 * 2 = 3840 in size, so that kPairs of them fit 16 bits. Then 256 hi + lo is one 16-bit product of interleaved sums.
// Work      per 32 bytes of two channels, two digits: 2 loads, 2 interleavings, 6 extractions, 8 byte products, 8 sums; quads (quads.h) take 8
//           products more and spill: their sums are twice as many.
#pragma once
#include "quads.h"

namespace effllm {

constexpr int64_t kPairs = 8;

template <class V> struct Pairs { static constexpr bool used = false; };

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
template <> struct Pairs<Avx2> {
  static constexpr bool used = true;
  using Sums = __m256i;  // of eight outputs

  // 32 bytes of the codes of two channels at codes + o[0] and o[1], then of the next two, at most kPairs pairs; x0, x1: a dword a pair, its digit of both
  // channels twice. to[i], i = 0 .. 8: the sums of eight outputs each, from `output(i)`; FIRST or added. A function of its own: these sums need half
  // of the registers there are, and a caller's constants would take them.
  template <int ND, bool FIRST> __attribute__((noinline)) static void add(const uint8_t* codes, const int64_t* o, const int32_t* x0, const int32_t* x1, int64_t pairs, __m256i* to, const uint8_t* later) {
    const __m256i low = _mm256_set1_epi8(0x0F);
    __m256i a0 = _mm256_setzero_si256(), a1 = a0, a2 = a0, a3 = a0, b0 = a0, b1 = a0, b2 = a0, b3 = a0;
    for (int64_t p = 0; p < pairs; ++p) {
      const __m256i a = load(codes + o[2 * p]), b = load(codes + o[2 * p + 1]);
      __builtin_prefetch(later + 64 * p);
      const __m256i ab = _mm256_unpacklo_epi8(a, b), AB = _mm256_unpackhi_epi8(a, b);
      const __m256i x = _mm256_set1_epi32(x0[p]), z = ND == 2 ? _mm256_set1_epi32(x1[p]) : x;
      auto both = [&](__m256i u, __m256i& first, __m256i& second) {
        first = _mm256_add_epi16(first, _mm256_maddubs_epi16(u, x));
        if constexpr (ND == 2) second = _mm256_add_epi16(second, _mm256_maddubs_epi16(u, z));
      };
      both(_mm256_and_si256(ab, low), a0, b0);
      both(_mm256_and_si256(AB, low), a1, b1);
      both(_mm256_and_si256(_mm256_srli_epi16(ab, 4), low), a2, b2);
      both(_mm256_and_si256(_mm256_srli_epi16(AB, 4), low), a3, b3);
    }
    const __m256i join = _mm256_set1_epi32(ND == 2 ? 1 | 256 << 16 : 1), none = _mm256_setzero_si256();
    auto put = [&](int i, __m256i hi, __m256i lo) {
      __m256i even = _mm256_madd_epi16(_mm256_unpacklo_epi16(lo, hi), join), odd = _mm256_madd_epi16(_mm256_unpackhi_epi16(lo, hi), join);
      if constexpr (!FIRST) even = _mm256_add_epi32(even, to[2 * i]), odd = _mm256_add_epi32(odd, to[2 * i + 1]);
      to[2 * i] = even, to[2 * i + 1] = odd;
    };
    if constexpr (ND == 2) put(0, a0, b0), put(1, a1, b1), put(2, a2, b2), put(3, a3, b3);
    else put(0, none, a0), put(1, none, a1), put(2, none, a2), put(3, none, a3);
  }
  static constexpr int output(int i) { return 64 * (i / 2 % 2) + 16 * (i / 4) + 32 * (i % 2); }  // as input_major.py counts the outputs of a unit

  // All pairs of a segment: 64 bytes in two halves, one after the other while their lines are near. A line that `lines` names is asked for with every
  // pair: at an even pace, since a burst would fill what waits for memory.
  template <int ND, class Lines> static inline void sums(const uint8_t* codes, const int64_t* o, const int32_t* x0, const int32_t* x1, int64_t pairs, __m256i (*to)[8], Lines& lines) {
    const int64_t head = std::min(pairs, kPairs);
    for (int64_t h = 0; h < 2; ++h) add<ND, true>(codes + 32 * h, o, x0, x1, head, to[h], lines.take(head));
    for (int64_t p = kPairs; p < pairs; p += kPairs) {
      const int64_t some = std::min(pairs - p, kPairs);
      for (int64_t h = 0; h < 2; ++h) add<ND, false>(codes + 32 * h, o + 2 * p, x0 + p, x1 + p, some, to[h], lines.take(some));
    }
  }

  // y[0 .. 8) += scale (step total + sum), scales in fp16; the other with scales of any kind and minima, which meet the sum where there are any.
  static void add_scaled(__m256i total, float step, float sum, const uint16_t* scale, float* y) {
    const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(step), _mm256_set1_ps(sum));
    _mm256_storeu_ps(y, _mm256_fmadd_ps(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scale))), value, _mm256_loadu_ps(y)));
  }
  static void add_any(__m256i total, float step, float sum, const void* scale, const void* minimum, bool half, int64_t at, float* y) {
    auto eight = [&](const void* p) {
      return half ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + at))) : _mm256_loadu_ps(static_cast<const float*>(p) + at);
    };
    const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(total), _mm256_set1_ps(step), _mm256_set1_ps(minimum ? 0.f : sum));
    __m256 out = _mm256_fmadd_ps(eight(scale), value, _mm256_loadu_ps(y));
    if (minimum) out = _mm256_fmadd_ps(eight(minimum), _mm256_set1_ps(sum), out);
    _mm256_storeu_ps(y, out);
  }
  static __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
};
#endif

}  // namespace effllm
