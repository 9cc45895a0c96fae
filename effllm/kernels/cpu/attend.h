// Attention of a few query rows over the keys of one key head: what a step of decoding does, without allocations.
//
// Maths     o = softmax(scale * q k^T + mask) v, fp32 throughout, one rounding at the end. A row without any key gives zeros.
// Bytes     2 * keys * D * element size, keys up to the last one that any row attends to; masked-out keys are not read as values.
// Work      per key D/16 widenings and D/16 multiply-adds a row for the score, the same for the value; up to four rows share the widening.
// Layout    rows of keys and values lie `stride` bytes apart; a head size that fills no blocks of 32 takes plain loops.
#pragma once
#include "attention.h"
#include "gemv.h"

namespace effllm {

struct QueryRow {
  const void* q = nullptr;
  void* out = nullptr;
  const char* mask = nullptr;  // of key 0; null: all keys
  int64_t mask_step = 0;       // elements
};

struct KeyHead {
  const char* k = nullptr;
  const char* v = nullptr;
  int64_t k_stride = 0, v_stride = 0;  // bytes
  int64_t keys = 0, d = 0;
  float scale = 1;
  bool boolean = true;      // of the masks
  Type mask_type = Type::f32;
};

struct AttendScratch {
  std::vector<float> q, scores, acc;
};

// A row of a cache: the weights of a step have driven it out of ours.
constexpr int64_t kKeysAhead = 8;
template <Type T, int NF> inline void fetch_row(const char* row) {
#pragma GCC unroll 8
  for (int byte = 0; byte < NF * 16 * (T == Type::f32 ? 4 : 2); byte += 64) __builtin_prefetch(row + byte);
}

template <class V, Type T, int NF, int R> inline void key_scores(const float* q, const KeyHead& h, int64_t keys, float* out, int64_t ldo) {
  using F = typename V::F;
  F qf[R][NF];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NF; ++i) qf[r][i] = V::load_f(q + r * h.d + 16 * i);
  for (int64_t s = 0; s < keys; ++s) {
    F kf[NF];
    const char* row = h.k + s * h.k_stride;
    fetch_row<T, NF>(row + kKeysAhead * h.k_stride), fetch_row<T, NF>(h.v + s * h.v_stride);  // the values are wanted next
#pragma GCC unroll 8
    for (int i = 0; i < NF; i += 2) widen<V, T>(row + i * 16 * (T == Type::f32 ? 4 : 2), kf[i], kf[i + 1]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      F a = V::fma(kf[0], qf[r][0], V::zero_f());
#pragma GCC unroll 8
      for (int i = 1; i < NF; ++i) a = V::fma(kf[i], qf[r][i], a);
      out[r * ldo + s] = sum16(a);
    }
  }
}

template <class V, Type T, int NF, int R> inline void value_sums(const float* p, int64_t ldp, const KeyHead& h, int64_t keys, float* out) {
  using F = typename V::F;
  F acc[R][NF];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NF; ++i) acc[r][i] = V::zero_f();
  for (int64_t s = 0; s < keys; ++s) {
    bool any = false;
    for (int r = 0; r < R; ++r) any |= p[r * ldp + s] != 0.f;
    if (!any) continue;  // what a masked-out value holds must not turn up as NaN
    F vf[NF];
    const char* row = h.v + s * h.v_stride;
#pragma GCC unroll 8
    for (int i = 0; i < NF; i += 2) widen<V, T>(row + i * 16 * (T == Type::f32 ? 4 : 2), vf[i], vf[i + 1]);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int i = 0; i < NF; ++i) acc[r][i] = V::fma1(vf[i], p[r * ldp + s], acc[r][i]);
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < NF; ++i) V::store_f(out + r * h.d + 16 * i, acc[r][i]);
}

template <Type T> inline void key_scores_plain(const float* q, int64_t rows, const KeyHead& h, int64_t keys, float* out, int64_t ldo, float* line) {
  for (int64_t s = 0; s < keys; ++s) {
    widen<T>(h.k + s * h.k_stride, 0, h.d, line);
    for (int64_t r = 0; r < rows; ++r) {
      float dot = 0;
      const float* x = q + r * h.d;
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < h.d; ++i) dot += x[i] * line[i];
      out[r * ldo + s] = dot;
    }
  }
}

template <Type T> inline void value_sums_plain(const float* p, int64_t rows, int64_t ldp, const KeyHead& h, int64_t keys, float* out, float* line) {
  std::fill(out, out + rows * h.d, 0.f);
  for (int64_t s = 0; s < keys; ++s) {
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) any |= p[r * ldp + s] != 0.f;
    if (!any) continue;
    widen<T>(h.v + s * h.v_stride, 0, h.d, line);
    for (int64_t r = 0; r < rows; ++r) {
      const float w = p[r * ldp + s];
      float* a = out + r * h.d;
#pragma omp simd
      for (int64_t i = 0; i < h.d; ++i) a[i] += w * line[i];
    }
  }
}

// Keys up to the last one that a row attends to.
inline int64_t keys_of(const QueryRow& row, const KeyHead& h) {
  if (!row.mask || !h.boolean) return h.keys;
  int64_t n = h.keys;
  if (row.mask_step == 1)
    for (uint64_t word; n >= 8; n -= 8) {
      std::memcpy(&word, row.mask + n - 8, 8);
      if (word) break;
    }
  while (n > 0 && !row.mask[(n - 1) * row.mask_step]) --n;
  return n;
}

