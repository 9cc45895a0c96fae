// Attention of a few queries over a compressed cache (state: effllm/runtime/caches/paging.py), for any page format.
//
//   o = softmax(scale * q [K^ ; K]^T + mask) [V^ ; V]      pages of compressed tokens [0, flushed), then the dense ring [flushed, total)
//
// Work    tasks of (row of the batch, key head, run of pages); the last run of a head also takes the ring. A task serves all query heads of
//         its key head, walks its pages once (keys, then values of a page, which lie side by side) with an online softmax, and leaves
//         (o, max, sum). Runs are merged by o = sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i; a run without any key has m = -inf.
// Bytes   flushed * bytes per token + ring; the mask. Dense keys and values are never made.
// Codec   what a format supplies; R rows (queries) of one key head, fp32. It is copied for every task, so it may hold buffers.
//           width                                          floats of an accumulator row; `Plain` below is D, no rounding, nothing at the end
//           begin(b, g, q, rows)                           a task starts: q (R, D), not scaled
//           scores(record, q, rows, s)                     s (R, page) = q K^^T
//           round(p)                                       a probability as `values` takes it
//           values(record, p, rows, acc)                   acc (R, width) += p (R, page) V^
//           finish(acc, sums, rows, out)                   out (R, D) from the accumulators and the sums of probabilities in them
// Shift    keys that stand elsewhere than they were packed for (edited texts): the query is turned back once per table row, and a page with one
//          turn, which is the rule, costs one product as without. A codec that keeps queries from `begin` on is there once per row.
// Numerics fp32; a NaN anywhere in what is attended gives NaN.
#pragma once
#include <memory>
#include <type_traits>

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

// `records`: of a page, one per key head or one for all of them.
inline State state_of(const Tensor& pages, const Tensor& ring, const Tensor& lens, int64_t page, int64_t records) {
  STD_TORCH_CHECK(pages.dim() == 3 && ring.dim() == 5 && lens.numel() == 2 && pages.is_contiguous() && ring.is_contiguous(), "effllm: the cache's tensors do not fit");
  State z{};
  z.pages = static_cast<const uint8_t*>(pages.const_data_ptr());
  z.ring = static_cast<const char*>(ring.const_data_ptr());
  z.type = type_of(ring.scalar_type());
  z.batch = ring.size(0), z.heads = ring.size(2), z.width = ring.size(3), z.dim = ring.size(4);
  z.count = pages.size(1), z.page_bytes = pages.size(2), z.page = page, z.record = records == 1 ? 0 : z.page_bytes / records;  // from one key head to the next
  const int64_t* n = static_cast<const int64_t*>(lens.const_data_ptr());
  z.total = n[0], z.flushed = n[1];
  STD_TORCH_CHECK(pages.size(0) == z.batch && page > 0 && z.heads > 0, "effllm: the cache's tensors do not fit");
  STD_TORCH_CHECK(z.flushed >= 0 && z.flushed % page == 0 && z.total >= z.flushed && z.flushed <= z.count * page && z.total - z.flushed <= z.width, "effllm: the cache's lengths do not fit its tensors");
  return z;
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

// The part of a codec that most formats need nothing of.
struct Plain {
  int64_t width = 0;  // 0: the head size
  void begin(int64_t, int64_t, const float*, int64_t) {}
  float round(float p) const { return p; }
};

// One run's softmax so far: acc (rows, dim), the largest score and the sum of exponentials of each row.
struct Run {
  int64_t rows, dim;
  float *acc, *top, *sum;
  // Take `n` scores (rows, n) in, turned into weights in place, as `round` has them; false where no row attends to any of them.
  template <class Round> bool take(float* s, int64_t n, Round&& round) const {
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
        const float e = p[t] == -INFINITY ? 0.f : round(exp_negative(p[t] - m));
        p[t] = e;
        l += e;
      }
      sum[r] += l;
    }
    return any;
  }
};

