// 2:4 weights in tiles of 16 rows, AVX-512 (layout nm_tiles): the activations are gathered, not the weights spread.
//
// Values in bf16 (layout (T, G, 16, 2), a lane of 32 bits holds the two kept values of one group of one row).
//   The two kept columns of a group are one of six pairs, a nibble i | j << 2. For a group of four activations the table of all 16
//   nibbles, 32 bits each, is one register: vpermd with the rows' nibbles gives every row its two activations, vdpbf16ps the products.
//   Tables are made once a token. Per 64 bytes of values: one shift, one permutation, one product.
// Codes of 8 or 4 bits (layout (T, units, 64), a lane of 32 bits holds the four codes of two groups of one row).
//   A pair of int8 digits is 16 bits: the tables of two groups fill one register, vpermw, then vpdpbusd for each digit, and
//   once more against ones for the sum of the kept activations, which the zero point multiplies.
// Bytes     9/16 of dense bf16; 5/8 of dense 8 bits.
// Numerics  bf16: fp32 sums, denormals count as zero. Codes: exact within a segment of at most 128 columns, whose activations share a
//           step (two digits: 2^-16 of their largest, three for fp32: 2^-24), fp32 across segments.
#pragma once
#include "bipolar.h"
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

namespace effllm {

constexpr int kTiles = 4;  // tiles side by side: they share the loads of tables

struct NmTiles {
  const uint8_t* values;
  const uint8_t* index;
  const void* scale;    // (T, S, 16), null for bf16 values
  const void* minimum;
  bool half;
  float zero;
  int bits;             // 0: bf16 values
  int64_t n, tiles, groups, group, scales;  // groups of four columns in a padded row; group: codes that share a scale, 0 for all
};

inline __m512i broadcast8(const void* p) {
  int64_t v;
  std::memcpy(&v, p, 8);
  return _mm512_set1_epi64(v);
}

#if defined(__AVX512BF16__)
// Tables of one token: 16 pairs of bf16 for each group of four, 64 bytes a group.
inline void pair_tables(const uint16_t* x, int64_t groups, uint8_t* out) {
  alignas(64) uint16_t from[32];
  for (int w = 0; w < 16; ++w) from[2 * w] = static_cast<uint16_t>(w & 3), from[2 * w + 1] = static_cast<uint16_t>(w >> 2);
  const __m512i at = _mm512_load_si512(from);
  for (int64_t g = 0; g < groups; ++g) _mm512_store_si512(out + g * 64, _mm512_permutexvar_epi16(at, broadcast8(x + g * 4)));
}

// COUNT tiles times one token: out[16 * COUNT].
template <int COUNT> inline void tiles_bf16(const NmTiles& w, int64_t tile, const uint8_t* tables, float* out) {
  __m512 acc[COUNT][2];
  const uint8_t *v[COUNT], *index[COUNT];
  for (int t = 0; t < COUNT; ++t) {
    acc[t][0] = acc[t][1] = _mm512_setzero_ps();
    v[t] = w.values + (tile + t) * w.groups * 64;
    index[t] = w.index + (tile + t) * w.groups * 8;
  }
  for (int64_t g = 0; g < w.groups; g += 8) {
    __m512i pick[COUNT];
    for (int t = 0; t < COUNT; ++t) pick[t] = _mm512_loadu_si512(index[t] + g * 8);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      const __m512i table = _mm512_load_si512(tables + (g + j) * 64);
#pragma GCC unroll 4
      for (int t = 0; t < COUNT; ++t) {
        const __m512i value = _mm512_loadu_si512(v[t] + (g + j) * 64);
        const __m512i x = _mm512_permutexvar_epi32(j ? _mm512_srli_epi32(pick[t], static_cast<unsigned>(4 * j)) : pick[t], table);
        acc[t][j % 2] = _mm512_dpbf16_ps(acc[t][j % 2], (__m512bh)value, (__m512bh)x);
      }
    }
  }
  for (int t = 0; t < COUNT; ++t) _mm512_storeu_ps(out + 16 * t, _mm512_add_ps(acc[t][0], acc[t][1]));
}
#endif

// One token as digits: step per segment of `seg` columns, digits [d][k], most significant first.
struct Digits {
  std::vector<int8_t> x;
  std::vector<float> step;
  std::vector<uint8_t> tables;
  int64_t segs = 0;
  const uint8_t* table(int digit, int64_t units) const {
    return tables.data() + (64 - reinterpret_cast<uintptr_t>(tables.data()) % 64) % 64 + digit * units * 64;
  }

