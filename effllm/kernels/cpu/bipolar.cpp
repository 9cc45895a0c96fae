// Registers the bipolar-INT linear ops of one instruction set against PyTorch's stable ABI. EFFLLM_NAMESPACE and EFFLLM_ISA come from
// the builder (build.py). Threads are PyTorch's own.
#include "bipolar.h"
#include "expand.h"
#include "expand_fp32.h"
#include "offer.h"
#include "packed.h"
#include "single.h"

namespace {

using effllm::Activations;
using effllm::Plan;
using effllm::result;
using effllm::type_of;
using effllm::weight_of;
using effllm::Type;
using effllm::Weight;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using V = effllm::EFFLLM_ISA;

template <int D> using Run = void (*)(const Weight&, const Activations&, int64_t, int64_t, const float*, const float*, void*, Type, const Plan&);
template <int D> Run<D> pick(int64_t bits) {
  static constexpr Run<D> table[8] = {effllm::multiply_tiles<V, 1, D>, effllm::multiply_tiles<V, 2, D>, effllm::multiply_tiles<V, 3, D>, effllm::multiply_tiles<V, 4, D>,
                                      effllm::multiply_tiles<V, 5, D>, effllm::multiply_tiles<V, 6, D>, effllm::multiply_tiles<V, 7, D>, effllm::multiply_tiles<V, 8, D>};
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "effllm: bits must be 1 to 8");
  return table[bits - 1];
}

// A thread is worth waking for about 3 us of work; one code costs about bits / 8 bytes at some 10 bytes a nanosecond, and per token
// and digit 1/64 of a dot product at one a cycle.
int64_t grain(int64_t tiles, int64_t blocks, int64_t bits, int64_t m, int digits) {
  const double tile_ns = static_cast<double>(blocks) * (64.0 * static_cast<double>(bits) / 10.0 + static_cast<double>(m) * digits * 8 / 3.0);
  return std::max<int64_t>(1, std::min<int64_t>(tiles, static_cast<int64_t>(3000.0 / tile_ns)));
}

void run(const std::vector<Weight>& weights, int64_t bits, const Activations& x, const float* out_scale, const float* bias, void* y, Type type, const Plan& how) {
  int64_t pairs = 0;
  for (const auto& w : weights) pairs += (w.tiles + 1) / 2;
  const int64_t each = how.threads > 0 ? (pairs + how.threads - 1) / how.threads : grain(pairs, 2 * weights[0].blocks, bits, x.m, x.digits);
  const auto go = x.digits == 1 ? pick<1>(bits) : x.digits == 2 ? pick<2>(bits) : pick<3>(bits);
  torch::stable::parallel_for(0, pairs, each, [&](int64_t from, int64_t to) {
    int64_t first = 0;
    for (const auto& w : weights) {
      const int64_t count = (w.tiles + 1) / 2, a = std::max(from, first), b = std::min(to, first + count);
      if (a < b) go(w, x, 2 * (a - first), std::min(w.tiles, 2 * (b - first)), out_scale, bias, y, type, how);
      first += count;
    }
  });
}

bool wants_tables(int64_t bits) { return bits == 1 || bits == 3 || bits == 5 || bits == 7; }

void prepare_int8(Activations& a, const int8_t* src, int64_t m, int64_t k, const Weight& w, double zero, int64_t bits, const Plan& how) {
  const int64_t kp = w.blocks * 32;
  a.shape<V>(m, k, kp, w.group == 0 ? kp : w.group, 1, bits);
  const float factor = w.minimum ? 0.5f : -static_cast<float>(zero);
  torch::stable::parallel_for(0, m, 16, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) a.take_int8<V>(i, src + i * k, factor);
  });
  a.tables.clear();
#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
  if (V::fast_single && m == 1 && wants_tables(bits) && effllm::single_wanted(bits, how)) {
    a.tables.resize(static_cast<size_t>(w.blocks * 256 + 64));
    effllm::build_tables(a.x.data(), w.blocks, const_cast<uint8_t*>(a.aligned_tables()));
  }
#endif
  (void)bits, (void)how;
}

