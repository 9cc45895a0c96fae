// Linears with bipolar-INT weights that skip channels: by input, and by output.
//
// Maths     W = 2 s (u - zero) or 2 s u + minimum. Per segment of channels (a group, at most 128) activations are int16 digits q with one step, so
//           y_n += s_gn (2 step sum_k q_k u_kn - 2 zero sum_k x_k)        or        s_gn 2 step sum_k q_k u_kn + minimum_gn sum_k x_k
//           with an exact integer sum over the channels that are read. fp32 activations take two digits.
// Layout    by input: codes (K, U, 64), scale and minimum (G, Np); by output: codes (N, U, 64), scale and minimum (N, G): see
//           runtime/layouts/input_major.py and row_major.py. Codes are 2, 4 or 8 bits wide.
// Bytes     the codes of channels that are read, and all scales.
// Order     by input: a task is a block of outputs with fp32 sums in cache; segments in order; per segment 16 sums of 16 outputs stay in
//           registers over its channels, two of which share the halves of a lane; the next segment's lines are prefetched meanwhile.
//           by output: a task is some rows; each is read front to back, the next one prefetched.
// Numerics  the rounding of activations, 2^-16 of a segment's largest (fp32: 2^-32), is below that of bf16 (fp32) products; deterministic.
// Many rows the weight expanded to x's dtype, then PyTorch's own product.
#include <utility>

#include "pairs.h"
#include "skip.h"

namespace {

using namespace effllm::skip;
using effllm::Type;
using effllm::size_of;
using V = effllm::EFFLLM_ISA;
using P = effllm::Pairs<V>;
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
};

Codes codes_of(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& minimum, int64_t bits, int64_t group, double zero) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "effllm: codes have 1 to 8 bits");
  STD_TORCH_CHECK(group == 0 || group == 16 || group == 32 || group == 64 || group == 128, "effllm: groups are 16, 32, 64, 128, or 0 for whole rows");
  STD_TORCH_CHECK(codes.dim() == 3 && codes.size(2) == 64 && codes.is_contiguous() && codes.scalar_type() == ScalarType::Byte, "effllm: codes must be (channels, units, 64) bytes, contiguous");
  const auto dtype = scale.scalar_type();
  STD_TORCH_CHECK(scale.dim() == 2 && scale.is_contiguous() && (dtype == ScalarType::Half || dtype == ScalarType::Float), "effllm: scales must be a contiguous matrix of float16 or float32");
  if (minimum) STD_TORCH_CHECK(minimum->is_contiguous() && minimum->scalar_type() == dtype && minimum->size(0) == scale.size(0) && minimum->size(1) == scale.size(1), "effllm: minima must be like scales");
  return {static_cast<const uint8_t*>(codes.const_data_ptr()), scale.const_data_ptr(), minimum ? minimum->const_data_ptr() : nullptr, dtype == ScalarType::Half,
          codes.size(0), codes.size(1), scale.size(0), scale.size(1), group, bits <= 2 ? 2 : bits <= 4 ? 4 : 8, static_cast<float>(zero)};
}

inline F load_scale(const void* p, int64_t at, bool half) { return half ? V::load_h(static_cast<const uint16_t*>(p) + at) : V::load_f(static_cast<const float*>(p) + at); }
inline float one_scale(const void* p, int64_t at, bool half) { return effllm::load_as_float(p, at, half ? Type::f16 : Type::f32); }
inline int digits_of(Type t) { return t == Type::f32 ? 2 : 1; }

// The read channels by segment, paired, and their activations as digits of up to eight vectors (rows times digits).
struct Segments {
  int64_t vectors = 0, digits = 1, pairs = 0;
  std::vector<int32_t> index;   // two a pair
  std::vector<int32_t> values;  // [vector][pair]: two int16
  std::vector<int64_t> start;   // first pair of each segment, and the end
  std::vector<int64_t> group;   // of each segment
  std::vector<float> step, sum; // [segment][vector]: 2 step of the digit; what meets the scale (or minimum), of the first digit only
  std::vector<int16_t> digit[2];

