// Attention of many query rows over the keys of one key head, in tiles of keys with an online softmax: nothing of the size of queries x keys
// exists, and tiles that no row attends to are never touched. Prompts (prompt.cpp) and segments (segments.cpp).
//
// Rows      a row is a query and one of the query heads that share the key head, so that a tile is loaded and transposed once for all of them.
// See       which keys a row attends to, the caller's: begin(), end(): keys of the block; tile(s, n): whether none, some or all of the keys
//           s .. s + n are seen by the rows, filling seen[]; mask(r, s, n, p): scores of row r, masked.
// Numerics  softmax and sums in fp32; products as flash_tiles.h says. A row without any key gives zeros; NaN stays NaN.
#pragma once
#include "flash_tiles.h"

namespace effllm::flash {

enum class Seen { none, some, all };

struct Row {
  const void* q = nullptr;
  void* out = nullptr;
};

struct Softmax {
  float scale = 1, softcap = 0;
};

// exp for x <= 0 lane by lane, as exp_negative.
inline Vec exp_of(Vec x) {
  typedef int32_t Int __attribute__((vector_size(kBytes)));
  x = x < -87.f ? Vec{} - 87.f : x;
  const Vec n = (x * 1.44269504f + 12582912.f) - 12582912.f;  // rounds: the sum has no bits behind the point
  const Vec r = x - n * 0.693147180f + n * 1.90465421e-9f;
  Vec p = Vec{} + 1.f / 720;
  p = p * r + 1.f / 120, p = p * r + 1.f / 24, p = p * r + 1.f / 6, p = p * r + 0.5f, p = p * r + 1.f, p = p * r + 1.f;
  return p * reinterpret_cast<Vec>((__builtin_convertvector(n, Int) + 127) << 23);
}
inline float most_of(const Vec& v) {
  float f[kLane], top = -INFINITY;
  store(f, v);
#pragma omp simd reduction(max : top)
  for (int i = 0; i < kLane; ++i) top = f[i] > top ? f[i] : top;
  return top;
}
inline float total_of(const Vec& v) {
  float f[kLane], sum = 0;
  store(f, v);
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < kLane; ++i) sum += f[i];
  return sum;
}

inline float tanh_of(float x) {  // by the exponential; relative error near 0 is that of 1 - e, so small values keep their own
  const float a = std::fabs(x);
  if (a < 0.01f) return x * (1.f - x * x / 3.f);
  const float e = exp_negative(-2.f * a), t = (1.f - e) / (1.f + e);
  return x < 0 ? -t : t;
}

// Scores of a row in a tile to weights; its largest score so far, its sum, and its values' sums by it are brought up to date.
inline void soften(float* p, float& top, float& sum, float* acc, int64_t width) {
  constexpr int kParts = kTile / kLane;
  Vec x[kParts];
  for (int i = 0; i < kParts; ++i) x[i] = load(p + i * kLane);
  Vec high = x[0];
  for (int i = 1; i < kParts; ++i) high = x[i] > high ? x[i] : high;
  const float most = most_of(high);
  if (most > top) {
    const float shrink = top == -INFINITY ? 0.f : exp_negative(top - most);
    top = most, sum *= shrink;
    for (int64_t i = 0; i < width; i += kLane) store(acc + i, load(acc + i) * shrink);
  }
  const float level = top == -INFINITY ? 0.f : top;
  Vec part{};
  for (int i = 0; i < kParts; ++i) {
    const Vec e = x[i] == -INFINITY ? Vec{} : exp_of(x[i] - level);
    part += e;
    store(p + i * kLane, e);
  }
  sum += total_of(part);
}

template <class E, Type T, class See> void attend(const Row* row, int64_t rows, const Keys& h, const Softmax& how, See& see) {
  thread_local std::vector<float> memory;
  const int64_t dq = E::query_floats(h), width = E::width(h);
  const size_t need = static_cast<size_t>(rows * (dq + width + kTile + 2) + E::tile_floats(h) + 64);
  if (memory.size() < need) memory.resize(need);
  float *acc = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64 / 4, *score = acc + rows * width, *tile = score + rows * kTile;
  float *q = tile + E::tile_floats(h), *top = q + rows * dq, *sum = top + rows;
  for (int64_t r = 0; r < rows; ++r) E::query(row[r].q, h, q + r * dq), top[r] = -INFINITY, sum[r] = 0;
  std::fill(acc, acc + rows * width, 0.f);
  alignas(64) char seen[kTile];
  const int64_t end = see.end();
  for (int64_t s = see.begin(); s < end; s += kTile) {
    const int64_t n = std::min<int64_t>(kTile, end - s);
    const Seen some = see.tile(s, n, seen);
    if (some == Seen::none) continue;
    const char* which = some == Seen::all ? nullptr : seen;
    E::scores(h, s, n, which, q, rows, score, tile);
    for (int64_t r = 0; r < rows; ++r) {
      float* p = score + r * kTile;
      for (int i = 0; i < kTile; i += kLane) store(p + i, load(p + i) * how.scale);
      if (how.softcap > 0)
        for (int64_t j = 0; j < n; ++j) p[j] = how.softcap * tanh_of(p[j] / how.softcap);
      if (n < kTile) std::fill(p + n, p + kTile, -INFINITY);
      if (which) see.mask(r, s, n, p);
      soften(p, top[r], sum[r], acc + r * width, width);
    }
    E::values(h, s, n, which, score, rows, acc, tile);
  }
  for (int64_t r = 0; r < rows; ++r) {
    const float unit = share_of(sum[r]);
    const float* a = acc + r * width;
    if constexpr (T == Type::bf16) {
      auto* to = static_cast<uint16_t*>(row[r].out);
#pragma omp simd
      for (int64_t i = 0; i < h.dv; ++i) to[i] = float_to_bf16(a[i] * unit);
    } else {
      for (int64_t i = 0; i < h.dv; ++i) store_from_float(row[r].out, i, T, a[i] * unit);
    }
  }
}

constexpr int64_t kFew = 6;  // rows up to which nothing is transposed

// The way that fits the number of rows and the type.
template <Type T, class See> void attend(const Row* row, int64_t rows, const Keys& h, const Softmax& how, See& see) {
  if (rows <= kFew) return attend<Dots<T>, T>(row, rows, h, how, see);
#if defined(EFFLLM_PAIRS)
  if constexpr (T == Type::bf16) return attend<Pairs, T>(row, rows, h, how, see);
#endif
  attend<Wide<T>, T>(row, rows, h, how, see);
}

constexpr int64_t kRows = 96;  // queries x heads of a task: loading a tile costs about 1 / kRows of the products it serves
inline int64_t block_rows(int64_t repeat) { return std::max<int64_t>(1, kRows / repeat) * repeat; }

}  // namespace effllm::flash
