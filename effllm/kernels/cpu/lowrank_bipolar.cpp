// y = (x B^T) A^T + bias with both factors bipolar-INT in tile16: one parallel region, the intermediate stays in cache.
//
// Grid      tasks of two tiles of B, whose 32 outputs are one segment of the second stage's activations: each task turns its own segment into
//           digits (activation.h), so that no step between the stages is serial. Then tasks of tiles of A.
// Bytes     both factors' codes and scales once.
// Numerics  the intermediate as int8 digits, two for 16-bit x and three for fp32: its rounding, 2^-16 (2^-24) of a segment's maximum, is far below
//           that of bf16 (fp32). From `expand_from` rows on two linears of bipolar.cpp with the intermediate in x's dtype.
#include "expand_fp32.h"
#include "offer.h"
#include "packed.h"
#include "phases.h"

namespace {

using effllm::Activations;
using effllm::Plan;
using effllm::Type;
using effllm::Weight;
using torch::stable::Tensor;
using V = effllm::EFFLLM_ISA;

constexpr int64_t kTaskBytes = 48 << 10;
constexpr double kCodeBytesPerNs = 10, kProductNs = 8.0 / 3, kWorthNs = 4000;

struct Pair {
  Weight a, b;
  int64_t rank, tasks1, tasks2, each;  // each: tiles of A a task
  Activations mid;
};

struct Factors {
  std::vector<Tensor> codes, scale, minimum;
  int64_t bits, group;
  float zero;
  const void* low(size_t i) const { return minimum.empty() ? nullptr : minimum[i].const_data_ptr(); }
  float factor() const { return minimum.empty() ? -zero : 0.5f; }  // turns a sum of x into the correction term
};

double nanoseconds(const Weight& w, int64_t bits, int64_t m, int digits) {
  return static_cast<double>(w.tiles * w.blocks) * (64.0 * static_cast<double>(bits) / kCodeBytesPerNs + static_cast<double>(m) * digits * kProductNs);
}

void fused(const Tensor& x, int64_t m, int64_t k, std::vector<Pair>& pairs, const Factors& a, const Factors& b, const float* bias, void* y, const Plan& how) {
  const Type type = effllm::type_of(x.scalar_type());
  const int digits = type == Type::f32 ? 3 : 2;
  static thread_local Activations held;
  Activations& input = held;  // the calling thread's, also inside the tasks: a thread-local name there would be the worker's own
  const Weight& w0 = pairs[0].b;
  input.shape<V>(m, k, w0.blocks * 32, b.group == 16 ? 16 : 32, digits, b.bits);
  const float first_factor = b.factor(), second_factor = a.factor();
  torch::stable::parallel_for(0, m, 8, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) input.take_float(i, x.const_data_ptr(), type, first_factor);
  });
  int64_t first = 0, second = 0;
  double ns = 0;
  for (auto& p : pairs) {
    p.mid.shape<V>(m, p.rank, p.a.blocks * 32, a.group == 16 ? 16 : 32, digits, a.bits);
    std::fill(p.mid.step.begin(), p.mid.step.end(), 0.f), std::fill(p.mid.corr.begin(), p.mid.corr.end(), 0.f);
    first += p.tasks1 = (p.b.tiles + 1) / 2;
    const int64_t tile_bytes = p.a.blocks * 64 * a.bits, share = (p.a.tiles + 7) / 8;
    p.each = (std::max<int64_t>(1, std::min(kTaskBytes / tile_bytes, share)) + 1) / 2 * 2;
    second += p.tasks2 = (p.a.tiles + p.each - 1) / p.each;
    ns += nanoseconds(p.a, a.bits, m, digits) + nanoseconds(p.b, b.bits, m, digits);
  }
  const int64_t most = torch::stable::get_num_threads();
  const int64_t threads = how.threads > 0 ? how.threads : std::max<int64_t>(1, std::min(most, static_cast<int64_t>(ns / kWorthNs)));
  effllm::in_phases<2>({first, second}, threads, [&](int phase, int64_t task) {
    for (auto& p : pairs) {
      const int64_t tasks = phase ? p.tasks2 : p.tasks1;
      if (task >= tasks) { task -= tasks; continue; }
      if (phase) {
        const int64_t from = task * p.each;
        effllm::multiply_range<V>(p.a, a.bits, p.mid, from, std::min(p.a.tiles, from + p.each), nullptr, bias, y, type, how);
        return;
      }
      static thread_local std::vector<float> out;
      out.assign(static_cast<size_t>(m * 32), 0.f);
      Weight w = p.b;
      const int64_t tile = 2 * task;
      w.ldy = 32, w.col = -tile * 16;
      effllm::multiply_range<V>(w, b.bits, input, tile, std::min(w.tiles, tile + 2), nullptr, nullptr, out.data(), Type::f32, how);
      const int64_t seg = p.mid.seg;
      for (int64_t i = 0; i < m; ++i)
        for (int64_t c = 0; c < 32; c += seg) {
          const int64_t at = tile * 16 + c, n = std::min(seg, p.rank - at);
          if (n > 0) p.mid.take_segment(i, at / seg, out.data() + i * 32 + c, n, second_factor);
        }
      return;
    }
  });
}

