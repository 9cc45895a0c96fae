// Attention over a paged cache whose pages are decoded on the fly: what all formats of keys and values have in common.
//
// State     pages uint8 (B, P, page bytes), one record per key head one behind the other; ring (B, 2, G, W, D), token t in slot t % W;
//           tokens [0, flushed) are in pages, [flushed, total) in the ring. See runtime/caches/paging.py.
// Grid      one task per (row of the batch, key head, run of pages); the R = H / G * Q query rows of a key head are served together, so every
//           page is decoded once. Partial results (largest score, sum, weighted values) of the runs are merged; the last run takes the ring too.
// Numerics  online softmax over blocks of 64 tokens in fp32, one rounding to the output's dtype.
//
// A Source decodes. Its constructor takes (Paged, row of the batch, key head, rows, queries (rows, D) fp32, not scaled); it has
//   width                        floats an accumulator row has
//   round(p)                     a probability as the products below will take it
//   scores(record, t, n, s)      s[r * 64 + i] = q_r . k_(t + i) for n <= 64 tokens of the page from t, a multiple of 64
//   values(record, t, n, p, acc) acc[r * width + c] += sum_i p[r * 64 + i] v_(t + i)[c]; p is 0 from n to 63
//   finish(acc, sums, out)       out (rows, D) from the accumulators and the sums of probabilities in them
#pragma once
#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "turns.h"

namespace effllm {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t BLOCK = 64;

struct Paged {
  View q;
  int64_t batch, heads, queries, d, kv;
  const uint8_t* pages;
  int64_t page_count, page_bytes, record, page;
  const void* ring;
  int64_t width, total, flushed;
  Mask mask;
  float scale;
  Type type;
  Shift shift;
  int64_t rows() const { return heads / kv * queries; }
  int64_t ring_at(int64_t b, int64_t side, int64_t g, int64_t t) const { return (((b * 2 + side) * kv + g) * width + t % width) * d; }
};

inline Paged paged_of(const Tensor& q, const Tensor& pages, const Tensor& ring, const Tensor& lens, const std::optional<Tensor>& mask, double scale, int64_t page, int64_t records,
                      const std::optional<Tensor>& row = {}, const std::optional<Tensor>& cos = {}, const std::optional<Tensor>& sin = {}, bool half = false) {
  STD_TORCH_CHECK(ring.dim() == 5 && ring.is_contiguous() && pages.dim() == 3 && pages.is_contiguous() && lens.numel() == 2, "effllm: not the state of a paged cache");
  Paged c{};
  c.q = view_of(q);
  c.batch = q.size(0), c.heads = q.size(1), c.queries = q.size(2), c.d = q.size(3), c.kv = ring.size(2);
  STD_TORCH_CHECK(ring.size(0) == c.batch && pages.size(0) == c.batch && ring.size(4) == c.d && c.kv > 0 && c.heads % c.kv == 0, "effllm: attention shapes do not fit");
  STD_TORCH_CHECK(q.scalar_type() == ring.scalar_type(), "effllm: queries and cache differ in dtype");
  c.pages = static_cast<const uint8_t*>(pages.const_data_ptr());
  c.page_count = pages.size(1), c.page_bytes = pages.size(2), c.page = page;
  c.record = c.page_bytes / records;
  c.ring = ring.const_data_ptr();
  c.width = ring.size(3);
  const int64_t* n = static_cast<const int64_t*>(lens.const_data_ptr());
  c.total = n[0], c.flushed = n[1];
  STD_TORCH_CHECK(c.flushed >= 0 && c.total >= c.flushed && c.total - c.flushed <= c.width && c.flushed <= c.page_count * page && c.flushed % page == 0, "effllm: the lengths of the cache do not fit its tensors");
  c.type = type_of(q.scalar_type());
  c.mask = mask_of(mask, c.batch, c.heads, c.queries, c.page_count * page + c.width);
  c.scale = static_cast<float>(scale);
  c.shift = shift_of(row, cos, sin, half, c.d, c.page_count * page + c.width);
  return c;
}

// The state of an online softmax over `rows` queries.
struct Softmax {
  std::vector<float> top, sum;
  explicit Softmax(int64_t rows) : top(static_cast<size_t>(rows), -INFINITY), sum(static_cast<size_t>(rows), 0.f) {}
  // s (64) becomes probabilities relative to the new largest score; returns the factor for what was summed so far.
  template <class Round> float step(int64_t r, float* s, int64_t n, Round&& round) {
    float most = top[static_cast<size_t>(r)], total = 0;
    for (int64_t i = 0; i < n; ++i) most = std::max(most, s[i]);
    const float base = most == -INFINITY ? 0.f : most;
    for (int64_t i = n; i < BLOCK; ++i) s[i] = -INFINITY;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < BLOCK; ++i) {
      const float e = s[i] == -INFINITY ? 0.f : round(exp_negative(s[i] - base));
      s[i] = e;
      total += e;
    }
    const float before = top[static_cast<size_t>(r)];
    const float factor = before == -INFINITY ? 0.f : before == most ? 1.f : exp_negative(before - most);
    top[static_cast<size_t>(r)] = most;
    sum[static_cast<size_t>(r)] = sum[static_cast<size_t>(r)] * factor + total;
    return factor;
  }
};

