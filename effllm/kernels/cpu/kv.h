// Attention of a few queries over a compressed cache (state: effllm/runtime/caches/paging.py), for any page format.
//
//   o = softmax(scale * q [K^ ; K]^T + mask) [V^ ; V]      pages of compressed tokens [0, flushed), then the dense ring [flushed, total)
//
// Work    tasks of (row of the batch, run of pages), which walk their pages from front to back, in each of them all key heads; where the pages are too
//         few for that, tasks of (row, key head, run). All query heads of a key head are served at once (keys, then values of a page, which lie side by
//         side) with an online softmax that leaves (o, max, sum). Runs are merged by o = sum_i e^(m_i - m) o_i / sum_i e^(m_i - m) l_i; a run without any key has m = -inf.
// Bytes   flushed * bytes per token + ring; the mask. Dense keys and values are never made.
// Codec   what a format supplies; R rows (queries) of one key head, fp32. It is copied for every key head of a task, so it may hold buffers.
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
      int32_t nan = 0;
#pragma omp simd reduction(max : big) reduction(| : nan)
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

// One key head's part of a run: its queries, codec and softmax. Points into itself.
template <class Codec> struct Lane {
  const Work& w;
  const Codec& codec;
  const int64_t b, g, rows, d;
  Codec own;
  std::vector<float> qs, acc, spare;
  std::vector<std::unique_ptr<Codec>> others;
  std::unique_ptr<Turned> turned;
  float* base;
  Shown shown;
  Run run;

  Lane(const Work& work, const Codec& given, int64_t row, int64_t head, float* to)
      : w(work), codec(given), b(row), g(head), rows(w.rows()), d(w.z.dim), own(given), base(to), shown{w.mask, b, g * w.repeat(), w.queries, w.scale} {
    qs.resize(static_cast<size_t>(rows * d));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t c = 0, at = w.q.at(b, g * w.repeat() + r / w.queries, r % w.queries); c < d; ++c) qs[static_cast<size_t>(r * d + c)] = load_as_float(w.q.data, at + c, w.type);
    own.begin(b, g, qs.data(), rows);
    turned = std::make_unique<Turned>(w.shift, qs.data(), rows, d);
    others.resize(static_cast<size_t>(w.shift.turns.count));
    const int64_t width = own.width ? own.width : d;
    float *top = base + rows * d, *sum = top + rows;
    acc.assign(static_cast<size_t>(rows * width), 0.f);
    std::fill(top, sum, -INFINITY);
    std::fill(sum, sum + rows, 0.f);
    run = Run{rows, width, acc.data(), top, sum};
  }
  Lane(const Lane&) = delete;
  Lane& operator=(const Lane&) = delete;

  const uint8_t* record(int64_t n) const { return w.z.pages + (b * w.z.count + n) * w.z.page_bytes + g * w.z.record; }
  // Records of a head lie a page apart, farther than the processor looks ahead by itself.
  static void ask(const uint8_t* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }
  void score(const uint8_t* from, int64_t a, float* to) {
    if constexpr (std::is_base_of_v<Plain, Codec>) own.scores(from, turned->at(a), rows, to);
    else {
      auto& other = others[static_cast<size_t>(a)];
      if (!other) other = std::make_unique<Codec>(codec), other->begin(b, g, turned->at(a), rows);
      other->scores(from, turned->at(a), rows, to);
    }
  }
  // Page n; `next` is asked for meanwhile, unless it is null.
  void page(int64_t n, const uint8_t* next, std::vector<float>& s) {
    const State& z = w.z;
    const int64_t at = n * z.page, half = z.record / 2;
    if (!shown.any(rows, at, z.page)) return;
    s.resize(static_cast<size_t>(rows * z.page));
    if (next) ask(next, half);
    if (!w.shift.on) own.scores(record(n), qs.data(), rows, s.data());
    else score_turns(w.shift.row, at, z.page, rows, z.page, s.data(), spare, [&](int64_t a, float* to) { score(record(n), a, to); });
    shown.add(s.data(), rows, at, z.page);
    if (next) ask(next + half, half);
    if (run.take(s.data(), z.page, [this](float p) { return own.round(p); })) own.values(record(n), s.data(), rows, acc.data());
  }
  // The sums of the pages, and the ring if it is this run's.
  void finish(bool ring, std::vector<float>& s) {
    if constexpr (std::is_base_of_v<Plain, Codec>) std::copy(acc.begin(), acc.end(), base);
    else own.finish(acc.data(), run.sum, rows, base);
    if (!ring) return;
    const auto near = w.z.type == Type::f32 ? ring_part<Type::f32> : w.z.type == Type::bf16 ? ring_part<Type::bf16> : ring_part<Type::f16>;
    near(w.z, b, g, *turned, shown, Run{rows, d, base, run.top, run.sum}, s);
  }
};

