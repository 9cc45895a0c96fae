// Linears with bipolar-INT weights that skip channels: by input, and by output.
//
// Maths     W = 2 s (u - zero) or 2 s u + minimum. Per segment of channels (a group, at most 128) activations are integers q with one step, so
//           y_n += s_gn (2 step sum_k q_k u_kn - 2 zero sum_k x_k)        or        s_gn 2 step sum_k q_k u_kn + minimum_gn sum_k x_k
//           with an exact integer sum over the channels that are read. q has two int8 digits, three for fp32 activations.
// Layout    by input: codes (K, U, 64), scale and minimum (G, Np); by output: codes (N, U, 64), scale and minimum (N, G): see
//           runtime/layouts/input_major.py and row_major.py. Codes are 4 or 8 bits wide.
// Bytes     the codes of channels that are read, and by input all scales.
// Order     by input: a task is a block of outputs with fp32 sums in cache; segments in order; four channels that are read are turned into
//           bytes of one output each and multiplied at once, with all sums of 64 bytes of codes in registers over a segment; lines of
//           a later segment are prefetched meanwhile. by output: a task is some rows, each read front to back, the next one prefetched.
// Numerics  the rounding of activations, 2^-16 of a segment's largest (fp32: 2^-24), is below that of bf16 (fp32) products; deterministic.
// Many rows the weight expanded to x's dtype, then PyTorch's own product.
#include "quads.h"
#include "skip.h"

namespace {

using namespace effllm::skip;
using effllm::Type;
using effllm::size_of;
using V = effllm::EFFLLM_ISA;
using F = V::F;
using I = V::I;
using W = V::W;

constexpr int64_t kAheadSegments = 3;  // that prefetches run ahead, into the second-level cache: the first would lose them again
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
          codes.size(0), codes.size(1), scale.size(0), scale.size(1), group, bits <= 4 ? 4 : 8, static_cast<float>(zero)};
}

inline F load_scale(const void* p, int64_t at, bool half) { return half ? V::load_h(static_cast<const uint16_t*>(p) + at) : V::load_f(static_cast<const float*>(p) + at); }
inline float one_scale(const void* p, int64_t at, bool half) { return effllm::load_as_float(p, at, half ? Type::f16 : Type::f32); }

// A vector is one row's two leading digits, or of fp32 activations also its last one alone: what one pass multiplies.
inline int digits_of(Type t) { return t == Type::f32 ? 3 : 2; }
inline int64_t vectors_of(Type t) { return t == Type::f32 ? 2 : 1; }  // of a row
// What multiplies the integer sum of vector `v` of a row, without the scale.
inline float step_of(float step, int digits, int64_t v) { return 2.f * step * (digits == 3 && v == 0 ? 256.f : 1.f); }

// The read channels by segment, in quads, and the digits of each vector.
struct Segments {
  int64_t vectors = 0, each = 1, quads = 0, ld = 0;  // vectors in all, of a row
  std::vector<int64_t> offset;  // bytes to the codes of a channel, four a quad
  std::vector<int32_t> values;  // [vector][digit][quad]: four int8
  std::vector<int64_t> start;   // first quad of each segment, and the end
  std::vector<int64_t> group;   // of each segment
  std::vector<float> step, sum; // [segment][vector]; what meets the scale (or minimum) belongs to a row's first vector
  std::vector<int8_t> digit[3];

  const int32_t* row(int64_t vector, int64_t d) const { return values.data() + (2 * vector + d) * ld; }
  int64_t count() const { return static_cast<int64_t>(group.size()); }

