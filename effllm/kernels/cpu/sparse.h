// An unstructured sparse matrix in CSR beside a structured one: y += S x, fused into its last stage.
//
// Layout    values (nnz) bf16, fp16 or fp32; columns (nnz) uint16 or int32; rows int32 (N + 1): row n holds entries rows[n] .. rows[n + 1].
// Bytes     nnz * (value + column) + 4 N. x as fp32 stays in cache.
// Many rows x is transposed in chunks of 64 tokens, so that an entry is one multiply-add of contiguous vectors.
#pragma once
#include "gemv.h"
#include "operands.h"

namespace effllm {

struct Sparse {
  const void* values = nullptr;
  const void* columns = nullptr;
  const int32_t* rows = nullptr;
  Type type = Type::f32;
  bool wide = false;  // columns are int32
  int64_t n = 0, nonzeros = 0;

  int64_t bytes() const { return nonzeros * (size_of(type) + (wide ? 4 : 2)); }

  template <Type T, class C> static float dot(const void* values, const C* columns, int64_t from, int64_t to, const float* x) {
    float s[4] = {0, 0, 0, 0};
    int64_t j = from;
    for (; j + 4 <= to; j += 4)
      for (int i = 0; i < 4; ++i) s[i] += load_as_float(values, j + i, T) * x[columns[j + i]];
    for (; j < to; ++j) s[0] += load_as_float(values, j, T) * x[columns[j]];
    return (s[0] + s[1]) + (s[2] + s[3]);
  }
  template <Type T> float row(int64_t n_, const float* x) const {
    return wide ? dot<T>(values, static_cast<const int32_t*>(columns), rows[n_], rows[n_ + 1], x) : dot<T>(values, static_cast<const uint16_t*>(columns), rows[n_], rows[n_ + 1], x);
  }
  // out[n - from] += row n times x, x in plain order.
  void add(int64_t from, int64_t to, const float* x, float* out) const {
    for (int64_t i = from; i < to; ++i) out[i - from] += type == Type::bf16 ? row<Type::bf16>(i, x) : type == Type::f16 ? row<Type::f16>(i, x) : row<Type::f32>(i, x);
  }

  int64_t column(int64_t j) const { return wide ? static_cast<const int32_t*>(columns)[j] : static_cast<const uint16_t*>(columns)[j]; }

  // y (m, n) += x (m, k) S^T, both of type t.
  template <class V> void add_many(const void* x, void* y, int64_t m, int64_t k, Type t) const {
    constexpr int64_t chunk = 64, block = 16;
    std::vector<float> turned(static_cast<size_t>(k * chunk));
    for (int64_t m0 = 0; m0 < m; m0 += chunk) {
      const int64_t count = std::min(chunk, m - m0);
      torch::stable::parallel_for(0, k, 256, [&](int64_t a, int64_t b) {
        for (int64_t c = a; c < b; ++c)
          for (int64_t i = 0; i < chunk; ++i) turned[static_cast<size_t>(c * chunk + i)] = i < count ? load_as_float(x, (m0 + i) * k + c, t) : 0.f;
      });
      torch::stable::parallel_for(0, (n + block - 1) / block, 4, [&](int64_t a, int64_t b) {
        float sums[block][chunk];
        for (int64_t p = a; p < b; ++p) {
          const int64_t n0 = p * block, n1 = std::min(n, n0 + block);
          for (int64_t r = n0; r < n1; ++r) {
            typename V::F acc[chunk / 16];
            for (auto& f : acc) f = V::zero_f();
            for (int64_t j = rows[r]; j < rows[r + 1]; ++j) {
              const float value = load_as_float(values, j, type);
              const float* from = turned.data() + column(j) * chunk;
              for (int i = 0; i < chunk / 16; ++i) acc[i] = V::fma1(V::load_f(from + 16 * i), value, acc[i]);
            }
            for (int i = 0; i < chunk / 16; ++i) V::store_f(sums[r - n0] + 16 * i, acc[i]);
          }
          for (int64_t i = 0; i < count; ++i)
            for (int64_t r = n0; r < n1; ++r) {
              const int64_t at = (m0 + i) * n + r;
              store_from_float(y, at, t, load_as_float(y, at, t) + sums[r - n0][i]);
            }
        }
      });
    }
  }
};

// Checks a CSR matrix of n rows; columns are the caller's word, as indices of a gather are.
inline Sparse sparse_of(const torch::stable::Tensor& values, const torch::stable::Tensor& columns, const torch::stable::Tensor& rows, int64_t n) {
  using torch::headeronly::ScalarType;
  const auto index = columns.scalar_type();
  STD_TORCH_CHECK(index == ScalarType::UInt16 || index == ScalarType::Int, "effllm: sparse columns must be uint16 or int32");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Int && rows.numel() == n + 1, "effllm: sparse rows must be int32, one more than the outputs");
  STD_TORCH_CHECK(values.numel() == columns.numel(), "effllm: as many sparse values as columns");
  Sparse s{values.const_data_ptr(), columns.const_data_ptr(), static_cast<const int32_t*>(rows.const_data_ptr()), type_of(values.scalar_type()), index == ScalarType::Int, n, values.numel()};
  STD_TORCH_CHECK(s.rows[0] == 0 && s.rows[n] == s.nonzeros, "effllm: sparse rows must run from 0 to the number of values");
  return s;
}

}  // namespace effllm