void prepare_float(Activations& a, const void* x, int64_t m, int64_t k, const Weight& w, double zero, int64_t bits, Type type) {
  const int64_t kp = w.blocks * 32;
  a.shape<V>(m, k, kp, w.group == 16 ? 16 : 32, type == Type::f32 ? 3 : 2, bits);
  const float factor = w.minimum ? 0.5f : -static_cast<float>(zero);
  torch::stable::parallel_for(0, m, 8, [&](int64_t from, int64_t to) {
    for (int64_t i = from; i < to; ++i) a.take_float(i, x, type, factor);
  });
}

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
using Expand = void (*)(const Weight&, const uint16_t*, int64_t, int64_t, int64_t, float, int64_t, int64_t, const float*, void*, Type);
void run_expanded(const Tensor& x, const std::vector<Weight>& weights, int64_t bits, float zero, const float* bias, void* y, int64_t threads) {
  static constexpr Expand table[8] = {effllm::multiply_expanded<V, 1>, effllm::multiply_expanded<V, 2>, effllm::multiply_expanded<V, 3>, effllm::multiply_expanded<V, 4>,
                                      effllm::multiply_expanded<V, 5>, effllm::multiply_expanded<V, 6>, effllm::multiply_expanded<V, 7>, effllm::multiply_expanded<V, 8>};
  STD_TORCH_CHECK(bits >= 1 && bits <= 8, "effllm: bits must be 1 to 8");
  const int64_t m = x.size(0), k = x.size(1);
  const auto* rows = static_cast<const uint16_t*>(x.const_data_ptr());
  int64_t ld = k;
  static thread_local std::vector<uint16_t> copy;
  if (k % 2 || 2 * k % 2048 == 0) {  // a column after the last one that counts as zero; rows a power of two apart would share sets of the cache
    ld = k + k % 2 + 32;
    copy.resize(static_cast<size_t>(m * ld));
    torch::stable::parallel_for(0, m, std::max<int64_t>(1, 65536 / k), [to = copy.data(), rows, ld, k](int64_t from, int64_t end) {
      for (int64_t i = from; i < end; ++i) std::memcpy(to + i * ld, rows + i * k, static_cast<size_t>(k) * 2), to[i * ld + k] = 0;
    });
    rows = copy.data();
  }
  int64_t pairs = 0;
  for (const auto& w : weights) pairs += (w.tiles + 1) / 2;
  const int64_t each = threads > 0 ? (pairs + threads - 1) / threads : grain(pairs, 2 * weights[0].blocks, bits, m, 2);
  torch::stable::parallel_for(0, pairs, each, [&](int64_t from, int64_t to) {
    int64_t first = 0;
    for (const auto& w : weights) {
      const int64_t count = (w.tiles + 1) / 2, a = std::max(from, first), b = std::min(to, first + count);
      const float* own = bias ? bias + w.col : nullptr;
      if (a < b) table[bits - 1](w, rows, m, k, ld, zero, 2 * (a - first), std::min(w.tiles, 2 * (b - first)), own, y, Type::bf16);
      first += count;
    }
  });
}
#endif

using Wide = void (*)(const Weight&, const float*, int64_t, int64_t, float, int64_t, int64_t, const float*, void*);
template <class U> void run_wide(const Tensor& x, int64_t m, int64_t k, const std::vector<Weight>& weights, int64_t bits, float zero, const float* bias, void* y, int64_t threads) {
  if constexpr (U::narrow) {
    static constexpr Wide table[8] = {effllm::multiply_wide<U, 1>, effllm::multiply_wide<U, 2>, effllm::multiply_wide<U, 3>, effllm::multiply_wide<U, 4>,
                                      effllm::multiply_wide<U, 5>, effllm::multiply_wide<U, 6>, effllm::multiply_wide<U, 7>, effllm::multiply_wide<U, 8>};
    STD_TORCH_CHECK(bits >= 1 && bits <= 8, "effllm: bits must be 1 to 8");
    const auto* rows = static_cast<const float*>(x.const_data_ptr());
    int64_t tiles = 0;
    for (const auto& w : weights) tiles += w.tiles;
    const int64_t each = threads > 0 ? (tiles + threads - 1) / threads : grain(tiles, weights[0].blocks, bits, m, 3);
    torch::stable::parallel_for(0, tiles, each, [&](int64_t from, int64_t to) {
      int64_t first = 0;
      for (const auto& w : weights) {
        const int64_t a = std::max(from, first), b = std::min(to, first + w.tiles);
        if (a < b) table[bits - 1](w, rows, m, k, zero, a - first, b - first, bias ? bias + w.col : nullptr, y);
        first += w.tiles;
      }
    });
  }
}

