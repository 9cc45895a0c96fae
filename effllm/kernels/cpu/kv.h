// Attention of a few queries over a compressed cache (state: effllm/runtime/caches/paging.py), for any page format.
//
//   o = softmax(scale * q [K^ ; K]^T + mask) [V^ ; V]      pages of compressed tokens [0, flushed), then the dense ring [flushed, total)
//
// Work    tasks of (row of the batch, key head, run of pages); the last run of a head also takes the ring. A task serves all query heads of
//         its key head, walks its pages once (keys, then values of a page, which lie side by side) with an online softmax, and leaves
//         (o, max, sum). Runs are merged by o = sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i; a run without any key has m = -inf.
// Bytes   flushed * bytes per token + ring; the mask. Dense keys and values are never made.
// Codec   what a format supplies, for R rows (queries) of one key head:
//           void scores(const uint8_t* record, const float* q, int64_t rows, float* s)     s (rows, page) = q (rows, D) K^^T, q scaled already
//           void values(const uint8_t* record, const float* p, int64_t rows, float* acc)   acc (rows, D) += p (rows, page) V^
//         It is copied for every task, so it may hold buffers.
// Numerics fp32; a NaN anywhere in what is attended gives NaN.
#pragma once
#include "turns.h"

namespace effllm::kv {

using torch::stable::Tensor;

struct State {
  const uint8_t* pages;
  const char* ring;
  Type type;
  int64_t batch, heads, dim, width, count, page, page_bytes, record, total, flushed;
  int64_t keys() const { return count * page + width; }
};

inline State state_of(const Tensor& pages, const Tensor& ring, const Tensor& lens, int64_t page) {
  STD_TORCH_CHECK(pages.dim() == 3 && ring.dim() == 5 && lens.numel() == 2 && pages.is_contiguous() && ring.is_contiguous(), "effllm: the cache's tensors do not fit");
  State z{};
  z.pages = static_cast<const uint8_t*>(pages.const_data_ptr());
  z.ring = static_cast<const char*>(ring.const_data_ptr());
  z.type = type_of(ring.scalar_type());
  z.batch = ring.size(0), z.heads = ring.size(2), z.width = ring.size(3), z.dim = ring.size(4);
  z.count = pages.size(1), z.page_bytes = pages.size(2), z.page = page, z.record = z.page_bytes / z.heads;
  const int64_t* n = static_cast<const int64_t*>(lens.const_data_ptr());
  z.total = n[0], z.flushed = n[1];
  STD_TORCH_CHECK(pages.size(0) == z.batch && z.flushed <= z.count * page && z.total - z.flushed <= z.width, "effllm: the cache's lengths do not fit");
  return z;
}

// One run's softmax so far: acc (rows, dim), the largest score and the sum of exponentials of each row.
struct Run {
  int64_t rows, dim;
  float *acc, *top, *sum;
  // Take `n` scores (rows, n) in, turned into weights in place; false where no row attends to any of them.
  bool take(float* s, int64_t n) const {
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      float* p = s + r * n;
      float big = -INFINITY;
      bool nan = false;
      for (int64_t t = 0; t < n; ++t) big = p[t] > big ? p[t] : big, nan |= p[t] != p[t];
      if (big == -INFINITY && !nan) {
        std::fill(p, p + n, 0.f);
        continue;
      }
      any = true;
      if (big > top[r]) {
        const float shrink = top[r] == -INFINITY ? 0.f : std::exp(top[r] - big);
        sum[r] *= shrink, top[r] = big;
        for (int64_t i = 0; i < dim; ++i) acc[r * dim + i] *= shrink;
      }
      const float m = top[r] == -INFINITY ? 0.f : top[r];
      float l = 0;
#pragma omp simd reduction(+ : l)
      for (int64_t t = 0; t < n; ++t) {
        const float e = p[t] == -INFINITY ? 0.f : exp_negative(p[t] - m);
        p[t] = e;
        l += e;
      }
      sum[r] += l;
    }
    return any;
  }
};