  void take(const Active& a, int64_t k, const Codes& w, int digits_) {
    digits = digits_, vectors = a.m * digits;
    const int64_t length = w.group ? w.group : kLongest, most = a.count + (k + length - 1) / length;
    index.clear(), start.assign(1, 0), group.clear(), step.clear(), sum.clear();
    values.resize(static_cast<size_t>(vectors * most));
    for (auto& d : digit) d.resize(static_cast<size_t>(length + 1));
    int16_t* q[2] = {digit[0].data(), digit[1].data()};
    const float factor = w.minimum ? 1.f : -2.f * w.zero;
    pairs = 0;
    for (int64_t i = 0; i < a.count;) {
      const int64_t segment = a.index[static_cast<size_t>(i)] / length;
      int64_t end = i;
      while (end < a.count && a.index[static_cast<size_t>(end)] < (segment + 1) * length) index.push_back(a.index[static_cast<size_t>(end++)]);
      const int64_t count = end - i, own = (count + 1) / 2;
      if (count % 2) index.push_back(index.back());
      for (int64_t r = 0; r < a.m; ++r) {
        float unit, total;
        const bool finite = effllm::quantize16(a.row(r) + i, count, static_cast<int>(digits), q, unit, total);
        for (int64_t d = 0; d < digits; ++d) {
          if (!finite) std::memset(q[d], 0, static_cast<size_t>(2 * count));
          q[d][count] = 0;
          std::memcpy(values.data() + (r * digits + d) * most + pairs, q[d], static_cast<size_t>(4 * own));
          step.push_back(finite ? 2.f * unit / (d ? 65534.f : 1.f) : std::nanf(""));
          sum.push_back(d ? 0.f : finite ? factor * total : std::nanf(""));
        }
      }
      pairs += own;
      start.push_back(pairs);
      group.push_back(w.group ? segment : 0);
      i = end;
    }
    ld = most;
    if (index.empty()) index.push_back(0);
  }
  int64_t ld = 0;
  int64_t count() const { return static_cast<int64_t>(group.size()); }
};

// One segment of MR vectors over U units from `unit` on: y (MR, ldy) += what the maths says.
template <int WIDTH, int MR, int U> void segment(const Codes& w, const Segments& s, int64_t at, int64_t first, int64_t unit, float* y, int64_t ldy) {
  constexpr int fields = 16 / WIDTH, sums = 2 * fields;
  const int64_t from = s.start[static_cast<size_t>(at)], to = s.start[static_cast<size_t>(at + 1)];
  I acc[MR][U][sums];
  for (int j = 0; j < MR; ++j)
    for (int u = 0; u < U; ++u)
      for (int f = 0; f < sums; ++f) acc[j][u][f] = V::zero_i();
  const int32_t* values[MR];
  for (int j = 0; j < MR; ++j) values[j] = s.values.data() + (first + j) * s.ld;
  for (int64_t p = from; p < to; ++p) {
    const uint8_t *a = w.line(s.index[static_cast<size_t>(2 * p)]) + unit * 64, *b = w.line(s.index[static_cast<size_t>(2 * p + 1)]) + unit * 64;
    W x[MR];
    for (int j = 0; j < MR; ++j) x[j] = P::both(values[j][p]);
#pragma GCC unroll 2
    for (int u = 0; u < U; ++u) {
      W low, high;
      P::join(V::load(a + 64 * u), V::load(b + 64 * u), low, high);
      [&]<int... f>(std::integer_sequence<int, f...>) {
        ([&] {
          const W c = P::template half<WIDTH, f>(low), d = P::template half<WIDTH, f>(high);
#pragma GCC unroll 2
          for (int j = 0; j < MR; ++j) acc[j][u][f] = P::dot(acc[j][u][f], c, x[j]), acc[j][u][fields + f] = P::dot(acc[j][u][fields + f], d, x[j]);
        }(), ...);
      }(std::make_integer_sequence<int, fields>{});
    }
  }
  const int64_t row = s.group[static_cast<size_t>(at)] * w.stride;
#pragma GCC unroll 2
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 16
    for (int f = 0; f < sums; ++f) {
      const int64_t n = (unit + u) * (512 / WIDTH) + 16 * f;
      const F scale = load_scale(w.scale, row + n, w.half);
      for (int j = 0; j < MR; ++j) {
        const float step = s.step[static_cast<size_t>(at * s.vectors + first + j)], sum = s.sum[static_cast<size_t>(at * s.vectors + first + j)];
        float* to_y = y + j * ldy + u * (512 / WIDTH) + 16 * f;
        F value = V::load_f(to_y);
        if (w.minimum) {
          value = V::fma(scale, V::axpb(V::to_float(acc[j][u][f]), step, 0.f), value);
          value = V::fma1(load_scale(w.minimum, row + n, w.half), sum, value);
        } else {
          value = V::fma(scale, V::axpb(V::to_float(acc[j][u][f]), step, sum), value);
        }
        V::store_f(to_y, value);
      }
    }
}