// One or several weights that share x: y holds their outputs side by side.
Tensor multiply(const Tensor& x_in, const float* xs, const std::vector<Tensor>& codes, const std::vector<Tensor>& scale, const std::vector<const void*>& minimum,
                const std::optional<Tensor>& bias, const std::vector<int64_t>& n, int64_t bits, int64_t group, double zero, ScalarType dtype, const Plan& how) {
  const Tensor x = x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in);
  const int64_t k = x.size(x.dim() - 1), m = k ? x.numel() / k : 0;
  int64_t total = 0;
  std::vector<Weight> weights;
  for (size_t i = 0; i < codes.size(); ++i) {
    weights.push_back(weight_of(codes[i], scale[i], minimum[i], n[i], bits, group));
    effllm::check_columns(weights.back(), k);
    weights.back().col = total;
    total += n[i];
  }
  for (auto& w : weights) w.ldy = total;
  Tensor y = result(x, total, dtype);
  if (m == 0 || total == 0) return y;
  const std::vector<float> b = effllm::floats_of(bias, total);
  if (!xs && effllm::expands<V>(how, m, type_of(x.scalar_type()))) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
    run_expanded(torch::stable::view(x, {m, k}), weights, bits, static_cast<float>(zero), bias ? b.data() : nullptr, y.mutable_data_ptr(), how.threads);
#else
    run_wide<V>(x, m, k, weights, bits, static_cast<float>(zero), bias ? b.data() : nullptr, y.mutable_data_ptr(), how.threads);
#endif
    return y;
  }
  static thread_local Activations a;  // keeps its buffers between calls
  if (xs) prepare_int8(a, static_cast<const int8_t*>(x.const_data_ptr()), m, k, weights[0], zero, bits, how);
  else prepare_float(a, x.const_data_ptr(), m, k, weights[0], zero, bits, type_of(x.scalar_type()));
  run(weights, bits, a, xs, bias ? b.data() : nullptr, y.mutable_data_ptr(), type_of(dtype), how);
  return y;
}

Tensor linear(const Tensor x, const Tensor codes, const Tensor scale, std::optional<Tensor> minimum, std::optional<Tensor> bias, int64_t n, int64_t bits, int64_t group, double zero,
              int64_t threads, int64_t unpack_from, int64_t expand_from, int64_t rows, int64_t tiles, int64_t chunk) {
  return multiply(x, nullptr, {codes}, {scale}, {minimum ? minimum->const_data_ptr() : nullptr}, bias, {n}, bits, group, zero, x.scalar_type(), {threads, unpack_from, expand_from, rows, tiles, chunk});
}

Tensor linear_a8(const Tensor xq, const Tensor xs, const Tensor codes, const Tensor scale, std::optional<Tensor> minimum, std::optional<Tensor> bias, int64_t n, int64_t bits, int64_t group,
                 double zero, ScalarType dtype, int64_t threads, int64_t unpack_from, int64_t rows, int64_t tiles, int64_t chunk) {
  const Tensor s = xs.is_contiguous() ? xs : torch::stable::contiguous(xs);
  return multiply(xq, static_cast<const float*>(s.const_data_ptr()), {codes}, {scale}, {minimum ? minimum->const_data_ptr() : nullptr}, bias, {n}, bits, group, zero, dtype, {threads, unpack_from, 0, rows, tiles, chunk});
}

std::vector<const void*> pointers(const std::vector<Tensor>& t, size_t count) {
  std::vector<const void*> p(count, nullptr);
  for (size_t i = 0; i < t.size(); ++i) p[i] = t[i].const_data_ptr();
  return p;
}
std::vector<int64_t> rows_of(const std::vector<Tensor>& codes) {
  std::vector<int64_t> n;
  for (const auto& c : codes) n.push_back(c.size(0) * 16);
  return n;
}

