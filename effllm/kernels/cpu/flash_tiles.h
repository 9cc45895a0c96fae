// The products of attention over tiles of keys (flash.h): scores of a tile, and weighted sums of its values. Three ways, one interface:
//
// Dots    few rows: a dot product per key and row; transposing a tile would cost as much as the work.
// Wide    keys and values widened to fp32, keys transposed; fp32 multiply-adds.
// Pairs   bf16 kept: two neighbours a 32-bit lane, `vdpbf16ps`; twice the multiply-adds of Wide. Products are exact, sums fp32; the weights of
//         values are rounded to bf16, as PyTorch's own kernel does.
//
// A tile has kTile keys; `seen` (null: all of the first n) says which are loaded, the others count as zero: what they hold does not matter.
#pragma once
#include "attention.h"
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#include <immintrin.h>
#define EFFLLM_PAIRS 1
#endif

namespace effllm::flash {

#if defined(__AVX512F__)
constexpr int kVectors = 4, kUnroll = 6;  // 24 accumulators of 32 registers
#else
constexpr int kVectors = 1, kUnroll = 6;  // 64-byte vectors are two AVX registers, or four of SSE
#endif
constexpr int kLane = 16, kTile = 64, kStep = kVectors * kLane;

typedef float Vec __attribute__((vector_size(64)));
inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, 64); return v; }
inline void store(float* p, const Vec& v) { std::memcpy(p, &v, 64); }
inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

struct MultiplyAdd {
  static Vec go(const Vec& acc, const float* a, const Vec& x) { return acc + *a * x; }
};
#if defined(EFFLLM_PAIRS)
struct DotPairs {
  static Vec go(const Vec& acc, const float* a, const Vec& x) {
    int32_t two; std::memcpy(&two, a, 4);
    return reinterpret_cast<Vec>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc), reinterpret_cast<__m512bh>(_mm512_set1_epi32(two)), reinterpret_cast<__m512bh>(x)));
  }
};
#endif

// C (M, n) (+)= A (M, depth) B (depth, n), n a multiple of kStep, all dense rows with the given strides, elements of 4 bytes; SET overwrites.
template <class Op, int M, bool SET> inline void rows_product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, int64_t n) {
  for (int64_t j = 0; j < n; j += kStep) {
    Vec acc[M][kVectors];
    for (int i = 0; i < M; ++i)
      for (int u = 0; u < kVectors; ++u) {
        if constexpr (SET) acc[i][u] = Vec{};
        else acc[i][u] = load(c + i * ldc + j + u * kLane);
      }
    for (int64_t d = 0; d < depth; ++d) {
      Vec x[kVectors];
      for (int u = 0; u < kVectors; ++u) x[u] = load(b + d * ldb + j + u * kLane);
      for (int i = 0; i < M; ++i)
        for (int u = 0; u < kVectors; ++u) acc[i][u] = Op::go(acc[i][u], a + i * lda + d, x[u]);
    }
    for (int i = 0; i < M; ++i)
      for (int u = 0; u < kVectors; ++u) store(c + i * ldc + j + u * kLane, acc[i][u]);
  }
}
template <class Op, bool SET> inline void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t depth, int64_t n) {
  int64_t i = 0;
  for (; i + kUnroll <= m; i += kUnroll) rows_product<Op, kUnroll, SET>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, n);
  for (; i + 2 <= m; i += 2) rows_product<Op, 2, SET>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, n);
  for (; i < m; ++i) rows_product<Op, 1, SET>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, n);
}

// Keys and values of one key head; strides are bytes.
struct Keys {
  const char* k = nullptr;
  const char* v = nullptr;
  int64_t k_stride = 0, v_stride = 0, d = 0, dv = 0;
};

template <Type T> struct Dots {
  static int64_t query_floats(const Keys& h) { return h.d; }
  static int64_t tile_floats(const Keys& h) { return h.d + h.dv; }
  static int64_t width(const Keys& h) { return round_up(h.dv, kStep); }  // of a row of sums
  static void query(const void* from, const Keys& h, float* to) { widen<T>(from, 0, h.d, to); }
  static void scores(const Keys& h, int64_t s, int64_t n, const char* seen, const float* q, int64_t rows, float* score, float* tile) {
    for (int64_t j = 0; j < n; ++j) {
      if (seen && !seen[j]) { for (int64_t r = 0; r < rows; ++r) score[r * kTile + j] = 0; continue; }
      widen<T>(h.k + (s + j) * h.k_stride, 0, h.d, tile);
      for (int64_t r = 0; r < rows; ++r) {
        float dot = 0;
        const float* x = q + r * h.d;
#pragma omp simd reduction(+ : dot)
        for (int64_t i = 0; i < h.d; ++i) dot += x[i] * tile[i];
        score[r * kTile + j] = dot;
      }
    }
  }
  static void values(const Keys& h, int64_t s, int64_t n, const char* seen, float* score, int64_t rows, float* acc, float* tile) {
    const int64_t ld = width(h);
    for (int64_t j = 0; j < n; ++j) {
      if (seen && !seen[j]) continue;
      widen<T>(h.v + (s + j) * h.v_stride, 0, h.dv, tile);
      for (int64_t r = 0; r < rows; ++r) {
        const float w = score[r * kTile + j];
        if (w == 0.f) continue;  // another row's key
        float* a = acc + r * ld;
#pragma omp simd
        for (int64_t i = 0; i < h.dv; ++i) a[i] += w * tile[i];
      }
    }
  }
};

