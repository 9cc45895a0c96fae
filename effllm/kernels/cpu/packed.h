// What bipolar.cpp offers to ops of weights that are composed of bipolar matrices: the kernels are instantiated there, once.
#pragma once
#include "bipolar.h"
#include "operands.h"

namespace effllm {

inline Weight weight_of(const torch::stable::Tensor& codes, const torch::stable::Tensor& scale, const void* minimum, int64_t n, int64_t bits, int64_t group) {
  STD_TORCH_CHECK(codes.dim() == 3 && codes.size(2) == 64 * bits && codes.is_contiguous(), "effllm: codes must be (tiles, blocks, 64 * bits), contiguous");
  STD_TORCH_CHECK(scale.dim() == 3 && scale.size(0) == codes.size(0) && scale.size(2) == 16 && scale.is_contiguous(), "effllm: scale must be (tiles, groups, 16), contiguous");
  STD_TORCH_CHECK(n > (codes.size(0) - 1) * 16 && n <= codes.size(0) * 16, "effllm: the number of rows does not fit the tiles");
  STD_TORCH_CHECK(group == 0 || codes.size(1) * 32 <= scale.size(1) * group, "effllm: too few groups for the columns");
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), scale.const_data_ptr(), minimum, scale.scalar_type() == torch::headeronly::ScalarType::Half,
          n, codes.size(0), codes.size(1), scale.size(1), group, n, 0};
}
inline void check_columns(const Weight& w, int64_t k) {
  STD_TORCH_CHECK(k <= w.blocks * 32 && k > (w.blocks - (w.group > 32 ? w.group / 32 : 1)) * 32 - 32, "effllm: the activation's last dimension does not fit the weight");
}

// Digits of m tokens: of int8 codes, or of floats, for weights like w.
template <class V> void take_codes(Activations& a, const int8_t* x, int64_t m, int64_t k, const Weight& w, double zero, int64_t bits, const Plan& how);
template <class V> void take_floats(Activations& a, const void* x, int64_t m, int64_t k, const Weight& w, double zero, int64_t bits, Type type);

// Tiles from .. to of w times prepared activations, to y[m * w.ldy + w.col + row]; out_scale are the scales of int8 activations, one a token.
template <class V> void multiply_range(const Weight& w, int64_t bits, const Activations& x, int64_t from, int64_t to, const float* out_scale, const float* bias, void* y, Type type, const Plan& how);

// A whole linear: x (..., k) times one packed weight.
template <class V>
torch::stable::Tensor multiply_one(const torch::stable::Tensor& x, const torch::stable::Tensor& codes, const torch::stable::Tensor& scale, const void* minimum,
                                   const std::optional<torch::stable::Tensor>& bias, int64_t n, int64_t bits, int64_t group, double zero, const Plan& how);

}  // namespace effllm
