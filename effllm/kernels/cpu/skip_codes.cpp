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
//           a later segment are prefetched meanwhile. 4-bit codes on AVX2 go by pairs of channels (pairs.h), and a task is a part of the channels,
//           added up in order at the end. by output: a task is a range of rows, some of those that are read taken together, front to back, and
//           the next ones prefetched.
// Numerics  the rounding of activations, 2^-16 of a segment's largest (fp32: 2^-24), is below that of bf16 (fp32) products; deterministic.
// Many rows the weight expanded to x's dtype, then PyTorch's own product.
#include "offer.h"
#include "pairs.h"
#include "skip.h"

namespace {

using namespace effllm::skip;
using effllm::Type;
using effllm::size_of;
using V = effllm::EFFLLM_ISA;
using F = V::F;
using I = V::I;
using W = V::W;

constexpr bool kPairwise = effllm::Pairs<V>::used;  // 4-bit codes by input go by pairs of channels (pairs.h), else by quads
constexpr int64_t kAheadSegments = kPairwise ? 1 : 3;  // that prefetches run ahead: by then the first-level cache may have lost them, the second has them
constexpr int64_t kBlock = kPairwise ? 4096 : 2048;    // outputs of a task
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
  void prefetch_scales(int64_t at, int64_t count) const {  // and minima, into the second-level cache
    const int64_t value = half ? 2 : 4;
    for (const void* p : {scale, minimum})
      for (int64_t b = 0; p && b < count * value; b += 64) __builtin_prefetch(static_cast<const char*>(p) + at * value + b, 0, 2);
  }
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

// The read channels by segment, in quads, and the digits of each vector. Segments are listed first, then filled in any order, by parts.
struct Segments {
  static constexpr int64_t kPart = 32;  // segments that one task fills
  int64_t vectors = 0, each = 1, ld = 0, length = 0, line = 0;  // vectors in all, of a row; channels of a segment; bytes of a channel
  int digits = 2;
  float factor = 1.f;           // of the sum of x
  bool doubled = false;         // digits of pairs of channels are needed, too
  std::vector<int64_t> offset;  // bytes to the codes of a channel, four a quad
  std::vector<int32_t> values;  // [vector][digit][quad]: four int8
  std::vector<int32_t> twice;   // [vector][digit][pair]: two int8, and the same once more
  std::vector<int64_t> start, stop;  // quads of each segment; after the last those of a segment without any
  std::vector<int64_t> first;   // of each segment in the list of active channels, and the end
  std::vector<int64_t> group;   // of each segment
  std::vector<float> step, sum; // [segment][vector]; what meets the scale (or minimum) belongs to a row's first vector

  const int32_t* row(int64_t vector, int64_t d) const { return values.data() + (2 * vector + d) * ld; }
  const int32_t* pair_row(int64_t vector, int64_t d) const { return twice.data() + (2 * vector + d) * 2 * ld; }
  int64_t count() const { return static_cast<int64_t>(group.size()); }
  int64_t parts() const { return (count() + kPart - 1) / kPart; }
  int64_t channels(int64_t at) const { return first[static_cast<size_t>(at + 1)] - first[static_cast<size_t>(at)]; }

  void list(const Active& a, int64_t k, const Codes& w, Type type) {
    digits = digits_of(type), each = vectors_of(type), vectors = a.m * each, doubled = kPairwise && w.width == 4;
    length = w.group ? w.group : kLongest, line = w.units * 64, factor = w.minimum ? 1.f : -2.f * w.zero;
    start.clear(), stop.clear(), first.assign(1, 0), group.clear();
    int64_t quads = 0;
    for (int64_t i = 0; i < a.count;) {
      const int32_t* index = a.index.data() + i;
      const int64_t segment = *index / length, past = (segment + 1) * length, room = std::min(length, a.count - i);
      int64_t count = 0;
      for (int64_t c = 0; c < room; ++c) count += index[c] < past;  // in order, so those that pass come first
      if (this->count() % kPart == 0) quads += 4;  // digits_by writes past the end: not where another part begins
      start.push_back(quads), stop.push_back(quads += (count + 3) / 4);
      group.push_back(w.group ? segment : 0);
      first.push_back(i += count);
    }
    start.push_back(quads), stop.push_back(quads);
    ld = quads + 4;
    grow(offset, 4 * ld), grow(values, 2 * vectors * ld), grow(step, this->count() * vectors), grow(sum, this->count() * vectors);
    if (doubled) grow(twice, 4 * vectors * ld);
  }

