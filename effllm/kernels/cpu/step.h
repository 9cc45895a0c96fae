// Operands and instructions of step programs (step.cpp): strided views of buffers, read off a list of integers.
//
// Operand   slot, offset, kind, sizes[5], strides[5]: elements, leading dimensions of size 1 where there are fewer. Offsets count from the
//           first element of the slot's tensor.
// Kinds     f32, bf16, f16 as in Type; then int64, bool, int8.
// Ranges    a view of no slot whose elements are its offset and what follows: positions that are compared and not worth storing.
// Sharing   an instruction is cut into tasks by what it writes; a task computes what it reads in common with others by itself.
#pragma once
#include "activation.h"

namespace effllm::step {

constexpr int kDims = 5;
enum class Kind : int64_t { f32, bf16, f16, i64, b8, i8 };
inline int64_t size_of(Kind k) { return k == Kind::i64 ? 8 : k == Kind::f32 ? 4 : k == Kind::b8 || k == Kind::i8 ? 1 : 2; }

constexpr int64_t kNoRange = INT64_MIN;

struct Operand {
  char* data = nullptr;
  Kind kind = Kind::f32;
  int64_t begin = kNoRange;  // else the view is a range of integers that is stored nowhere: element i of it is begin + i
  int64_t size[kDims], stride[kDims];
  int64_t inner() const { return size[kDims - 1]; }
  int64_t step() const { return stride[kDims - 1]; }
  int64_t rows() const { return size[0] * size[1] * size[2] * size[3]; }
  Type type() const { return static_cast<Type>(kind); }
  bool floating() const { return kind <= Kind::f16; }
  // The first element of a row, in the order of the leading dimensions.
  int64_t row(int64_t i) const {
    int64_t at = 0;
    for (int d = kDims - 2; d >= 0; --d) at += i % size[d] * stride[d], i /= size[d];
    return at;
  }
  char* at(int64_t element) const { return data + element * size_of(kind); }
  int64_t integer(int64_t element) const {  // of an i64 or bool operand
    return begin != kNoRange ? begin + element : kind == Kind::i64 ? reinterpret_cast<const int64_t*>(data)[element] : static_cast<int64_t>(data[element] != 0);
  }
};

// n things cut for `of` takers: where taker i begins.
inline int64_t cut(int64_t n, int64_t i, int64_t of) { return n * i / of; }

// A row of floats, widened; `line` is room for it unless it lies there already.
inline const float* widened(const Operand& v, int64_t from, int64_t count, float* line) {
  const int64_t step = v.step();
  if (v.kind == Kind::f32) {
    if (step == 1) return reinterpret_cast<const float*>(v.data) + from;
    for (int64_t i = 0; i < count; ++i) line[i] = reinterpret_cast<const float*>(v.data)[from + i * step];
    return line;
  }
  const auto* h = reinterpret_cast<const uint16_t*>(v.data) + from;
  if (v.kind == Kind::bf16 && step == 1) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) line[i] = bf16_to_float(h[i]);
    return line;
  }
  for (int64_t i = 0; i < count; ++i) line[i] = load_as_float(h, i * step, v.type());
  return line;
}

// Floats to a run of memory.
inline void narrowed(const Operand& v, int64_t to, int64_t count, const float* line) {
  if (v.kind == Kind::f32) { std::memcpy(v.data + to * 4, line, static_cast<size_t>(count) * 4); return; }
  auto* h = reinterpret_cast<uint16_t*>(v.data) + to;
  if (v.kind == Kind::bf16) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) h[i] = float_to_bf16(line[i]);
    return;
  }
  for (int64_t i = 0; i < count; ++i) store_from_float(v.data, to + i, v.type(), line[i]);
}

}  // namespace effllm::step
