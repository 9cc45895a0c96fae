// Rotations of rotary channels by rows of a table, and queries that are turned back for the keys they meet: q . R(a) k = R(-a) q . k.
//
// Layout   cos, sin float32 (A, P), rounded from fp64 angles; row int32 or int64, one per token. R turns the first 2 * P channels by pairs:
//          (c, c + P) for "half", (2c, 2c + 1) for "interleaved"; the others pass.
#pragma once
#include <optional>
#include <vector>

#include "attention.h"

namespace effllm {

struct Rows {  // table rows of tokens
  const void* data = nullptr;
  bool wide = false;
  int64_t step = 0;
  int64_t operator[](int64_t i) const { return wide ? static_cast<const int64_t*>(data)[i * step] : static_cast<const int32_t*>(data)[i * step]; }
};
inline Rows rows_of(const torch::stable::Tensor& t) {
  const auto type = t.scalar_type();
  STD_TORCH_CHECK(t.dim() == 1 && (type == torch::headeronly::ScalarType::Int || type == torch::headeronly::ScalarType::Long), "effllm: row must be a vector of int32 or int64");
  return {t.const_data_ptr(), type == torch::headeronly::ScalarType::Long, t.stride(0)};
}

struct Turns {
  const float *cos = nullptr, *sin = nullptr;
  int64_t count = 0, pairs = 0;
  bool half = false;
  // out = R(+-row) x, fp32; the two may not overlap
  void turn(const float* x, int64_t row, float sign, int64_t d, float* out) const {
    const float *c = cos + row * pairs, *s = sin + row * pairs;
    if (half) {
#pragma omp simd
      for (int64_t i = 0; i < pairs; ++i) {
        out[i] = x[i] * c[i] - x[i + pairs] * (sign * s[i]);
        out[i + pairs] = x[i + pairs] * c[i] + x[i] * (sign * s[i]);
      }
    } else {
      for (int64_t i = 0; i < pairs; ++i) {
        out[2 * i] = x[2 * i] * c[i] - x[2 * i + 1] * (sign * s[i]);
        out[2 * i + 1] = x[2 * i + 1] * c[i] + x[2 * i] * (sign * s[i]);
      }
    }
    for (int64_t i = 2 * pairs; i < d; ++i) out[i] = x[i];
  }
};
inline Turns turns_of(const torch::stable::Tensor& cos, const torch::stable::Tensor& sin, bool half, int64_t d) {
  STD_TORCH_CHECK(cos.dim() == 2 && cos.scalar_type() == torch::headeronly::ScalarType::Float && sin.scalar_type() == torch::headeronly::ScalarType::Float, "effllm: cos and sin must be float32 tables");
  STD_TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && sin.dim() == 2 && sin.size(0) == cos.size(0) && sin.size(1) == cos.size(1), "effllm: cos and sin must be contiguous and of one shape");
  STD_TORCH_CHECK(2 * cos.size(1) <= d, "effllm: the tables turn more channels than there are");
  return {static_cast<const float*>(cos.const_data_ptr()), static_cast<const float*>(sin.const_data_ptr()), cos.size(0), cos.size(1), half};
}
inline void check_rows(const Rows& rows, int64_t n, const Turns& turns) {
  for (int64_t i = 0; i < n; ++i) STD_TORCH_CHECK(rows[i] >= 0 && rows[i] < turns.count, "effllm: row leaves the table");
}

// What turns the keys of a cache, if anything does.
struct Shift {
  bool on = false;
  Rows row;
  Turns turns;
};
inline Shift shift_of(const std::optional<torch::stable::Tensor>& row, const std::optional<torch::stable::Tensor>& cos, const std::optional<torch::stable::Tensor>& sin, bool half, int64_t d, int64_t keys) {
  if (!row) return {};
  STD_TORCH_CHECK(cos && sin && row->size(0) == keys, "effllm: there must be a table, and a row for each key");
  Shift s{true, rows_of(*row), turns_of(*cos, *sin, half, d)};
  check_rows(s.row, keys, s.turns);
  return s;
}

// Queries (rows, d), fp32, turned back for a table row when it is first asked for. Without a shift they are themselves.
class Turned {
  const Shift& shift_;
  const float* q_;
  int64_t rows_, d_;
  std::vector<std::vector<float>> made_;

 public:
  Turned(const Shift& shift, const float* q, int64_t rows, int64_t d) : shift_(shift), q_(q), rows_(rows), d_(d), made_(static_cast<size_t>(shift.turns.count)) {}
  const float* at(int64_t a) {
    auto& back = made_[static_cast<size_t>(a)];
    if (back.empty()) {
      back.resize(static_cast<size_t>(rows_ * d_));
      for (int64_t r = 0; r < rows_; ++r) shift_.turns.turn(q_ + r * d_, a, -1.f, d_, back.data() + r * d_);
    }
    return back.data();
  }
  const float* of(int64_t token) { return shift_.on ? at(shift_.row[token]) : q_; }
};

// Scores of n tokens from `from`, whose turns may differ: score(a, to) writes (rows, stride) for the queries of table row a; the tokens of
// that row are taken from it. One turn, which is the rule inside a page, costs one call.
template <class Score> void score_turns(const Rows& row, int64_t from, int64_t n, int64_t rows, int64_t stride, float* s, std::vector<float>& spare, Score&& score) {
  const int64_t first = row[from];
  int64_t same = 1;
  while (same < n && row[from + same] == first) ++same;
  score(first, s);
  if (same == n) return;
  spare.resize(static_cast<size_t>(rows * stride));
  std::vector<int64_t> done{first};
  for (int64_t i = same; i < n; ++i) {
    const int64_t a = row[from + i];
    if (std::find(done.begin(), done.end(), a) != done.end()) continue;
    done.push_back(a);
    score(a, spare.data());
    for (int64_t j = i; j < n; ++j)
      if (row[from + j] == a)
        for (int64_t r = 0; r < rows; ++r) s[r * stride + j] = spare[static_cast<size_t>(r * stride + j)];
  }
}

}  // namespace effllm
