// Activations as integer digits, so that every kernel is one exact integer dot product per segment of columns.
//
// A8    one digit: the int8 codes that the caller quantized, one scale a token (applied at the very end).
// A16   two digits for bf16 / fp16 input, three for fp32: per block of 32 columns x ~ step * (256 hi + lo), with step the
//       block's largest magnitude over 127 * 256 (127 * 65536 for fp32). The rounding, 2^-16 (2^-24) of the block's maximum, is
//       below that of bf16 (fp32) arithmetic on the same block.
//
// A segment is the run of columns that share one weight scale and one activation step: the group for A8, at most 32 for A16.
//
// Words     instruction sets whose byte products do not accumulate (narrow.h) take two digits, or one that meets 8-bit codes, as one int16 a
//           column instead; of each four columns the order is 0, 2, 1, 3, as codes come apart into even and odd bytes.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace effllm {

enum class Type { f32, bf16, f16 };
inline int64_t size_of(Type t) { return t == Type::f32 ? 4 : 2; }

inline float bf16_to_float(uint16_t h) { uint32_t u = static_cast<uint32_t>(h) << 16; float f; std::memcpy(&f, &u, 4); return f; }
inline uint16_t float_to_bf16(float f) {
  uint32_t u; std::memcpy(&u, &f, 4);
  const uint32_t nan = (u >> 16) | 0x40, rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? nan : rounded);
}
inline float load_as_float(const void* p, int64_t i, Type t) {
  if (t == Type::f32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  if (t == Type::bf16) return bf16_to_float(h);
  _Float16 v; std::memcpy(&v, &h, 2); return static_cast<float>(v);
}
inline void store_from_float(void* p, int64_t i, Type t, float f) {
  if (t == Type::f32) { static_cast<float*>(p)[i] = f; return; }
  uint16_t h;
  if (t == Type::bf16) h = float_to_bf16(f);
  else { const _Float16 v = static_cast<_Float16>(f); std::memcpy(&h, &v, 2); }
  static_cast<uint16_t*>(p)[i] = h;
}

// Digits, steps and correction terms of M tokens.
struct Activations {
  int digits = 1;
  int64_t m = 0, k = 0, kp = 0;  // tokens, columns, columns padded to blocks of 32
  int64_t seg = 0, segs = 0;     // columns per segment, segments per token
  bool words = false;            // int16 columns instead of digits
  std::vector<int8_t> x;         // [m][digit][kp], most significant digit first; or [m][kp] words
  std::vector<float> step;       // [m][segs], A16 only
  std::vector<float> corr;       // [m][segs]: what multiplies scale (-2 zero) or minimum: sum of x in the segment, see Kernel notes
  std::vector<uint8_t> tables;   // sums of four activations for the 1-bit lookup, see lookup.h
  const uint8_t* aligned_tables() const { return tables.data() + (64 - reinterpret_cast<uintptr_t>(tables.data()) % 64) % 64; }
  int64_t stride() const { return kp + 64; }  // rows a power of two apart would share one set of the cache
  const int8_t* row(int64_t i, int d) const { return x.data() + (i * digits + d) * stride(); }
  const int16_t* word_row(int64_t i) const { return reinterpret_cast<const int16_t*>(x.data() + i * 2 * stride()); }
  int16_t* word_row(int64_t i) { return reinterpret_cast<int16_t*>(x.data() + i * 2 * stride()); }

  // Room for m tokens that weights of `bits` are to meet, by the kernels of V.
  template <class V> void shape(int64_t m_, int64_t k_, int64_t kp_, int64_t seg_, int digits_, int64_t bits) {
    m = m_; k = k_; kp = kp_; seg = seg_; digits = digits_;
    words = V::narrow && (digits == 2 || (digits == 1 && bits == 8));
    segs = (kp + seg - 1) / seg;
    x.assign(static_cast<size_t>(m * (words ? 2 : digits) * stride()), 0);
    corr.resize(static_cast<size_t>(m * segs));
    if (digits > 1) step.resize(static_cast<size_t>(m * segs));
  }

  // One token of int8 codes. `factor` turns a sum of x into the correction term.
  template <class V> void take_int8(int64_t i, const int8_t* src, float factor) {
    if (words) return take_int8_words(i, src, factor);
    int8_t* dst = x.data() + i * stride();
    std::memcpy(dst, src, static_cast<size_t>(k));
    for (int64_t s = 0; s < segs; ++s) {
      int32_t sum = 0;
      int64_t c = s * seg;
      const int64_t end = std::min(kp, (s + 1) * seg);
      for (; c + 32 <= end; c += 32) sum += V::sum32(dst + c);
      for (; c < end; ++c) sum += dst[c];
      corr[static_cast<size_t>(i * segs + s)] = factor * static_cast<float>(sum);
    }
  }

  void take_int8_words(int64_t i, const int8_t* src, float factor) {
    for (int64_t s = 0; s < segs; ++s) {
      const int64_t from = s * seg, end = std::min(k, from + seg);
      int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t c = from; c < end; ++c) sum += src[c];
      corr[static_cast<size_t>(i * segs + s)] = factor * static_cast<float>(sum);
    }
    put_words(word_row(i), src, k);
  }

  // n columns from q, in the order of words; `to` is the place of the first, whose number is a multiple of four.
  template <class Q> static void put_words(int16_t* to, const Q* q, int64_t n) {
    int64_t c = 0;
    for (; c + 4 <= n; c += 4)
      to[c] = static_cast<int16_t>(q[c]), to[c + 1] = static_cast<int16_t>(q[c + 2]), to[c + 2] = static_cast<int16_t>(q[c + 1]), to[c + 3] = static_cast<int16_t>(q[c + 3]);
    for (; c < n; ++c) to[c % 4 == 1 ? c + 1 : c % 4 == 2 ? c - 1 : c] = static_cast<int16_t>(q[c]);
  }

  // One token of floats.
  void take_float(int64_t i, const void* src, Type type, float factor) {
    float f[32];
    for (int64_t s = 0; s < segs; ++s) {
      const int64_t from = s * seg, n = std::min(seg, k - from);
      if (n == 32) {
        load32(src, i * k + from, type, f);
        take_segment<32>(i, s, f, factor);
        continue;
      }
      for (int64_t c = 0; c < n; ++c) f[c] = load_as_float(src, i * k + from + c, type);
      take_segment(i, s, f, n, factor);
    }
  }

  static void load32(const void* src, int64_t at, Type type, float* f) {
    if (type == Type::f32) { std::memcpy(f, static_cast<const float*>(src) + at, 128); return; }
    const auto* h = static_cast<const uint16_t*>(src) + at;
    if (type == Type::bf16)
#pragma omp simd
      for (int c = 0; c < 32; ++c) f[c] = bf16_to_float(h[c]);
    else
      for (int c = 0; c < 32; ++c) f[c] = load_as_float(src, at + c, type);
  }

  // The N columns of one segment, with loops that fill vectors.
  template <int N> void take_segment(int64_t i, int64_t s, const float* f, float factor) {
    const float top = digits == 2 ? 127.f * 256.f : 127.f * 65536.f;
    alignas(64) int32_t q[N];
    float big = 0;
    int32_t odd = 0;  // NaN or infinity, which a maximum would lose
#pragma omp simd reduction(max : big) reduction(| : odd)
    for (int c = 0; c < N; ++c) {
      const float a = std::fabs(f[c]);
      odd |= !(a <= 3.4e38f);
      big = a > big ? a : big;
    }
    const size_t at = static_cast<size_t>(i * segs + s);
    if (odd) {
      step[at] = corr[at] = std::nanf("");
      return;
    }
    const float unit = big > 0 ? big / top : 0.f, inv = unit > 0 && std::isfinite(1.f / unit) ? 1.f / unit : 0.f;
    int32_t sum = 0;  // 32 times 127 * 2^16 fits
#pragma omp simd reduction(+ : sum)
    for (int c = 0; c < N; ++c) q[c] = static_cast<int32_t>(std::nearbyint(f[c] * inv)), sum += q[c];
    if (words) put_words(word_row(i) + s * seg, q, N);
    else for (int d = digits - 1; d >= 0; --d) {
      int8_t* dst = x.data() + (i * digits + d) * stride() + s * seg;
#pragma omp simd
      for (int c = 0; c < N; ++c) {
        const int32_t up = (q[c] + 128) >> 8;
        dst[c] = static_cast<int8_t>(d == 0 ? q[c] : q[c] - up * 256);
        q[c] = up;
      }
    }
    step[at] = unit;
    corr[at] = factor * unit * static_cast<float>(sum);
  }

  // The n columns of one segment of a token; none: the padding after the last.
  void take_segment(int64_t i, int64_t s, const float* f, int64_t n, float factor) {
    const float top = digits == 2 ? 127.f * 256.f : 127.f * 65536.f;
    int32_t q[32];
    float big = 0;
    bool finite = true;
    for (int64_t c = 0; c < n; ++c) {
      const float a = std::fabs(f[c]);
      finite &= a <= 3.4e38f;
      big = a > big ? a : big;
    }
    const size_t at = static_cast<size_t>(i * segs + s);
    if (!finite) {  // the token's result is NaN, as the dense product's would be
      step[at] = corr[at] = std::nanf("");
      return;
    }
    const float unit = big > 0 ? big / top : 0.f, inv = unit > 0 && std::isfinite(1.f / unit) ? 1.f / unit : 0.f;
    int64_t sum = 0;
    for (int64_t c = 0; c < n; ++c) q[c] = static_cast<int32_t>(std::nearbyint(f[c] * inv)), sum += q[c];
    if (words) put_words(word_row(i) + s * seg, q, n);
    else for (int d = digits - 1; d >= 0; --d) {
      int8_t* dst = x.data() + (i * digits + d) * stride() + s * seg;
      for (int64_t c = 0; c < n; ++c) {
        const int32_t up = (q[c] + 128) >> 8;
        dst[c] = static_cast<int8_t>(d == 0 ? q[c] : q[c] - up * 256);
        q[c] = up;
      }
    }
    step[at] = unit;
    corr[at] = factor * unit * static_cast<float>(sum);
  }
};

}  // namespace effllm