  void take(const Active& a, int64_t k, const Codes& w, Type type) {
    const int digits = digits_of(type);
    each = vectors_of(type), vectors = a.m * each;
    const int64_t length = w.group ? w.group : kLongest;
    ld = a.count / 4 + (k + length - 1) / length + 1;
    offset.clear(), start.assign(1, 0), group.clear(), step.clear(), sum.clear();
    values.resize(static_cast<size_t>(2 * vectors * ld));
    for (auto& d : digit) d.resize(static_cast<size_t>(length + 4));
    int8_t* q[3] = {digit[0].data(), digit[1].data(), digit[2].data()};
    const float factor = w.minimum ? 1.f : -2.f * w.zero;
    quads = 0;
    for (int64_t i = 0; i < a.count;) {
      const int64_t segment = a.index[static_cast<size_t>(i)] / length;
      int64_t end = i;
      while (end < a.count && a.index[static_cast<size_t>(end)] < (segment + 1) * length) offset.push_back(a.index[static_cast<size_t>(end++)] * w.units * 64);
      const int64_t count = end - i, own = (count + 3) / 4;
      for (int64_t c = count; c < 4 * own; ++c) offset.push_back(offset.back());
      for (int64_t r = 0; r < a.m; ++r) {
        float unit, total;
        const bool finite = effllm::digits_of_segment(a.row(r) + i, count, digits, q, unit, total);
        for (int d = 0; d < digits; ++d) {
          if (!finite) std::memset(q[d], 0, static_cast<size_t>(count));
          std::memset(q[d] + count, 0, static_cast<size_t>(4 * own - count));
          std::memcpy(values.data() + (2 * (r * each + d / 2) + d % 2) * ld + quads, q[d], static_cast<size_t>(4 * own));
        }
        for (int64_t v = 0; v < each; ++v) {
          step.push_back(finite ? step_of(unit, digits, v) : std::nanf(""));
          sum.push_back(v ? 0.f : finite ? factor * total : std::nanf(""));
        }
      }
      quads += own;
      start.push_back(quads);
      group.push_back(w.group ? segment : 0);
      i = end;
    }
  }
};

// One segment of a vector of ND digits over one unit: y += what the maths says.
template <int WIDTH, int ND> inline void segment(const Codes& w, const Segments& s, int64_t at, int64_t vector, int64_t unit, float* y) {
  constexpr int per = 8 / WIDTH;
  using Q = effllm::Quads<V>;
  I acc[ND][4][per];
#pragma GCC unroll 2
  for (int d = 0; d < ND; ++d)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < per; ++j) acc[d][r][j] = V::zero_i();
  const uint8_t* codes = w.data + unit * 64;
  const int32_t *first = s.row(vector, 0), *second = s.row(vector, 1);
  const int64_t end = s.start[static_cast<size_t>(at + 1)];
  for (int64_t q = s.start[static_cast<size_t>(at)]; q < end; ++q) {
    const int64_t* o = s.offset.data() + 4 * q;
    W t[4];
    Q::turn(V::load(codes + o[0]), V::load(codes + o[1]), V::load(codes + o[2]), V::load(codes + o[3]), t);
    const auto *x0 = reinterpret_cast<const int8_t*>(first + q), *x1 = reinterpret_cast<const int8_t*>(second + q);
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if constexpr (per == 1) {
        acc[0][r][0] = V::template dp<true>(acc[0][r][0], t[r], x0);
        if constexpr (ND > 1) acc[1][r][0] = V::template dp<true>(acc[1][r][0], t[r], x1);
      } else {
        const W low = V::template field<0, 0x0F>(t[r]);
        const W high = Q::raw ? t[r] : V::template field<4, 0x0F>(t[r]);
        acc[0][r][0] = V::template dp<false>(acc[0][r][0], low, x0), acc[0][r][1] = V::template dp<false>(acc[0][r][1], high, x0);
        if constexpr (ND > 1) acc[1][r][0] = V::template dp<false>(acc[1][r][0], low, x1), acc[1][r][1] = V::template dp<false>(acc[1][r][1], high, x1);
      }
    }
  }
  const int64_t scales = s.group[static_cast<size_t>(at)] * w.stride + unit * (512 / WIDTH);
  const float step = s.step[static_cast<size_t>(at * s.vectors + vector)], sum = s.sum[static_cast<size_t>(at * s.vectors + vector)];
  auto fold = [&](auto&& scale_at, auto&& meets) {
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r)
#pragma GCC unroll 2
      for (int j = 0; j < per; ++j) {
        I total;
        if constexpr (ND > 1) total = V::shift_add(acc[0][r][j], acc[1][r][j]);
        else total = acc[0][r][j];
        if (j) {
          I low;
          if constexpr (ND > 1) low = V::shift_add(acc[0][r][0], acc[1][r][0]);
          else low = acc[0][r][0];
          total = Q::high(total, low);
        }
        const int n = 16 * (per * r + j);
        V::store_f(y + n, meets(scale_at(n), V::to_float(total), j ? step * Q::kHigh : step, n, V::load_f(y + n)));
      }
  };
  auto symmetric = [&](F scale, F total, float unit_step, int, F value) { return V::fma(scale, V::axpb(total, unit_step, sum), value); };
  if (w.half && !w.minimum) {
    const auto* p = static_cast<const uint16_t*>(w.scale) + scales;
    fold([&](int n) { return V::load_h(p + n); }, symmetric);
  } else {
    fold([&](int n) { return load_scale(w.scale, scales + n, w.half); }, [&](F scale, F total, float unit_step, int n, F value) {
      if (!w.minimum) return symmetric(scale, total, unit_step, n, value);
      return V::fma1(load_scale(w.minimum, scales + n, w.half), sum, V::fma(scale, V::axpb(total, unit_step, 0.f), value));
    });
  }
}

