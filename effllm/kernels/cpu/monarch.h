// What the two kinds of Monarch kernels share: sizes, tasks of rows, and the last step of an output.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <vector>

#include "gemv.h"
#include "phases.h"

namespace effllm::monarch {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using V = effllm::EFFLLM_ISA;

constexpr int64_t kTaskBytes = 64 << 10;  // of weights: some 3 us

inline Type type_of(ScalarType t) {
  STD_TORCH_CHECK(t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half, "effllm: Monarch linears take float32, bfloat16 or float16");
  return t == ScalarType::Float ? Type::f32 : t == ScalarType::BFloat16 ? Type::bf16 : Type::f16;
}

struct Sizes {
  int64_t m, k, n, in, out, rank, p, s;  // p columns and s rows of a block
  bool strided;
  int64_t inner() const { return in * rank; }  // columns of w2
  int64_t width(int64_t i) const { return std::min(p, std::max<int64_t>(0, k - i * p)); }  // columns of block i that x has
  int64_t column(int64_t o, int64_t j) const { return strided ? j * out + o : o * s + j; }
};

inline Sizes sizes_of(const Tensor& x, int64_t n, int64_t in, int64_t out, int64_t rank) {
  STD_TORCH_CHECK(in > 0 && out > 0 && rank > 0 && x.dim() > 0, "effllm: a Monarch weight needs at least one block and rank one");
  const int64_t k = x.size(x.dim() - 1);
  return {k ? x.numel() / k : 0, k, n, in, out, rank, (k + in - 1) / in, (n + out - 1) / out, false};
}

inline Tensor result(const Tensor& x, int64_t n) {
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) shape[static_cast<size_t>(i)] = x.size(i);
  shape.back() = n;
  return torch::stable::new_empty(x, shape);
}

inline std::vector<float> floats(const std::optional<Tensor>& bias, int64_t n) {
  std::vector<float> b;
  if (!bias) return b;
  STD_TORCH_CHECK(bias->numel() == n, "effllm: the bias does not fit the output");
  const Tensor t = torch::stable::contiguous(*bias);
  const Type bt = type_of(t.scalar_type());
  b.resize(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) b[static_cast<size_t>(i)] = load_as_float(t.const_data_ptr(), i, bt);
  return b;
}

struct Chunks {  // rows of equal blocks, cut into tasks
  int64_t rows, step, each;  // rows of a block, of a task, tasks of a block
  Chunks(int64_t rows_, double row_bytes, int64_t least) : rows(rows_) {
    step = std::max<int64_t>(least, static_cast<int64_t>(static_cast<double>(kTaskBytes) / std::max(1.0, row_bytes)) / least * least);
    each = (rows + step - 1) / step;
  }
  int64_t from(int64_t task) const { return task % each * step; }
  int64_t to(int64_t task) const { return std::min(rows, from(task) + step); }
};

// One core reads some 20 bytes a nanosecond; a thread is worth waking for 3 us.
inline int64_t threads_for(int64_t asked, double nbytes, int64_t m) {
  const auto most = static_cast<int64_t>(torch::stable::get_num_threads());
  if (asked > 0) return std::min(asked, most);
  return std::clamp<int64_t>(static_cast<int64_t>(nbytes * static_cast<double>(std::max<int64_t>(1, m / 2)) / 20.0 / 3000.0), 1, most);
}

struct Buffer {  // of one calling thread, kept between calls
  std::vector<float> data;
  float* take(int64_t count) {
    if (static_cast<int64_t>(data.size()) < count + 16) data.resize(static_cast<size_t>(count + 16));
    return data.data() + (64 - reinterpret_cast<uintptr_t>(data.data()) % 64) % 64 / 4;
  }
};

// y rows: out[m][j] for rows from .. to of class o.
inline void finish(const Sizes& z, int64_t o, int64_t from, int64_t to, const float* out, int64_t ldo, const float* bias, void* y, Type type) {
  for (int64_t i = 0; i < z.m; ++i)
    for (int64_t j = from; j < to; ++j) {
      const int64_t c = z.column(o, j);
      if (c < z.n) store_from_float(y, i * z.n + c, type, out[i * ldo + j - from] + (bias ? bias[c] : 0.f));
    }
}

}  // namespace effllm::monarch