// The mask of one row of the batch and its key head, as a run of tokens at a time is added to scores.
struct Shown {
  const Mask& mask;
  int64_t b, h0, queries;
  // s (rows, n) += mask for tokens [from, from + n).
  void add(float* s, int64_t rows, int64_t from, int64_t n) const {
    if (!mask.data) return;
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t h = h0 + r / queries, q = r % queries;
      if (mask.boolean && mask.s3 == 1) {
        const uint8_t* at = static_cast<const uint8_t*>(mask.data) + b * mask.s0 + h * mask.s1 + q * mask.s2 + from;
        for (int64_t t = 0; t < n; ++t) s[r * n + t] = at[t] ? s[r * n + t] : -INFINITY;
      } else
        for (int64_t t = 0; t < n; ++t) {
          const float m = mask(b, h, q, from + t);
          s[r * n + t] = m == -INFINITY ? m : s[r * n + t] + m;
        }
    }
  }
  // Whether any row attends to any of the tokens: a page that nobody sees is not read.
  bool any(int64_t rows, int64_t from, int64_t n) const {
    if (!mask.data) return true;
    const int64_t distinct = mask.s1 || mask.s2 ? rows : 1;
    for (int64_t r = 0; r < distinct; ++r)
      for (int64_t t = 0; t < n; ++t)
        if (mask(b, h0 + r / queries, r % queries, from + t) > -INFINITY) return true;
    return false;
  }
};

template <Type T>
void ring_part(const State& z, int64_t b, int64_t g, Turned& turned, const Shown& mask, const Run& run, std::vector<float>& s) {
  const int64_t n = z.total - z.flushed, d = z.dim, head = z.width * d;
  const int64_t keys = (b * 2 * z.heads + g) * head, values = keys + z.heads * head;
  std::vector<float> line(static_cast<size_t>(d));
  s.resize(static_cast<size_t>(run.rows * std::max(n, z.page)));
  for (int64_t t = 0; t < n; ++t) {
    widen<T>(z.ring, keys + (z.flushed + t) % z.width * d, d, line.data());
    const float* q = turned.of(z.flushed + t);
    for (int64_t r = 0; r < run.rows; ++r) {
      float dot = 0;
      const float *x = q + r * d, *y = line.data();
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < d; ++i) dot += x[i] * y[i];
      s[static_cast<size_t>(r * n + t)] = dot;
    }
  }
  mask.add(s.data(), run.rows, z.flushed, n);
  if (!run.take(s.data(), n)) return;
  for (int64_t t = 0; t < n; ++t) {
    widen<T>(z.ring, values + (z.flushed + t) % z.width * d, d, line.data());
    for (int64_t r = 0; r < run.rows; ++r) {
      const float w = s[static_cast<size_t>(r * n + t)];
      if (w == 0.f) continue;
      float* a = run.acc + r * d;
      const float* y = line.data();
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) a[i] += w * y[i];
    }
  }
}