// One run of one key head's pages; the last run takes the ring.
template <class Codec> void by_head(const Work& w, int64_t i, const Codec& codec, float* part, std::vector<float>& s) {
  const int64_t filled = w.z.flushed / w.z.page, turn = i % w.runs, until = filled * (turn + 1) / w.runs;
  Lane<Codec> lane(w, codec, i / w.runs / w.z.heads, i / w.runs % w.z.heads, part + i * w.slot());
  for (int64_t n = filled * turn / w.runs; n < until; ++n) lane.page(n, n + 1 < until ? lane.record(n + 1) : nullptr, s);
  lane.finish(turn == w.runs - 1, s);
}

// One run of pages for all key heads of a row of the batch, so that memory is read from front to back; the runs share the rings.
template <class Codec> void by_page(const Work& w, int64_t i, const Codec& codec, float* part, std::vector<float>& s) {
  const int64_t filled = w.z.flushed / w.z.page, turn = i % w.runs, until = filled * (turn + 1) / w.runs, b = i / w.runs;
  std::vector<std::unique_ptr<Lane<Codec>>> lanes;
  for (int64_t g = 0; g < w.z.heads; ++g) lanes.push_back(std::make_unique<Lane<Codec>>(w, codec, b, g, part + ((b * w.z.heads + g) * w.runs + turn) * w.slot()));
  for (int64_t n = filled * turn / w.runs; n < until; ++n)
    for (int64_t g = 0; g < w.z.heads; ++g) {
      Lane<Codec>& lane = *lanes[static_cast<size_t>(g)];
      const bool more = w.z.record && (g + 1 < w.z.heads || n + 1 < until);  // what follows in memory is read next
      lane.page(n, more ? lane.record(n) + w.z.record : nullptr, s);
    }
  for (int64_t g = 0; g < w.z.heads; ++g) lanes[static_cast<size_t>(g)]->finish(g % w.runs == turn, s);
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
  const int64_t lanes = z.batch * z.heads, threads = static_cast<int64_t>(torch::stable::get_num_threads()), wanted = 4 * threads;
  // a run costs a merge and its own start: at least 256 tokens each
  const int64_t most = z.flushed / std::max<int64_t>(256, z.page), rows = (wanted + z.batch - 1) / z.batch;
  const bool pages_first = rows <= most || z.batch >= wanted;  // enough runs for all threads without sharing out heads
  w.runs = std::max<int64_t>(1, std::min(pages_first ? rows : (wanted + lanes - 1) / lanes, most));
  std::vector<float> part(static_cast<size_t>(lanes * w.runs * w.slot()));
  const int64_t each = w.rows() * z.dim * 2 * z.total / w.runs * (pages_first ? z.heads : 1);
  torch::stable::parallel_for(0, (pages_first ? z.batch : lanes) * w.runs, std::max<int64_t>(1, 24000 / std::max<int64_t>(1, each)), [&](int64_t from, int64_t to) {
    std::vector<float> s;
    for (int64_t i = from; i < to; ++i) pages_first ? by_page(w, i, codec, part.data(), s) : by_head(w, i, codec, part.data(), s);
  });
  merge(w, part, out.mutable_data_ptr());
  return out;
}

}  // namespace effllm::kv
