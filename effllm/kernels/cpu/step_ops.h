// What the instructions of step programs do; each takes its views, its integers, and which of its tasks to do.
#pragma once
#include <cstdlib>

#include "attend.h"
#include "packed.h"
#include "phases.h"
#include "step.h"

namespace effllm::step {

using V = EFFLLM_ISA;

enum class Binary : int64_t { add, sub, mul, div, above, le, lt, ge, gt, eq, ne, both, either };
enum class Unary : int64_t { silu, gelu, gelu_tanh, relu, sigmoid, tanh, neg, cos, sin };

struct Lines {  // room of one thread
  std::vector<float> a, b, c;
  AttendScratch attend;
  std::vector<QueryRow> rows;
  Activations activations;
  std::vector<char> made, codes, scales;  // rows that a product makes for itself
  const float* x_scales = nullptr;
  int64_t call = -1, phase = -1;  // whose activations these are
};
inline Lines& lines() { static thread_local Lines l; return l; }
inline float* room(std::vector<float>& v, int64_t count) {
  if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
  return v.data();
}

// Elements that a task must have to be worth a hand-over.
constexpr int64_t kFew = 2048;
inline int64_t few_tasks(const Operand& v, int64_t threads) { return std::clamp<int64_t>(v.rows() * v.inner() / kFew, 1, threads); }

// The part of rows x columns that a task does: whole rows where there are enough, else columns of all rows.
struct Part {
  int64_t row0, row1, col0, col1;
  Part(const Operand& v, int64_t task, int64_t of) : row0(0), row1(v.rows()), col0(0), col1(v.inner()) {
    if (row1 >= of) row0 = cut(v.rows(), task, of), row1 = cut(v.rows(), task + 1, of);
    else col0 = cut(v.inner(), task, of), col1 = cut(v.inner(), task + 1, of);
  }
};

inline void copy(const Operand& to, const Operand& from, int64_t task, int64_t of) {
  const Part p(to, task, of);
  const int64_t n = p.col1 - p.col0, size = size_of(to.kind);
  float* line = room(lines().a, n);
  for (int64_t r = p.row0; r < p.row1; ++r) {
    const int64_t t = to.row(r) + p.col0 * to.step(), f = from.row(r) + p.col0 * from.step();
    if (from.kind == Kind::i64 && (from.begin != kNoRange || to.kind != from.kind)) {
      for (int64_t i = 0; i < n; ++i) {
        const int64_t x = from.integer(f + i * from.step());
        if (to.kind == Kind::i64) reinterpret_cast<int64_t*>(to.data)[t + i * to.step()] = x;
        else store_from_float(to.data, t + i * to.step(), to.type(), static_cast<float>(x));
      }
    } else if (to.kind != from.kind) {
      const float* x = widened(from, f, n, line);
      if (to.step() == 1) narrowed(to, t, n, x);
      else for (int64_t i = 0; i < n; ++i) store_from_float(to.data, t + i * to.step(), to.type(), x[i]);
    } else if (to.step() == 1 && from.step() == 1) {
      std::memcpy(to.at(t), from.at(f), static_cast<size_t>(n * size));
    } else {
      for (int64_t i = 0; i < n; ++i) std::memcpy(to.at(t + i * to.step()), from.at(f + i * from.step()), static_cast<size_t>(size));
    }
  }
}

template <class T> inline T apply(Binary op, T x, T y) { return op == Binary::add ? x + y : op == Binary::sub ? x - y : op == Binary::mul ? x * y : x / y; }
inline bool holds(Binary op, int64_t x, int64_t y) {
  switch (op) {
    case Binary::le: return x <= y;
    case Binary::lt: return x < y;
    case Binary::ge: return x >= y;
    case Binary::gt: return x > y;
    case Binary::eq: return x == y;
    case Binary::ne: return x != y;
    case Binary::both: return x && y;
    default: return x || y;
  }
}

// Integers and truth values; what is compared may be ranges.
inline void whole_numbers(const Operand& to, const Operand& x, const Operand& y, Binary kind, const Part& p) {
  for (int64_t r = p.row0; r < p.row1; ++r) {
    const int64_t t = to.row(r), a = x.row(r), b = y.row(r);
    if (to.kind == Kind::i64) {
      for (int64_t i = p.col0; i < p.col1; ++i) reinterpret_cast<int64_t*>(to.data)[t + i * to.step()] = apply(kind, x.integer(a + i * x.step()), y.integer(b + i * y.step()));
    } else if (kind == Binary::le && x.begin != kNoRange && x.step() == 1 && y.step() == 0 && to.step() == 1) {  // causal masks
      const int64_t last = y.integer(b), full = std::clamp<int64_t>(last - (x.begin + a) + 1, p.col0, p.col1);
      std::memset(to.data + t + p.col0, 1, static_cast<size_t>(full - p.col0));
      std::memset(to.data + t + full, 0, static_cast<size_t>(p.col1 - full));
    } else {
      for (int64_t i = p.col0; i < p.col1; ++i) to.data[t + i * to.step()] = holds(kind, x.integer(a + i * x.step()), y.integer(b + i * y.step()));
    }
  }
}

inline void binary(const Operand& to, const Operand& x, const Operand& y, int64_t op, int64_t task, int64_t of) {
  const Part p(to, task, of);
  const int64_t n = p.col1 - p.col0;
  const auto kind = static_cast<Binary>(op);
  if (to.kind == Kind::i64 || to.kind == Kind::b8) { whole_numbers(to, x, y, kind, p); return; }
  Lines& l = lines();
  float *ra = room(l.a, n), *rb = room(l.b, n), *rc = room(l.c, n);
  for (int64_t r = p.row0; r < p.row1; ++r) {
    const float* a = widened(x, x.row(r) + p.col0 * x.step(), n, ra);
    const float* b = widened(y, y.row(r) + p.col0 * y.step(), n, rb);
    if (kind == Binary::add)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) rc[i] = a[i] + b[i];
    else if (kind == Binary::mul)
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) rc[i] = a[i] * b[i];
    else if (kind == Binary::above)  // x, or 0 where it is at most a threshold; NaN stays
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) rc[i] = std::fabs(a[i]) <= b[i] ? 0.f : a[i];
    else for (int64_t i = 0; i < n; ++i) rc[i] = apply(kind, a[i], b[i]);
    narrowed(to, to.row(r) + p.col0, n, rc);
  }
}