// Units from .. to of all segments: y (vectors, ldy), starting at unit `from`. Lines of a later segment come in meanwhile.
template <int WIDTH> void blocks_of(const Codes& w, const Segments& s, bool last_alone, int64_t from, int64_t to, float* y, int64_t ldy) {
  constexpr int64_t outputs = 512 / WIDTH;
  for (int64_t at = 0; at < s.count(); ++at) {
    const int64_t far = std::min(s.count(), at + kAheadSegments), farther = std::min(s.count(), far + 1);
    const int64_t* next = s.offset.data() + 4 * s.start[static_cast<size_t>(far)];
    const int64_t ahead = 4 * (s.start[static_cast<size_t>(farther)] - s.start[static_cast<size_t>(far)]);
    for (int64_t u = from; u < to; ++u) {
      const uint8_t* line = w.data + u * 64;
      for (int64_t c = 0; c < ahead; c += 4)
        for (int i = 0; i < 4; ++i) __builtin_prefetch(line + next[c + i], 0, 2);
      for (int64_t v = 0; v < s.vectors; ++v) {
        float* out = y + v * ldy + (u - from) * outputs;
        if (last_alone && v % 2) segment<WIDTH, 1>(w, s, at, v, u, out);
        else segment<WIDTH, 2>(w, s, at, v, u, out);
      }
    }
  }
}

void by_input(const Call& c, const Codes& w, int64_t n, const float* bias, void* y, int64_t asked, int64_t block) {
  static thread_local Active read;
  static thread_local Segments kept;
  Segments& s = kept;
  take<V>(read, c.data(), c.type, c.m, c.k, c.mask);
  s.take(read, c.k, w, c.type);
  const int64_t threads = threads_for(asked, static_cast<double>(read.count * w.units * 64) * static_cast<double>(s.vectors)), outputs = 512 / w.width;
  const int64_t share = (w.units + threads - 1) / threads, each = std::clamp<int64_t>((block > 0 ? block : 2048) / outputs, 1, share), tasks = (w.units + each - 1) / each;
  effllm::in_phases<1>({tasks}, threads, [&](int, int64_t task) {
    static thread_local Buffer memory;
    const int64_t from = task * each, to = std::min(w.units, from + each), ldy = each * outputs + 16;
    float* acc = memory.take(s.vectors * ldy);
    std::memset(acc, 0, static_cast<size_t>(s.vectors * ldy) * 4);
    if (w.width == 4) blocks_of<4>(w, s, s.each > 1, from, to, acc, ldy);
    else blocks_of<8>(w, s, s.each > 1, from, to, acc, ldy);
    const int64_t width = std::min(n, to * outputs) - from * outputs;
    for (int64_t i = 0; i < c.m; ++i) {
      float* sums = acc + i * s.each * ldy;
      for (int64_t v = 1; v < s.each; ++v)
        for (int64_t j = 0; j < width; ++j) sums[j] += sums[v * ldy + j];
      write(sums, bias ? bias + from * outputs : nullptr, y, i * n + from * outputs, width, c.type);
    }
  });
}

// Activations of all columns: digits in plain order, steps of parts of at most 64 columns that share a scale.
struct Columns {
  int64_t vectors = 0, each = 1, length = 0, segments = 0, part = 0, parts = 0, planes = 0, stride = 0;
  std::vector<int8_t> x;         // [vector][digit][stride]
  std::vector<float> step;       // [vector][parts], high planes of nibbles times kHigh
  std::vector<float> sum;        // [row][segments]
  const int8_t* row(int64_t vector, int64_t d) const { return x.data() + (2 * vector + d) * stride; }

