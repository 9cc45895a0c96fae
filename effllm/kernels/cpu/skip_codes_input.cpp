// Linears with bipolar-INT weights that skip channels by input (maths, layout and numerics: skip_codes.h).
//
// Bytes     the codes of channels that are read, and all scales.
// Order     a task is a block of outputs with fp32 sums in cache; segments in order; four channels that are read are turned into bytes of one output
//           each and multiplied at once, with all sums of 64 bytes of codes in registers over a segment; lines of a later segment are prefetched
//           meanwhile. 4-bit codes on AVX2 go by pairs of channels (pairs.h), and a task is a part of the channels, added up in order at the end.
#include "skip_codes.h"

namespace {

using namespace effllm::skip;
using effllm::Type;

constexpr bool kPairwise = effllm::Pairs<V>::used;  // 4-bit codes by input go by pairs of channels (pairs.h), else by quads
constexpr int64_t kAheadSegments = kPairwise ? 1 : 3;  // that prefetches run ahead: by then the first-level cache may have lost them, the second has them
constexpr int64_t kBlock = kPairwise ? 4096 : 2048;    // outputs of a task

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

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("skip_input_codes(Tensor x, Tensor threshold, Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias, int n, int bits, int group, float zero, int limit, int threads=0, int block=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "skip_input_codes", TORCH_BOX(&skip_input_codes)); }