Tensor linear_many(const Tensor x, std::vector<Tensor> codes, std::vector<Tensor> scale, std::vector<Tensor> minimum, int64_t bits, int64_t group, double zero, int64_t threads, int64_t unpack_from,
                   int64_t expand_from, int64_t rows, int64_t tiles, int64_t chunk) {
  return multiply(x, nullptr, codes, scale, pointers(minimum, codes.size()), std::nullopt, rows_of(codes), bits, group, zero, x.scalar_type(), {threads, unpack_from, expand_from, rows, tiles, chunk});
}

Tensor linear_a8_many(const Tensor xq, const Tensor xs, std::vector<Tensor> codes, std::vector<Tensor> scale, std::vector<Tensor> minimum, int64_t bits, int64_t group, double zero, ScalarType dtype,
                      int64_t threads, int64_t unpack_from, int64_t rows, int64_t tiles, int64_t chunk) {
  const Tensor s = xs.is_contiguous() ? xs : torch::stable::contiguous(xs);
  return multiply(xq, static_cast<const float*>(s.const_data_ptr()), codes, scale, pointers(minimum, codes.size()), std::nullopt, rows_of(codes), bits, group, zero, dtype, {threads, unpack_from, 0, rows, tiles, chunk});
}

}  // namespace

namespace effllm {

template <> void multiply_range<V>(const Weight& w, int64_t bits, const Activations& x, int64_t from, int64_t to, const float* out_scale, const float* bias, void* y, Type type, const Plan& how) {
  const auto go = x.digits == 1 ? pick<1>(bits) : x.digits == 2 ? pick<2>(bits) : pick<3>(bits);
  go(w, x, from, to, out_scale, bias, y, type, how);
}

template <> void take_codes<V>(Activations& a, const int8_t* x, int64_t m, int64_t k, const Weight& w, double zero, int64_t bits, const Plan& how) { prepare_int8(a, x, m, k, w, zero, bits, how); }
template <> void take_floats<V>(Activations& a, const void* x, int64_t m, int64_t k, const Weight& w, double zero, int64_t bits, Type type) { prepare_float(a, x, m, k, w, zero, bits, type); }

template <>
Tensor multiply_one<V>(const Tensor& x, const Tensor& codes, const Tensor& scale, const void* minimum, const std::optional<Tensor>& bias, int64_t n, int64_t bits, int64_t group, double zero,
                       const Plan& how) {
  return multiply(x, nullptr, {codes}, {scale}, {minimum}, bias, {n}, bits, group, zero, x.scalar_type(), how);
}

}  // namespace effllm

STABLE_TORCH_LIBRARY(EFFLLM_NAMESPACE, m) {
  m.def("linear(Tensor x, Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias, int n, int bits, int group, float zero, int threads=0, int unpack_from=0, int expand_from=0, int rows=0, int tiles=0, int chunk=0) -> Tensor");
  m.def("linear_a8(Tensor xq, Tensor xs, Tensor codes, Tensor scale, Tensor? minimum, Tensor? bias, int n, int bits, int group, float zero, ScalarType dtype, int threads=0, int unpack_from=0, int rows=0, int tiles=0, int chunk=0) -> Tensor");
  m.def("linear_many(Tensor x, Tensor[] codes, Tensor[] scale, Tensor[] minimum, int bits, int group, float zero, int threads=0, int unpack_from=0, int expand_from=0, int rows=0, int tiles=0, int chunk=0) -> Tensor");
  m.def("linear_a8_many(Tensor xq, Tensor xs, Tensor[] codes, Tensor[] scale, Tensor[] minimum, int bits, int group, float zero, ScalarType dtype, int threads=0, int unpack_from=0, int rows=0, int tiles=0, int chunk=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) {
  effllm::offer(m, "linear", TORCH_BOX(&linear));
  effllm::offer(m, "linear_a8", TORCH_BOX(&linear_a8));
  effllm::offer(m, "linear_many", TORCH_BOX(&linear_many));
  effllm::offer(m, "linear_a8_many", TORCH_BOX(&linear_a8_many));
}