// x times the logistic function of x, with one vector exponential.
inline void silu_of(const float* x, float* y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float e = exp_negative(-std::fabs(x[i]));  // exp(-|x|)
    y[i] = x[i] * (x[i] >= 0 ? 1.f : e) / (1.f + e);
  }
}

// tanh by exp(-2|x|); near 0 by its series, where the difference would lose its digits.
inline float tanh_of(float x) {
  const float a = std::fabs(x), e = exp_negative(-2 * a);
  const float far = (1.f - e) / (1.f + e), square = a * a;
  const float near = a * (1.f - square * (1.f / 3 - square * (2.f / 15 - square * (17.f / 315))));
  return std::copysign(a < 0.15f ? near : far, x);
}

inline void activate(Unary op, const float* x, float* y, int64_t n) {
  switch (op) {
    case Unary::silu: silu_of(x, y, n); break;
    case Unary::gelu: for (int64_t i = 0; i < n; ++i) y[i] = 0.5f * x[i] * (1.f + std::erf(x[i] * 0.70710678f)); break;
    case Unary::gelu_tanh:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = 0.5f * x[i] * (1.f + tanh_of(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
      break;
    case Unary::relu: for (int64_t i = 0; i < n; ++i) y[i] = x[i] < 0 ? 0.f : x[i]; break;
    case Unary::sigmoid:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) { const float e = exp_negative(-std::fabs(x[i])); y[i] = (x[i] >= 0 ? 1.f : e) / (1.f + e); }
      break;
    case Unary::tanh:
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) y[i] = tanh_of(x[i]);
      break;
    case Unary::neg: for (int64_t i = 0; i < n; ++i) y[i] = -x[i]; break;
    case Unary::cos: for (int64_t i = 0; i < n; ++i) y[i] = std::cos(x[i]); break;
    case Unary::sin: for (int64_t i = 0; i < n; ++i) y[i] = std::sin(x[i]); break;
  }
}