  void fill(const Active& a, int64_t part) {
    for (int64_t at = part * kPart; at < std::min(count(), (part + 1) * kPart); ++at) {
      const int64_t i = first[static_cast<size_t>(at)], n = channels(at), quad = start[static_cast<size_t>(at)], own = stop[static_cast<size_t>(at)] - quad;
      int64_t* to = offset.data() + 4 * quad;
      for (int64_t c = 0; c < n; ++c) to[c] = a.index[static_cast<size_t>(i + c)] * line;
      for (int64_t c = n; c < 4 * own; ++c) to[c] = to[n - 1];
      for (int64_t r = 0; r < a.m; ++r) {
        float unit, total;
        int8_t* q[3];
        for (int d = 0; d < digits; ++d) q[d] = reinterpret_cast<int8_t*>(values.data() + (2 * (r * each + d / 2) + d % 2) * ld + quad);
        const bool finite = effllm::digits_by<V>(a.row(r) + i, n, digits, q, unit, total);
        for (int d = 0; d < digits; ++d) {
          std::memset(q[d] + (finite ? n : 0), 0, static_cast<size_t>(4 * own - (finite ? n : 0)));
          if (doubled) double_pairs(reinterpret_cast<const uint16_t*>(q[d]), 2 * own, twice.data() + (2 * (r * each + d / 2) + d % 2) * 2 * ld + 2 * quad);
        }
        for (int64_t v = 0; v < each; ++v) {
          step[static_cast<size_t>(at * vectors + r * each + v)] = finite ? step_of(unit, digits, v) : std::nanf("");
          sum[static_cast<size_t>(at * vectors + r * each + v)] = v ? 0.f : finite ? factor * total : std::nanf("");
        }
      }
    }
  }

