// Ends of a step program: rows of embeddings by token ids, and the token whose logit is largest.
#pragma once
#include "step_ops.h"

namespace effllm::step {

// Rows of a table by their numbers: to (.., k), ids, table (n, k). False where a number is out of range.
inline bool id_of(const Operand& ids, int64_t r, int64_t n, int64_t& id) {  // `to` has one dimension more: its rows are the ids' elements
  id = ids.integer(ids.row(r / ids.inner()) + r % ids.inner() * ids.step());
  return id >= 0 && id < n;
}
inline bool rows(const Operand& to, const Operand& ids, const Operand& table) {
  const int64_t size = size_of(to.kind), k = to.inner();
  for (int64_t r = 0, id; r < to.rows(); ++r) {
    if (!id_of(ids, r, table.size[kDims - 2], id)) return false;
    std::memcpy(to.at(to.row(r)), table.at(id * table.stride[kDims - 2]), static_cast<size_t>(k * size));
  }
  return true;
}

// The same of a packed table: to, ids, codes, scale, minimum or none. a = n, bits, group, index of zero, whether scales are fp16, blocks, groups.
// Parts and fields of a code lie as runtime/layouts/tile16.py says.
inline bool packed_rows(const Operand* v, const int64_t* a, const float* constants) {
  const Operand &to = v[0], &ids = v[1], &low = v[4];
  const int64_t k = to.inner(), bits = a[1], group = a[2], blocks = a[5], groups = a[6];
  const float zero = constants[a[3]];
  const Type half = a[4] ? Type::f16 : Type::f32;
  float* line = room(lines().a, blocks * 32);
  for (int64_t r = 0, id; r < to.rows(); ++r) {
    if (!id_of(ids, r, a[0], id)) return false;
    const int64_t tile = id / 16, lane = id % 16;
    const auto* codes = reinterpret_cast<const uint8_t*>(v[2].data) + tile * blocks * 64 * bits;
    for (int64_t b = 0; b < blocks; ++b, codes += 64 * bits) {
      uint8_t u[32] = {0};
      const uint8_t* unit = codes + 4 * lane;
      for (int64_t left = bits, p; left > 0; left -= p) {
        for (p = 8; p > left; p /= 2) {}
        for (int64_t q = 0; q < p; ++q, unit += 64)
          for (int64_t f = 0; f < 8 / p; ++f)
            for (int64_t i = 0; i < 4; ++i) {
              uint8_t& code = u[q * 32 / p + 4 * f + i];
              code = static_cast<uint8_t>(code << p | (unit[i] >> f * p & ((1 << p) - 1)));
            }
      }
      for (int64_t i = 0; i < 32; ++i) line[b * 32 + i] = static_cast<float>(u[i]);
    }
    for (int64_t i = 0; i < k; ++i) {
      const int64_t at = (tile * groups + (groups == 1 ? 0 : i / group)) * 16 + lane;
      const float scale = 2.f * load_as_float(v[3].data, at, half);
      line[i] = low.data ? line[i] * scale + load_as_float(low.data, at, half) : (line[i] - zero) * scale;
    }
    narrowed(to, to.row(r), k, line);
  }
  return true;
}

// Where row `task` of x is largest: the first of equals, or the first that is no number, as torch has it.
inline void largest(const Operand& to, const Operand& x, int64_t task) {
  constexpr int64_t kBlock = 1024;
  const int64_t n = x.inner(), row = x.row(task);
  float* line = room(lines().a, kBlock);
  float best = -INFINITY;
  int64_t block = 0;
  bool nan = false;
  for (int64_t from = 0; from < n && !nan; from += kBlock) {
    const int64_t count = std::min(kBlock, n - from);
    const float* f = widened(x, row + from * x.step(), count, line);
    float top = -INFINITY;
    int wrong = 0;
#pragma omp simd reduction(max : top) reduction(| : wrong)
    for (int64_t i = 0; i < count; ++i) top = f[i] > top ? f[i] : top, wrong |= f[i] != f[i];
    if (wrong || top > best) best = top, block = from, nan = wrong != 0;
  }
  const int64_t count = std::min(kBlock, n - block);
  const float* f = widened(x, row + block * x.step(), count, line);
  int64_t i = 0;
  while (i + 1 < count && (nan ? f[i] == f[i] : f[i] != best)) ++i;
  reinterpret_cast<int64_t*>(to.data)[to.row(task / to.inner()) + task % to.inner() * to.step()] = block + i;
}

}  // namespace effllm::step