inline void unary(const Operand& to, const Operand& x, int64_t op, int64_t task, int64_t of) {
  const Part p(to, task, of);
  const int64_t n = p.col1 - p.col0;
  float *ra = room(lines().a, n), *rb = room(lines().b, n);
  for (int64_t r = p.row0; r < p.row1; ++r) {
    activate(static_cast<Unary>(op), widened(x, x.row(r) + p.col0 * x.step(), n, ra), rb, n);
    narrowed(to, to.row(r) + p.col0, n, rb);
  }
}

// act(gate) * up.
inline void glu(const Operand& to, const Operand& gate, const Operand& up, int64_t op, int64_t task, int64_t of) {
  const Part p(to, task, of);
  const int64_t n = p.col1 - p.col0;
  Lines& l = lines();
  float *ra = room(l.a, n), *rb = room(l.b, n), *rc = room(l.c, n);
  for (int64_t r = p.row0; r < p.row1; ++r) {
    activate(static_cast<Unary>(op), widened(gate, gate.row(r) + p.col0 * gate.step(), n, ra), rc, n);
    const float* u = widened(up, up.row(r) + p.col0 * up.step(), n, rb);
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) rc[i] *= u[i];
    narrowed(to, to.row(r) + p.col0, n, rc);
  }
}

// RMS norm or layer norm of rows: v = to, sum, x, weight, bias, other; where there is an `other`, x + other is normed, and kept in `sum`.
// a = kind (0 RMS, 1 layer), index of eps, index of what is added to the weight, whether to round before the weight.
inline void norm(const Operand* v, const int64_t* a, const float* constants, int64_t task, int64_t of) {
  const Operand &to = v[0], &sum = v[1], &x = v[2], &weight = v[3], &bias = v[4], &other = v[5];
  const Part p(to, task, of);
  const int64_t n = to.inner(), from = p.col0, count = p.col1 - p.col0;
  const float eps = constants[a[1]], offset = constants[a[2]];
  Lines& l = lines();
  float *ra = room(l.a, n), *rb = room(l.b, n), *rc = room(l.c, n);
  for (int64_t r = p.row0; r < p.row1; ++r) {
    const float* f = widened(x, x.row(r), n, ra);
    if (other.data) {
      const float* g = widened(other, other.row(r), n, rb);
#pragma omp simd
      for (int64_t i = 0; i < n; ++i) rc[i] = f[i] + g[i];
      if (sum.data) narrowed(sum, sum.row(r) + from, count, rc + from);
      if (sum.kind == Kind::bf16)  // the norm is of the sum as it is kept
#pragma omp simd
        for (int64_t i = 0; i < n; ++i) rc[i] = bf16_to_float(float_to_bf16(rc[i]));
      else if (sum.kind == Kind::f16)
        for (int64_t i = 0; i < n; ++i) rc[i] = static_cast<float>(static_cast<_Float16>(rc[i]));
      f = rc;
    }
    float mean = 0, squares = 0;
    if (a[0] == 1) {
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < n; ++i) mean += f[i];
      mean /= static_cast<float>(n);
    }
#pragma omp simd reduction(+ : squares)
    for (int64_t i = 0; i < n; ++i) squares += (f[i] - mean) * (f[i] - mean);
    const float inverse = 1.f / std::sqrt(squares / static_cast<float>(n) + eps);
    float* y = rb;
#pragma omp simd
    for (int64_t i = from; i < from + count; ++i) y[i] = (f[i] - mean) * inverse;
    if (a[3] && to.kind == Kind::bf16)
#pragma omp simd
      for (int64_t i = from; i < from + count; ++i) y[i] = bf16_to_float(float_to_bf16(y[i]));
    if (weight.data) {
      float* w = room(l.a, n);
      const float* g = widened(weight, from * weight.step(), count, w);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[from + i] *= offset + g[i];
    }
    if (bias.data) {
      const float* g = widened(bias, from * bias.step(), count, room(l.a, n));
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[from + i] += g[i];
    }
    narrowed(to, to.row(r) + from, count, y + from);
  }
}