// The scale, and the mask of one row of the batch and its key head for a run of tokens at a time.
struct Shown {
  const Mask& mask;
  int64_t b, h0, queries;
  float scale;
  // s (rows, n) = s * scale + mask for tokens [from, from + n).
  void add(float* s, int64_t rows, int64_t from, int64_t n) const {
#pragma omp simd
    for (int64_t i = 0; i < rows * n; ++i) s[i] *= scale;
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
    for (int64_t r = 0; r < run.rows; ++r) s[static_cast<size_t>(r * n + t)] = dot(q + r * d, line.data(), d);
  }
  mask.add(s.data(), run.rows, z.flushed, n);
  if (!run.take(s.data(), n, [](float p) { return p; })) return;
  for (int64_t t = 0; t < n; ++t) {
    widen<T>(z.ring, values + (z.flushed + t) % z.width * d, d, line.data());
    for (int64_t r = 0; r < run.rows; ++r)
      if (const float w = s[static_cast<size_t>(r * n + t)]; w != 0.f) axpy(run.acc + r * d, w, line.data(), d);
  }
}

// What all tasks share.
struct Work {
  State z;
  View q;
  Mask mask;
  Type type;
  int64_t heads, queries, runs;
  float scale;
  Shift shift;
  int64_t repeat() const { return heads / z.heads; }
  int64_t rows() const { return repeat() * queries; }
  int64_t slot() const { return rows() * (z.dim + 2); }  // floats of a run's result: weighted values, largest scores, sums
};

// Task i: pages of one run of one key head, and the ring in the last run, into `base`.
template <class Codec> void task(const Work& w, int64_t i, const Codec& codec, Codec& own, float* base, std::vector<float>& qs, std::vector<float>& s, std::vector<float>& acc) {
  const State& z = w.z;
  const int64_t d = z.dim, rows = w.rows(), b = i / w.runs / z.heads, g = i / w.runs % z.heads, part = i % w.runs, filled = z.flushed / z.page;
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0, at = w.q.at(b, g * w.repeat() + r / w.queries, r % w.queries); c < d; ++c) qs[static_cast<size_t>(r * d + c)] = load_as_float(w.q.data, at + c, w.type);
  own.begin(b, g, qs.data(), rows);
  Turned turned(w.shift, qs.data(), rows, d);
  std::vector<std::unique_ptr<Codec>> others(static_cast<size_t>(w.shift.turns.count));
  std::vector<float> spare;
  auto score = [&](const uint8_t* record, int64_t a, float* to) {
    if constexpr (std::is_base_of_v<Plain, Codec>) own.scores(record, turned.at(a), rows, to);
    else {
      auto& other = others[static_cast<size_t>(a)];
      if (!other) other = std::make_unique<Codec>(codec), other->begin(b, g, turned.at(a), rows);
      other->scores(record, turned.at(a), rows, to);
    }
  };
  const int64_t width = own.width ? own.width : d;
  float *top = base + rows * d, *sum = top + rows;
  acc.assign(static_cast<size_t>(rows * width), 0.f);
  std::fill(top, sum, -INFINITY);
  std::fill(sum, sum + rows, 0.f);
  const Run run{rows, width, acc.data(), top, sum};
  const Shown shown{w.mask, b, g * w.repeat(), w.queries, w.scale};
  s.resize(static_cast<size_t>(rows * z.page));
  for (int64_t n = filled * part / w.runs; n < filled * (part + 1) / w.runs; ++n) {
    if (!shown.any(rows, n * z.page, z.page)) continue;
    const uint8_t* record = z.pages + (b * z.count + n) * z.page_bytes + g * z.record;
    if (!w.shift.on) own.scores(record, qs.data(), rows, s.data());
    else score_turns(w.shift.row, n * z.page, z.page, rows, z.page, s.data(), spare, [&](int64_t a, float* to) { score(record, a, to); });
    shown.add(s.data(), rows, n * z.page, z.page);
    if (run.take(s.data(), z.page, [&own](float p) { return own.round(p); })) own.values(record, s.data(), rows, acc.data());
  }
  if constexpr (std::is_base_of_v<Plain, Codec>) std::copy(acc.begin(), acc.end(), base);
  else own.finish(acc.data(), sum, rows, base);
  if (part < w.runs - 1) return;
  const auto near = z.type == Type::f32 ? ring_part<Type::f32> : z.type == Type::bf16 ? ring_part<Type::bf16> : ring_part<Type::f16>;
  near(z, b, g, turned, shown, Run{rows, d, base, top, sum}, s);
}

