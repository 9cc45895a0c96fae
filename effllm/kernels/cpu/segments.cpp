// Attention by segments: prompts, chunks of prompts and decoding steps of many sequences, over one row of cached keys, without a mask.
//
// Layout    q (1, H, T, D), k (1, Hk, P, D), v (1, Hk, P, Dv) with any strides but a dense last dimension; H = Hk * R. table int32 (S, 4): q_start,
//           q_len, k_start, k_len (lowering/packed_attention.py). Result (1, T, H, Dv), dense.
// Tasks     a segment, a key head, and a block of at most kRows rows; a row is a query and one of the R query heads that share the key
//           head, queries first. Threads claim tasks, the longest runs first. The arithmetic is in flash.h: a block reads its own keys only,
//           tiles behind the diagonal or out of the window are never touched.
// Flops     4 * H * D * sum over queries of the keys they see.  Bytes  per block, its keys and values once.
// Numerics  as in flash.h, one rounding to the output's dtype.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "flash.h"
#include "offer.h"
#include "phases.h"

namespace {

using effllm::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

// Row r of a task sees the keys up to base + (from + r) / repeat, the last `window` of them where there is one.
struct Triangle {
  const Task& t;
  int64_t repeat, window;
  int64_t last(int64_t r) const { return t.base + (t.from + r) / repeat; }
  int64_t first(int64_t r) const { return window > 0 ? std::max<int64_t>(0, last(r) - window + 1) : 0; }
  int64_t begin() const { return first(0); }
  int64_t end() const { return last(t.rows - 1) + 1; }
  effllm::flash::Seen tile(int64_t s, int64_t n, char* seen) const {
    if (s >= first(t.rows - 1) && s + n <= last(0) + 1) return effllm::flash::Seen::all;
    std::fill(seen, seen + n, char{1});  // every key of a block is some row's
    return effllm::flash::Seen::some;
  }
  void mask(int64_t r, int64_t s, int64_t n, float* p) const {
    const int64_t from = std::clamp<int64_t>(first(r) - s, 0, n), to = std::clamp<int64_t>(last(r) + 1 - s, from, n);
    std::fill(p, p + from, -INFINITY);
    std::fill(p + to, p + n, -INFINITY);
  }
};

template <Type T> void attend(const Call& c, const Task& t) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  thread_local std::vector<effllm::flash::Row> rows;
  rows.resize(static_cast<size_t>(t.rows));
  for (int64_t r = 0; r < t.rows; ++r) {
    const int64_t head = t.head * c.repeat + (t.from + r) % c.repeat, token = t.q_start + (t.from + r) / c.repeat;
    rows[static_cast<size_t>(r)] = {static_cast<const char*>(c.q.data) + c.q.at(head, token) * size, static_cast<char*>(c.out) + (token * c.heads + head) * c.dv * size};
  }
  const effllm::flash::Keys keys{static_cast<const char*>(c.k.data) + c.k.at(t.head, t.k_start) * size, static_cast<const char*>(c.v.data) + c.v.at(t.head, t.k_start) * size,
                                 c.k.s2 * size, c.v.s2 * size, c.d, c.dv};
  Triangle see{t, c.repeat, c.window};
  effllm::flash::attend<T>(rows.data(), t.rows, keys, {c.scale, c.softcap}, see);
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
  const int64_t block = effllm::flash::block_rows(repeat);
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
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "packed_attention", TORCH_BOX(&packed_attention)); }
