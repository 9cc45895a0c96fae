// What the ops of every kernel family do with their tensors: types, the output, and PyTorch's own linear for many rows.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "activation.h"

namespace effllm {

inline Type type_of(torch::headeronly::ScalarType t) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half, "effllm: values must be float32, bfloat16 or float16");
  return t == ScalarType::Float ? Type::f32 : t == ScalarType::BFloat16 ? Type::bf16 : Type::f16;
}

// x's shape with n for the last dimension.
inline torch::stable::Tensor result(const torch::stable::Tensor& x, int64_t n, torch::headeronly::ScalarType dtype) {
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) shape[static_cast<size_t>(i)] = x.size(i);
  shape.back() = n;
  return torch::stable::new_empty(x, shape, dtype);
}

inline std::vector<float> floats_of(const std::optional<torch::stable::Tensor>& t, int64_t expected) {
  std::vector<float> f;
  if (!t) return f;
  STD_TORCH_CHECK(t->numel() == expected, "effllm: the bias does not fit the outputs");
  const torch::stable::Tensor c = torch::stable::contiguous(*t);
  const Type type = type_of(c.scalar_type());
  f.resize(static_cast<size_t>(expected));
  const void* from = c.const_data_ptr();  // a call through the ABI, not one an element
  for (int64_t i = 0; i < expected; ++i) f[static_cast<size_t>(i)] = load_as_float(from, i, type);
  return f;
}

// torch.nn.functional.linear: x w^T + bias.
inline torch::stable::Tensor dense_linear(const torch::stable::Tensor& x, const torch::stable::Tensor& w, const std::optional<torch::stable::Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(w), torch::stable::detail::from(bias)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<torch::stable::Tensor>(stack[0]);
}

}  // namespace effllm
