// Linears with bipolar-INT weights that skip channels by output, where a gate closes them (maths, layout and numerics: skip_codes.h).
//
// Bytes     the codes and scales of channels that are read.
// Order     a task is a range of rows, some of those that are read taken together, front to back, and the next ones prefetched.
#include "skip_codes.h"

namespace {

using namespace effllm::skip;
using effllm::Type;
using effllm::size_of;

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
  m.def("skip_output_codes(Tensor x, Tensor gate, Tensor threshold, Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias, int bits, int group, float zero, int limit, int threads=0, int block=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "skip_output_codes", TORCH_BOX(&skip_output_codes)); }