// The runs of every key head, merged and divided.
inline void merge(const Work& w, const std::vector<float>& part, void* out) {
  const int64_t d = w.z.dim, rows = w.rows(), slot = w.slot();
  std::vector<float> line(static_cast<size_t>(d));
  for (int64_t lane = 0; lane < w.z.batch * w.z.heads; ++lane)
    for (int64_t r = 0; r < rows; ++r) {
      const float* first = part.data() + lane * w.runs * slot;
      float top = -INFINITY, sum = 0;
      for (int64_t n = 0; n < w.runs; ++n) top = std::max(top, first[n * slot + rows * d + r]);
      std::fill(line.begin(), line.end(), 0.f);
      for (int64_t n = 0; n < w.runs; ++n) {
        const float* p = first + n * slot;
        const float m = p[rows * d + r], weight = m == -INFINITY ? (p[rows * (d + 1) + r] == 0 ? 0.f : NAN) : std::exp(m - top);
        sum += weight * p[rows * (d + 1) + r];
        axpy(line.data(), weight, p + r * d, d);
      }
      const int64_t h = lane % w.z.heads * w.repeat() + r / w.queries, to = ((lane / w.z.heads * w.heads + h) * w.queries + r % w.queries) * d;
      const float divide = sum == 0 ? 0.f : 1.f / sum;
      for (int64_t c = 0; c < d; ++c) store_from_float(out, to + c, w.type, line[static_cast<size_t>(c)] * divide);
    }
}

template <class Codec>
Tensor attend(const Tensor& q, const State& z, const std::optional<Tensor>& mask, double scale, const Codec& codec, const Shift& shift = {}) {
  STD_TORCH_CHECK(q.dim() == 4 && q.size(0) == z.batch && q.size(3) == z.dim && q.size(1) % z.heads == 0, "effllm: the queries do not fit the cache");
  Work w{z, view_of(q), mask_of(mask, z.batch, q.size(1), q.size(2), z.keys()), type_of(q.scalar_type()), q.size(1), q.size(2), 1, static_cast<float>(scale), shift};
  Tensor out = torch::stable::new_empty(q, {z.batch, w.heads, w.queries, z.dim}, q.scalar_type());
  const int64_t lanes = z.batch * z.heads, wanted = 4 * static_cast<int64_t>(torch::stable::get_num_threads());
  // a run costs a merge and its own start: at least 256 tokens each
  w.runs = std::max<int64_t>(1, std::min((wanted + lanes - 1) / lanes, z.flushed / std::max<int64_t>(256, z.page)));
  std::vector<float> part(static_cast<size_t>(lanes * w.runs * w.slot()));
  torch::stable::parallel_for(0, lanes * w.runs, std::max<int64_t>(1, 24000 / std::max<int64_t>(1, w.rows() * z.dim * 2 * z.total / w.runs)), [&](int64_t from, int64_t to) {
    Codec own = codec;
    std::vector<float> qs(static_cast<size_t>(w.rows() * z.dim)), s, acc;
    for (int64_t i = from; i < to; ++i) task(w, i, codec, own, part.data() + i * w.slot(), qs, s, acc);
  });
  merge(w, part, out.mutable_data_ptr());
  return out;
}

}  // namespace effllm::kv