Tensor in_turn(const Tensor& x, int64_t m, const std::vector<Pair>& pairs, const Factors& a, const Factors& b, const std::optional<Tensor>& bias, int64_t total, const Plan& how) {
  std::vector<Tensor> parts;
  for (size_t i = 0; i < pairs.size(); ++i) {
    const Tensor mid = effllm::multiply_one<V>(x, b.codes[i], b.scale[i], b.low(i), std::nullopt, pairs[i].rank, b.bits, b.group, b.zero, how);
    parts.push_back(effllm::multiply_one<V>(mid, a.codes[i], a.scale[i], a.low(i), bias, pairs[i].a.n, a.bits, a.group, a.zero, how));
  }
  if (parts.size() == 1) return parts[0];
  const Tensor y = torch::stable::new_empty(x, {m, total});
  const int64_t size = effllm::type_of(y.scalar_type()) == Type::f32 ? 4 : 2;
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, m, 16, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) {
      int64_t col = 0;
      for (size_t j = 0; j < parts.size(); col += pairs[j++].a.n)
        std::memcpy(to + (i * total + col) * size, static_cast<const char*>(parts[j].const_data_ptr()) + i * pairs[j].a.n * size, static_cast<size_t>(pairs[j].a.n * size));
    }
  });
  return y;
}

// n and rank 0: those of full tiles, as merged weights have them.
Tensor lowrank_bipolar(const Tensor x_in, std::vector<Tensor> a_codes, std::vector<Tensor> a_scale, std::vector<Tensor> a_minimum, std::vector<Tensor> b_codes, std::vector<Tensor> b_scale,
                       std::vector<Tensor> b_minimum, std::optional<Tensor> bias, int64_t n, int64_t rank, int64_t a_bits, int64_t a_group, double a_zero, int64_t b_bits, int64_t b_group, double b_zero,
                       int64_t threads, int64_t unpack_from, int64_t expand_from) {
  const size_t count = a_codes.size();
  STD_TORCH_CHECK(count > 0 && b_codes.size() == count && a_scale.size() == count && b_scale.size() == count, "effllm: as many scales as codes, as many first as second factors");
  STD_TORCH_CHECK((a_minimum.empty() || a_minimum.size() == count) && (b_minimum.empty() || b_minimum.size() == count), "effllm: a minimum for every factor or for none");
  STD_TORCH_CHECK(count == 1 || !bias, "effllm: merged low-rank linears have no bias");
  const Factors a{a_codes, a_scale, a_minimum, a_bits, a_group, static_cast<float>(a_zero)}, b{b_codes, b_scale, b_minimum, b_bits, b_group, static_cast<float>(b_zero)};
  const int64_t k = x_in.size(x_in.dim() - 1), m = k ? x_in.numel() / k : 0;
  static thread_local std::vector<Pair> pairs;  // keeps the intermediates' buffers between calls
  pairs.resize(count);
  int64_t total = 0;
  for (size_t i = 0; i < count; ++i) {
    Pair& p = pairs[i];
    p.rank = rank > 0 ? rank : b_codes[i].size(0) * 16;
    p.b = effllm::weight_of(b_codes[i], b_scale[i], b.low(i), p.rank, b_bits, b_group);
    p.a = effllm::weight_of(a_codes[i], a_scale[i], a.low(i), n > 0 ? n : a_codes[i].size(0) * 16, a_bits, a_group);
    effllm::check_columns(p.b, k), effllm::check_columns(p.a, p.rank);
    p.a.col = total;
    total += p.a.n;
  }
  for (auto& p : pairs) p.a.ldy = total;
  if (m == 0 || total == 0) return effllm::result(x_in, total, x_in.scalar_type());
  const Tensor x = torch::stable::view(x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in), {m, k});
  const Plan how{threads, unpack_from, expand_from, 0, 0, 0};
  if (effllm::expands<V>(how, m, effllm::type_of(x.scalar_type()))) {
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x_in.dim(); ++i) shape.push_back(x_in.size(i));
    shape.push_back(total);
    return torch::stable::view(in_turn(x, m, pairs, a, b, bias, total, how), shape);
  }
  const Tensor y = effllm::result(x_in, total, x_in.scalar_type());
  const std::vector<float> f = effllm::floats_of(bias, total);
  fused(x, m, k, pairs, a, b, bias ? f.data() : nullptr, y.mutable_data_ptr(), how);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("lowrank_bipolar(Tensor x, Tensor[] a_codes, Tensor[] a_scale, Tensor[] a_minimum, Tensor[] b_codes, Tensor[] b_scale, Tensor[] b_minimum, Tensor? bias, int n, int rank, "
        "int a_bits, int a_group, float a_zero, int b_bits, int b_group, float b_zero, int threads=0, int unpack_from=0, int expand_from=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "lowrank_bipolar", TORCH_BOX(&lowrank_bipolar)); }