template <Type T> struct Wide {
  static int64_t query_floats(const Keys& h) { return h.d; }
  static int64_t tile_floats(const Keys& h) { return kTile * std::max(round_up(h.d, kLane), round_up(h.dv, kStep)) + h.d; }
  static int64_t width(const Keys& h) { return round_up(h.dv, kStep); }
  static void query(const void* from, const Keys& h, float* to) { widen<T>(from, 0, h.d, to); }
  static void scores(const Keys& h, int64_t s, int64_t n, const char* seen, const float* q, int64_t rows, float* score, float* tile) {
    float* line = tile + kTile * h.d;
    for (int64_t j = 0; j < kTile; ++j) {
      if (j < n && !(seen && !seen[j])) widen<T>(h.k + (s + j) * h.k_stride, 0, h.d, line);
      else std::fill(line, line + h.d, 0.f);
      for (int64_t i = 0; i < h.d; ++i) tile[i * kTile + j] = line[i];
    }
    product<MultiplyAdd, true>(q, h.d, tile, kTile, score, kTile, rows, h.d, kTile);
  }
  static void values(const Keys& h, int64_t s, int64_t n, const char* seen, float* score, int64_t rows, float* acc, float* tile) {
    const int64_t ld = width(h);
    for (int64_t j = 0; j < n; ++j) {
      float* line = tile + j * ld;
      if (seen && !seen[j]) { std::fill(line, line + ld, 0.f); continue; }
      widen<T>(h.v + (s + j) * h.v_stride, 0, h.dv, line);
      std::fill(line + h.dv, line + ld, 0.f);
    }
    product<MultiplyAdd, false>(score, kTile, tile, ld, acc, ld, rows, n, ld);
  }
};

#if defined(EFFLLM_PAIRS)
// Rows of `count` bf16 (from + i * stride), 16 of them, as columns of pairs: out[pair][16], pairs ld floats apart.
inline void transpose_pairs(const char* const* row, int64_t count, float* out, int64_t ld) {
  for (int64_t c = 0; c < count; c += 32) {  // 16 pairs
    const __mmask32 some = count - c >= 32 ? ~0u : (1u << (count - c)) - 1;
    __m512i r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = row[i] ? _mm512_maskz_loadu_epi16(some, row[i] + 2 * c) : _mm512_setzero_si512();
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    for (int i = 0; i < 16; i += 4) {
      r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
      r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {  // r[4 g + i]: pairs i, i + 4, i + 8, i + 12 of the rows 4 g .. 4 g + 3
      const __m512i a = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88), b = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
      const __m512i e = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD), f = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
      t[i] = _mm512_shuffle_i32x4(a, b, 0x88), t[i + 8] = _mm512_shuffle_i32x4(a, b, 0xDD);
      t[i + 4] = _mm512_shuffle_i32x4(e, f, 0x88), t[i + 12] = _mm512_shuffle_i32x4(e, f, 0xDD);
    }
    const int64_t pairs = std::min<int64_t>(16, (count - c + 1) / 2);
    for (int64_t i = 0; i < pairs; ++i) _mm512_storeu_ps(out + (c / 2 + i) * ld, _mm512_castsi512_ps(t[i]));
  }
}

struct Pairs {
  static int64_t query_floats(const Keys& h) { return (h.d + 1) / 2; }
  static int64_t tile_floats(const Keys& h) { return kTile / 2 * std::max(2 * ((h.d + 1) / 2), width(h)); }
  static int64_t width(const Keys& h) { return round_up(h.dv, kStep); }
  static void query(const void* from, const Keys& h, float* to) {
    to[(h.d - 1) / 2] = 0;
    std::memcpy(to, from, static_cast<size_t>(h.d) * 2);
  }
  static void scores(const Keys& h, int64_t s, int64_t n, const char* seen, const float* q, int64_t rows, float* score, float* tile) {
    for (int64_t j = 0; j < kTile; j += 16) {
      const char* row[16];
      for (int64_t i = 0; i < 16; ++i) row[i] = j + i < n && !(seen && !seen[j + i]) ? h.k + (s + j + i) * h.k_stride : nullptr;
      transpose_pairs(row, h.d, tile + j, kTile);
    }
    product<DotPairs, true>(q, query_floats(h), tile, kTile, score, kTile, rows, query_floats(h), kTile);
  }
  static void values(const Keys& h, int64_t s, int64_t n, const char* seen, float* score, int64_t rows, float* acc, float* tile) {
    const int64_t ld = width(h), pairs = (n + 1) / 2;
    const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
    for (int64_t j = 0; j < pairs; ++j) {
      const bool one = !(seen && !seen[2 * j]), two = 2 * j + 1 < n && !(seen && !seen[2 * j + 1]);
      const char* a = h.v + (s + 2 * j) * h.v_stride;
      for (int64_t c = 0; c < ld; c += 32) {
        const __mmask32 some = h.dv - c >= 32 ? ~0u : h.dv > c ? (1u << (h.dv - c)) - 1 : 0;
        const __m512i x = _mm512_maskz_loadu_epi16(one ? some : 0, a + 2 * c), y = _mm512_maskz_loadu_epi16(two ? some : 0, a + h.v_stride + 2 * c);
        _mm512_storeu_ps(tile + j * ld + c, _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, low, y)));
        _mm512_storeu_ps(tile + j * ld + c + 16, _mm512_castsi512_ps(_mm512_permutex2var_epi16(x, high, y)));
      }
    }
    for (int64_t r = 0; r < rows; ++r) {  // weights as pairs, in the first half of their row
      float* p = score + r * kTile;
      for (int64_t i = 0; i < kTile / 32; ++i)
        _mm512_storeu_ps(p + 16 * i, reinterpret_cast<__m512>(_mm512_cvtne2ps_pbh(_mm512_loadu_ps(p + 32 * i + 16), _mm512_loadu_ps(p + 32 * i))));
    }
    product<DotPairs, false>(score, kTile, tile, ld, acc, ld, rows, pairs, ld);
  }
};
#endif

}  // namespace effllm::flash