// Units from .. to of all segments: y (vectors, ldy), starting at unit `from`.
template <int WIDTH, int MR> void block_of(const Codes& w, const Segments& s, int64_t first, int64_t from, int64_t to, float* y, int64_t ldy, bool fetch) {
  constexpr int U = MR == 1 && WIDTH >= 4 && V::gemm_rows > 2 ? 2 : 1;
  constexpr int64_t outputs = 512 / WIDTH;
  for (int64_t at = 0; at < s.count(); ++at) {
    const int32_t* next = s.index.data() + 2 * s.start[static_cast<size_t>(at + 1)];
    const int64_t ahead = fetch && at + 1 < s.count() ? 2 * (s.start[static_cast<size_t>(at + 2)] - s.start[static_cast<size_t>(at + 1)]) : 0;
    int64_t u = from;
    for (; u + U <= to; u += U) {
      for (int64_t c = 0; c < ahead; ++c)
        for (int i = 0; i < U; ++i) __builtin_prefetch(w.line(next[c]) + (u + i) * 64);
      segment<WIDTH, MR, U>(w, s, at, first, u, y + (u - from) * outputs, ldy);
    }
    for (; u < to; ++u) {
      for (int64_t c = 0; c < ahead; ++c) __builtin_prefetch(w.line(next[c]) + u * 64);
      segment<WIDTH, MR, 1>(w, s, at, first, u, y + (u - from) * outputs, ldy);
    }
  }
}

template <int WIDTH> void blocks_of(const Codes& w, const Segments& s, int64_t from, int64_t to, float* y, int64_t ldy) {
  int64_t j = 0;
  for (; j + 2 <= s.vectors; j += 2) block_of<WIDTH, 2>(w, s, j, from, to, y + j * ldy, ldy, j == 0);
  if (j < s.vectors) block_of<WIDTH, 1>(w, s, j, from, to, y + j * ldy, ldy, j == 0);
}

void by_input(const Call& c, const Codes& w, int64_t n, const float* bias, void* y, int64_t asked, int64_t block) {
  static thread_local Active read;
  static thread_local Segments kept;
  Segments& s = kept;
  take<V>(read, c.data(), c.type, c.m, c.k, c.mask);
  s.take(read, c.k, w, digits_of(c.type));
  const int64_t threads = threads_for(asked, static_cast<double>(read.count * w.units * 64) * static_cast<double>(s.vectors)), outputs = 512 / w.width;
  const int64_t share = (w.units + threads - 1) / threads, each = std::clamp<int64_t>((block > 0 ? block : 2048) / outputs, 1, share), tasks = (w.units + each - 1) / each;
  effllm::in_phases<1>({tasks}, threads, [&](int, int64_t task) {
    static thread_local Buffer memory;
    const int64_t from = task * each, to = std::min(w.units, from + each), ldy = each * outputs + 16;
    float* acc = memory.take(s.vectors * ldy);
    std::memset(acc, 0, static_cast<size_t>(s.vectors * ldy) * 4);
    if (w.width == 4) blocks_of<4>(w, s, from, to, acc, ldy);
    else if (w.width == 8) blocks_of<8>(w, s, from, to, acc, ldy);
    else blocks_of<2>(w, s, from, to, acc, ldy);
    const int64_t end = std::min(n, to * outputs);
    for (int64_t i = 0; i < c.m; ++i)
      for (int64_t j = from * outputs; j < end; ++j) {
        float f = acc[i * s.digits * ldy + j - from * outputs] + (bias ? bias[j] : 0.f);
        if (s.digits > 1) f += acc[(i * s.digits + 1) * ldy + j - from * outputs];
        effllm::store_from_float(y, i * n + j, c.type, f);
      }
  });
}

