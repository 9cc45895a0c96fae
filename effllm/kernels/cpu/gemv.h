// Rows of a dense matrix times a few fp32 vectors: what every structured weight with floating-point factors is made of.
//
// Maths     out[m][n] = sum_k w[n][k] x[m][k], w in bf16, fp16 or fp32, sums in fp32.
// Layout    w row-major, `ld` elements a row. x fp32, each vector padded with zeros to whole blocks of 32 and, for bf16 weights, the 16
//           even columns of a block before its 16 odd ones (`place`): a shift and a mask then widen a register of bf16 in place, without
//           the shuffles that the order of columns would cost.
// Bytes     N * K of w once; x stays in cache. Work: per 32 weights two widenings and two multiply-adds a vector.
// Order     four rows at once share each load of x. Rows of a range follow one another in memory, so the hardware sees one stream each.
// Numerics  every weight is exact in fp32; fp32 multiply-adds in 16 partial sums a row. NaN and infinity pass through.
#pragma once
#include "activation.h"
#include "vector.h"

namespace effllm {

inline int64_t padded32(int64_t k) { return (k + 31) / 32 * 32; }
inline int64_t place(int64_t i, Type t) { return t == Type::bf16 ? (i & ~int64_t{31}) + (i & 1) * 16 + (i & 31) / 2 : i; }

// Even and odd columns of 32 bf16 values as floats.
inline void widen_bf16(const uint16_t* p, Portable::F& even, Portable::F& odd) {
  for (int i = 0; i < 16; ++i) {
    uint32_t u; std::memcpy(&u, p + 2 * i, 4);
    const uint32_t lo = u << 16, hi = u & 0xFFFF0000u;
    std::memcpy(even.v + i, &lo, 4); std::memcpy(odd.v + i, &hi, 4);
  }
}
inline float sum16(const Portable::F& f) {
  float s = 0;
#pragma omp simd reduction(+ : s)
  for (int i = 0; i < 16; ++i) s += f.v[i];
  return s;
}
#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
inline void widen_bf16(const uint16_t* p, Avx2::F& even, Avx2::F& odd) {
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xFFFF0000u));
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p) + 1);
  even = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  odd = {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
}
inline float sum16(const Avx2::F& f) {
  const __m256 a = _mm256_add_ps(f.a, f.b);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
#endif
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline void widen_bf16(const uint16_t* p, __m512& even, __m512& odd) {
  const __m512i v = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(v, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
inline float sum16(const __m512& f) { return _mm512_reduce_add_ps(f); }
#endif

// 32 weights as two registers, in the order of `place`.
template <class V, Type T> inline void widen(const void* p, typename V::F& a, typename V::F& b) {
  if constexpr (T == Type::bf16) widen_bf16(static_cast<const uint16_t*>(p), a, b);
  else if constexpr (T == Type::f16) a = V::load_h(static_cast<const uint16_t*>(p)), b = V::load_h(static_cast<const uint16_t*>(p) + 16);
  else a = V::load_f(static_cast<const float*>(p)), b = V::load_f(static_cast<const float*>(p) + 16);
}

struct Matrix {  // rows of a dense factor
  const void* data = nullptr;
  Type type = Type::f32;
  int64_t n = 0, k = 0, ld = 0;
  int64_t row_bytes() const { return ld * size_of(type); }
  const char* row(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

struct Vectors {  // m vectors of k floats at `data`, `ld` apart, padded and placed for rows of `type`
  float* data = nullptr;
  int64_t m = 0, k = 0, ld = 0;
  Type type = Type::f32;
  static int64_t stride(int64_t k) { return padded32(k) + 16; }  // vectors a power of two apart would share one set of the cache
  float* row(int64_t i) const { return data + i * ld; }
  void clear_tail() const {  // what padding holds meets weights that are zero, and zero times NaN is NaN
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = k; c < padded32(k); ++c) row(i)[place(c, type)] = 0.f;
  }
  void take(int64_t i, int64_t at, const void* src, int64_t from, int64_t count, Type t) const {  // columns at .. of vector i
    float* to = row(i);
    if (t == Type::bf16 && type == Type::bf16 && at % 32 == 0) {
      const auto* h = static_cast<const uint16_t*>(src) + from;
      int64_t c = 0;
      for (; c + 32 <= count; c += 32)
#pragma omp simd
        for (int j = 0; j < 16; ++j) {
          uint32_t u; std::memcpy(&u, h + c + 2 * j, 4);
          const uint32_t lo = u << 16, hi = u & 0xFFFF0000u;
          std::memcpy(to + at + c + j, &lo, 4); std::memcpy(to + at + c + 16 + j, &hi, 4);
        }
      for (; c < count; ++c) to[place(at + c, type)] = bf16_to_float(h[c]);
      return;
    }
    for (int64_t c = 0; c < count; ++c) to[place(at + c, type)] = load_as_float(src, from + c, t);
  }
};

// R rows from w times MR vectors from x: out[m * ldo + r].
template <class V, Type T, int R, int MR> inline void dots(const Matrix& w, int64_t n, const Vectors& x, int64_t m, float* out, int64_t ldo) {
  using F = typename V::F;
  F acc[R][MR];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < MR; ++i) acc[r][i] = V::zero_f();
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const char* base[R];
  for (int r = 0; r < R; ++r) base[r] = w.row(n + r);
  auto step = [&](const float* xs, auto&& at) {
    F x0[MR], x1[MR];
#pragma GCC unroll 4
    for (int i = 0; i < MR; ++i) x0[i] = V::load_f(xs + i * x.ld), x1[i] = V::load_f(xs + i * x.ld + 16);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      F a, b;
      widen<V, T>(at(r), a, b);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[r][i] = V::fma(b, x1[i], V::fma(a, x0[i], acc[r][i]));
    }
  };
  const float* xs = x.row(m);
  const int64_t whole = w.k & ~int64_t{31};
  for (int64_t k = 0; k < whole; k += 32) step(xs + k, [&](int r) { return base[r] + k * size; });
  if (whole < w.k) {
    alignas(64) char rest[R][32 * size] = {};
    for (int r = 0; r < R; ++r) std::memcpy(rest[r], base[r] + whole * size, static_cast<size_t>((w.k - whole) * size));
    step(xs + whole, [&](int r) { return rest[r]; });
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < MR; ++i) out[i * ldo + r] = sum16(acc[r][i]);
}

template <class V> constexpr int kRows = V::gemm_rows > 2 ? 4 : 2;     // rows and vectors at once that leave registers over
template <class V> constexpr int kVectors = V::gemm_rows > 2 ? 4 : 2;

template <class V, Type T, int R> inline void dots_of_all(const Matrix& w, int64_t n, const Vectors& x, float* out, int64_t ldo) {
  int64_t m = 0;
  if constexpr (kVectors<V> >= 4)
    for (; m + 4 <= x.m; m += 4) dots<V, T, R, 4>(w, n, x, m, out + m * ldo, ldo);
  for (; m + 2 <= x.m; m += 2) dots<V, T, R, 2>(w, n, x, m, out + m * ldo, ldo);
  for (; m < x.m; ++m) dots<V, T, R, 1>(w, n, x, m, out + m * ldo, ldo);
}

template <class V, Type T> void rows_of_type(const Matrix& w, int64_t from, int64_t to, const Vectors& x, float* out, int64_t ldo) {
  constexpr int R = kRows<V>;
  int64_t n = from;
  for (; n + R <= to; n += R) dots_of_all<V, T, R>(w, n, x, out + n - from, ldo);
  for (; n < to; ++n) dots_of_all<V, T, 1>(w, n, x, out + n - from, ldo);
}

// out[m * ldo + n - from] for rows from .. to of w and all vectors of x, which are placed for w's type.
template <class V> void dense_rows(const Matrix& w, int64_t from, int64_t to, const Vectors& x, float* out, int64_t ldo) {
  if (w.type == Type::bf16) rows_of_type<V, Type::bf16>(w, from, to, x, out, ldo);
  else if (w.type == Type::f16) rows_of_type<V, Type::f16>(w, from, to, x, out, ldo);
  else rows_of_type<V, Type::f32>(w, from, to, x, out, ldo);
}

}  // namespace effllm