inline void rescale(float* a, int64_t n, float factor) {
  if (factor == 1.f) return;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] *= factor;
}

inline float dot(const float* x, const float* y, int64_t n) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

inline void axpy(float* a, float w, const float* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) a[i] += w * x[i];
}

// Adds scale and mask to the scores of n tokens from position t; false where no query attends to any of them.
inline bool prepare(const Paged& c, int64_t b, int64_t g, int64_t t, int64_t n, float* s) {
  const int64_t rows = c.rows(), repeat = c.heads / c.kv;
  bool any = !c.mask.data;
  for (int64_t r = 0; r < rows; ++r) {
    float* row = s + r * BLOCK;
    for (int64_t i = 0; i < n; ++i) row[i] *= c.scale;
    if (!c.mask.data) continue;
    for (int64_t i = 0; i < n; ++i) {
      const float m = c.mask(b, g * repeat + r / c.queries, r % c.queries, t + i);
      row[i] = m == -INFINITY ? m : row[i] + m;
      any |= m > -INFINITY;
    }
  }
  return any;
}

// The tokens of the ring, into out (rows, D).
template <Type T> void ring_part(const Paged& c, int64_t b, int64_t g, Turned& turned, Softmax& soft, float* out) {
  const int64_t rows = c.rows(), d = c.d;
  std::vector<float> s(static_cast<size_t>(rows * BLOCK)), line(static_cast<size_t>(d));
  for (int64_t t = c.flushed; t < c.total; t += BLOCK) {
    const int64_t n = std::min(BLOCK, c.total - t);
    for (int64_t i = 0; i < n; ++i) {
      widen<T>(c.ring, c.ring_at(b, 0, g, t + i), d, line.data());
      const float* q = turned.of(t + i);
      for (int64_t r = 0; r < rows; ++r) s[static_cast<size_t>(r * BLOCK + i)] = dot(q + r * d, line.data(), d);
    }
    if (!prepare(c, b, g, t, n, s.data())) continue;
    for (int64_t r = 0; r < rows; ++r) rescale(out + r * d, d, soft.step(r, s.data() + r * BLOCK, n, [](float p) { return p; }));
    for (int64_t i = 0; i < n; ++i) {
      widen<T>(c.ring, c.ring_at(b, 1, g, t + i), d, line.data());
      for (int64_t r = 0; r < rows; ++r) axpy(out + r * d, s[static_cast<size_t>(r * BLOCK + i)], line.data(), d);
    }
  }
}