// Activations of rows as digits in the order of row_major: column 32 f + 16 h + l of a unit at 32 f + 2 l + h.
struct Rows {
  int64_t vectors = 0, digits = 1, length = 0, segments = 0, stride = 0;
  std::vector<int16_t> x;        // [vector][stride]
  std::vector<float> step, sum;  // [vector][segments]
  void take(const Call& c, const Codes& w, int digits_) {
    digits = digits_, vectors = c.m * digits;
    length = w.group ? w.group : kLongest, segments = (c.k + length - 1) / length, stride = w.units * (512 / w.width) + 32;
    x.assign(static_cast<size_t>(vectors * stride), 0);
    step.assign(static_cast<size_t>(vectors * segments), 0.f), sum = step;
    float f[kLongest];
    int16_t digit[2][kLongest];
    int16_t* q[2] = {digit[0], digit[1]};
    for (int64_t r = 0; r < c.m; ++r)
      for (int64_t g = 0; g < segments; ++g) {
        const int64_t from = g * length, count = std::min(length, c.k - from);
        for (int64_t j = 0; j < count; ++j) f[j] = effllm::load_as_float(c.data(), r * c.k + from + j, c.type);
        float unit, total;
        const bool finite = effllm::quantize16(f, count, digits_, q, unit, total);
        for (int64_t d = 0; d < digits; ++d) {
          const int64_t v = r * digits + d;
          step[static_cast<size_t>(v * segments + g)] = finite ? 2.f * unit / (d ? 65534.f : 1.f) : std::nanf("");
          sum[static_cast<size_t>(v * segments + g)] = d ? 0.f : finite ? (w.minimum ? 1.f : -2.f * w.zero) * total : std::nanf("");
          if (!finite) continue;
          int16_t* to = x.data() + v * stride;
          for (int64_t j = 0; j < count; ++j) {
            const int64_t k = from + j, l = k % 32;
            to[k - l + 2 * (l % 16) + l / 16] = q[d][j];
          }
        }
      }
  }
};

// One row of codes times MR vectors; scales of the row as floats in `scale`. `per` fields of 32 columns make a segment.
template <int WIDTH, int MR> void row_of(const uint8_t* codes, const uint8_t* next, int64_t units, const Rows& s, int64_t first, const float* scale, const float* minimum, int64_t per, float* out) {
  constexpr int fields = 16 / WIDTH;
  F total[MR][2];
  I acc[MR];
  for (int j = 0; j < MR; ++j) total[j][0] = total[j][1] = V::zero_f(), acc[j] = V::zero_i();
  int64_t held = 0, at = 0;
  for (int64_t u = 0; u < units; ++u) {
    __builtin_prefetch(next + u * 64);
    const W c = V::load(codes + u * 64);
    [&]<int... f>(std::integer_sequence<int, f...>) {
      ([&] {
        const W part = P::template half<WIDTH, f>(c);
        for (int j = 0; j < MR; ++j)
          acc[j] = P::dot(acc[j], part, V::load(reinterpret_cast<const uint8_t*>(s.x.data() + (first + j) * s.stride + (u * fields + f) * 32)));
        if (++held == per || (u + 1 == units && f + 1 == fields)) {
          if (at < s.segments)
            for (int j = 0; j < MR; ++j) {
              total[j][f & 1] = V::fma1(V::to_float(acc[j]), scale[at] * s.step[static_cast<size_t>((first + j) * s.segments + at)], total[j][f & 1]);
              acc[j] = V::zero_i();
            }
          held = 0, ++at;
        }
      }(), ...);
    }(std::make_integer_sequence<int, fields>{});
  }
  for (int j = 0; j < MR; ++j) {
    const float* sums = s.sum.data() + (first + j) * s.segments;
    const float* meets = minimum ? minimum : scale;
    float offset = 0;
#pragma omp simd reduction(+ : offset)
    for (int64_t g = 0; g < s.segments; ++g) offset += sums[g] * meets[g];
    out[first + j] = effllm::sum16(total[j][0]) + effllm::sum16(total[j][1]) + offset;
  }
}

