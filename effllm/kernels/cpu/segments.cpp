// Attention by segments: prompts, chunks of prompts and decoding steps of many sequences, over one row of cached keys, without a mask.
//
// Layout    q (1, H, T, D), k (1, Hk, P, D), v (1, Hk, P, Dv) with any strides but a dense last dimension; H = Hk * R. table int32 (S, 4): q_start,
//           q_len, k_start, k_len (lowering/packed_attention.py). Result (1, T, H, Dv), dense.
// Tasks     a segment, a key head, and a block of at most kRows rows; a row is a query and one of the R query heads that share the key
//           head, queries first, so that the keys of a block are read once for all of them. Threads claim tasks, the longest runs first.
// Many rows tiles of 64 keys, widened to fp32 and transposed once per block; scores and output are small matrix products with
//           accumulators in registers; softmax online, so nothing of the size of queries x keys exists. Tiles behind the diagonal or out
//           of the window are never touched: a block reads its own keys only.
// Few rows  (decoding) a dot product per key and row; transposing would cost as much as the work.
// Flops     4 * H * D * sum over queries of the keys they see.  Bytes  per block, its keys and values once.
// Numerics  fp32 throughout, one rounding to the output's dtype.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "attention.h"
#include "phases.h"

namespace {

using effllm::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__AVX512F__)
constexpr int kVectors = 4, kUnroll = 6;  // 24 accumulators of 32 registers
#else
constexpr int kVectors = 1, kUnroll = 6;  // 64-byte vectors are two AVX registers, or four of SSE
#endif
constexpr int kLane = 16, kTile = 64, kStep = kVectors * kLane;
constexpr int64_t kRows = 96;  // queries x heads of a task: transposing a tile costs about 1 / kRows of the products it serves
constexpr int64_t kFew = 6;    // rows up to which nothing is transposed

typedef float Vec __attribute__((vector_size(64)));
inline Vec load(const float* p) { Vec v; std::memcpy(&v, p, 64); return v; }
inline void store(float* p, const Vec& v) { std::memcpy(p, &v, 64); }

// C (M, n) (+)= A (M, depth) B (depth, n), n a multiple of kStep, all dense rows with the given strides; SET overwrites.
template <int M, bool SET> void small_rows(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t depth, int64_t n) {
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
        for (int u = 0; u < kVectors; ++u) acc[i][u] += a[i * lda + d] * x[u];
    }
    for (int i = 0; i < M; ++i)
      for (int u = 0; u < kVectors; ++u) store(c + i * ldc + j + u * kLane, acc[i][u]);
  }
}
template <bool SET> void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc, int64_t m, int64_t depth, int64_t n) {
  int64_t i = 0;
  for (; i + kUnroll <= m; i += kUnroll) small_rows<kUnroll, SET>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, n);
  for (; i < m; ++i) small_rows<1, SET>(a + i * lda, lda, b, ldb, c + i * ldc, ldc, depth, n);
}

inline float tanh_of(float x) {  // by the exponential; relative error near 0 is that of 1 - e, so small values keep their own
  const float a = std::fabs(x);
  if (a < 0.01f) return x * (1.f - x * x / 3.f);
  const float e = effllm::exp_negative(-2.f * a), t = (1.f - e) / (1.f + e);
  return x < 0 ? -t : t;
}

struct View {
  const void* data;
  int64_t s1, s2;
  int64_t at(int64_t h, int64_t i) const { return h * s1 + i * s2; }
};
View view_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && t.size(0) == 1 && (t.stride(3) == 1 || t.size(3) == 1), "effllm: attention by segments takes (1, heads, tokens, size) with a dense last dimension");
  return {t.const_data_ptr(), t.stride(1), t.stride(2)};
}

struct Call {
  View q, k, v;
  void* out;
  int64_t heads, repeat, d, dv, window;
  float scale, softcap;
};
struct Task {
  int64_t q_start, k_start, head, from, rows, base;  // rows from .. from + rows; row r sees keys up to base + r / repeat, counted from k_start
  int64_t work;
};

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

