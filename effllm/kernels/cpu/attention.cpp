// Attention of a few queries over a long cache: o = softmax(scale * q k^T + mask) v, for decoding. The arithmetic is in attend.h.
//
// Layout    q (B, H, Q, D), k and v (B, Hk, S, D) with any strides but a dense last dimension; H = Hk * R (grouped-query attention): the R
//           query heads of a key head are served while its keys are in cache, so k and v are read once and never repeated.
// Mask      none, or (1 or B, 1 or H, 1 or Q, S) of bool (true: attend) or float (added). What masked-out keys and values hold does not matter:
//           with a static cache that is the unused tail, which a bool mask spares reading. A query without any key gives zeros.
// Bytes     2 * B * Hk * S' * D * element size, S' the keys that any query attends to.
// Numerics  fp32 throughout, one rounding to the output's dtype.
#include "attend.h"
#include "offer.h"

namespace {

using namespace effllm::attention;
using effllm::Type;
using torch::stable::Tensor;
using V = effllm::EFFLLM_ISA;

Tensor decode_attention(const Tensor q_in, const Tensor k, const Tensor v, std::optional<Tensor> mask, double scale) {
  const Tensor q = q_in.stride(3) == 1 || q_in.size(3) == 1 ? q_in : torch::stable::contiguous(q_in);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3), kv = k.size(1), keys = k.size(2);
  const Type type = check(q, k, v);
  Tensor out = torch::stable::new_empty(q, {batch, heads, queries, d}, q.scalar_type());
  const Mask m = mask_of(mask, batch, heads, queries, keys);
  const View qv = view_of(q), kvw = view_of(k), vv = view_of(v);
  const int64_t repeat = heads / kv, size = effllm::size_of(type), grain = grain_of(repeat * queries * keys * d * 2);
  char* to_out = static_cast<char*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, batch * kv, grain, [&](int64_t from, int64_t to) {
    effllm::AttendScratch scratch;
    std::vector<effllm::QueryRow> rows(static_cast<size_t>(repeat * queries));
    for (int64_t i = from; i < to; ++i) {
      const int64_t b = i / kv, hk = i % kv;
      effllm::KeyHead head{static_cast<const char*>(kvw.data) + kvw.at(b, hk, 0) * size, static_cast<const char*>(vv.data) + vv.at(b, hk, 0) * size,
                           kvw.s2 * size, vv.s2 * size, keys, d, static_cast<float>(scale), m.boolean, m.type};
      for (int64_t r = 0; r < repeat * queries; ++r) {
        const int64_t h = hk * repeat + r / queries, at = r % queries;
        const int64_t element = b * m.s0 + h * m.s1 + at * m.s2;
        rows[static_cast<size_t>(r)] = {static_cast<const char*>(qv.data) + qv.at(b, h, at) * size, to_out + ((b * heads + h) * queries + at) * d * size,
                                        m.data ? static_cast<const char*>(m.data) + element * (m.boolean ? 1 : effllm::size_of(m.type)) : nullptr, m.s3};
      }
      const auto run = type == Type::f32 ? effllm::attend<V, Type::f32> : type == Type::bf16 ? effllm::attend<V, Type::bf16> : effllm::attend<V, Type::f16>;
      run(rows.data(), repeat * queries, head, scratch);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("decode_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "decode_attention", TORCH_BOX(&decode_attention)); }