template <int WIDTH> void row(const uint8_t* codes, const uint8_t* next, int64_t units, const Rows& s, const float* scale, const float* minimum, float* out) {
  const int64_t per = s.length / 32;
  int64_t j = 0;
  for (; j + 2 <= s.vectors; j += 2) row_of<WIDTH, 2>(codes, next, units, s, j, scale, minimum, per, out);
  if (j < s.vectors) row_of<WIDTH, 1>(codes, next, units, s, j, scale, minimum, per, out);
}

void by_output(const Call& c, const Tensor& gate, Type gate_type, const Codes& w, const float* bias, void* y, int64_t asked, int64_t block) {
  static thread_local Active kept;
  static thread_local Rows rows;
  Active& a = kept;
  Rows& s = rows;
  const int64_t n = w.lines;
  take<V>(a, gate.const_data_ptr(), gate_type, c.m, n, c.mask);
  s.take(c, w, digits_of(c.type));
  std::memset(y, 0, static_cast<size_t>(c.m * n * size_of(c.type)));
  const int64_t threads = threads_for(asked, static_cast<double>(a.count * w.units * 64) * static_cast<double>(s.vectors));
  const int64_t each = std::clamp<int64_t>(block > 0 ? block : 64, 1, std::max<int64_t>(1, (a.count + threads - 1) / threads));
  effllm::in_phases<1>({(a.count + each - 1) / each}, threads, [&](int, int64_t task) {
    static thread_local Buffer memory;
    float* scale = memory.take(2 * (s.segments + 32));
    float* minimum = w.minimum ? scale + s.segments + 32 : nullptr;
    float out[2 * kMost];
    for (int64_t i = task * each; i < std::min(a.count, (task + 1) * each); ++i) {
      const int64_t j = a.index[static_cast<size_t>(i)], after = a.index[static_cast<size_t>(i + 1)];
      int64_t g = 0;
      if (w.group)
        for (; g + 16 <= s.segments; g += 16) {
          V::store_f(scale + g, load_scale(w.scale, j * w.stride + g, w.half));
          if (minimum) V::store_f(minimum + g, load_scale(w.minimum, j * w.stride + g, w.half));
        }
      for (; g < s.segments; ++g) {
        scale[g] = one_scale(w.scale, j * w.stride + (w.group ? g : 0), w.half);
        if (minimum) minimum[g] = one_scale(w.minimum, j * w.stride + (w.group ? g : 0), w.half);
      }
      if (w.width == 4) row<4>(w.line(j), w.line(after), w.units, s, scale, minimum, out);
      else if (w.width == 8) row<8>(w.line(j), w.line(after), w.units, s, scale, minimum, out);
      else row<2>(w.line(j), w.line(after), w.units, s, scale, minimum, out);
      for (int64_t r = 0; r < c.m; ++r) {
        const float gated = effllm::load_as_float(gate.const_data_ptr(), r * n + j, gate_type);
        if (!c.mask.passes(gated, j)) continue;
        const float f = out[r * s.digits] + (s.digits > 1 ? out[r * s.digits + 1] : 0.f) + (bias ? bias[j] : 0.f);
        effllm::store_from_float(y, r * n + j, c.type, gated * f);
      }
    }
  });
}

// The dense weight in x's dtype: (K, n) of codes by input, (N, k) of codes by output.
Tensor expanded(const Tensor& like, const Codes& w, int64_t columns, bool by_output) {
  const Tensor dense = torch::stable::new_empty(like, {w.lines, columns});
  void* to = dense.mutable_data_ptr();
  const Type type = effllm::type_of(like.scalar_type());
  const uint32_t mask = (1u << w.width) - 1;
  torch::stable::parallel_for(0, w.lines, 16, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i)
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t unit = c / (512 / w.width), r = c % (512 / w.width);
        int64_t lane, bit;
        if (by_output) lane = r % 16, bit = r % 32 / 16 * 16 + r / 32 * w.width;
        else lane = r % 16, bit = r / 16 * w.width;
        uint32_t word;
        std::memcpy(&word, w.line(i) + unit * 64 + lane * 4, 4);
        const auto u = static_cast<float>((word >> bit) & mask);
        const int64_t g = w.group ? (by_output ? c : i) / w.group : 0, at = by_output ? i * w.stride + g : g * w.stride + c;
        const float s = 2.f * one_scale(w.scale, at, w.half);
        effllm::store_from_float(to, i * columns + c, type, w.minimum ? s * u + one_scale(w.minimum, at, w.half) : s * (u - w.zero));
      }
  });
  return dense;
}