template <Type T> void attend(const Call& c, const Task& t) {
  const int64_t dp = round_up(c.d, kLane), vp = round_up(c.dv, kStep), rows = t.rows;
  auto last_of = [&](int64_t r) { return t.base + (t.from + r) / c.repeat; };
  auto first_of = [&](int64_t r) { return c.window > 0 ? std::max<int64_t>(0, last_of(r) - c.window + 1) : 0; };
  const bool few = rows <= kFew;
  thread_local std::vector<float> memory;
  const int64_t tile_bytes = few ? dp + vp : kTile * (dp + vp);
  const size_t need = static_cast<size_t>(rows * (dp + vp + kTile + 2) + tile_bytes + 64);
  if (memory.size() < need) memory.resize(need);
  float* q = memory.data();
  float *acc = q + rows * dp, *score = acc + rows * vp, *top = score + rows * kTile, *sum = top + rows, *kt = sum + rows, *vt = kt + (few ? dp : kTile * dp);
  for (int64_t r = 0; r < rows; ++r) {
    float* x = q + r * dp;
    effllm::widen<T>(c.q.data, c.q.at(t.head * c.repeat + (t.from + r) % c.repeat, t.q_start + (t.from + r) / c.repeat), c.d, x);
    for (int64_t i = 0; i < c.d; ++i) x[i] *= c.scale;
    std::fill(x + c.d, x + dp, 0.f);
    top[r] = -INFINITY, sum[r] = 0;
  }
  std::fill(acc, acc + rows * vp, 0.f);
  const int64_t end = last_of(rows - 1) + 1;
  for (int64_t s = first_of(0); s < end; s += kTile) {
    const int64_t n = std::min<int64_t>(kTile, end - s);
    if (few) {
      for (int64_t j = 0; j < n; ++j) {
        effllm::widen<T>(c.k.data, c.k.at(t.head, t.k_start + s + j), c.d, kt);
        for (int64_t r = 0; r < rows; ++r) {
          float dot = 0;
          const float* x = q + r * dp;
#pragma omp simd reduction(+ : dot)
          for (int64_t i = 0; i < c.d; ++i) dot += x[i] * kt[i];
          score[r * kTile + j] = dot;
        }
      }
    } else {
      for (int64_t j = 0; j < kTile; ++j) {
        float* line = vt + j * vp;  // borrowed: values are loaded after the scores
        if (j < n) effllm::widen<T>(c.k.data, c.k.at(t.head, t.k_start + s + j), c.d, line);
        else std::fill(line, line + c.d, 0.f);
        for (int64_t i = 0; i < c.d; ++i) kt[i * kTile + j] = line[i];
      }
      product<true>(q, dp, kt, kTile, score, kTile, rows, c.d, kTile);
    }
    for (int64_t r = 0; r < rows; ++r) {
      float* p = score + r * kTile;
      const int64_t from = std::max<int64_t>(0, first_of(r) - s), to = std::min<int64_t>(n, last_of(r) + 1 - s);
      if (from >= to) { std::fill(p, p + kTile, 0.f); continue; }
      if (c.softcap > 0) for (int64_t j = from; j < to; ++j) p[j] = c.softcap * tanh_of(p[j] / c.softcap);
      float most = top[r];
#pragma omp simd reduction(max : most)
      for (int64_t j = from; j < to; ++j) most = std::max(most, p[j]);
      if (most > top[r]) {
        const float shrink = top[r] == -INFINITY ? 0.f : effllm::exp_negative(top[r] - most);
        top[r] = most, sum[r] *= shrink;
        for (int64_t i = 0; i < vp; ++i) acc[r * vp + i] *= shrink;
      }
      float part = 0;
      const float high = top[r] == -INFINITY ? 0.f : top[r];
#pragma omp simd reduction(+ : part)
      for (int64_t j = from; j < to; ++j) { p[j] = p[j] == -INFINITY ? 0.f : effllm::exp_negative(p[j] - high); part += p[j]; }
      sum[r] += part;
      std::fill(p, p + from, 0.f);
      std::fill(p + to, p + kTile, 0.f);
    }
    if (few) {
      for (int64_t j = 0; j < n; ++j) {
        effllm::widen<T>(c.v.data, c.v.at(t.head, t.k_start + s + j), c.dv, vt);
        for (int64_t r = 0; r < rows; ++r) {
          const float w = score[r * kTile + j];
          if (w == 0.f) continue;  // also: another row's keys
          float* a = acc + r * vp;
#pragma omp simd
          for (int64_t i = 0; i < c.dv; ++i) a[i] += w * vt[i];
        }
      }
    } else {
      for (int64_t j = 0; j < n; ++j) {
        effllm::widen<T>(c.v.data, c.v.at(t.head, t.k_start + s + j), c.dv, vt + j * vp);
        std::fill(vt + j * vp + c.dv, vt + (j + 1) * vp, 0.f);
      }
      product<false>(score, kTile, vt, vp, acc, vp, rows, n, vp);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t to = ((t.q_start + (t.from + r) / c.repeat) * c.heads + t.head * c.repeat + (t.from + r) % c.repeat) * c.dv;
    const float unit = sum[r] > 0 ? 1.f / sum[r] : (sum[r] == 0 ? 0.f : sum[r]);
    for (int64_t i = 0; i < c.dv; ++i) effllm::store_from_float(c.out, to + i, T, acc[r * vp + i] * unit);
  }
}

Tensor packed_attention(const Tensor q, const Tensor k, const Tensor v, const Tensor table, double scale, int64_t window, double softcap) {
  const int64_t heads = q.size(1), tokens = q.size(2), d = q.size(3), kv = k.size(1), slots = k.size(2), dv = v.size(3);
  STD_TORCH_CHECK(kv > 0 && heads % kv == 0 && k.size(3) == d && v.size(2) == slots && v.size(1) == kv, "effllm: attention shapes do not fit");
  const ScalarType dtype = q.scalar_type();
  STD_TORCH_CHECK(dtype == k.scalar_type() && dtype == v.scalar_type(), "effllm: q, k and v differ in dtype");
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, "effllm: attention takes float32, bfloat16 or float16");
  STD_TORCH_CHECK(table.dim() == 2 && table.size(1) == 4 && table.scalar_type() == ScalarType::Int, "effllm: the table must be int32 (S, 4)");
  Tensor out = torch::stable::new_empty(q, {1, tokens, heads, dv}, dtype);
  const int64_t repeat = heads / kv, segments = table.size(0), t0 = table.stride(0), t1 = table.stride(1);
  const Call call{view_of(q), view_of(k), view_of(v), out.mutable_data_ptr(), heads, repeat, d, dv, window, static_cast<float>(scale), static_cast<float>(softcap)};
  std::vector<Task> tasks;
  std::vector<char> covered(static_cast<size_t>(tokens), 0);
  const auto* at = static_cast<const int32_t*>(table.const_data_ptr());
  const int64_t block = std::max<int64_t>(1, kRows / repeat) * repeat;
  int64_t total = 0;
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t qs = at[s * t0], ql = at[s * t0 + t1], ks = at[s * t0 + 2 * t1], kl = at[s * t0 + 3 * t1];
    STD_TORCH_CHECK(qs >= 0 && ql >= 1 && qs + ql <= tokens && ks >= 0 && kl >= ql && ks + kl <= slots, "effllm: a segment reaches out of its queries or keys");
    for (int64_t i = qs; i < qs + ql; ++i) {
      STD_TORCH_CHECK(!covered[static_cast<size_t>(i)], "effllm: two segments share a query");
      covered[static_cast<size_t>(i)] = 1;
    }
    for (int64_t from = 0; from < ql * repeat; from += block) {
      const int64_t rows = std::min(block, ql * repeat - from), seen = std::min(kl - ql + (from + rows) / repeat, window > 0 ? window + rows / repeat : kl);
      for (int64_t h = 0; h < kv; ++h) tasks.push_back({qs, ks, h, from, rows, kl - ql, rows * seen * (d + dv)}), total += tasks.back().work;
    }
  }
  const int64_t size = dtype == ScalarType::Float ? 4 : 2;
  for (int64_t i = 0; i < tokens; ++i)
    if (!covered[static_cast<size_t>(i)]) std::memset(static_cast<char*>(out.mutable_data_ptr()) + i * heads * dv * size, 0, static_cast<size_t>(heads * dv * size));
  std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work > b.work; });
  // about 8 multiply-adds a nanosecond and 3 us to wake a thread
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + total / 24000);
  const auto run = dtype == ScalarType::Float ? attend<Type::f32> : dtype == ScalarType::BFloat16 ? attend<Type::bf16> : attend<Type::f16>;
  effllm::in_phases<1>({static_cast<int64_t>(tasks.size())}, threads, [&](int, int64_t i) { run(call, tasks[static_cast<size_t>(i)]); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("packed_attention(Tensor q, Tensor k, Tensor v, Tensor table, float scale, int window, float softcap) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { m.impl("packed_attention", TORCH_BOX(&packed_attention)); }
