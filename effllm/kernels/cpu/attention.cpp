// Attention of a few queries over a long cache: o = softmax(scale * q k^T + mask) v, for decoding.
//
// Layout    q (B, H, Q, D), k and v (B, Hk, S, D) with any strides but a dense last dimension; H = Hk * R (grouped-query attention): the R
//           query heads of a key head are served while its keys are in cache, so k and v are read once and never repeated.
// Mask      none, or (1 or B, 1 or H, 1 or Q, S) of bool (true: attend) or float (added). Masked-out keys are not read: with a static
//           cache that is the unused tail. A query without any key gives zeros.
// Bytes     2 * B * Hk * S' * D * element size, S' the keys that any query attends to.
// Numerics  fp32 throughout, one rounding to the output's dtype.
#include "attention.h"

namespace {

using namespace effllm::attention;
using effllm::Type;
using torch::stable::Tensor;

// The queries of one key head: `rows` = R * Q of them, heads h0 .. h0 + R.
template <Type T>
void one_head(const View& q, const View& k, const View& v, const Mask& mask, int64_t b, int64_t hk, int64_t repeat, int64_t queries, int64_t keys, int64_t d, float scale, void* out, int64_t heads) {
  const int64_t rows = repeat * queries;
  std::vector<float> qs(static_cast<size_t>(rows * d)), scores(static_cast<size_t>(rows * keys)), line(static_cast<size_t>(d));
  for (int64_t r = 0; r < rows; ++r) {
    widen<T>(q.data, q.at(b, hk * repeat + r / queries, r % queries), d, qs.data() + r * d);
    for (int64_t i = 0; i < d; ++i) qs[static_cast<size_t>(r * d + i)] *= scale;
  }
  for (int64_t s = 0; s < keys; ++s) {
    if (!mask.load(b, hk * repeat, repeat, queries, s, keys, scores.data())) continue;
    widen<T>(k.data, k.at(b, hk, s), d, line.data());
    for (int64_t r = 0; r < rows; ++r) {
      float dot = 0;
      const float *x = qs.data() + r * d, *y = line.data();
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < d; ++i) dot += x[i] * y[i];
      scores[static_cast<size_t>(r * keys + s)] += dot;
    }
  }
  finish<T>(scores.data(), v, b, hk, repeat, queries, keys, d, out, heads);
}

Tensor decode_attention(const Tensor q, const Tensor k, const Tensor v, std::optional<Tensor> mask, double scale) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3), kv = k.size(1), keys = k.size(2);
  const Type type = check(q, k, v);
  Tensor out = torch::stable::new_empty(q, {batch, heads, queries, d}, q.scalar_type());
  const Mask m = mask_of(mask, batch, heads, queries, keys);
  const View qv = view_of(q), kvw = view_of(k), vv = view_of(v);
  const int64_t repeat = heads / kv, grain = grain_of(repeat * queries * keys * d * 2);
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