// Rows of a cache that are written by index along the last dimension but one; negative ones count from the end where an assignment `wraps`.
inline bool in_range(const Operand& cache, const Operand& index, int64_t count, bool wraps) {
  for (int64_t j = 0; j < count; ++j) {
    const int64_t at = reinterpret_cast<const int64_t*>(index.data)[j * index.step()], slots = cache.size[kDims - 2];
    if (at < (wraps ? -slots : 0) || at >= slots) return false;
  }
  return true;
}
inline int64_t indexed_row(const Operand& cache, const Operand& index, const Operand& from, int64_t r) {
  const int64_t count = from.size[kDims - 2];
  const int64_t at = reinterpret_cast<const int64_t*>(index.data)[r % count * index.step()];
  int64_t outer = r / count, base = (at < 0 ? at + cache.size[kDims - 2] : at) * cache.stride[kDims - 2];
  for (int d = kDims - 3; d >= 0; --d) base += outer % from.size[d] * cache.stride[d], outer /= from.size[d];
  return base;
}

// x cos + rotated(x) sin, the rotation of halves or of neighbours; to rows of a cache where there is an index. a = pairs are neighbours, indices
// wrap. False where that is out of range.
inline bool rotate(const Operand& to, const Operand& x, const Operand& cos, const Operand& sin, const Operand& index, const int64_t* a, int64_t task, int64_t of) {
  const int64_t n = x.inner(), half = n / 2;
  if (index.data && !in_range(to, index, x.size[kDims - 2], a[1])) return false;
  Lines& l = lines();
  for (int64_t r = cut(x.rows(), task, of); r < cut(x.rows(), task + 1, of); ++r) {
    float* y = room(l.attend.acc, 3 * n);  // attention uses it in other instructions only
    const float* f = widened(x, x.row(r), n, room(l.a, n));
    const float* c = widened(cos, cos.row(r), n, room(l.b, n));
    const float* s = widened(sin, sin.row(r), n, room(l.c, n));
    if (a[0])
      for (int64_t i = 0; i < half; ++i) {
        y[2 * i] = f[2 * i] * c[2 * i] - f[2 * i + 1] * s[2 * i];
        y[2 * i + 1] = f[2 * i + 1] * c[2 * i + 1] + f[2 * i] * s[2 * i + 1];
      }
    else
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        y[i] = f[i] * c[i] - f[half + i] * s[i];
        y[half + i] = f[half + i] * c[half + i] + f[i] * s[half + i];
      }
    const int64_t at = index.data ? indexed_row(to, index, x, r) : to.row(r);
    if (to.step() == 1) narrowed(to, at, n, y);
    else for (int64_t i = 0; i < n; ++i) store_from_float(to.data, at + i * to.step(), to.type(), y[i]);
  }
  return true;
}

// Rows of one element, as a permutation of channels has: to[.., index[i]] = from[.., i].
inline void scatter(const Operand& to, const Operand& index, const Operand& from, int64_t task, int64_t of) {
  constexpr int rows = kDims - 2;
  const int64_t count = from.size[rows], size = size_of(from.kind), outer = from.rows() / count;
  for (int64_t o = 0; o < outer; ++o) {
    char* out = to.at(to.row(o * to.size[rows]));
    const char* in = from.at(from.row(o * count));
    for (int64_t i = cut(count, task, of); i < cut(count, task + 1, of); ++i)
      std::memcpy(out + index.integer(i * index.step()) * to.stride[rows] * size, in + i * from.stride[rows] * size, static_cast<size_t>(size));
  }
}

