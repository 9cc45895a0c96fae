// Ops of this library by name, so that a step program can call those that it has no instruction for (step.cpp): no dispatcher, and an error keeps
// its text.
//
// Call    arguments of an instruction: results, length of the name, its letters, arguments, then each one: a kind and what belongs to it.
//         none | tensor: view, dtype, dimensions | maybe (an optional tensor that is there) | tensors: count, three for each | integer | real: the bits
//         of a double | truth | text: length, letters | integers: count, each | dtype
// Tensors are made of views when they are first needed, and again where a view has moved.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <bit>
#include <optional>
#include <string>
#include <vector>

#include "offer.h"
#include "step_ops.h"

namespace effllm::step {

using torch::stable::Tensor;

enum class Given : int64_t { none, tensor, maybe, tensors, integer, real, truth, text, integers, dtype };

inline std::string text_of(const int64_t*& at) {
  const int64_t length = *at++;
  std::string text(static_cast<size_t>(length), ' ');
  for (int64_t i = 0; i < length; ++i) text[static_cast<size_t>(i)] = static_cast<char>(*at++);
  return text;
}

// A view as a tensor: [view, dtype, dimensions].
inline Tensor tensor_of(const Operand* v, const int64_t* at) {
  const Operand& x = v[at[0]];
  const size_t dims = static_cast<size_t>(at[2]), skip = kDims - dims;
  return torch::stable::from_blob(x.data, {x.size + skip, dims}, {x.stride + skip, dims}, torch::stable::Device(torch::headeronly::DeviceType::CPU),
                                  static_cast<torch::headeronly::ScalarType>(at[1]));
}

// One op with its arguments. The views come with each call; those that have not moved keep their tensors.
class Call {
  EFFLLM_NAMESPACE::Boxed op_ = nullptr;
  std::string name_;
  const int64_t* args_ = nullptr;
  int64_t results_ = 0, count_ = 0;
  std::vector<std::optional<Tensor>> made_;  // by view

  const Tensor& tensor(const Operand* v, const int64_t* at) {
    auto& known = made_[static_cast<size_t>(at[0])];
    if (!known || known->const_data_ptr() != v[at[0]].data) known = tensor_of(v, at);
    return *known;
  }
  // Reads one argument.
  StableIValue given(const Operand* v, const int64_t*& at) {
    using torch::stable::detail::from;
    const auto kind = static_cast<Given>(*at++);
    const int64_t* here = at;
    switch (kind) {
      case Given::none: return from(std::nullopt);
      case Given::tensor: at += 3; return from(tensor(v, here));
      case Given::maybe: at += 3; return from(std::optional<Tensor>(tensor(v, here)));
      case Given::tensors: {
        std::vector<Tensor> all;
        at += 1 + 3 * *here;
        for (int64_t i = 0; i < *here; ++i) all.push_back(tensor(v, here + 1 + 3 * i));
        return from(all);
      }
      case Given::integer: return from(*at++);
      case Given::real: return from(std::bit_cast<double>(*at++));
      case Given::truth: return from(*at++ != 0);
      case Given::text: return from(text_of(at));
      case Given::integers: {
        at += 1 + *here;
        return from(std::vector<int64_t>(here + 1, here + 1 + *here));
      }
      case Given::dtype: return from(static_cast<torch::headeronly::ScalarType>(*at++));
    }
    STD_TORCH_CHECK(false, "effllm: a call with an argument of unknown kind");
  }

 public:
  Call(const int64_t* a, int64_t views) : made_(static_cast<size_t>(views)) {
    results_ = *a++;
    name_ = text_of(a);
    op_ = EFFLLM_NAMESPACE::find(name_);
    STD_TORCH_CHECK(op_, "effllm: a step program calls ", name_, ", which is not there");
    count_ = *a++, args_ = a;
  }
  // The results go to the first views.
  void operator()(const Operand* v) {
    std::vector<StableIValue> stack(static_cast<size_t>(std::max(count_, results_)));
    const int64_t* at = args_;
    for (int64_t i = 0; i < count_; ++i) stack[static_cast<size_t>(i)] = given(v, at);
    op_(stack.data(), static_cast<uint64_t>(count_), static_cast<uint64_t>(results_));
    for (int64_t i = 0; i < results_; ++i) {
      const Tensor result = torch::stable::detail::to<Tensor>(stack[static_cast<size_t>(i)]);
      Operand from = v[i];
      STD_TORCH_CHECK(result.numel() == from.rows() * from.inner(), "effllm: ", name_, " gave another shape than it was compiled for");
      from.data = static_cast<char*>(result.mutable_data_ptr());
      const int64_t dims = result.dim();
      for (int64_t d = 0; d < dims; ++d) from.stride[kDims - dims + d] = result.size(d) == 1 ? 1 : result.stride(d);
      copy(v[i], from, 0, 1);
    }
  }
};

}  // namespace effllm::step
