// Rotary keys at new positions: rotate them while they are gathered, or rotate the query instead and read them as they lie.
//
// Maths     pie_apply          out[b, g, t] = R(row[t]) k[b, g, source[t]]
//           rotated_attention  o = softmax(scale * (R(-row[s]) q) . k[s] + mask) v, since q . R(a) k = R(-a) q . k
//           R turns the first 2 * P channels by pairs: (c, c + P) for "half", (2c, 2c + 1) for "interleaved"; the others pass.
// Layout    k, v (B, G, S, D) and q (B, H, Q, D) with any strides but a dense last dimension; H = G * repeat. source int64 (T), negative:
//           zeros, or absent: the token itself. row int32 or int64 (T or S). cos, sin float32 (A, P), rounded from fp64 angles.
// Mask      as in attention.cpp: absent, bool (true: attend) or added; keys that no query attends to are not read.
// Bytes     pie_apply: 2 * B * G * T * D * element size. rotated_attention: those of k and v, as without segments.
// Numerics  fp32, one rounding to the output's dtype; cos 1 and sin 0 give the input back exactly. A query is rotated once per table row
//           that its keys use, in fp32 and never rounded.
#include "attend.h"
#include "offer.h"
#include "turns.h"

namespace {

using namespace effllm::attention;
using effllm::check_rows, effllm::rows_of, effllm::turns_of, effllm::Rows, effllm::Turns, effllm::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <Type T> void gather(const View& k, const int64_t* source, const Rows& row, const Turns& turns, int64_t heads, int64_t from, int64_t to, int64_t tokens, int64_t d, void* out) {
  std::vector<float> x(static_cast<size_t>(d)), y(static_cast<size_t>(d));
  for (int64_t i = from; i < to; ++i) {
    const int64_t t = i % tokens, head = i / tokens, s = source ? source[t] : t;
    if (s < 0) std::fill(y.begin(), y.end(), 0.f);
    else {
      widen<T>(k.data, k.at(head / heads, head % heads, s), d, x.data());
      turns.turn(x.data(), row[t], 1.f, d, y.data());
    }
    if constexpr (T == Type::f32) std::memcpy(static_cast<float*>(out) + i * d, y.data(), static_cast<size_t>(d) * 4);
    else
#pragma omp simd
      for (int64_t c = 0; c < d; ++c) effllm::store_from_float(out, i * d + c, T, y[static_cast<size_t>(c)]);
  }
}

Tensor pie_apply(const Tensor k, std::optional<Tensor> source, const Tensor row, const Tensor cos, const Tensor sin, bool half) {
  const int64_t tokens = row.size(0), d = k.size(3), keys = k.size(2);
  const View view = view_of(k);
  const Turns turns = turns_of(cos, sin, half, d);
  const Rows rows = rows_of(row);
  const Type type = type_of(k.scalar_type());
  check_rows(rows, tokens, turns);
  const int64_t* from = nullptr;
  if (source) {
    STD_TORCH_CHECK(source->scalar_type() == ScalarType::Long && source->dim() == 1 && source->is_contiguous() && source->size(0) == tokens, "effllm: source must be a contiguous int64 vector as long as row");
    from = static_cast<const int64_t*>(source->const_data_ptr());
    for (int64_t t = 0; t < tokens; ++t) STD_TORCH_CHECK(from[t] < keys, "effllm: source leaves the cache");
  } else STD_TORCH_CHECK(keys == tokens, "effllm: without source there must be a row for each key");
  Tensor out = torch::stable::new_empty(k, {k.size(0), k.size(1), tokens, d}, k.scalar_type());
  const int64_t heads = k.size(1);
  torch::stable::parallel_for(0, k.size(0) * heads * tokens, 512, [&](int64_t lo, int64_t hi) {
    const auto run = type == Type::f32 ? gather<Type::f32> : type == Type::bf16 ? gather<Type::bf16> : gather<Type::f16>;
    run(view, from, rows, turns, heads, lo, hi, tokens, d, out.mutable_data_ptr());
  });
  return out;
}

// The queries of one key head, each rotated back once for every table row in use.
// Softmax over the masked scores (rows, keys) of one key head, and the weighted sum of its values into out.
template <Type T>
void finish(float* scores, const View& v, int64_t b, int64_t hk, int64_t repeat, int64_t queries, int64_t keys, int64_t d, void* out, int64_t heads) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const int64_t rows = repeat * queries;
  std::vector<float> acc(static_cast<size_t>(rows * d)), line(static_cast<size_t>(d)), total(static_cast<size_t>(rows));
  for (int64_t r = 0; r < rows; ++r) total[static_cast<size_t>(r)] = effllm::weigh(scores + r * keys, keys);
  effllm::KeyHead h;
  h.v = static_cast<const char*>(v.data) + v.at(b, hk, 0) * size, h.v_stride = v.s2 * size, h.d = d;
  effllm::value_sums_plain<T>(scores, rows, keys, h, keys, acc.data(), line.data());
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t to = ((b * heads + hk * repeat + r / queries) * queries + r % queries) * d;
    effllm::put_row<T, 0>(acc.data() + r * d, d, effllm::share_of(total[static_cast<size_t>(r)]), static_cast<char*>(out) + to * size);
  }
}

