// What linears with bipolar-INT weights that skip channels share, by input (skip_codes_input.cpp) and by output (skip_codes_output.cpp).
//
// Maths     W = 2 s (u - zero) or 2 s u + minimum. Per segment of channels (a group, at most 128) activations are integers q with one step, so
//           y_n += s_gn (2 step sum_k q_k u_kn - 2 zero sum_k x_k)        or        s_gn 2 step sum_k q_k u_kn + minimum_gn sum_k x_k
//           with an exact integer sum over the channels that are read. q has two int8 digits, three for fp32 activations.
// Layout    by input: codes (K, U, 64), scale and minimum (G, Np); by output: codes (N, U, 64), scale and minimum (N, G): see
//           runtime/layouts/input_major.py and row_major.py. Codes are 4 or 8 bits wide.
// Numerics  the rounding of activations, 2^-16 of a segment's largest (fp32: 2^-24), is below that of bf16 (fp32) products; deterministic.
// Many rows the weight expanded to x's dtype, then PyTorch's own product.
#pragma once
#include "offer.h"
#include "pairs.h"
#include "skip.h"

namespace effllm::skip {

using V = EFFLLM_ISA;
using F = V::F;
using I = V::I;
using W = V::W;

constexpr int64_t kLongest = 128;  // channels of a segment: what int32 sums of 8-bit codes hold

struct Codes {
  const uint8_t* data;
  const void *scale, *minimum;
  bool half;                             // scales are fp16
  int64_t lines, units, groups, stride;  // rows of codes, 64-byte units of each; rows or columns of scales, their row stride
  int64_t group;                         // 0: one for all
  int width;
  float zero;
  const uint8_t* line(int64_t i) const { return data + i * units * 64; }
  void prefetch_scales(int64_t at, int64_t count) const {  // and minima, into the second-level cache
    const int64_t value = half ? 2 : 4;
    for (const void* p : {scale, minimum})
      for (int64_t b = 0; p && b < count * value; b += 64) __builtin_prefetch(static_cast<const char*>(p) + at * value + b, 0, 2);
  }
};

inline Codes codes_of(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& minimum, int64_t bits, int64_t group, double zero) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "effllm: codes have 1 to 8 bits");
  STD_TORCH_CHECK(group == 0 || group == 16 || group == 32 || group == 64 || group == 128, "effllm: groups are 16, 32, 64, 128, or 0 for whole rows");
  STD_TORCH_CHECK(codes.dim() == 3 && codes.size(2) == 64 && codes.is_contiguous() && codes.scalar_type() == ScalarType::Byte, "effllm: codes must be (channels, units, 64) bytes, contiguous");
  const auto dtype = scale.scalar_type();
  STD_TORCH_CHECK(scale.dim() == 2 && scale.is_contiguous() && (dtype == ScalarType::Half || dtype == ScalarType::Float), "effllm: scales must be a contiguous matrix of float16 or float32");
  if (minimum) STD_TORCH_CHECK(minimum->is_contiguous() && minimum->scalar_type() == dtype && minimum->size(0) == scale.size(0) && minimum->size(1) == scale.size(1), "effllm: minima must be like scales");
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), scale.const_data_ptr(), minimum ? minimum->const_data_ptr() : nullptr, dtype == ScalarType::Half,
          codes.size(0), codes.size(1), scale.size(0), scale.size(1), group, bits <= 4 ? 4 : 8, static_cast<float>(zero)};
}

inline F load_scale(const void* p, int64_t at, bool half) { return half ? V::load_h(static_cast<const uint16_t*>(p) + at) : V::load_f(static_cast<const float*>(p) + at); }
inline float one_scale(const void* p, int64_t at, bool half) { return effllm::load_as_float(p, at, half ? Type::f16 : Type::f32); }

// A vector is one row's two leading digits, or of fp32 activations also its last one alone: what one pass multiplies.
inline int digits_of(Type t) { return t == Type::f32 ? 3 : 2; }
inline int64_t vectors_of(Type t) { return t == Type::f32 ? 2 : 1; }  // of a row
// What multiplies the integer sum of vector `v` of a row, without the scale.
inline float step_of(float step, int digits, int64_t v) { return 2.f * step * (digits == 3 && v == 0 ? 256.f : 1.f); }

// Sixteen neighbouring codes of a channel (by input: outputs; by output: columns), as floats: which = 0 .. 512 / WIDTH / 16 of a unit.
template <int WIDTH, bool OUTPUT> inline F sixteen(const uint8_t* unit, int which) {
  constexpr int per = 8 / WIDTH;
  const int shift = OUTPUT ? which / 4 * WIDTH : which % per * WIDTH, r = OUTPUT ? which % 4 : which / per;
  alignas(64) float f[16];
  for (int q = 0; q < 4; ++q) {
    uint32_t four;
    std::memcpy(&four, unit + (OUTPUT ? 16 * r + 4 * q : 16 * q + 4 * r), 4);
    for (int i = 0; i < 4; ++i) f[4 * q + i] = static_cast<float>((four >> (8 * i + shift)) & ((1u << WIDTH) - 1));
  }
  return V::load_f(f);
}

// The dense weight in x's dtype: (K, n) of codes by input, (N, k) of codes by output.
template <int WIDTH, bool OUTPUT> void expand(const Codes& w, int64_t columns, void* to, Type type) {
  torch::stable::parallel_for(0, w.lines, 16, [&](int64_t a, int64_t b) {
    alignas(64) float f[16], scale[16], low[16] = {};
    for (int64_t i = a; i < b; ++i)
      for (int64_t c = 0; c < columns; c += 16) {
        // by input the scales of neighbours are neighbours, by output they are one: groups are whole multiples of 16 columns
        const int64_t g = w.group ? (OUTPUT ? c : i) / w.group : 0, at = OUTPUT ? i * w.stride + g : g * w.stride + c;
        if constexpr (OUTPUT) {
          const float s = 2.f * one_scale(w.scale, at, w.half), m = w.minimum ? one_scale(w.minimum, at, w.half) : -s * w.zero;
          for (int j = 0; j < 16; ++j) scale[j] = s, low[j] = m;
        } else {
          const F s = load_scale(w.scale, at, w.half);
          V::store_f(scale, V::axpb(s, 2.f, 0.f));
          V::store_f(low, w.minimum ? load_scale(w.minimum, at, w.half) : V::axpb(s, -2.f * w.zero, 0.f));
        }
        const F u = sixteen<WIDTH, OUTPUT>(w.line(i) + c / (512 / WIDTH) * 64, static_cast<int>(c % (512 / WIDTH) / 16));
        V::store_f(f, V::fma(V::load_f(scale), u, V::load_f(low)));
        const int64_t count = std::min<int64_t>(16, columns - c);
        write(f, nullptr, to, i * columns + c, count, type);
      }
  });
}

inline Tensor expanded(const Tensor& like, const Codes& w, int64_t columns, bool by_output) {
  const Tensor dense = torch::stable::new_empty(like, {w.lines, columns});
  const Type type = effllm::type_of(like.scalar_type());
  void* to = dense.mutable_data_ptr();
  if (w.width == 4) by_output ? expand<4, true>(w, columns, to, type) : expand<4, false>(w, columns, to, type);
  else by_output ? expand<8, true>(w, columns, to, type) : expand<8, false>(w, columns, to, type);
  return dense;
}

inline std::optional<Tensor> bias_as(const std::optional<Tensor>& bias, torch::headeronly::ScalarType dtype) {
  return bias ? std::optional<Tensor>(as(*bias, dtype)) : std::nullopt;
}

}  // namespace effllm::skip