template <class Codec>
Tensor attend(const Tensor& q, const Tensor& pages, const Tensor& ring, const Tensor& lens, const std::optional<Tensor>& mask_in, double scale, int64_t page, const Codec& codec,
              const Shift& shift = {}) {
  const State z = state_of(pages, ring, lens, page);
  const int64_t heads = q.size(1), queries = q.size(2), d = z.dim, repeat = heads / z.heads, rows = repeat * queries;
  STD_TORCH_CHECK(q.dim() == 4 && q.size(0) == z.batch && q.size(3) == d && heads % z.heads == 0, "effllm: the queries do not fit the cache");
  const Type type = type_of(q.scalar_type());
  Tensor out = torch::stable::new_empty(q, {z.batch, heads, queries, d}, q.scalar_type());
  const Mask mask = mask_of(mask_in, z.batch, heads, queries, z.keys());
  const View view = view_of(q);
  const int64_t filled = z.flushed / page, lanes = z.batch * z.heads, wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  // a run costs a merge and its own start: at least four pages each
  const int64_t runs = std::max<int64_t>(1, std::min((wanted + lanes - 1) / lanes, filled / 4));
  const int64_t slot = rows * (d + 2);
  std::vector<float> part(static_cast<size_t>(lanes * runs * slot));
  torch::stable::parallel_for(0, lanes * runs, std::max<int64_t>(1, 24000 / std::max<int64_t>(1, rows * d * 2 * z.total / runs)), [&](int64_t from, int64_t to) {
    Codec own = codec;
    std::vector<float> qs(static_cast<size_t>(rows * d)), s, spare;
    for (int64_t i = from; i < to; ++i) {
      const int64_t b = i / runs / z.heads, g = i / runs % z.heads, part_of = i % runs;
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t c = 0, at = view.at(b, g * repeat + r / queries, r % queries); c < d; ++c)
          qs[static_cast<size_t>(r * d + c)] = load_as_float(view.data, at + c, type) * static_cast<float>(scale);
      float* base = part.data() + i * slot;
      const Run run{rows, d, base, base + rows * d, base + rows * (d + 1)};
      std::fill(run.acc, run.acc + rows * d, 0.f);
      std::fill(run.top, run.top + rows, -INFINITY);
      std::fill(run.sum, run.sum + rows, 0.f);
      const Shown shown{mask, b, g * repeat, queries};
      Turned turned(shift, qs.data(), rows, d);
      s.resize(static_cast<size_t>(rows * page));
      for (int64_t n = filled * part_of / runs; n < filled * (part_of + 1) / runs; ++n) {
        if (!shown.any(rows, n * page, page)) continue;
        const uint8_t* record = z.pages + (b * z.count + n) * z.page_bytes + g * z.record;
        if (!shift.on) own.scores(record, qs.data(), rows, s.data());
        else score_turns(shift.row, n * page, page, rows, page, s.data(), spare, [&](int64_t a, float* to) { own.scores(record, turned.at(a), rows, to); });
        shown.add(s.data(), rows, n * page, page);
        if (run.take(s.data(), page)) own.values(record, s.data(), rows, run.acc);
      }
      if (part_of == runs - 1) {
        const auto near = z.type == Type::f32 ? ring_part<Type::f32> : z.type == Type::bf16 ? ring_part<Type::bf16> : ring_part<Type::f16>;
        near(z, b, g, turned, shown, run, s);
      }
    }
  });
  std::vector<float> line(static_cast<size_t>(d));
  for (int64_t lane = 0; lane < lanes; ++lane)
    for (int64_t r = 0; r < rows; ++r) {
      const float* first = part.data() + lane * runs * slot;
      float top = -INFINITY, sum = 0;
      for (int64_t n = 0; n < runs; ++n) top = std::max(top, first[n * slot + rows * d + r]);
      std::fill(line.begin(), line.end(), 0.f);
      for (int64_t n = 0; n < runs; ++n) {
        const float* p = first + n * slot;
        const float m = p[rows * d + r], w = m == -INFINITY ? (p[rows * (d + 1) + r] == 0 ? 0.f : NAN) : std::exp(m - top);
        sum += w * p[rows * (d + 1) + r];
        for (int64_t c = 0; c < d; ++c) line[static_cast<size_t>(c)] += w * p[r * d + c];
      }
      const int64_t b = lane / z.heads, h = lane % z.heads * repeat + r / queries, to = ((b * heads + h) * queries + r % queries) * d;
      const float scale_out = sum == 0 ? 0.f : 1.f / sum;
      for (int64_t c = 0; c < d; ++c) store_from_float(out.mutable_data_ptr(), to + c, type, line[static_cast<size_t>(c)] * scale_out);
    }
  return out;
}

}  // namespace effllm::kv