 private:
  template <class T> static void grow(std::vector<T>& v, int64_t count) {
    if (static_cast<int64_t>(v.size()) < count) v.resize(static_cast<size_t>(count));
  }
  static void double_pairs(const uint16_t* from, int64_t count, int32_t* to) {
#pragma omp simd
    for (int64_t p = 0; p < count; ++p) to[p] = static_cast<int32_t>(from[p] * 0x10001u);
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
  const int64_t end = s.stop[static_cast<size_t>(at)];
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

// The lines of a segment in the order in which they are asked for: a channel's units from .. to, then the next channel's.
struct Lines {
  const uint8_t* base;
  const int64_t *next, *end;
  int64_t units, line = 0;
  // Some lines, one behind the other; what lies behind a channel's last one is not wanted, and does no harm.
  const uint8_t* take(int64_t some) {
    if (next >= end) return base;
    const uint8_t* p = base + *next + line * 64;
    if ((line += some) >= units) line = 0, ++next;
    return p;
  }
};

// The same by pairs of channels, 32 bytes of them at a time.
template <int ND, class P = effllm::Pairs<V>> inline void pair_segment(const Codes& w, const Segments& s, int64_t at, int64_t vector, int64_t unit, float* y, Lines& lines) {
  const int64_t quad = s.start[static_cast<size_t>(at)], scales = s.group[static_cast<size_t>(at)] * w.stride + unit * 128;
  const float step = s.step[static_cast<size_t>(at * s.vectors + vector)], sum = s.sum[static_cast<size_t>(at * s.vectors + vector)];
  typename P::Sums total[2][8];
  P::template sums<ND>(w.data + unit * 64, s.offset.data() + 4 * quad, s.pair_row(vector, 0) + 2 * quad, s.pair_row(vector, 1) + 2 * quad, (s.channels(at) + 1) / 2, total, lines);
  for (int64_t half = 0; half < 2; ++half) {
    float* out = y + 8 * half;
    if (w.half && !w.minimum) {
      const auto* p = static_cast<const uint16_t*>(w.scale) + scales + 8 * half;
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) P::add_scaled(total[half][i], step, sum, p + P::output(i), out + P::output(i));
    } else {
      for (int i = 0; i < 8; ++i) P::add_any(total[half][i], step, sum, w.scale, w.minimum, w.half, scales + 8 * half + P::output(i), out + P::output(i));
    }
  }
}

// Units from .. to of segments first .. last: y (vectors, ldy), starting at unit `from`. A later segment comes in meanwhile, channel after
// channel, so that neighbouring lines are asked for together: line by line over all channels takes a fifth longer. Its scales come with it.
template <int WIDTH> void blocks_of(const Codes& w, const Segments& s, int64_t first, int64_t last, int64_t from, int64_t to, float* y, int64_t ldy) {
  constexpr int64_t outputs = 512 / WIDTH;
  const uint8_t* lines = w.data + from * 64;
  for (int64_t at = first; at < last; ++at) {
    const int64_t far = at + kAheadSegments, each = far < last ? s.channels(far) : 0, scales = w.group && far < last ? s.group[static_cast<size_t>(far)] * w.stride : -1;
    const int64_t* next = s.offset.data() + 4 * s.start[static_cast<size_t>(std::min(far, s.count()))];
    constexpr bool pairs = kPairwise && WIDTH == 4;
    Lines later{lines, next, next + each, to - from};
    for (int64_t u = from; u < to; ++u) {
      if constexpr (!pairs)
        for (int64_t c = 0; c < each; ++c) __builtin_prefetch(later.take(1), 0, 2);
      if (!pairs && scales >= 0) w.prefetch_scales(scales + u * outputs, outputs);
      for (int64_t v = 0; v < s.vectors; ++v) {
        float* out = y + v * ldy + (u - from) * outputs;
        const bool alone = s.each > 1 && v % 2;
        if constexpr (pairs) alone ? pair_segment<1>(w, s, at, v, u, out, later) : pair_segment<2>(w, s, at, v, u, out, later);
        else alone ? segment<WIDTH, 1>(w, s, at, v, u, out) : segment<WIDTH, 2>(w, s, at, v, u, out);
      }
    }
  }
}

// Parts of the channels that are summed apart, so that a thread reads whole channels and not its outputs of all of them: long runs of memory, each
// page once. Of the shape alone: sums must not depend on threads or on which channels are read.
inline int64_t parts_of(int64_t k) { return kPairwise && k >= 4096 ? 2 : 1; }

void by_input(const Call& c, const Codes& w, int64_t n, const float* bias, void* y, int64_t asked, int64_t block) {
  static thread_local Active read;
  static thread_local Segments kept;
  static thread_local Buffer memory;
  Segments& s = kept;
  const Active& listed = read;
  take<V>(read, c.data(), c.type, c.m, c.k, c.mask);
  s.list(read, c.k, w, c.type);
  const int64_t threads = threads_for(asked, static_cast<double>(read.count * w.units * 64) * static_cast<double>(s.vectors)), outputs = 512 / w.width;
  const int64_t parts = parts_of(c.k), sides = (threads + parts - 1) / parts;
  const int64_t each = std::clamp<int64_t>((block > 0 ? block : kBlock) / outputs, 1, (w.units + sides - 1) / sides), blocks = (w.units + each - 1) / each;
  const int64_t ldy = w.units * outputs + 16, whole = s.vectors * ldy, slice = 1024, slices = (n + slice - 1) / slice;
  float* sums = memory.take(parts * whole);
  auto segment_at = [&](int64_t part) {  // the first at or behind the part's first channel
    const int64_t channel = part * c.k / parts;
    return std::partition_point(s.first.begin(), s.first.end() - 1, [&](int64_t i) { return listed.index[static_cast<size_t>(i)] / s.length < (channel + s.length - 1) / s.length; }) - s.first.begin();
  };
  effllm::in_phases<3>({s.parts(), parts * blocks, slices}, threads, [&](int phase, int64_t task) {
    if (phase == 0) return s.fill(listed, task);
    if (phase == 1) {
      const int64_t part = task / blocks, from = task % blocks * each, to = std::min(w.units, from + each);
      float* acc = sums + part * whole + from * outputs;
      for (int64_t v = 0; v < s.vectors; ++v) std::memset(acc + v * ldy, 0, static_cast<size_t>((to - from) * outputs) * 4);
      const int64_t first = segment_at(part), last = segment_at(part + 1);
      if (w.width == 4) blocks_of<4>(w, s, first, last, from, to, acc, ldy);
      else blocks_of<8>(w, s, first, last, from, to, acc, ldy);
      return;
    }
    const int64_t from = task * slice, width = std::min(slice, n - from);
    for (int64_t i = 0; i < c.m; ++i) {
      float* to = sums + i * s.each * ldy + from;
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t v = part == 0; v < s.each; ++v) {
          const float* more = to + part * whole + v * ldy;
#pragma omp simd
          for (int64_t j = 0; j < width; ++j) to[j] += more[j];
        }
      write(to, bias ? bias + from : nullptr, y, i * n + from, width, c.type);
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
    step.assign(static_cast<size_t>(vectors * parts + 16), 0.f), sum.assign(static_cast<size_t>(c.m * segments + 16), 0.f);
    float f[kLongest];
    for (int64_t r = 0; r < c.m; ++r)
      for (int64_t g = 0; g < segments; ++g) {
        const int64_t from = g * length, count = std::min(length, c.k - from);
        floats(c.data(), r * c.k + from, count, c.type, f);
        int8_t* q[3];
        for (int d = 0; d < digits; ++d) q[d] = x.data() + (2 * (r * each + d / 2) + d % 2) * stride + from;
        float unit, total;
        const bool finite = effllm::digits_by<V>(f, count, digits, q, unit, total);
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
template <bool WIDE, int ND> inline I sums_of(const W& c, const int8_t* x0, const int8_t* x1) {
  if constexpr (ND == 1) return effllm::Quads<V>::template dot<WIDE>(c, x0);
  else return effllm::Quads<V>::template dot<WIDE>(c, x0, x1);
}

constexpr int kRows = effllm::Quads<V>::raw ? 4 : 2;  // rows that share the loads of activations: what registers hold

// Rows of codes times a vector of ND digits; scale[r] holds row r's steps by part, kRows rows `ld` apart. What meets the sums of x is not in y.
// Lines of the rows that come next are asked for meanwhile.
template <int WIDTH, int ND, int PER> void rows_of(const uint8_t* const* codes, const uint8_t* const* next, int64_t units, const Columns& s, int64_t vector, const float* scale, int64_t ld, float* y) {
  using Q = effllm::Quads<V>;
  F total[kRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) total[r] = V::zero_f();
  const int8_t *x0 = s.row(vector, 0), *x1 = s.row(vector, 1);
  auto plane = [&](const W& c, int64_t p, int r) {
    total[r] = V::fma(V::to_float(sums_of<WIDTH == 8, ND>(c, x0 + p * 64, x1 + p * 64)), Q::spread(scale + r * ld + p * PER, PER), total[r]);
  };
  for (int64_t u = 0; u < units; ++u) {
    W c[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(next[r] + u * 64, 0, 2), c[r] = V::load(codes[r] + u * 64);
    if constexpr (WIDTH == 8) {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) plane(c[r], u, r);
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) plane(V::template field<0, 0x0F>(c[r]), 2 * u, r);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        if constexpr (Q::raw) plane(V::template field<0, 0xF0>(c[r]), 2 * u + 1, r);
        else plane(V::template field<4, 0x0F>(c[r]), 2 * u + 1, r);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) y[r] += effllm::sum16(total[r]);
}

template <int WIDTH, int ND> void rows(const uint8_t* const* codes, const uint8_t* const* next, int64_t units, const Columns& s, int64_t vector, const float* scale, int64_t ld, float* y) {
  if (s.part == 64) return rows_of<WIDTH, ND, 1>(codes, next, units, s, vector, scale, ld, y);
  if (s.part == 32) return rows_of<WIDTH, ND, 2>(codes, next, units, s, vector, scale, ld, y);
  return rows_of<WIDTH, ND, 4>(codes, next, units, s, vector, scale, ld, y);
}

// A row's steps by part (its scales times those of x, zero where the row ends), and the sum over its segments of what meets those of x.
void steps_of(const Codes& w, const Columns& s, int64_t line, int64_t vector, float* to) {
  const float* step = s.step.data() + vector * s.parts;
  const int64_t at = line * w.stride, known = std::min(s.parts, (s.segments * s.length) / s.part);
  int64_t p = 0;
  if (w.group && s.length == s.part)
    for (; p + 16 <= s.segments; p += 16) V::store_f(to + p, V::fma(load_scale(w.scale, at + p, w.half), V::load_f(step + p), V::zero_f()));
  for (; p < known; ++p) to[p] = step[p] * one_scale(w.scale, at + (w.group ? p * s.part / s.length : 0), w.half);
  for (; p < s.parts; ++p) to[p] = 0.f;
}

float offset_of(const Codes& w, const Columns& s, int64_t line, int64_t row) {
  const void* meets = w.minimum ? w.minimum : w.scale;
  const float* sums = s.sum.data() + row * s.segments;
  float offset = 0;
  int64_t g = 0;
  if (w.group) {
    F total = V::zero_f();
    for (; g + 16 <= s.segments; g += 16) total = V::fma(load_scale(meets, line * w.stride + g, w.half), V::load_f(sums + g), total);
    if (g) offset = effllm::sum16(total);
  }
  for (; g < s.segments; ++g) offset += sums[g] * one_scale(meets, line * w.stride + (w.group ? g : 0), w.half);
  return offset;
}

// A task is a range of channels; within it each row of x takes its own, so that a channel which several rows read comes from memory once.
void by_output(const Call& c, const Tensor& gate, Type gate_type, const Codes& w, const float* bias, void* y, int64_t asked, int64_t block) {
  static thread_local Active kept[kMost];
  static thread_local Columns columns;
  Active* lists = kept;
  Columns& s = columns;
  const int64_t n = w.lines;
  int64_t read = 0;
  for (int64_t m = 0; m < c.m; ++m) {
    take<V>(lists[m], static_cast<const char*>(gate.const_data_ptr()) + m * n * size_of(gate_type), gate_type, 1, n, c.mask);
    read += lists[m].count;
  }
  s.take(c, w);
  std::memset(y, 0, static_cast<size_t>(c.m * n * size_of(c.type)));
  const int64_t threads = threads_for(asked, static_cast<double>(read * w.units * 64) * static_cast<double>(s.each));
  const int64_t each = std::clamp<int64_t>(block > 0 ? block : 128, 1, std::max<int64_t>(1, (n + threads - 1) / threads));
  effllm::in_phases<1>({(n + each - 1) / each}, threads, [&](int, int64_t task) {
    static thread_local Buffer memory;
    const int64_t ld = s.parts + 16;
    float* steps = memory.take(kRows * ld);
    for (int64_t m = 0; m < c.m; ++m) {
      const Active& a = lists[m];
      auto before = [&](int64_t channel) { return std::lower_bound(a.index.data(), a.index.data() + a.count, channel) - a.index.data(); };
      const int64_t end = before(std::min(n, (task + 1) * each));
      for (int64_t i = before(task * each); i < end; i += kRows) {
        const uint8_t *codes[kRows], *next[kRows];
        int64_t line[kRows];
        float f[kRows];
        for (int r = 0; r < kRows; ++r) {  // past the end the last row once more
          line[r] = a.index[static_cast<size_t>(std::min(i + r, end - 1))], codes[r] = w.line(line[r]), f[r] = bias ? bias[line[r]] : 0.f;
          const int64_t later = a.index[static_cast<size_t>(i + kRows + r)];
          next[r] = w.line(later);
          if (w.group) w.prefetch_scales(later * w.stride, w.stride);
        }
        for (int64_t v = m * s.each; v < (m + 1) * s.each; ++v) {
          for (int r = 0; r < kRows; ++r) steps_of(w, s, line[r], v, steps + r * ld);
          const bool alone = s.each > 1 && v % 2;
          if (w.width == 4) alone ? rows<4, 1>(codes, next, w.units, s, v, steps, ld, f) : rows<4, 2>(codes, next, w.units, s, v, steps, ld, f);
          else alone ? rows<8, 1>(codes, next, w.units, s, v, steps, ld, f) : rows<8, 2>(codes, next, w.units, s, v, steps, ld, f);
        }
        for (int r = 0; r < kRows && i + r < end; ++r)
          effllm::store_from_float(y, m * n + line[r], c.type, a.values[static_cast<size_t>(i + r)] * (f[r] + offset_of(w, s, line[r], m)));
      }
    }
  });
}

// Sixteen neighbouring codes of a channel (by input: outputs; by output: columns), as floats: which = 0 .. 512 / WIDTH / 16 of a unit.
template <int WIDTH, bool OUTPUT> inline F sixteen(const uint8_t* unit, int which) {
  constexpr int per = 8 / WIDTH;
  const int shift = OUTPUT ? which / 4 * WIDTH : which % per * WIDTH, r = OUTPUT ? which % 4 : which / per;
  alignas(64) float f[16];
  for (int q = 0; q < 4; ++q) {
    uint32_t four;
    std::memcpy(&four, unit + (OUTPUT ? 16 * r + 4 * q : 16 * q + 4 * r), 4);
    for (int i = 0; i < 4; ++i) f[4 * q + i] = static_cast<float>((four >> (8 * i + shift)) & ((1u << WIDTH) - 1));
  }
  return V::load_f(f);
}

// The dense weight in x's dtype: (K, n) of codes by input, (N, k) of codes by output.
template <int WIDTH, bool OUTPUT> void expand(const Codes& w, int64_t columns, void* to, Type type) {
  torch::stable::parallel_for(0, w.lines, 16, [&](int64_t a, int64_t b) {
    alignas(64) float f[16], scale[16], low[16] = {};
    for (int64_t i = a; i < b; ++i)
      for (int64_t c = 0; c < columns; c += 16) {
        // by input the scales of neighbours are neighbours, by output they are one: groups are whole multiples of 16 columns
        const int64_t g = w.group ? (OUTPUT ? c : i) / w.group : 0, at = OUTPUT ? i * w.stride + g : g * w.stride + c;
        if constexpr (OUTPUT) {
          const float s = 2.f * one_scale(w.scale, at, w.half), m = w.minimum ? one_scale(w.minimum, at, w.half) : -s * w.zero;
          for (int j = 0; j < 16; ++j) scale[j] = s, low[j] = m;
        } else {
          const F s = load_scale(w.scale, at, w.half);
          V::store_f(scale, V::axpb(s, 2.f, 0.f));
          V::store_f(low, w.minimum ? load_scale(w.minimum, at, w.half) : V::axpb(s, -2.f * w.zero, 0.f));
        }
        const F u = sixteen<WIDTH, OUTPUT>(w.line(i) + c / (512 / WIDTH) * 64, static_cast<int>(c % (512 / WIDTH) / 16));
        V::store_f(f, V::fma(V::load_f(scale), u, V::load_f(low)));
        const int64_t count = std::min<int64_t>(16, columns - c);
        write(f, nullptr, to, i * columns + c, count, type);
      }
  });
}

Tensor expanded(const Tensor& like, const Codes& w, int64_t columns, bool by_output) {
  const Tensor dense = torch::stable::new_empty(like, {w.lines, columns});
  const Type type = effllm::type_of(like.scalar_type());
  void* to = dense.mutable_data_ptr();
  if (w.width == 4) by_output ? expand<4, true>(w, columns, to, type) : expand<4, false>(w, columns, to, type);
  else by_output ? expand<8, true>(w, columns, to, type) : expand<8, false>(w, columns, to, type);
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
  effllm::offer(m, "skip_input_codes", TORCH_BOX(&skip_input_codes));
  effllm::offer(m, "skip_output_codes", TORCH_BOX(&skip_output_codes));
}
