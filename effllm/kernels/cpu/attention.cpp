// Attention of a few queries over a long cache: o = softmax(scale * q k^T + mask) v, for decoding.
//
// Layout    q (B, H, Q, D), k and v (B, Hk, S, D) with any strides but a dense last dimension; H = Hk * R (grouped-query attention): the R
//           query heads of a key head are served while its keys are in cache, so k and v are read once and never repeated.
// Mask      none, or (1 or B, 1 or H, 1 or Q, S) of bool (true: attend) or float (added). Masked-out keys are not read: with a static
//           cache that is the unused tail. A query without any key gives zeros.
// Bytes     2 * B * Hk * S' * D * element size, S' the keys that any query attends to.
// Numerics  fp32 throughout, one rounding to the output's dtype.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "attend.h"

namespace {

using effllm::exp_negative;
using effllm::Type;
using effllm::widen;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct View {
  const void* data;
  int64_t s0, s1, s2;
  int64_t at(int64_t b, int64_t h, int64_t i) const { return b * s0 + h * s1 + i * s2; }
};
View view_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 4 && (t.stride(3) == 1 || t.size(3) == 1), "effllm: attention takes 4-dimensional tensors with a dense last dimension");
  return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)};
}

struct Mask {
  const void* data = nullptr;
  bool boolean = false;
  Type type = Type::f32;
  int64_t s0 = 0, s1 = 0, s2 = 0, s3 = 0;
  // What is added to a score; -inf leaves the key out.
  float operator()(int64_t b, int64_t h, int64_t q, int64_t s) const {
    if (!data) return 0.f;
    const int64_t at = b * s0 + h * s1 + q * s2 + s * s3;
    if (boolean) return static_cast<const bool*>(data)[at] ? 0.f : -INFINITY;
    return effllm::load_as_float(data, at, type);
  }
};

Type type_of(ScalarType t) {
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half, "effllm: attention takes float32, bfloat16 or float16");
  return t == ScalarType::Float ? Type::f32 : t == ScalarType::BFloat16 ? Type::bf16 : Type::f16;
}

// The queries of one key head: `rows` = R * Q of them, heads h0 .. h0 + R.
template <Type T>
void one_head(const View& q, const View& k, const View& v, const Mask& mask, int64_t b, int64_t hk, int64_t repeat, int64_t queries, int64_t keys, int64_t d, float scale, void* out, int64_t heads) {
  const int64_t rows = repeat * queries;
  std::vector<float> qs(static_cast<size_t>(rows * d)), acc(static_cast<size_t>(rows * d), 0.f), scores(static_cast<size_t>(rows * keys)), line(static_cast<size_t>(d));
  for (int64_t r = 0; r < rows; ++r) {
    widen<T>(q.data, q.at(b, hk * repeat + r / queries, r % queries), d, qs.data() + r * d);
    for (int64_t i = 0; i < d; ++i) qs[static_cast<size_t>(r * d + i)] *= scale;
  }
  for (int64_t s = 0; s < keys; ++s) {
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) {
      const float m = mask(b, hk * repeat + r / queries, r % queries, s);
      scores[static_cast<size_t>(r * keys + s)] = m;
      any |= m > -INFINITY;
    }
    if (!any) continue;
    widen<T>(k.data, k.at(b, hk, s), d, line.data());
    for (int64_t r = 0; r < rows; ++r) {
      float dot = 0;
      const float *x = qs.data() + r * d, *y = line.data();
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < d; ++i) dot += x[i] * y[i];
      scores[static_cast<size_t>(r * keys + s)] += dot;
    }
  }
  std::vector<float> total(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) {
    float* p = scores.data() + r * keys;
    float top = -INFINITY, sum = 0;
    for (int64_t s = 0; s < keys; ++s) top = std::max(top, p[s]);
    if (top == -INFINITY) top = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t s = 0; s < keys; ++s) {
      const float e = p[s] == -INFINITY ? 0.f : exp_negative(p[s] - top);
      p[s] = e;
      sum += e;
    }
    total[static_cast<size_t>(r)] = sum > 0 ? 1.f / sum : (sum == 0 ? 0.f : sum);
  }
  for (int64_t s = 0; s < keys; ++s) {
    bool any = false;
    for (int64_t r = 0; r < rows; ++r) any |= scores[static_cast<size_t>(r * keys + s)] != 0.f;
    if (!any) continue;
    widen<T>(v.data, v.at(b, hk, s), d, line.data());
    for (int64_t r = 0; r < rows; ++r) {
      const float w = scores[static_cast<size_t>(r * keys + s)];
      float* a = acc.data() + r * d;
      const float* y = line.data();
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) a[i] += w * y[i];
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t to = ((b * heads + hk * repeat + r / queries) * queries + r % queries) * d;
    for (int64_t i = 0; i < d; ++i) effllm::store_from_float(out, to + i, T, acc[static_cast<size_t>(r * d + i)] * total[static_cast<size_t>(r)]);
  }
}

Tensor decode_attention(const Tensor q, const Tensor k, const Tensor v, std::optional<Tensor> mask, double scale) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3), kv = k.size(1), keys = k.size(2);
  STD_TORCH_CHECK(kv > 0 && heads % kv == 0 && k.size(3) == d && v.size(3) == d && v.size(2) == keys && v.size(1) == kv && k.size(0) == batch, "effllm: attention shapes do not fit");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "effllm: q, k and v differ in dtype");
  const Type type = type_of(q.scalar_type());
  Tensor out = torch::stable::new_empty(q, {batch, heads, queries, d}, q.scalar_type());
  Mask m;
  if (mask) {
    STD_TORCH_CHECK(mask->dim() == 4 && mask->size(3) == keys, "effllm: the mask must be (batch, heads, queries, keys)");
    m.data = mask->const_data_ptr();
    m.boolean = mask->scalar_type() == ScalarType::Bool;
    if (!m.boolean) m.type = type_of(mask->scalar_type());
    auto step = [&](int64_t dim, int64_t want) { STD_TORCH_CHECK(mask->size(dim) == 1 || mask->size(dim) == want, "effllm: the mask does not broadcast"); return mask->size(dim) == 1 ? 0 : mask->stride(dim); };
    m.s0 = step(0, batch), m.s1 = step(1, heads), m.s2 = step(2, queries), m.s3 = mask->stride(3);
  }
  const View qv = view_of(q), kvw = view_of(k), vv = view_of(v);
  const int64_t repeat = heads / kv;
  // about 8 multiply-adds a nanosecond and 3 us to wake a thread
  const int64_t grain = std::max<int64_t>(1, 24000 / std::max<int64_t>(1, repeat * queries * keys * d * 2));
  torch::stable::parallel_for(0, batch * kv, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const auto run = type == Type::f32 ? one_head<Type::f32> : type == Type::bf16 ? one_head<Type::bf16> : one_head<Type::f16>;
      run(qv, kvw, vv, m, i / kv, i % kv, repeat, queries, keys, d, static_cast<float>(scale), out.mutable_data_ptr(), heads);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { m.impl("decode_attention", TORCH_BOX(&decode_attention)); }