// cache[.., index[j], :] = from[.., j, :]: index_copy_ along the last dimension but one. False where an index is out of range.
inline bool write(const Operand& cache, const Operand& index, const Operand& from, int64_t wraps, int64_t task, int64_t of) {
  const int64_t n = from.inner(), size = size_of(cache.kind);
  if (!in_range(cache, index, from.size[kDims - 2], wraps)) return false;
  if (n == 1 && !wraps) { scatter(cache, index, from, task, of); return true; }
  for (int64_t r = cut(from.rows(), task, of); r < cut(from.rows(), task + 1, of); ++r) {
    const int64_t base = indexed_row(cache, index, from, r), f = from.row(r);
    if (from.step() == 1 && cache.step() == 1) std::memcpy(cache.at(base), from.at(f), static_cast<size_t>(n * size));
    else
      for (int64_t i = 0; i < n; ++i) std::memcpy(cache.at(base + i * cache.step()), from.at(f + i * from.step()), static_cast<size_t>(size));
  }
  return true;
}

// int8 codes and scales of rows, as quantize_activation makes them.
inline void quantize(const Operand& codes, const Operand& scales, const Operand& x) {
  const int64_t n = x.inner();
  for (int64_t r = 0; r < x.rows(); ++r) {
    const float* f = widened(x, x.row(r), n, room(lines().a, n));
    float top = 0;
#pragma omp simd reduction(max : top)
    for (int64_t i = 0; i < n; ++i) top = std::fabs(f[i]) > top ? std::fabs(f[i]) : top;
    const float scale = std::max(top, 1e-30f) * (1.f / 127.f), inverse = 1.f / scale;
    auto* q = reinterpret_cast<int8_t*>(codes.data) + r * n;
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) q[i] = static_cast<int8_t>(static_cast<int32_t>(std::min(127.f, std::max(-127.f, std::nearbyint(f[i] * inverse)))));
    reinterpret_cast<float*>(scales.data)[r] = scale;
  }
}

// Packed linears. Operands: to, sum, x, scales of x, bias, three of what comes before, then codes, scale, minimum of each weight; none but to
// and x need be there. a = weights, bits, group, index of zero, whether scales are fp16, unpack_from, rows, tiles, chunk; then what comes
// before: kind (0 nothing, 1 norm, 2 gated unit), its four arguments, whether the result is quantized here; then n, tiles, blocks, groups of each.
constexpr int kPrologue = 9, kPackedArgs = 15, kPackedOperands = 8;
inline Weight packed_weight(const Operand* v, const int64_t* a, int64_t i) {
  const int64_t* size = a + kPackedArgs + 4 * i;
  const Operand* w = v + kPackedOperands + 3 * i;
  Weight out{};
  out.codes = reinterpret_cast<const uint8_t*>(w[0].data), out.scale = w[1].data, out.minimum = w[2].data, out.half = a[4] != 0;
  out.n = size[0], out.tiles = size[1], out.blocks = size[2], out.groups = size[3], out.group = a[2];
  return out;
}
inline int64_t packed_pairs(const int64_t* a) {
  int64_t pairs = 0;
  for (int64_t i = 0; i < a[0]; ++i) pairs += (a[kPackedArgs + 4 * i + 1] + 1) / 2;
  return pairs;
}

// About 64 KB of weights a task, and as many tasks for each thread, so that threads of equal speed end together.
inline int64_t weight_tasks(int64_t units, int64_t bytes, int64_t threads) {
  const int64_t wanted = std::clamp<int64_t>(bytes / (64 << 10), 1, 16 * threads);
  const int64_t even = std::max<int64_t>(1, (wanted + threads - 1) / threads) * threads;
  return std::min(units, bytes < (8 << 10) ? 1 : even);
}
inline int64_t packed_tasks(const Operand*, const int64_t* a, int64_t threads) {
  int64_t bytes = 0;
  for (int64_t i = 0; i < a[0]; ++i) bytes += a[kPackedArgs + 4 * i + 1] * a[kPackedArgs + 4 * i + 2] * 64 * a[1];
  return weight_tasks(packed_pairs(a), bytes, threads);
}

