// Sixteen rows at a time: the few vector operations that the bipolar kernels need, for AVX-512 VNNI, AVX2 and plain C++.
//
// W  64 bytes: 16 rows x 4 columns of unsigned codes        I  16 int32 accumulators, one a row        F  16 floats, one a row
//
// dp<WIDE>(acc, w, x4) adds sum_i w[r][i] * x4[i] to row r; WIDE says that codes may exceed 127, which AVX2's saturating
// 16-bit pair sums cannot take in one go.
#pragma once
#include "activation.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace effllm {

template <int SHIFT>  // right for SHIFT > 0, left for SHIFT < 0, of bytes whose strays the mask removes
inline uint8_t shift_byte(uint8_t u) { return SHIFT >= 0 ? u >> (SHIFT & 7) : static_cast<uint8_t>(u << ((-SHIFT) & 7)); }

struct Portable {
  static constexpr const char* name = "portable";
  static constexpr bool narrow = false;  // narrow.h
  static constexpr int gemm_rows = 2;
  static constexpr bool fast_single = false;
  static constexpr bool fast_bf16 = false;
  struct W { uint8_t v[64]; };
  struct I { int32_t v[16]; };
  struct F { float v[16]; };
  static W load(const uint8_t* p) { W w; std::memcpy(w.v, p, 64); return w; }
  static void store(uint8_t* p, const W& w) { std::memcpy(p, w.v, 64); }
  static W zero_w() { return W{}; }
  static I zero_i() { return I{}; }
  static F zero_f() { return F{}; }
  template <int SHIFT, int MASK> static W field(const W& u) {
    W w; for (int i = 0; i < 64; ++i) w.v[i] = shift_byte<SHIFT>(u.v[i]) & MASK; return w;
  }
  static W either(const W& a, const W& b) { W w; for (int i = 0; i < 64; ++i) w.v[i] = a.v[i] | b.v[i]; return w; }
  template <bool WIDE> static I dp(I acc, const W& w, const int8_t* x) {
    for (int r = 0; r < 16; ++r)
      acc.v[r] += w.v[4 * r] * x[0] + w.v[4 * r + 1] * x[1] + w.v[4 * r + 2] * x[2] + w.v[4 * r + 3] * x[3];
    return acc;
  }
  static I shift_add(const I& hi, const I& lo) { I r; for (int i = 0; i < 16; ++i) r.v[i] = hi.v[i] * 256 + lo.v[i]; return r; }
  static F to_float(const I& a) { F f; for (int i = 0; i < 16; ++i) f.v[i] = static_cast<float>(a.v[i]); return f; }
  static F fma(const F& a, const F& b, const F& c) { F f; for (int i = 0; i < 16; ++i) f.v[i] = a.v[i] * b.v[i] + c.v[i]; return f; }
  static F fma1(const F& a, float b, const F& c) { F f; for (int i = 0; i < 16; ++i) f.v[i] = a.v[i] * b + c.v[i]; return f; }
  static F axpb(const F& a, float b, float c) { F f; for (int i = 0; i < 16; ++i) f.v[i] = a.v[i] * b + c; return f; }
  static F load_f(const float* p) { F f; std::memcpy(f.v, p, 64); return f; }
  static F load_h(const uint16_t* p) {
    F f; for (int i = 0; i < 16; ++i) { _Float16 h; std::memcpy(&h, p + i, 2); f.v[i] = static_cast<float>(h); } return f;
  }
  static int32_t sum32(const int8_t* p) { int32_t s = 0; for (int i = 0; i < 32; ++i) s += p[i]; return s; }
  static F plus(F a, float b) { for (int i = 0; i < 16; ++i) a.v[i] += b; return a; }
  static F larger(F a, const F& b) { for (int i = 0; i < 16; ++i) a.v[i] = std::max(a.v[i], std::fabs(b.v[i])); return a; }
  static float most(const F& a) { float m = 0; for (int i = 0; i < 16; ++i) m = std::max(m, a.v[i]); return m; }
  static void digits(const F& f, float scale, int8_t* high, int8_t* low) {
    for (int i = 0; i < 16; ++i) {
      const int32_t v = static_cast<int32_t>(std::nearbyint(f.v[i] * scale));
      high[i] = static_cast<int8_t>((v + 128) >> 8), low[i] = static_cast<int8_t>(v);
    }
  }
  static void store_f(float* p, const F& f) { std::memcpy(p, f.v, 64); }
  static void store_bf16(uint16_t* p, const F& f) { for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(f.v[i]); }
  static void store_h(uint16_t* p, const F& f) { for (int i = 0; i < 16; ++i) store_from_float(p, i, Type::f16, f.v[i]); }
};

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
struct Avx2 {
  static constexpr const char* name = "avx2";
  static constexpr bool narrow = true;  // narrow.h
  static constexpr int gemm_rows = 2;
  static constexpr bool fast_single = false;
  static constexpr bool fast_bf16 = false;
  struct W { __m256i a, b; };
  struct I { __m256i a, b; };
  struct F { __m256 a, b; };
  static W load(const uint8_t* p) {
    auto q = reinterpret_cast<const __m256i*>(p); return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
  }
  static void store(uint8_t* p, const W& w) {
    auto q = reinterpret_cast<__m256i*>(p); _mm256_storeu_si256(q, w.a); _mm256_storeu_si256(q + 1, w.b);
  }
  static W zero_w() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static I zero_i() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static F zero_f() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  template <int SHIFT> static __m256i shifted(__m256i v) {
    if constexpr (SHIFT > 0) return _mm256_srli_epi16(v, SHIFT);
    else if constexpr (SHIFT < 0) return _mm256_slli_epi16(v, -SHIFT);
    else return v;
  }
  template <int SHIFT, int MASK> static W field(const W& u) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(MASK));
    return {_mm256_and_si256(shifted<SHIFT>(u.a), m), _mm256_and_si256(shifted<SHIFT>(u.b), m)};
  }
  static W either(const W& x, const W& y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static __m256i dot(__m256i acc, __m256i w, __m256i x) {
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
  }
  template <bool WIDE> static I dp(I acc, const W& w, const int8_t* p) {
    int32_t four; std::memcpy(&four, p, 4);
    const __m256i x = _mm256_set1_epi32(four);
    if constexpr (!WIDE) return {dot(acc.a, w.a, x), dot(acc.b, w.b, x)};
    const W lo = field<0, 0x7F>(w), hi = field<0, 0x80>(w);  // 128 * x fits only alone: pair sums of the top bit are taken at half weight
    const W half = field<1, 0x40>(hi);
    I r{dot(acc.a, lo.a, x), dot(acc.b, lo.b, x)};
    r = {dot(r.a, half.a, x), dot(r.b, half.b, x)};
    return {dot(r.a, half.a, x), dot(r.b, half.b, x)};
  }
  // Products without bytes that accumulate (narrow.h): of words, or of bytes into sums of 16 bits.
  struct S { __m256i a, b; };  // 16 rows x 2 sums of 16 bits
  static S zero_s() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  // The sums are made here: the compiler would keep products of several steps to add them later, and has no registers for them.
  template <class T> static T now(T sum) { asm("" : "+x"(sum.a), "+x"(sum.b)); return sum; }
  static W even(const W& w) { const __m256i m = _mm256_set1_epi16(255); return {_mm256_and_si256(w.a, m), _mm256_and_si256(w.b, m)}; }
  static W odd(const W& w) { return {_mm256_srli_epi16(w.a, 8), _mm256_srli_epi16(w.b, 8)}; }
  static I dp_words(const I& acc, const W& w, const int16_t* p) {
    int32_t two; std::memcpy(&two, p, 4);
    const __m256i x = _mm256_set1_epi32(two);
    return now(I{_mm256_add_epi32(acc.a, _mm256_madd_epi16(w.a, x)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(w.b, x))});
  }
  static S dp_short(const S& acc, const W& w, const int8_t* p) {
    int32_t four; std::memcpy(&four, p, 4);
    const __m256i x = _mm256_set1_epi32(four);
    return now(S{_mm256_add_epi16(acc.a, _mm256_maddubs_epi16(w.a, x)), _mm256_add_epi16(acc.b, _mm256_maddubs_epi16(w.b, x))});
  }
  static I add_short(const I& acc, const S& s) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_add_epi32(acc.a, _mm256_madd_epi16(s.a, one)), _mm256_add_epi32(acc.b, _mm256_madd_epi16(s.b, one))};
  }
  static I shift_add(const I& hi, const I& lo) {
    return {_mm256_add_epi32(_mm256_slli_epi32(hi.a, 8), lo.a), _mm256_add_epi32(_mm256_slli_epi32(hi.b, 8), lo.b)};
  }
  static F to_float(const I& v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }
  template <int C> static F column(const W& w) {
    const __m256i byte = _mm256_set1_epi32(255);
    return to_float(I{_mm256_and_si256(_mm256_srli_epi32(w.a, 8 * C), byte), _mm256_and_si256(_mm256_srli_epi32(w.b, 8 * C), byte)});
  }
  static F fma(const F& x, const F& y, const F& z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F fma1(const F& x, float y, const F& z) {
    const __m256 b = _mm256_set1_ps(y); return {_mm256_fmadd_ps(x.a, b, z.a), _mm256_fmadd_ps(x.b, b, z.b)};
  }
  static F axpb(const F& x, float y, float z) {
    const __m256 b = _mm256_set1_ps(y), c = _mm256_set1_ps(z); return {_mm256_fmadd_ps(x.a, b, c), _mm256_fmadd_ps(x.b, b, c)};
  }
  static F load_f(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static F load_h(const uint16_t* p) {
    auto q = reinterpret_cast<const __m128i*>(p); return {_mm256_cvtph_ps(_mm_loadu_si128(q)), _mm256_cvtph_ps(_mm_loadu_si128(q + 1))};
  }
  static int32_t sum32(const int8_t* p) { return lanes(dot(_mm256_setzero_si256(), _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))); }
  static int32_t lanes(__m256i v) {
    const __m128i h = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1)), q = _mm_add_epi32(h, _mm_unpackhi_epi64(h, h));
    return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 1)));
  }
  static F plus(const F& x, float y) {
    const __m256 b = _mm256_set1_ps(y); return {_mm256_add_ps(x.a, b), _mm256_add_ps(x.b, b)};
  }
  // The larger of a and |b|, by lane; the largest of all lanes, none of which is below 0.
  static F larger(const F& x, const F& y) {
    const __m256 sign = _mm256_set1_ps(-0.f); return {_mm256_max_ps(x.a, _mm256_andnot_ps(sign, y.a)), _mm256_max_ps(x.b, _mm256_andnot_ps(sign, y.b))};
  }
  static float most(const F& x) {
    const __m256 a = _mm256_max_ps(x.a, x.b);
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)), c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
  }
  // f * scale, within 127 * 256 of zero, as integers of two digits, high * 256 + low.
  static void digits(const F& f, float scale, int8_t* high, int8_t* low) {
    const __m256 by = _mm256_set1_ps(scale);
    const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(f.a, by)), _mm256_cvtps_epi32(_mm256_mul_ps(f.b, by)));
    words_to_digits(_mm256_permute4x64_epi64(words, 0xD8), high, low);
  }
  static void words_to_digits(__m256i v, int8_t* high, int8_t* low) {
    const __m256i h = _mm256_srai_epi16(_mm256_add_epi16(v, _mm256_set1_epi16(128)), 8), l = _mm256_sub_epi16(v, _mm256_slli_epi16(h, 8));
    const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi16(h, l), 0xD8);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_castsi256_si128(both));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_extracti128_si256(both, 1));
  }
  static void store_f(float* p, const F& f) { _mm256_storeu_ps(p, f.a); _mm256_storeu_ps(p + 8, f.b); }
  static __m256i rounded(__m256 f) {  // to bf16, in the lower half of each lane
    const __m256i u = _mm256_castps_si256(f), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    const __m256i near = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
    const __m256i nan = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
    return _mm256_blendv_epi8(near, nan, _mm256_castps_si256(_mm256_cmp_ps(f, f, _CMP_UNORD_Q)));
  }
  static void store_bf16(uint16_t* p, const F& f) {
    const __m256i both = _mm256_packus_epi32(rounded(f.a), rounded(f.b));  // lane by lane
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(both, 0xD8));
  }
  static void store_h(uint16_t* p, const F& f) {
    auto q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, _mm256_cvtps_ph(f.a, _MM_FROUND_TO_NEAREST_INT)), _mm_storeu_si128(q + 1, _mm256_cvtps_ph(f.b, _MM_FROUND_TO_NEAREST_INT));
  }
};
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
struct Avx512 {
  static constexpr const char* name = "avx512";
  static constexpr bool narrow = false;  // narrow.h
  static constexpr int gemm_rows = 6;
  static constexpr bool fast_single = true;
#if defined(__AVX512BF16__)
  static constexpr bool fast_bf16 = true;
#else
  static constexpr bool fast_bf16 = false;
#endif
  using W = __m512i;
  using I = __m512i;
  using F = __m512;
  static W load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store(uint8_t* p, W w) { _mm512_storeu_si512(p, w); }
  static W zero_w() { return _mm512_setzero_si512(); }
  static I zero_i() { return _mm512_setzero_si512(); }
  static F zero_f() { return _mm512_setzero_ps(); }
  template <int SHIFT, int MASK> static W field(W u) {
    const __m512i m = _mm512_set1_epi8(static_cast<char>(MASK));
    if constexpr (SHIFT > 0) u = _mm512_srli_epi16(u, SHIFT);
    if constexpr (SHIFT < 0) u = _mm512_slli_epi16(u, -SHIFT);
    return _mm512_and_si512(u, m);
  }
  static W either(W a, W b) { return _mm512_or_si512(a, b); }
  template <bool WIDE> static I dp(I acc, W w, const int8_t* p) {
    int32_t four; std::memcpy(&four, p, 4);
    return _mm512_dpbusd_epi32(acc, w, _mm512_set1_epi32(four));
  }
  static I shift_add(I hi, I lo) { return _mm512_add_epi32(_mm512_slli_epi32(hi, 8), lo); }
  static F to_float(I a) { return _mm512_cvtepi32_ps(a); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F fma1(F a, float b, F c) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), c); }
  static F axpb(F a, float b, float c) { return _mm512_fmadd_ps(a, _mm512_set1_ps(b), _mm512_set1_ps(c)); }
  static F load_f(const float* p) { return _mm512_loadu_ps(p); }
  static F load_h(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store_f(float* p, F f) { _mm512_storeu_ps(p, f); }
  static int32_t sum32(const int8_t* p) { return Avx2::lanes(_mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))); }
  static F plus(F a, float b) { return _mm512_add_ps(a, _mm512_set1_ps(b)); }
  static F larger(F a, F b) { return _mm512_max_ps(a, _mm512_abs_ps(b)); }
  static float most(F a) { return _mm512_reduce_max_ps(a); }
  static void digits(F f, float scale, int8_t* high, int8_t* low) {
    Avx2::words_to_digits(_mm512_cvtepi32_epi16(_mm512_cvtps_epi32(_mm512_mul_ps(f, _mm512_set1_ps(scale)))), high, low);
  }
  static void store_h(uint16_t* p, F f) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT)); }
#if defined(__AVX512BF16__)
  template <int C> static F column(W w) { return _mm512_cvtepi32_ps(_mm512_and_si512(C ? _mm512_srli_epi32(w, 8 * C) : w, _mm512_set1_epi32(255))); }
  static void store_bf16(uint16_t* p, F f) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(f))); }
  // Two columns of 16 rows as bf16, side by side in every lane; and the product of such pairs with the two values at p.
  static void store_pairs(uint8_t* p, F even, F odd) {
    const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(odd, even));  // even in the lower half
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    _mm512_storeu_si512(p, _mm512_permutexvar_epi16(order, both));
  }
  static F dot_pairs(F acc, W w, const uint16_t* p) {
    int32_t two; std::memcpy(&two, p, 4);
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)));
  }
#else
  static void store_bf16(uint16_t* p, F f) {
    const __m512i u = _mm512_castps_si512(f), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
    const __m512i nan = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(f, f, _CMP_UNORD_Q), nan)));
  }
#endif
};
#endif

}  // namespace effllm