  void take(const void* src, int64_t at, Type type, int64_t k, int64_t kp, int64_t seg, int digits) {
    x.assign(static_cast<size_t>(digits * kp), 0);
    segs = (kp + seg - 1) / seg;
    step.resize(static_cast<size_t>(segs));
    const float top = digits == 2 ? 127.f * 256.f : 127.f * 65536.f;
    std::vector<float> f(static_cast<size_t>(seg));
    for (int64_t s = 0; s < segs; ++s) {
      const int64_t from = s * seg, count = std::min(seg, k - from);
      float big = 0;
      bool finite = true;
      for (int64_t c = 0; c < count; ++c) {
        f[static_cast<size_t>(c)] = load_as_float(src, at + from + c, type);
        const float a = std::fabs(f[static_cast<size_t>(c)]);
        finite &= a <= 3.4e38f;
        big = a > big ? a : big;
      }
      const float unit = big > 0 ? big / top : 0.f, inv = unit > 0 && std::isfinite(1.f / unit) ? 1.f / unit : 0.f;
      step[static_cast<size_t>(s)] = finite ? unit : std::nanf("");
      if (!finite) continue;
      for (int64_t c = 0; c < count; ++c) {
        int32_t q = static_cast<int32_t>(std::nearbyint(f[static_cast<size_t>(c)] * inv));
        for (int d = digits - 1; d >= 0; --d) {
          const int32_t up = (q + 128) >> 8;
          x[static_cast<size_t>(d * kp + from + c)] = static_cast<int8_t>(d == 0 ? q : q - up * 256);
          q = up;
        }
      }
    }
    const int64_t units = kp / 8;
    tables.resize(static_cast<size_t>(digits * units * 64 + 64));
    alignas(64) uint8_t from[64];
    for (int w = 0; w < 32; ++w) {
      from[2 * w] = static_cast<uint8_t>((w & 3) + w / 16 * 4);
      from[2 * w + 1] = static_cast<uint8_t>((w >> 2 & 3) + w / 16 * 4);
    }
    const __m512i pick = _mm512_load_si512(from);
    for (int d = 0; d < digits; ++d) {
      uint8_t* to = const_cast<uint8_t*>(table(d, units));
      for (int64_t u = 0; u < units; ++u) _mm512_store_si512(to + u * 64, _mm512_shuffle_epi8(broadcast8(x.data() + d * kp + u * 8), pick));
    }
  }
};

// The value of D digits' exact sums.
template <int D> inline __m512 join_digits(const __m512i* a) {
  const __m512i top = _mm512_add_epi32(_mm512_slli_epi32(a[0], 8), a[1]);
  if constexpr (D == 2) return _mm512_cvtepi32_ps(top);
  return _mm512_fmadd_ps(_mm512_cvtepi32_ps(top), _mm512_set1_ps(256.f), _mm512_cvtepi32_ps(a[D - 1]));
}

// COUNT tiles of BITS-bit codes times one token of D digits, segments of SEG codes: out[16 * COUNT].
template <int BITS, int D, int COUNT> inline void tiles_codes(const NmTiles& w, int64_t tile, const Digits& x, int64_t seg, float* out) {
  constexpr int per = 8 / BITS;  // units in 64 bytes of codes
  const int64_t units = w.groups / 2;
  __m512 sum[COUNT];
  const uint8_t *v[COUNT], *index[COUNT];
  const uint8_t* table[D];
  for (int d = 0; d < D; ++d) table[d] = x.table(d, units);
  for (int t = 0; t < COUNT; ++t) {
    sum[t] = _mm512_setzero_ps();
    v[t] = w.values + (tile + t) * units * 64 / per;
    index[t] = w.index + (tile + t) * units * 16;
  }
  const __m512i nibble = _mm512_set1_epi16(15), second = _mm512_set1_epi32(0x100000), one = _mm512_set1_epi8(1);
  const int64_t run = seg / 4;
  for (int64_t s = 0, u = 0; s < x.segs; ++s) {
    __m512i acc[COUNT][D], all[COUNT][D];
    for (int t = 0; t < COUNT; ++t)
      for (int d = 0; d < D; ++d) acc[t][d] = all[t][d] = _mm512_setzero_si512();
    const int64_t end = std::min(units, u + run);
    for (; u < end; u += 4) {
#pragma GCC unroll 4
      for (int t = 0; t < COUNT; ++t) {
        const __m512i pick = _mm512_loadu_si512(index[t] + u * 16);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) {
          const __m512i at = _mm512_ternarylogic_epi32(j ? _mm512_srli_epi16(pick, static_cast<unsigned>(4 * j)) : pick, nibble, second, 0xEA);
          __m512i code = _mm512_loadu_si512(v[t] + (u + j) / per * 64);
          if constexpr (BITS == 4) code = _mm512_and_si512(j % 2 ? _mm512_srli_epi16(code, 4) : code, _mm512_set1_epi8(15));
#pragma GCC unroll 3
          for (int d = 0; d < D; ++d) {
            const __m512i here = _mm512_permutexvar_epi16(at, _mm512_load_si512(table[d] + (u + j) * 64));
            acc[t][d] = _mm512_dpbusd_epi32(acc[t][d], code, here);
            all[t][d] = _mm512_dpbusd_epi32(all[t][d], one, here);
          }
        }
      }
    }
    const __m512 step = _mm512_set1_ps(2.f * x.step[static_cast<size_t>(s)]);
    const int64_t g = w.group ? s * seg / w.group : 0;
    for (int t = 0; t < COUNT; ++t) {
      const int64_t where = ((tile + t) * w.scales + g) * 16;
      const __m512 scale = load_scale<Avx512>(w.scale, where, w.half);
      const __m512 products = join_digits<D>(acc[t]), kept = join_digits<D>(all[t]);
      __m512 add;
      if (w.minimum)
        add = _mm512_fmadd_ps(scale, products, _mm512_mul_ps(_mm512_mul_ps(load_scale<Avx512>(w.minimum, where, w.half), _mm512_set1_ps(.5f)), kept));
      else
        add = _mm512_mul_ps(scale, _mm512_fnmadd_ps(_mm512_set1_ps(w.zero), kept, products));
      sum[t] = _mm512_fmadd_ps(add, step, sum[t]);
    }
  }
  for (int t = 0; t < COUNT; ++t) _mm512_storeu_ps(out + 16 * t, sum[t]);
}