// A thread's own operand for x's rows, contiguous.
inline Operand own(std::vector<char>& memory, const Operand& x, Kind kind) {
  Operand o = x;
  o.kind = kind;
  int64_t stride = 1;
  for (int d = kDims - 1; d >= 0; --d) o.stride[d] = stride, stride *= o.size[d];
  if (static_cast<int64_t>(memory.size()) < stride * size_of(kind)) memory.resize(static_cast<size_t>(stride * size_of(kind)));
  o.data = memory.data();
  return o;
}

// What the products of this thread read: x, normed, gated or quantized as the instruction says, in digits.
inline void prepare(const Operand* v, const int64_t* a, const float* constants, bool a8, bool first, const Plan& plan, Lines& l) {
  Operand x = v[2], scales = v[3];
  const int64_t* p = a + kPrologue;
  if (p[0] == 1) {
    const Operand to = own(l.made, x, x.kind);
    Operand sum = v[1];
    if (!first) sum.data = nullptr;  // one writes it
    const Operand all[6] = {to, sum, x, v[5], v[6], v[7]};
    norm(all, p + 1, constants, 0, 1);
    x = to;
  } else if (p[0] == 2) {
    const Operand to = own(l.made, x, x.kind);
    glu(to, x, v[5], p[1], 0, 1);
    x = to;
  }
  const Weight w = packed_weight(v, a, 0);
  const double zero = constants[a[3]];
  if (a8 && p[5]) {
    const Operand codes = own(l.codes, x, Kind::i8);
    scales = own(l.scales, x, Kind::f32);
    quantize(codes, scales, x);
    x = codes;
  }
  l.x_scales = reinterpret_cast<const float*>(scales.data);
  if (a8) take_codes<V>(l.activations, reinterpret_cast<const int8_t*>(x.data), x.rows(), x.inner(), w, zero, a[1], plan);
  else take_floats<V>(l.activations, x.data, x.rows(), x.inner(), w, zero, a[1], x.type());
}

inline void packed(const Operand* v, const int64_t* a, const float* constants, bool a8, int64_t call, int64_t phase, int64_t task, int64_t of) {
  const Operand& to = v[0];
  const Plan plan{0, a[5], 0, a[6], a[7], a[8]};
  Lines& l = lines();
  if (l.call != call || l.phase != phase) {  // each thread by itself: less than a hand-over
    prepare(v, a, constants, a8, task == 0, plan, l);
    l.call = call, l.phase = phase;
  }
  const float* bias = nullptr;
  if (v[4].data) bias = widened(v[4], 0, to.inner(), room(l.c, to.inner()));
  const int64_t pairs = packed_pairs(a), from = cut(pairs, task, of), end = cut(pairs, task + 1, of);
  int64_t first = 0, col = 0;
  for (int64_t i = 0; i < a[0]; ++i) {
    Weight w = packed_weight(v, a, i);
    w.ldy = to.inner(), w.col = col;
    const int64_t count = (w.tiles + 1) / 2, lo = std::max(from, first), hi = std::min(end, first + count);
    if (lo < hi)
      multiply_range<V>(w, a[1], l.activations, 2 * (lo - first), std::min(w.tiles, 2 * (hi - first)), a8 ? l.x_scales : nullptr,
                        bias ? bias + col : nullptr, to.data, to.type(), plan);
    first += count, col += w.n;
  }
}

