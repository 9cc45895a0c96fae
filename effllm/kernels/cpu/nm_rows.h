// N:M weights row by row, any pattern and any values, for AVX-512, AVX2 and plain C++ (layout nm_rows).
//
// Maths     y[m, r] = sum over kept columns k of x[m, k] W[r, k]
// Layout    values  (N, Kc) fp32, bf16 or fp16; or codes uint8 (N, C): one byte a code above 4 bits, else two codes a byte, low nibble
//                   first, with scale and minimum (N, G) along the compressed axis
//           index   (N, 8 * words): bit k % 64 of word k / 64 says that column k is kept
// Work      a row's values become fp32 in the first-level cache once for all tokens; 16 columns at a time are spread to their places
//           (vpexpandd; AVX2: permutation by a table of bytes; else by loop) and multiplied. bf16 values with bf16 activations
//           on VBMI2 and BF16 hardware stay 16 bits wide: vpexpandw, then vdpbf16ps, four rows side by side.
// Bytes     N Kc itemsize + N K / 8; the activations stay in cache.
// Numerics  fp32 sums; vdpbf16ps takes denormals as zero.
#pragma once
#include <array>
#include <bit>

#include "bipolar.h"

namespace effllm {

struct NmRows {
  const void* values;       // values or codes
  Type type;                // of the values
  int bits;                 // 0: floating-point values
  const void* scale;        // null unless coded
  const void* minimum;
  bool half;                // scale and minimum are fp16
  float zero;
  int64_t group, groups;    // along the compressed axis; group 0: one a row
  const uint64_t* index;
  int64_t n, k, kc, width, words;  // width: values or bytes of codes in a row
  int64_t full, per16;      // words without padding, and kept values of 16 columns there
};

inline float half_to_float(const void* p, int64_t i, bool half) {
  return load_as_float(p, i, half ? Type::f16 : Type::f32);
}

// The kept values of one row as fp32.
inline void decode_row(const NmRows& w, int64_t row, float* out) {
  if (w.bits == 0) {
    if (w.type == Type::f32) {
      std::memcpy(out, static_cast<const float*>(w.values) + row * w.width, static_cast<size_t>(w.kc) * 4);
    } else if (w.type == Type::bf16) {
      const uint16_t* p = static_cast<const uint16_t*>(w.values) + row * w.width;
      for (int64_t i = 0; i < w.kc; ++i) out[i] = bf16_to_float(p[i]);
    } else {
      for (int64_t i = 0; i < w.kc; ++i) out[i] = load_as_float(w.values, row * w.width + i, Type::f16);
    }
    return;
  }
  const uint8_t* p = static_cast<const uint8_t*>(w.values) + row * w.width;
  const int64_t size = w.group ? w.group : w.kc;
  for (int64_t g = 0; g * size < w.kc; ++g) {
    const float step = 2.f * half_to_float(w.scale, row * w.groups + g, w.half);
    const float low = w.minimum ? half_to_float(w.minimum, row * w.groups + g, w.half) : 0.f;
    const float zero = w.minimum ? 0.f : w.zero;
    const int64_t from = g * size, to = std::min(w.kc, from + size);
    if (w.bits > 4)
      for (int64_t i = from; i < to; ++i) out[i] = step * (static_cast<float>(p[i]) - zero) + low;
    else
      for (int64_t i = from; i < to; ++i) out[i] = step * (static_cast<float>((p[i / 2] >> (i % 2 * 4)) & 15) - zero) + low;
  }
}

// Sixteen columns: the next values of `p` where `keep` has a bit, zero elsewhere. May read 16 floats.
inline Portable::F spread(Portable, const float* p, uint32_t keep) {
  Portable::F f{};
  for (int i = 0; i < 16; ++i)
    if (keep >> i & 1) f.v[i] = *p++;
  return f;
}
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
constexpr std::array<uint64_t, 256> spread_table() {  // byte i: which of the next values column i takes, 0x80: none
  std::array<uint64_t, 256> t{};
  for (int b = 0; b < 256; ++b) {
    uint64_t next = 0;
    for (int i = 0; i < 8; ++i) t[static_cast<size_t>(b)] |= (b >> i & 1 ? next++ : uint64_t{0x80}) << (8 * i);
  }
  return t;
}
inline constexpr auto kSpread = spread_table();
inline __m256 spread8(const float* p, uint32_t keep) {
  const __m256i from = _mm256_cvtepi8_epi32(_mm_cvtsi64_si128(static_cast<long long>(kSpread[keep & 255])));
  const __m256 got = _mm256_permutevar8x32_ps(_mm256_loadu_ps(p), from);
  return _mm256_andnot_ps(_mm256_castsi256_ps(_mm256_srai_epi32(from, 31)), got);
}
inline Avx2::F spread(Avx2, const float* p, uint32_t keep) { return {spread8(p, keep), spread8(p + std::popcount(keep & 255), keep >> 8)}; }
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m512 spread(Avx512, const float* p, uint32_t keep) { return _mm512_maskz_expand_ps(static_cast<__mmask16>(keep), _mm512_loadu_ps(p)); }
#endif

template <class V> inline float sum_of(typename V::F f) {
  float v[16];
  V::store_f(v, f);
  float s = 0;
  for (int i = 0; i < 16; ++i) s += v[i];
  return s;
}

// One decoded row times MR tokens x (fp32, `ld` apart, zeros past k).
template <class V, int MR> inline void row_times(const NmRows& w, int64_t row, const float* values, const float* x, int64_t ld, float* out) {
  typename V::F acc[MR][2];
  for (int m = 0; m < MR; ++m) acc[m][0] = acc[m][1] = V::zero_f();
  const uint64_t* keep = w.index + row * w.words;
  const auto word = [&](int64_t i, auto count) {
    const uint64_t bits = keep[i];
#pragma GCC unroll 4
    for (int q = 0; q < 4; ++q) {
      const uint32_t here = static_cast<uint32_t>(bits >> (16 * q)) & 0xFFFF;
      const auto f = spread(V{}, values, here);
      values += count(here);
      for (int m = 0; m < MR; ++m) acc[m][q % 2] = V::fma(f, V::load_f(x + m * ld + i * 64 + q * 16), acc[m][q % 2]);
    }
  };
  const int64_t step = w.per16;  // known before the bits are: the loads do not wait for them
  for (int64_t i = 0; i < w.full; ++i) word(i, [step](uint32_t) { return step; });
  for (int64_t i = w.full; i < w.words; ++i) word(i, [](uint32_t bits) { return static_cast<int64_t>(std::popcount(bits)); });
  for (int m = 0; m < MR; ++m) out[m] = sum_of<V>(acc[m][0]) + sum_of<V>(acc[m][1]);
}

// Rows from .. to times all tokens: out[m * ldo + row - from].
template <class V> void rows_times(const NmRows& w, int64_t from, int64_t to, const float* x, int64_t ld, int64_t m, float* out, int64_t ldo) {
  std::vector<float> values(static_cast<size_t>(w.kc + 32));
  for (int64_t r = from; r < to; ++r) {
    decode_row(w, r, values.data());
    int64_t i = 0;
    float four[4];
    for (; i + 4 <= m; i += 4) {
      row_times<V, 4>(w, r, values.data(), x + i * ld, ld, four);
      for (int j = 0; j < 4; ++j) out[(i + j) * ldo + r - from] = four[j];
    }
    for (; i < m; ++i) row_times<V, 1>(w, r, values.data(), x + i * ld, ld, out + i * ldo + r - from);
  }
}

// Rows from .. to as a dense matrix (to - from, k) of x's type.
template <class V> void rows_dense(const NmRows& w, int64_t from, int64_t to, void* out, Type type) {
  std::vector<float> values(static_cast<size_t>(w.kc + 32)), line(static_cast<size_t>(w.words * 64));
  for (int64_t r = from; r < to; ++r) {
    decode_row(w, r, values.data());
    const float* p = values.data();
    for (int64_t i = 0; i < w.words * 4; ++i) {
      const uint32_t keep = static_cast<uint32_t>(w.index[r * w.words + i / 4] >> (16 * (i % 4))) & 0xFFFF;
      V::store_f(line.data() + i * 16, spread(V{}, p, keep));
      p += std::popcount(keep);
    }
    const int64_t at = (r - from) * w.k;
    if (type == Type::f32) std::memcpy(static_cast<float*>(out) + at, line.data(), static_cast<size_t>(w.k) * 4);
    else if (type == Type::bf16) {
      uint16_t* to16 = static_cast<uint16_t*>(out) + at;
#pragma omp simd
      for (int64_t i = 0; i < w.k; ++i) to16[i] = float_to_bf16(line[static_cast<size_t>(i)]);
    } else
      for (int64_t i = 0; i < w.k; ++i) store_from_float(out, at + i, type, line[static_cast<size_t>(i)]);
  }
}

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define EFFLLM_NM_WIDE 1
inline uint32_t first_words(int64_t count) { return static_cast<uint32_t>((uint64_t{1} << count) - 1); }
inline __m512i spread_words(const uint16_t* p, uint32_t have, uint32_t keep) {  // reads no further than `have` says
  return _mm512_maskz_expand_epi16(keep, _mm512_maskz_loadu_epi16(have, p));
}

// R rows of bf16 values times MR tokens of bf16 x (`ld` apart, zeros past k).
template <int R, int MR> inline void rows_bf16(const NmRows& w, int64_t row, const uint16_t* x, int64_t ld, float* out, int64_t ldo) {
  __m512 acc[MR][R];
  const uint16_t* base[R];
  const uint64_t* keep[R];
  for (int r = 0; r < R; ++r) {
    base[r] = static_cast<const uint16_t*>(w.values) + (row + r) * w.width;
    keep[r] = w.index + (row + r) * w.words;
    for (int m = 0; m < MR; ++m) acc[m][r] = _mm512_setzero_ps();
  }
  const int64_t step = 2 * w.per16;
  const uint32_t have = first_words(step);
  const auto add = [&](int r, int64_t i, __m512i f, __m512i g) {
    for (int m = 0; m < MR; ++m) {
      const auto* at = x + m * ld + i * 64;
      acc[m][r] = _mm512_dpbf16_ps(_mm512_dpbf16_ps(acc[m][r], (__m512bh)f, (__m512bh)_mm512_loadu_si512(at)), (__m512bh)g, (__m512bh)_mm512_loadu_si512(at + 32));
    }
  };
  for (int64_t i = 0; i < w.full; ++i)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const uint64_t bits = keep[r][i];
      const uint16_t* p = base[r] + 2 * i * step;
      add(r, i, spread_words(p, have, static_cast<uint32_t>(bits)), spread_words(p + step, have, static_cast<uint32_t>(bits >> 32)));
    }
  for (int64_t i = w.full; i < w.words; ++i)  // the last word, where padding is
    for (int r = 0; r < R; ++r) {
      const uint32_t lo = static_cast<uint32_t>(keep[r][i]), hi = static_cast<uint32_t>(keep[r][i] >> 32);
      const uint16_t* p = base[r] + 2 * i * step;
      add(r, i, spread_words(p, first_words(std::popcount(lo)), lo), spread_words(p + std::popcount(lo), first_words(std::popcount(hi)), hi));
    }
  for (int m = 0; m < MR; ++m)
    for (int r = 0; r < R; ++r) out[m * ldo + r] = _mm512_reduce_add_ps(acc[m][r]);
}

inline void rows_times_bf16(const NmRows& w, int64_t from, int64_t to, const uint16_t* x, int64_t ld, int64_t m, float* out, int64_t ldo) {
  int64_t r = from;
  for (; r + 4 <= to; r += 4) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) rows_bf16<4, 4>(w, r, x + i * ld, ld, out + i * ldo + r - from, ldo);
    for (; i < m; ++i) rows_bf16<4, 1>(w, r, x + i * ld, ld, out + i * ldo + r - from, ldo);
  }
  for (; r < to; ++r)
    for (int64_t i = 0; i < m; ++i) rows_bf16<1, 1>(w, r, x + i * ld, ld, out + i * ldo + r - from, ldo);
}
#endif

}  // namespace effllm