// One task: pages [from, to) of a key head, and the ring if `last`. Writes out (rows, D) not yet divided, and top and sum (rows).
template <class Source, Type T, class... More>
void run_part(const Paged& c, int64_t b, int64_t g, int64_t from, int64_t to, bool last, float* out, float* top, float* sum, const More&... more) {
  const int64_t rows = c.rows(), d = c.d, repeat = c.heads / c.kv;
  std::vector<float> q(static_cast<size_t>(rows * d)), s(static_cast<size_t>(rows * BLOCK));
  for (int64_t r = 0; r < rows; ++r) widen<T>(c.q.data, c.q.at(b, g * repeat + r / c.queries, r % c.queries), d, q.data() + r * d);
  Turned turned(c.shift, q.data(), rows, d);
  Source source(c, b, g, rows, q.data(), more...);
  std::vector<std::unique_ptr<Source>> others(static_cast<size_t>(c.shift.turns.count));  // for queries that are turned
  std::vector<float> spare;
  auto other = [&](int64_t a) -> Source& {
    auto& own = others[static_cast<size_t>(a)];
    if (!own) own = std::make_unique<Source>(c, b, g, rows, turned.at(a), more...);
    return *own;
  };
  const int64_t width = source.width;
  std::vector<float> acc(static_cast<size_t>(rows * width), 0.f);
  Softmax soft(rows);
  for (int64_t p = from; p < to; ++p) {
    const uint8_t* record = c.pages + (b * c.page_count + p) * c.page_bytes + (c.record == c.page_bytes ? 0 : g * c.record);
    for (int64_t t = 0; t < c.page; t += BLOCK) {
      const int64_t n = std::min(BLOCK, c.page - t);
      if (c.mask.data) {  // what no query attends to is not read
        std::fill(s.begin(), s.end(), 0.f);
        if (!prepare(c, b, g, p * c.page + t, n, s.data())) continue;
      }
      if (!c.shift.on) source.scores(record, t, n, s.data());
      else score_turns(c.shift.row, p * c.page + t, n, rows, BLOCK, s.data(), spare, [&](int64_t a, float* to) { other(a).scores(record, t, n, to); });
      prepare(c, b, g, p * c.page + t, n, s.data());
      for (int64_t r = 0; r < rows; ++r) rescale(acc.data() + r * width, width, soft.step(r, s.data() + r * BLOCK, n, [&](float x) { return source.round(x); }));
      source.values(record, t, n, s.data(), acc.data());
    }
  }
  source.finish(acc.data(), soft.sum.data(), out);
  if (last) ring_part<T>(c, b, g, turned, soft, out);
  std::copy(soft.top.begin(), soft.top.end(), top);
  std::copy(soft.sum.begin(), soft.sum.end(), sum);
}

template <template <Type> class Source, Type T, class... More> void attend_as(const Paged& c, void* y, const More&... more) {
  const int64_t rows = c.rows(), d = c.d, heads = c.batch * c.kv, used = c.flushed / c.page, repeat = c.heads / c.kv;
  const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
  // enough tasks for all threads, of no less than 512 tokens each
  const int64_t splits = std::max<int64_t>(1, std::min((4 * threads + heads - 1) / heads == 1 ? 1 : (4 * threads + heads - 1) / heads, used * c.page / 512));
  std::vector<float> out(static_cast<size_t>(heads * splits * rows * d), 0.f), top(static_cast<size_t>(heads * splits * rows)), sum(top.size());
  const int64_t grain = std::max<int64_t>(1, 24000 * splits / std::max<int64_t>(1, rows * c.total * d * 2));
  torch::stable::parallel_for(0, heads * splits, grain, [&](int64_t first, int64_t end) {
    for (int64_t i = first; i < end; ++i) {
      const int64_t part = i % splits, head = i / splits;
      run_part<Source<T>, T>(c, head / c.kv, head % c.kv, used * part / splits, used * (part + 1) / splits, part == splits - 1, out.data() + i * rows * d,
                             top.data() + i * rows, sum.data() + i * rows, more...);
    }
  });
  for (int64_t head = 0; head < heads; ++head)
    for (int64_t r = 0; r < rows; ++r) {
      float most = -INFINITY, total = 0;
      for (int64_t p = 0; p < splits; ++p) most = std::max(most, top[static_cast<size_t>((head * splits + p) * rows + r)]);
      float* into = out.data() + (head * splits * rows + r) * d;
      for (int64_t p = 0; p < splits; ++p) {
        const size_t at = static_cast<size_t>((head * splits + p) * rows + r);
        const float weight = top[at] == -INFINITY && sum[at] == 0 ? 0.f : top[at] == most ? 1.f : exp_negative(top[at] - most);
        total += weight * sum[at];
        float* from = out.data() + static_cast<int64_t>(at) * d;
        if (p == 0) rescale(into, d, weight);
        else axpy(into, weight, from, d);
      }
      const float inverse = total > 0 ? 1.f / total : (total == 0 ? 0.f : total);
      const int64_t h = head % c.kv * repeat + r / c.queries, to = ((head / c.kv * c.heads + h) * c.queries + r % c.queries) * d;
      for (int64_t i = 0; i < d; ++i) store_from_float(y, to + i, c.type, into[i] * inverse);
    }
}

template <template <Type> class Source, class... More> Tensor attend_paged(const Tensor& q, const Paged& c, const More&... more) {
  Tensor y = torch::stable::new_empty(q, {c.batch, c.heads, c.queries, c.d}, q.scalar_type());
  void* to = y.mutable_data_ptr();
  if (c.type == Type::f32) attend_as<Source, Type::f32>(c, to, more...);
  else if (c.type == Type::bf16) attend_as<Source, Type::bf16>(c, to, more...);
  else attend_as<Source, Type::f16>(c, to, more...);
  return y;
}

}  // namespace effllm