#if defined(__AVX512BF16__)
// Two kept bf16 values of a group, one in the low half of each lane, to four columns of 16 rows.
inline void store_group(__m512i first, __m512i second, __m512i nibble, uint16_t* out, int64_t ld, int64_t columns) {
  const __m512i i = _mm512_and_si512(nibble, _mm512_set1_epi32(3)), j = _mm512_and_si512(_mm512_srli_epi32(nibble, 2), _mm512_set1_epi32(3));
  for (int c = 0; c < columns; ++c) {
    const __m512i at = _mm512_set1_epi32(c);
    const __m512i f = _mm512_maskz_mov_epi32(_mm512_cmpeq_epi32_mask(i, at), first);
    const __m512i both = _mm512_mask_mov_epi32(f, _mm512_cmpeq_epi32_mask(j, at), second);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + c * ld), _mm512_cvtepi32_epi16(both));
  }
}
inline __m512i as_words(__m512 f) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(f)); }

// Tiles from .. to as (k, ld) bf16 at `out`, whose first column is tile `origin`.
inline void tiles_dense(const NmTiles& w, int64_t k, int64_t from, int64_t to, int64_t origin, uint16_t* out, int64_t ld) {
  for (int64_t t = from; t < to; ++t) {
    uint16_t* at = out + (t - origin) * 16;
    for (int64_t g = 0; g * 4 < k; ++g) {
      const int64_t columns = std::min<int64_t>(4, k - g * 4);
      if (w.bits == 0) {
        const __m512i v = _mm512_loadu_si512(w.values + (t * w.groups + g) * 64);
        const __m512i pick = _mm512_loadu_si512(w.index + (t * w.groups + g / 8 * 8) * 8);
        store_group(_mm512_and_si512(v, _mm512_set1_epi32(0xFFFF)), _mm512_srli_epi32(v, 16), _mm512_srli_epi32(pick, static_cast<unsigned>(g % 8 * 4)), at + g * 4 * ld, ld, columns);
        continue;
      }
      const int64_t units = w.groups / 2, u = g / 2, per = 8 / w.bits;
      __m512i v = _mm512_loadu_si512(w.values + (t * (units / per) + u / per) * 64);
      if (w.bits == 4) v = _mm512_and_si512(u % 2 ? _mm512_srli_epi16(v, 4) : v, _mm512_set1_epi8(15));
      if (g % 2) v = _mm512_srli_epi32(v, 16);
      const __m512i pick = _mm512_loadu_si512(w.index + (t * units + u / 4 * 4) * 16);
      const int64_t where = (t * w.scales + (w.group ? g * 2 / w.group : 0)) * 16;
      const __m512 step = _mm512_mul_ps(load_scale<Avx512>(w.scale, where, w.half), _mm512_set1_ps(2.f));
      const __m512 low = w.minimum ? load_scale<Avx512>(w.minimum, where, w.half) : _mm512_mul_ps(step, _mm512_set1_ps(-w.zero));
      const __m512i byte = _mm512_set1_epi32(255);
      const __m512 a = _mm512_cvtepi32_ps(_mm512_and_si512(v, byte)), b = _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(v, 8), byte));
      store_group(as_words(_mm512_fmadd_ps(a, step, low)), as_words(_mm512_fmadd_ps(b, step, low)),
                  _mm512_srli_epi32(pick, static_cast<unsigned>(u % 4 * 4 + g % 2 * 16)), at + g * 4 * ld, ld, columns);
    }
  }
}
#endif

}  // namespace effllm
#endif
