// What the attention kernels share: strided views, masks, and softmax with the weighted sum of values.
#pragma once
#include "operands.h"

namespace effllm {

// exp for x <= 0, relative error below 2e-7: 2^round(x log2 e) times a degree-6 polynomial of the rest.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = std::fma(n, -1.90465421e-9f, std::fma(n, -0.693147180f, x));  // ln 2 in two parts
  float p = 1.f / 720;
  p = p * r + 1.f / 120; p = p * r + 1.f / 24; p = p * r + 1.f / 6; p = p * r + 0.5f; p = p * r + 1.f; p = p * r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float two; std::memcpy(&two, &bits, 4);
  return p * two;
}

// Masked scores of a row to the weights of its softmax times their sum, which is returned.
inline float weigh(float* p, int64_t keys) {
  float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
  for (int64_t s = 0; s < keys; ++s) top = p[s] > top ? p[s] : top;
  if (top == -INFINITY) top = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t s = 0; s < keys; ++s) {
    const float e = p[s] == -INFINITY ? 0.f : exp_negative(p[s] - top);
    p[s] = e;
    sum += e;
  }
  return sum;
}
// What a weighted sum of values is multiplied by: nothing was seen where the sum is 0, and NaN stays.
inline float share_of(float sum) { return sum > 0 ? 1.f / sum : (sum == 0 ? 0.f : sum); }

template <Type T> inline void widen(const void* base, int64_t at, int64_t d, float* out) {
  if constexpr (T == Type::f32) std::memcpy(out, static_cast<const float*>(base) + at, static_cast<size_t>(d) * 4);
  else
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] = effllm::load_as_float(base, at + i, T);
}

struct View {
  const void* data;
  int64_t s0, s1, s2;
  int64_t at(int64_t b, int64_t h, int64_t i) const { return b * s0 + h * s1 + i * s2; }
};
inline View view_of(const torch::stable::Tensor& t) {
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
  // Key s of the rows (head, query) of one key head into scores[row * keys + s]; false where no row attends to it.
  bool load(int64_t b, int64_t h0, int64_t repeat, int64_t queries, int64_t s, int64_t keys, float* scores) const {
    bool any = false;
    for (int64_t r = 0; r < repeat * queries; ++r) {
      const float m = (*this)(b, h0 + r / queries, r % queries, s);
      scores[r * keys + s] = m;
      any |= m > -INFINITY;
    }
    return any;
  }
};

inline Mask mask_of(const std::optional<torch::stable::Tensor>& mask, int64_t batch, int64_t heads, int64_t queries, int64_t keys) {
  Mask m;
  if (!mask) return m;
  STD_TORCH_CHECK(mask->dim() == 4 && mask->size(3) == keys, "effllm: the mask must be (batch, heads, queries, keys)");
  m.data = mask->const_data_ptr();
  m.boolean = mask->scalar_type() == torch::headeronly::ScalarType::Bool;
  if (!m.boolean) m.type = type_of(mask->scalar_type());
  auto step = [&](int64_t dim, int64_t want) { STD_TORCH_CHECK(mask->size(dim) == 1 || mask->size(dim) == want, "effllm: the mask does not broadcast"); return mask->size(dim) == 1 ? 0 : mask->stride(dim); };
  m.s0 = step(0, batch), m.s1 = step(1, heads), m.s2 = step(2, queries), m.s3 = mask->stride(3);
  return m;
}

namespace attention {

using effllm::Mask;
using effllm::mask_of;
using effllm::type_of;
using effllm::View;
using effllm::view_of;
using effllm::widen;
using torch::stable::Tensor;

// The dtype of q, k and v, whose shapes must fit.
inline Type check(const Tensor& q, const Tensor& k, const Tensor& v) {
  const int64_t kv = k.size(1);
  STD_TORCH_CHECK(kv > 0 && q.size(1) % kv == 0 && k.size(3) == q.size(3) && v.size(3) == q.size(3) && v.size(2) == k.size(2) && v.size(1) == kv && k.size(0) == q.size(0) && v.size(0) == q.size(0), "effllm: attention shapes do not fit");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "effllm: q, k and v differ in dtype");
  return type_of(q.scalar_type());
}

// About 8 multiply-adds a nanosecond, and 3 us to wake a thread.
inline int64_t grain_of(int64_t work) { return std::max<int64_t>(1, 24000 / std::max<int64_t>(1, work)); }

}  // namespace attention
}  // namespace effllm