// A dense linear. Views: to, x, weight (n, k), bias or none.
inline int64_t dense_tasks(const Operand* v, int64_t threads) {
  const int64_t n = v[2].size[kDims - 2], bytes = n * v[2].inner() * size_of(v[2].kind);
  return weight_tasks((n + 15) / 16, bytes, threads);
}
inline void dense(const Operand* v, int64_t call, int64_t phase, int64_t task, int64_t of) {
  const Operand &to = v[0], &x = v[1], &w = v[2], &bias = v[3];
  const int64_t n = w.size[kDims - 2], units = (n + 15) / 16, from = cut(units, task, of) * 16, end = std::min(n, cut(units, task + 1, of) * 16), m = x.rows();
  if (from >= end) return;
  Lines& l = lines();
  const Matrix matrix{w.data, w.type(), n, w.inner(), w.stride[kDims - 2]};
  Vectors vectors{nullptr, m, x.inner(), Vectors::stride(x.inner()), w.type()};
  vectors.data = room(l.a, vectors.ld * m);
  if (l.call != call || l.phase != phase) {
    vectors.clear_tail();
    for (int64_t i = 0; i < m; ++i) vectors.take(i, 0, x.data, i * x.inner(), x.inner(), x.type());
    l.call = call, l.phase = phase;
  }
  const int64_t ld = end - from;
  float* out = room(l.b, ld * m);
  dense_rows<V>(matrix, from, end, vectors, out, ld);
  for (int64_t i = 0; i < m; ++i) {
    if (bias.data) {
      const float* b = widened(bias, from * bias.step(), ld, room(l.c, ld));
#pragma omp simd
      for (int64_t j = 0; j < ld; ++j) out[i * ld + j] += b[j];
    }
    narrowed(to, i * n + from, ld, out + i * ld);
  }
}

// Attention. Views: to, q, k, v, mask or none, all (batch, heads, rows, size). Tasks are key heads, or query heads where those are few.
inline int64_t attend_tasks(const Operand* v, int64_t threads) {
  const int64_t batch = v[1].size[1], heads = v[1].size[2], kv = v[2].size[2];
  if (threads == 1 || batch * kv % threads == 0 || batch * kv >= 4 * threads) return std::min(batch * kv, 4 * threads);
  return batch * heads;
}
inline void attend_task(const Operand* v, float scale, int64_t task, int64_t of) {
  const Operand &to = v[0], &q = v[1], &k = v[2], &val = v[3], &mask = v[4];
  const int64_t batch = q.size[1], heads = q.size[2], queries = q.size[3], kv = k.size[2], repeat = heads / kv, keys = k.size[3], d = q.inner();
  const bool single = of == batch * heads && repeat > 1;
  const int64_t each = single ? 1 : repeat, units = single ? batch * heads : batch * kv, size = size_of(q.kind);
  Lines& l = lines();
  l.rows.resize(static_cast<size_t>(each * queries));
  auto element = [](const Operand& view, int64_t b, int64_t h, int64_t i) {
    return (view.size[1] > 1 ? b * view.stride[1] : 0) + (view.size[2] > 1 ? h * view.stride[2] : 0) + (view.size[3] > 1 ? i * view.stride[3] : 0);
  };
  for (int64_t unit = cut(units, task, of); unit < cut(units, task + 1, of); ++unit) {
    const int64_t b = unit * each / heads, h0 = unit * each % heads, hk = h0 / repeat;
    const KeyHead head{k.at(element(k, b, hk, 0)), val.at(element(val, b, hk, 0)), k.stride[3] * size, val.stride[3] * size, keys, d, scale,
                       mask.kind == Kind::b8, mask.floating() ? mask.type() : Type::f32};
    for (int64_t r = 0; r < each * queries; ++r) {
      const int64_t h = h0 + r / queries, i = r % queries;
      l.rows[static_cast<size_t>(r)] = {q.at(element(q, b, h, i)), to.at(element(to, b, h, i)), mask.data ? mask.at(element(mask, b, h, i)) : nullptr, mask.step()};
    }
    const auto run = q.kind == Kind::f32 ? attend<V, Type::f32> : q.kind == Kind::bf16 ? attend<V, Type::bf16> : attend<V, Type::f16>;
    run(l.rows.data(), each * queries, head, l.attend);
  }
}

}  // namespace effllm::step