// Masks, softmax: scores of one row to weights; returns what to divide the weighted sum by.
inline float soften(float* p, int64_t keys, const QueryRow& row, const KeyHead& h) {
  if (row.mask && h.boolean) {
    const char* m = row.mask;
    if (row.mask_step == 1)
#pragma omp simd
      for (int64_t s = 0; s < keys; ++s) p[s] = m[s] ? p[s] : -INFINITY;
    else
      for (int64_t s = 0; s < keys; ++s) p[s] = m[s * row.mask_step] ? p[s] : -INFINITY;
  } else if (row.mask) {
    for (int64_t s = 0; s < keys; ++s) {
      const float m = load_as_float(row.mask, s * row.mask_step, h.mask_type);
      p[s] = m == -INFINITY ? m : p[s] + m;  // whatever a key holds that nobody attends to
    }
  }
  return weigh(p, keys);
}

// A query, widened, times the scale; in the order of `place` where rows are taken in blocks of 32.
template <class V, Type T, int NF> inline void take_query(const void* q, const KeyHead& h, float* to) {
  if constexpr (NF == 0) {
    for (int64_t i = 0; i < h.d; ++i) to[i] = load_as_float(q, i, T) * h.scale;
  } else {
    for (int i = 0; i < NF; i += 2) {
      typename V::F a, b;
      widen<V, T>(static_cast<const char*>(q) + i * 16 * (T == Type::f32 ? 4 : 2), a, b);
      V::store_f(to + 16 * i, V::axpb(a, h.scale, 0.f)), V::store_f(to + 16 * i + 16, V::axpb(b, h.scale, 0.f));
    }
  }
}
// Sums in that order, times a factor, to a row.
template <Type T, int NF> inline void put_row(const float* from, int64_t d, float factor, void* to) {
  if constexpr (NF > 0 && T == Type::bf16) {
    auto* h = static_cast<uint16_t*>(to);
    for (int64_t c = 0; c < d; c += 32)
#pragma omp simd
      for (int64_t i = 0; i < 16; ++i) {
        const uint32_t two = float_to_bf16(from[c + i] * factor) | static_cast<uint32_t>(float_to_bf16(from[c + 16 + i] * factor)) << 16;
        std::memcpy(h + c + 2 * i, &two, 4);
      }
  } else {
    for (int64_t i = 0; i < d; ++i) store_from_float(to, i, T, from[NF ? place(i, T) : i] * factor);
  }
}

template <class V, Type T, int NF, int R> void attend_block(const QueryRow* rows, const KeyHead& h, AttendScratch& s) {
  int64_t keys = 0, count[R];
  for (int r = 0; r < R; ++r) count[r] = keys_of(rows[r], h), keys = std::max(keys, count[r]);
  s.q.resize(static_cast<size_t>(R * h.d + h.d)), s.acc.resize(static_cast<size_t>(R * h.d)), s.scores.resize(static_cast<size_t>(R * keys + 1));
  for (int r = 0; r < R; ++r) take_query<V, T, NF>(rows[r].q, h, s.q.data() + r * h.d);
  float* line = s.q.data() + R * h.d;
  if constexpr (NF > 0) key_scores<V, T, NF, R>(s.q.data(), h, keys, s.scores.data(), keys);
  else key_scores_plain<T>(s.q.data(), R, h, keys, s.scores.data(), keys, line);
  float total[R];
  for (int r = 0; r < R; ++r) {
    float* p = s.scores.data() + r * keys;
    total[r] = soften(p, count[r], rows[r], h);
    std::fill(p + count[r], p + keys, 0.f);
  }
  if constexpr (NF > 0) value_sums<V, T, NF, R>(s.scores.data(), keys, h, keys, s.acc.data());
  else value_sums_plain<T>(s.scores.data(), R, keys, h, keys, s.acc.data(), line);
  for (int r = 0; r < R; ++r) put_row<T, NF>(s.acc.data() + r * h.d, h.d, share_of(total[r]), rows[r].out);
}

template <class V, Type T, int NF> void attend_typed(const QueryRow* rows, int64_t count, const KeyHead& h, AttendScratch& s) {
  int64_t r = 0;
  for (; r + 4 <= count; r += 4) attend_block<V, T, NF, 4>(rows + r, h, s);
  if (count - r == 3) attend_block<V, T, NF, 3>(rows + r, h, s);
  else if (count - r == 2) attend_block<V, T, NF, 2>(rows + r, h, s);
  else if (count - r == 1) attend_block<V, T, NF, 1>(rows + r, h, s);
}

// Rows of queries that share a key head.
template <class V, Type T> void attend(const QueryRow* rows, int64_t count, const KeyHead& h, AttendScratch& s) {
  if (h.d == 64) attend_typed<V, T, 4>(rows, count, h, s);
  else if (h.d == 128) attend_typed<V, T, 8>(rows, count, h, s);
  else if (h.d == 32) attend_typed<V, T, 2>(rows, count, h, s);
  else if (h.d == 96) attend_typed<V, T, 6>(rows, count, h, s);
  else attend_typed<V, T, 0>(rows, count, h, s);
}

}  // namespace effllm