  void take(const Call& c, const Codes& w) {
    const int digits = digits_of(c.type);
    each = vectors_of(c.type), vectors = c.m * each;
    length = w.group ? w.group : kLongest, segments = (c.k + length - 1) / length, part = std::min<int64_t>(64, length);
    planes = w.units * (8 / w.width), parts = planes * (64 / part), stride = planes * 64 + 64;
    x.assign(static_cast<size_t>(2 * vectors * stride), 0);
    step.assign(static_cast<size_t>(vectors * parts + 16), 0.f), sum.assign(static_cast<size_t>(c.m * segments), 0.f);
    float f[kLongest];
    for (int64_t r = 0; r < c.m; ++r)
      for (int64_t g = 0; g < segments; ++g) {
        const int64_t from = g * length, count = std::min(length, c.k - from);
        for (int64_t j = 0; j < count; ++j) f[j] = effllm::load_as_float(c.data(), r * c.k + from + j, c.type);
        int8_t* q[3];
        for (int d = 0; d < digits; ++d) q[d] = x.data() + (2 * (r * each + d / 2) + d % 2) * stride + from;
        float unit, total;
        const bool finite = effllm::digits_of_segment(f, count, digits, q, unit, total);
        for (int d = 0; !finite && d < digits; ++d) std::memset(q[d], 0, static_cast<size_t>(count));
        sum[static_cast<size_t>(r * segments + g)] = finite ? (w.minimum ? 1.f : -2.f * w.zero) * total : std::nanf("");
        for (int64_t v = 0; v < each; ++v)
          for (int64_t p = from / part; p < (from + count + part - 1) / part; ++p) {
            const bool raised = w.width == 4 && p * part / 64 % 2;
            step[static_cast<size_t>((r * each + v) * parts + p)] = finite ? step_of(unit, digits, v) * (raised ? effllm::Quads<V>::kHigh : 1.f) : std::nanf("");
          }
      }
  }
};

// The exact sum of 64 codes times ND digits, by lane.
template <int ND> inline I sums_of(const W& c, const int8_t* x0, const int8_t* x1) {
  const I high = effllm::Quads<V>::dot(c, x0);
  if constexpr (ND == 1) return high;
  else return V::shift_add(high, effllm::Quads<V>::dot(c, x1));
}

// One row of codes times a vector of ND digits; `scale` holds the row's scales by part. Returns the sum without what meets the sums of x.
template <int WIDTH, int ND, int PER> float row_of(const uint8_t* codes, const uint8_t* next, int64_t units, const Columns& s, int64_t vector, const float* scale) {
  using Q = effllm::Quads<V>;
  F total[2] = {V::zero_f(), V::zero_f()};
  const int8_t *x0 = s.row(vector, 0), *x1 = s.row(vector, 1);
  auto plane = [&](const W& c, int64_t p, F& to) {
    to = V::fma(V::to_float(sums_of<ND>(c, x0 + p * 64, x1 + p * 64)), Q::spread(scale + p * PER, PER), to);
  };
  for (int64_t u = 0; u < units; ++u) {
    __builtin_prefetch(next + u * 64);
    const W c = V::load(codes + u * 64);
    if constexpr (WIDTH == 8) {
      plane(c, u, total[u & 1]);
    } else {
      plane(V::template field<0, 0x0F>(c), 2 * u, total[0]);
      if constexpr (Q::raw) plane(V::template field<0, 0xF0>(c), 2 * u + 1, total[1]);
      else plane(V::template field<4, 0x0F>(c), 2 * u + 1, total[1]);
    }
  }
  return effllm::sum16(total[0]) + effllm::sum16(total[1]);
}

template <int WIDTH, int ND> float row(const uint8_t* codes, const uint8_t* next, int64_t units, const Columns& s, int64_t vector, const float* scale) {
  if (s.part == 64) return row_of<WIDTH, ND, 1>(codes, next, units, s, vector, scale);
  if (s.part == 32) return row_of<WIDTH, ND, 2>(codes, next, units, s, vector, scale);
  return row_of<WIDTH, ND, 4>(codes, next, units, s, vector, scale);
}