template <Type T>
void one_head(const View& q, const View& k, const View& v, const Mask& mask, const Rows& row, const Turns& turns, int64_t b, int64_t hk, int64_t repeat, int64_t queries, int64_t keys, int64_t d, float scale, void* out, int64_t heads) {
  const int64_t rows = repeat * queries;
  std::vector<float> qs(static_cast<size_t>(rows * d)), line(static_cast<size_t>(d)), scores(static_cast<size_t>(rows * keys));
  std::vector<float> turned(static_cast<size_t>(turns.count * rows * d));
  std::vector<char> ready(static_cast<size_t>(turns.count), 0);
  for (int64_t r = 0; r < rows; ++r) {
    widen<T>(q.data, q.at(b, hk * repeat + r / queries, r % queries), d, qs.data() + r * d);
    for (int64_t i = 0; i < d; ++i) qs[static_cast<size_t>(r * d + i)] *= scale;
  }
  for (int64_t s = 0; s < keys; ++s) {
    if (!mask.load(b, hk * repeat, repeat, queries, s, keys, scores.data())) continue;
    const int64_t a = row[s];
    float* back = turned.data() + a * rows * d;
    if (!ready[static_cast<size_t>(a)]) {
      for (int64_t r = 0; r < rows; ++r) turns.turn(qs.data() + r * d, a, -1.f, d, back + r * d);
      ready[static_cast<size_t>(a)] = 1;
    }
    widen<T>(k.data, k.at(b, hk, s), d, line.data());
    for (int64_t r = 0; r < rows; ++r) {
      float dot = 0;
      const float *x = back + r * d, *y = line.data();
#pragma omp simd reduction(+ : dot)
      for (int64_t i = 0; i < d; ++i) dot += x[i] * y[i];
      scores[static_cast<size_t>(r * keys + s)] += dot;
    }
  }
  finish<T>(scores.data(), v, b, hk, repeat, queries, keys, d, out, heads);
}

Tensor rotated_attention(const Tensor q, const Tensor k, const Tensor v, std::optional<Tensor> mask, const Tensor row, const Tensor cos, const Tensor sin, bool half, double scale) {
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3), kv = k.size(1), keys = k.size(2);
  const Type type = check(q, k, v);
  const Turns turns = turns_of(cos, sin, half, d);
  const Rows rows = rows_of(row);
  STD_TORCH_CHECK(row.size(0) == keys, "effllm: there must be a row for each key");
  check_rows(rows, keys, turns);
  Tensor out = torch::stable::new_empty(q, {batch, heads, queries, d}, q.scalar_type());
  const Mask m = mask_of(mask, batch, heads, queries, keys);
  const View qv = view_of(q), kvw = view_of(k), vv = view_of(v);
  const int64_t repeat = heads / kv, grain = grain_of(repeat * queries * keys * d * 2);
  torch::stable::parallel_for(0, batch * kv, grain, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) {
      const auto run = type == Type::f32 ? one_head<Type::f32> : type == Type::bf16 ? one_head<Type::bf16> : one_head<Type::f16>;
      run(qv, kvw, vv, m, rows, turns, i / kv, i % kv, repeat, queries, keys, d, static_cast<float>(scale), out.mutable_data_ptr(), heads);
    }
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("pie_apply(Tensor k, Tensor? source, Tensor row, Tensor cos, Tensor sin, bool half) -> Tensor");
  m.def("rotated_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor row, Tensor cos, Tensor sin, bool half, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) {
  effllm::offer(m, "pie_apply", TORCH_BOX(&pie_apply));
  effllm::offer(m, "rotated_attention", TORCH_BOX(&rotated_attention));
}