std::optional<Tensor> bias_as(const std::optional<Tensor>& bias, torch::headeronly::ScalarType dtype) {
  return bias ? std::optional<Tensor>(as(*bias, dtype)) : std::nullopt;
}

Tensor skip_input_codes(const Tensor x, const Tensor threshold, const Tensor codes, const Tensor scale, std::optional<Tensor> minimum, std::optional<Tensor> bias, int64_t n, int64_t bits, int64_t group,
                        double zero, int64_t limit, int64_t threads, int64_t block) {
  const Call c = call_of(x, threshold, -1, limit);
  const Codes w = codes_of(codes, scale, minimum, bits, group, zero);
  STD_TORCH_CHECK(w.lines == c.k && n <= w.units * (512 / w.width) && w.stride == w.units * (512 / w.width), "effllm: the codes or scales do not fit the activation or the outputs");
  STD_TORCH_CHECK(w.groups == (group ? (c.k + group - 1) / group : 1), "effllm: as many rows of scales as groups of inputs");
  if (c.m && n && !c.few()) {
    const auto dtype = c.x.scalar_type();
    return shaped(effllm::dense_linear(c.sparse ? masked(c.x, c.mask) : c.x, torch::stable::transpose(expanded(c.x, w, n, false), 0, 1), bias_as(bias, dtype)), x);
  }
  const Tensor y = effllm::result(x, n, x.scalar_type());
  if (c.m == 0 || n == 0) return y;
  const std::vector<float> b = effllm::floats_of(bias, n);
  by_input(c, w, n, b.empty() ? nullptr : b.data(), y.mutable_data_ptr(), threads, block);
  return y;
}

Tensor skip_output_codes(const Tensor x, const Tensor gate, const Tensor threshold, const Tensor codes, const Tensor scale, std::optional<Tensor> minimum, std::optional<Tensor> bias, int64_t bits,
                         int64_t group, double zero, int64_t limit, int64_t threads, int64_t block) {
  STD_TORCH_CHECK(group != 16, "effllm: rows of groups of 16 have no kernel");
  const Codes w = codes_of(codes, scale, minimum, bits, group, zero);
  const int64_t n = w.lines;
  const Call c = call_of(x, threshold, n, limit);
  STD_TORCH_CHECK(w.units * (512 / w.width) >= c.k && gate.numel() == c.m * n, "effllm: the codes or the gate do not fit the activation");
  STD_TORCH_CHECK(w.groups == n && w.stride == (group ? (c.k + group - 1) / group : 1), "effllm: as many columns of scales as groups of inputs");
  const Tensor g = torch::stable::contiguous(gate);
  const Type type = effllm::type_of(g.scalar_type());
  if (c.m && n && !c.few()) {
    const auto dtype = c.x.scalar_type();
    const Tensor y = effllm::dense_linear(c.x, expanded(c.x, w, c.k, true), bias_as(bias, dtype));
    void* to = y.mutable_data_ptr();
    torch::stable::parallel_for(0, c.m, std::max<int64_t>(1, 32768 / n), [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0 * n; i < i1 * n; ++i) {
        const float f = effllm::load_as_float(g.const_data_ptr(), i, type);
        effllm::store_from_float(to, i, c.type, c.sparse && !c.mask.passes(f, i % n) ? 0.f : f * effllm::load_as_float(to, i, c.type));
      }
    });
    return shaped(y, x);
  }
  const Tensor y = effllm::result(x, n, x.scalar_type());
  if (c.m == 0 || n == 0) return y;
  const std::vector<float> b = effllm::floats_of(bias, n);
  by_output(c, g, type, w, b.empty() ? nullptr : b.data(), y.mutable_data_ptr(), threads, block);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("skip_input_codes(Tensor x, Tensor threshold, Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias, int n, int bits, int group, float zero, int limit, int threads=0, int block=0) -> Tensor");
  m.def("skip_output_codes(Tensor x, Tensor gate, Tensor threshold, Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias, int bits, int group, float zero, int limit, int threads=0, int block=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) {
  m.impl("skip_input_codes", TORCH_BOX(&skip_input_codes));
  m.impl("skip_output_codes", TORCH_BOX(&skip_output_codes));
}