void by_output(const Call& c, const Tensor& gate, Type gate_type, const Codes& w, const float* bias, void* y, int64_t asked, int64_t block) {
  static thread_local Active kept;
  static thread_local Columns columns;
  Active& a = kept;
  Columns& s = columns;
  const int64_t n = w.lines;
  take<V>(a, gate.const_data_ptr(), gate_type, c.m, n, c.mask);
  s.take(c, w);
  std::memset(y, 0, static_cast<size_t>(c.m * n * size_of(c.type)));
  const int64_t threads = threads_for(asked, static_cast<double>(a.count * w.units * 64) * static_cast<double>(s.vectors));
  const int64_t each = std::clamp<int64_t>(block > 0 ? block : 64, 1, std::max<int64_t>(1, (a.count + threads - 1) / threads));
  effllm::in_phases<1>({(a.count + each - 1) / each}, threads, [&](int, int64_t task) {
    static thread_local Buffer memory;
    const int64_t room = std::max(s.segments, s.parts) + 32;
    float* scale = memory.take(4 * room);  // by segment
    float *minimum = scale + room, *wide = minimum + room, *steps = wide + room;
    std::memset(wide, 0, static_cast<size_t>(room) * 4);
    for (int64_t i = task * each; i < std::min(a.count, (task + 1) * each); ++i) {
      const int64_t j = a.index[static_cast<size_t>(i)], after = a.index[static_cast<size_t>(i + 1)];
      int64_t g = 0;
      if (w.group)
        for (; g + 16 <= s.segments; g += 16) {
          V::store_f(scale + g, load_scale(w.scale, j * w.stride + g, w.half));
          if (w.minimum) V::store_f(minimum + g, load_scale(w.minimum, j * w.stride + g, w.half));
        }
      for (; g < s.segments; ++g) {
        scale[g] = one_scale(w.scale, j * w.stride + (w.group ? g : 0), w.half);
        if (w.minimum) minimum[g] = one_scale(w.minimum, j * w.stride + (w.group ? g : 0), w.half);
      }
      const float* by_part = scale;
      if (s.length > s.part) {
        for (int64_t p = 0; p < s.parts; ++p) wide[p] = scale[std::min(s.segments - 1, p * s.part / s.length)];
        by_part = wide;
      }
      for (int64_t r = 0; r < c.m; ++r) {
        const float gated = effllm::load_as_float(gate.const_data_ptr(), r * n + j, gate_type);
        if (!c.mask.passes(gated, j)) continue;
        float f = bias ? bias[j] : 0.f;
        for (int64_t v = r * s.each; v < (r + 1) * s.each; ++v) {
          const float* step = s.step.data() + v * s.parts;
          const int64_t known = std::min(s.parts, s.length > s.part ? s.parts : s.segments);
          for (int64_t p = 0; p < known; p += 16) V::store_f(steps + p, V::fma(V::load_f(by_part + p), V::load_f(step + p), V::zero_f()));
          for (int64_t p = known; p < s.parts; ++p) steps[p] = 0.f;
          const bool alone = s.each > 1 && v % 2;
          if (w.width == 4) f += alone ? row<4, 1>(w.line(j), w.line(after), w.units, s, v, steps) : row<4, 2>(w.line(j), w.line(after), w.units, s, v, steps);
          else f += alone ? row<8, 1>(w.line(j), w.line(after), w.units, s, v, steps) : row<8, 2>(w.line(j), w.line(after), w.units, s, v, steps);
        }
        const float *sums = s.sum.data() + r * s.segments, *meets = w.minimum ? minimum : scale;
        float offset = 0;
#pragma omp simd reduction(+ : offset)
        for (int64_t q = 0; q < s.segments; ++q) offset += sums[q] * meets[q];
        effllm::store_from_float(y, r * n + j, c.type, gated * (f + offset));
      }
    }
  });
}

// The dense weight in x's dtype: (K, n) of codes by input, (N, k) of codes by output.
Tensor expanded(const Tensor& like, const Codes& w, int64_t columns, bool by_output) {
  const Tensor dense = torch::stable::new_empty(like, {w.lines, columns});
  void* to = dense.mutable_data_ptr();
  const Type type = effllm::type_of(like.scalar_type());
  const int64_t per = 8 / w.width;
  const uint32_t mask = (1u << w.width) - 1;
  torch::stable::parallel_for(0, w.lines, 16, [&](int64_t a, int64_t b) {
    for (int64_t i = a; i < b; ++i)
      for (int64_t c = 0; c < columns; ++c) {
        const int64_t unit = c / (512 / w.width), r = c % (512 / w.width);
        int64_t byte, bit;
        if (by_output) byte = r % 64, bit = r / 64 * w.width;
        else byte = r % 16 / 4 * 16 + r / 16 / per * 4 + r % 4, bit = r / 16 % per * w.width;
        const auto u = static_cast<float>((static_cast<uint32_t>(w.line(i)[unit * 64 + byte]) >> bit) & mask);
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
