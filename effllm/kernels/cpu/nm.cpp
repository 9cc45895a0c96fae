// Registers the N:M linear ops of one instruction set: nm_rows (any pattern) and nm_tiles (2:4, AVX-512). Both take floating-point or
// coded values, and ARMOR's block-diagonal wrappers: y = A (S (B x)) in one call, S x of a block of rows staying in the first-level cache.
//
// Few tokens read the compressed weight; from `expand_from` tokens on (0: never) it becomes dense a few megabytes at a time, and the
// product is PyTorch's own.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>
#include <optional>

#include "blockdiag.h"
#include "nm_codes.h"
#include "nm_rows.h"
#include "nm_tiles.h"
#include "offer.h"

namespace {

using effllm::NmRows;
using effllm::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using V = effllm::EFFLLM_ISA;

constexpr int64_t kDenseBytes = 4 << 20;
constexpr int64_t kTokens = 32;  // at a time: their sums of one block of rows stay in the first-level cache
constexpr int64_t kDecoded = 6;  // tokens from which decoding a row once for all of them costs less

Type type_of(const Tensor& t) {
  const ScalarType s = t.scalar_type();
  STD_TORCH_CHECK(s == ScalarType::Float || s == ScalarType::BFloat16 || s == ScalarType::Half, "effllm: expected float32, bfloat16 or float16");
  return s == ScalarType::Float ? Type::f32 : s == ScalarType::BFloat16 ? Type::bf16 : Type::f16;
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

struct Wrapper {  // block-diagonal, null without ARMOR
  const uint32_t* blocks = nullptr;
  int64_t d = 0;
  const uint32_t* at(int64_t row) const { return blocks + row * d / 2; }
};
Wrapper wrapper_of(const std::optional<Tensor>& t, int64_t rows) {
  if (!t) return {};
  const int64_t d = t->dim() == 5 ? 2 * t->size(2) : 0;
  STD_TORCH_CHECK(d > 0 && d % 16 == 0 && t->size(0) * d == rows && t->size(1) * 16 == d && t->is_contiguous() && t->scalar_type() == ScalarType::BFloat16,
                  "effllm: blocks must be (rows / d, d / 16, d / 2, 16, 2) bf16, contiguous");
  return {static_cast<const uint32_t*>(t->const_data_ptr()), d};
}

void store_row(const float* from, const float* bias, void* y, int64_t at, int64_t count, Type type) {
  if (type == Type::bf16) {
    uint16_t* to = static_cast<uint16_t*>(y) + at;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = effllm::float_to_bf16(bias ? from[i] + bias[i] : from[i]);
  } else if (type == Type::f32) {
    float* to = static_cast<float*>(y) + at;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) to[i] = bias ? from[i] + bias[i] : from[i];
  } else
    for (int64_t i = 0; i < count; ++i) effllm::store_from_float(y, at + i, type, bias ? from[i] + bias[i] : from[i]);
}

// Rows of a weight times prepared activations. `many` multiplies rows from .. to (a multiple of `unit`, or the last) with tokens m0 .. m1
// into out (m1 - m0, ldo); `expand` writes them dense, transposed (k, ld) where `columns`, else (rows, k).
struct Core {
  int64_t n, k, unit;
  bool columns;
  virtual ~Core() = default;
  virtual void prepare(const Tensor& x, const float* wide, int64_t m) = 0;  // `wide`: fp32 (m, k) that stands for x
  virtual void many(int64_t from, int64_t to, int64_t m0, int64_t m1, float* out, int64_t ldo) const = 0;
  virtual void expand(int64_t from, int64_t to, int64_t origin, void* out, int64_t ld, Type type) const = 0;
  virtual double row_ns(int64_t m) const = 0;
};

void to_float(const Tensor& x, int64_t m, int64_t k, float* out, int64_t ld) {
  const Type type = type_of(x);
  for (int64_t i = 0; i < m; ++i) {
    float* to = out + i * ld;
    if (type == Type::f32) std::memcpy(to, static_cast<const float*>(x.const_data_ptr()) + i * k, static_cast<size_t>(k) * 4);
    else if (type == Type::bf16) {
      const uint16_t* from = static_cast<const uint16_t*>(x.const_data_ptr()) + i * k;
#pragma omp simd
      for (int64_t c = 0; c < k; ++c) to[c] = effllm::bf16_to_float(from[c]);
    } else
      for (int64_t c = 0; c < k; ++c) to[c] = effllm::load_as_float(x.const_data_ptr(), i * k + c, type);
  }
}
void to_bf16(const Tensor& x, const float* wide, int64_t m, int64_t k, uint16_t* out, int64_t ld) {
  for (int64_t i = 0; i < m; ++i)
    if (wide) store_row(wide + i * k, nullptr, out, i * ld, k, Type::bf16);
    else std::memcpy(out + i * ld, static_cast<const uint16_t*>(x.const_data_ptr()) + i * k, static_cast<size_t>(k) * 2);
}

struct Rows final : Core {
  NmRows w;
  bool wide = false;  // bf16 values and activations, multiplied as they are
  std::vector<float> xf;
  std::vector<uint16_t> xh;
  int64_t ld;

  void prepare(const Tensor& x, const float* given, int64_t m) override {
    ld = w.words * 64;
#ifdef EFFLLM_NM_WIDE
    wide = V::fast_bf16 && w.bits == 0 && w.type == Type::bf16 && x.scalar_type() == ScalarType::BFloat16;
#endif
    if (wide) {
      xh.assign(static_cast<size_t>(m * ld), 0);
      to_bf16(x, given, m, k, xh.data(), ld);
      return;
    }
    xf.assign(static_cast<size_t>(m * ld), 0.f);
    if (!given) to_float(x, m, k, xf.data(), ld);
    else
      for (int64_t i = 0; i < m; ++i) std::memcpy(xf.data() + i * ld, given + i * k, static_cast<size_t>(k) * 4);
  }
  void many(int64_t from, int64_t to, int64_t m0, int64_t m1, float* out, int64_t ldo) const override {
#ifdef EFFLLM_NM_WIDE
    if (wide) { effllm::rows_times_bf16(w, from, to, xh.data() + m0 * ld, ld, m1 - m0, out, ldo); return; }
    if (V::fast_bf16 && m1 - m0 < kDecoded && effllm::aligned(w)) {
      effllm::rows_times_codes(w, from, to, xf.data() + m0 * ld, ld, m1 - m0, out, ldo);
      return;
    }
#endif
    effllm::rows_times<V>(w, from, to, xf.data() + m0 * ld, ld, m1 - m0, out, ldo);
  }
  void expand(int64_t from, int64_t to, int64_t origin, void* out, int64_t, Type type) const override {
    const int64_t skip = (from - origin) * k * (type == Type::f32 ? 4 : 2);
    effllm::rows_dense<V>(w, from, to, static_cast<uint8_t*>(out) + skip, type);
  }
  double row_ns(int64_t m) const override { return static_cast<double>(k) * (0.08 + 0.05 * static_cast<double>(m)); }
};

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
using effllm::NmTiles;
template <int BITS, int D> void codes(const NmTiles& w, int64_t tile, int64_t count, const effllm::Digits& x, int64_t seg, float* out) {
  int64_t t = 0;
  for (; t + 2 <= count; t += 2) effllm::tiles_codes<BITS, D, 2>(w, tile + t, x, seg, out + 16 * t);
  for (; t < count; ++t) effllm::tiles_codes<BITS, D, 1>(w, tile + t, x, seg, out + 16 * t);
}

struct Tiles final : Core {
  NmTiles w;
  int digits = 2;
  int64_t seg = 0;  // codes whose activations share a step
  std::vector<uint8_t> tables;
  std::vector<effllm::Digits> x8;
  const uint8_t* table(int64_t m) const { return tables.data() + (64 - reinterpret_cast<uintptr_t>(tables.data()) % 64) % 64 + m * w.groups * 64; }

  void prepare(const Tensor& x, const float* given, int64_t m) override {
    const int64_t kp = w.groups * 4;
    if (w.bits == 0) {
      std::vector<uint16_t> xh(static_cast<size_t>(m * kp), 0);
      to_bf16(x, given, m, k, xh.data(), kp);
      tables.resize(static_cast<size_t>(m * w.groups * 64 + 64));
      for (int64_t i = 0; i < m; ++i) effllm::pair_tables(xh.data() + i * kp, w.groups, const_cast<uint8_t*>(table(i)));
      return;
    }
    const Type type = given ? Type::f32 : type_of(x);
    digits = x.scalar_type() == ScalarType::Float ? 3 : 2;
    seg = w.group ? std::min<int64_t>(w.group, 64) : 64;
    x8.resize(static_cast<size_t>(m));
    const void* from = given ? static_cast<const void*>(given) : x.const_data_ptr();
    torch::stable::parallel_for(0, m, 4, [&](int64_t a, int64_t b) {
      for (int64_t i = a; i < b; ++i) x8[static_cast<size_t>(i)].take(from, i * k, type, k, kp, 2 * seg, digits);
    });
  }
  void many(int64_t from, int64_t to, int64_t m0, int64_t m1, float* out, int64_t ldo) const override {
    const int64_t tile = from / 16, count = (to - from + 15) / 16;
    for (int64_t m = m0; m < m1; ++m) {
      float* o = out + (m - m0) * ldo;
      if (w.bits) {
        const auto& x = x8[static_cast<size_t>(m)];
        if (w.bits == 4) digits == 2 ? codes<4, 2>(w, tile, count, x, seg, o) : codes<4, 3>(w, tile, count, x, seg, o);
        else digits == 2 ? codes<8, 2>(w, tile, count, x, seg, o) : codes<8, 3>(w, tile, count, x, seg, o);
        continue;
      }
      int64_t t = 0;
      for (; t + effllm::kTiles <= count; t += effllm::kTiles) effllm::tiles_bf16<effllm::kTiles>(w, tile + t, table(m), o + 16 * t);
      for (; t + 2 <= count; t += 2) effllm::tiles_bf16<2>(w, tile + t, table(m), o + 16 * t);
      for (; t < count; ++t) effllm::tiles_bf16<1>(w, tile + t, table(m), o + 16 * t);
    }
  }
  void expand(int64_t from, int64_t to, int64_t origin, void* out, int64_t ld, Type) const override {
    effllm::tiles_dense(w, k, from / 16, (to + 15) / 16, origin / 16, static_cast<uint16_t*>(out), ld);
  }
  double row_ns(int64_t m) const override { return static_cast<double>(k) * (w.bits ? 0.03 : 0.025) * static_cast<double>(m); }
};
#endif

void few(const Core& core, const Wrapper& left, int64_t m, const float* bias, void* y, Type type, int64_t threads) {
  const int64_t unit = left.blocks ? left.d : core.unit, units = (core.n + unit - 1) / unit;
  const int64_t least = static_cast<int64_t>(3000.0 / (static_cast<double>(unit) * core.row_ns(m))) + 1;
  const int64_t each = threads > 0 ? (units + threads - 1) / threads : std::min(units, least);
  torch::stable::parallel_for(0, units, each, [&](int64_t a, int64_t b) {
    const int64_t ldo = (unit + 15) / 16 * 16;
    std::vector<float> o1(static_cast<size_t>(kTokens * ldo)), o2(static_cast<size_t>(ldo));
    for (int64_t u = a; u < b; ++u)
      for (int64_t m0 = 0; m0 < m; m0 += kTokens) {
        const int64_t from = u * unit, to = std::min(core.n, from + unit), m1 = std::min(m, m0 + kTokens);
        core.many(from, to, m0, m1, o1.data(), ldo);
        for (int64_t i = m0; i < m1; ++i) {
          const float* out = o1.data() + (i - m0) * ldo;
          if (left.blocks) effllm::block_times<V>(left.at(from), left.d, out, o2.data()), out = o2.data();
          store_row(out, bias ? bias + from : nullptr, y, i * core.n + from, to - from, type);
        }
      }
  });
}

void expanded(const Core& core, const Tensor& x, const Wrapper& left, int64_t m, const float* bias, void* y, Type type) {
  const int64_t size = type == Type::f32 ? 4 : 2, step = left.blocks ? std::max<int64_t>(left.d, 16) : 16;
  const int64_t chunk = std::max<int64_t>(step, kDenseBytes / (size * core.k) / (4 * step) * 4 * step);
  for (int64_t from = 0; from < core.n; from += chunk) {
    const int64_t to = std::min(core.n, from + chunk), padded = (to - from + 15) / 16 * 16;
    const Tensor w = torch::stable::new_empty(x, core.columns ? std::vector<int64_t>{core.k, padded} : std::vector<int64_t>{to - from, core.k}, x.scalar_type());
    torch::stable::parallel_for(0, padded / 16, 1, [&](int64_t a, int64_t b) {
      core.expand(from + a * 16, std::min(to, from + b * 16), from, w.mutable_data_ptr(), padded, type);
    });
    const Tensor part = torch::stable::matmul(x, core.columns ? w : torch::stable::transpose(w, 0, 1));
    const int64_t ld = part.size(1);
    torch::stable::parallel_for(0, m, 4, [&](int64_t a, int64_t b) {
      std::vector<float> line(static_cast<size_t>(padded)), done(static_cast<size_t>(padded));
      for (int64_t i = a; i < b; ++i) {
        for (int64_t c = 0; c < to - from; ++c) line[static_cast<size_t>(c)] = effllm::load_as_float(part.const_data_ptr(), i * ld + c, type);
        const float* out = line.data();
        if (left.blocks) {
          for (int64_t r = 0; r < to - from; r += left.d) effllm::block_times<V>(left.at(from + r), left.d, line.data() + r, done.data() + r);
          out = done.data();
        }
        store_row(out, bias ? bias + from : nullptr, y, i * core.n + from, to - from, type);
      }
    });
  }
}

Tensor multiply(Core& core, const Tensor& x_in, const std::optional<Tensor>& left_in, const std::optional<Tensor>& right_in, const std::optional<Tensor>& bias, int64_t threads, int64_t expand_from) {
  Tensor x = dense(x_in);
  const int64_t k = x.size(x.dim() - 1), m = k ? x.numel() / k : 0;
  const Type type = type_of(x);
  core.k = k;
  std::vector<int64_t> shape(static_cast<size_t>(x.dim()));
  for (int64_t i = 0; i < x.dim(); ++i) shape[static_cast<size_t>(i)] = x.size(i);
  shape.back() = core.n;
  Tensor y = torch::stable::new_empty(x, shape, x.scalar_type());
  if (m == 0 || core.n == 0) return y;
  x = torch::stable::view(x, {m, k});
  std::vector<float> b;
  if (bias) {
    const Tensor t = dense(*bias);
    STD_TORCH_CHECK(t.numel() == core.n, "effllm: the bias does not fit the weight");
    b.resize(static_cast<size_t>(core.n));
    for (int64_t i = 0; i < core.n; ++i) b[static_cast<size_t>(i)] = effllm::load_as_float(t.const_data_ptr(), i, type_of(t));
  }
  const Wrapper left = wrapper_of(left_in, core.n), right = wrapper_of(right_in, k);
  std::vector<float> turned;  // B x
  if (right.blocks) {
    turned.resize(static_cast<size_t>(m * k));
    std::vector<float> wide(static_cast<size_t>(m * k));
    to_float(x, m, k, wide.data(), k);
    const int64_t blocks = k / right.d, least = 60000 / (right.d * right.d) + 1;
    torch::stable::parallel_for(0, blocks, threads > 0 ? (blocks + threads - 1) / threads : std::min(blocks, std::max<int64_t>(1, least / m)), [&](int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c)
        for (int64_t i = 0; i < m; ++i) effllm::block_times<V>(right.at(c * right.d), right.d, wide.data() + i * k + c * right.d, turned.data() + i * k + c * right.d);
    });
  }
  const float* bias_at = bias ? b.data() : nullptr;
  const float* given = right.blocks ? turned.data() : nullptr;
  if (expand_from > 0 && m >= expand_from && (!core.columns || type == Type::bf16)) {
    if (given) {
      Tensor u = torch::stable::new_empty(x, {m, k}, x.scalar_type());
      for (int64_t i = 0; i < m; ++i) store_row(given + i * k, nullptr, u.mutable_data_ptr(), i * k, k, type);
      x = u;
    }
    expanded(core, x, left, m, bias_at, y.mutable_data_ptr(), type);
    return y;
  }
  core.prepare(x, given, m);
  few(core, left, m, bias_at, y.mutable_data_ptr(), type, threads);
  return y;
}

void check_scales(const std::optional<Tensor>& scale, const std::optional<Tensor>& minimum, int64_t bits) {
  STD_TORCH_CHECK((bits > 0) == scale.has_value() && (bits > 0 || !minimum), "effllm: coded values need scales, others take none");
  STD_TORCH_CHECK(!scale || scale->is_contiguous(), "effllm: scales must be contiguous");
  STD_TORCH_CHECK(!minimum || (minimum->is_contiguous() && minimum->numel() == scale->numel() && minimum->scalar_type() == scale->scalar_type()), "effllm: minima must match the scales");
}

Tensor nm_rows(const Tensor x, const Tensor values, std::optional<Tensor> scale, std::optional<Tensor> minimum, const Tensor index, std::optional<Tensor> left, std::optional<Tensor> right,
               std::optional<Tensor> bias, int64_t n, int64_t keep, int64_t of, int64_t bits, int64_t group, double zero, int64_t threads, int64_t expand_from) {
  const int64_t k = x.size(x.dim() - 1), kp = (k + of - 1) / of * of, words = index.size(1) / 8, kc = kp / of * keep;
  check_scales(scale, minimum, bits);
  STD_TORCH_CHECK(values.dim() == 2 && values.size(0) == n && index.size(0) == n && index.size(1) % 8 == 0 && words == (kp + 63) / 64 && values.is_contiguous() && index.is_contiguous(),
                  "effllm: values and index do not fit the activation or are not contiguous");
  STD_TORCH_CHECK(values.size(1) * (bits > 0 && bits <= 4 ? 2 : 1) >= kc, "effllm: too few values for the activation");
  Rows core;
  core.n = n, core.unit = 16, core.columns = false;
  core.w = {values.const_data_ptr(), bits ? Type::f32 : type_of(values), static_cast<int>(bits), scale ? scale->const_data_ptr() : nullptr, minimum ? minimum->const_data_ptr() : nullptr,
            scale && scale->scalar_type() == ScalarType::Half, static_cast<float>(zero), group, scale ? scale->size(1) : 0, static_cast<const uint64_t*>(index.const_data_ptr()),
            n, k, kc, values.size(1), words, kp / 64, 16 / of * keep};
  STD_TORCH_CHECK(!scale || group == 0 || scale->size(1) * group >= kc, "effllm: too few groups for the values");
  return multiply(core, x, left, right, bias, threads, expand_from);
}

Tensor nm_tiles(const Tensor x, const Tensor values, std::optional<Tensor> scale, std::optional<Tensor> minimum, const Tensor index, std::optional<Tensor> left, std::optional<Tensor> right,
                std::optional<Tensor> bias, int64_t n, int64_t keep, int64_t of, int64_t bits, int64_t group, double zero, int64_t threads, int64_t expand_from) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  const int64_t k = x.size(x.dim() - 1), tiles = values.size(0);
  check_scales(scale, minimum, bits);
  STD_TORCH_CHECK(keep == 2 && of == 4 && V::fast_bf16 && (bits == 0 || bits == 4 || bits == 8), "effllm: tiles hold 2:4 weights in bf16 or codes of 4 or 8 bits");
  STD_TORCH_CHECK(bits || x.scalar_type() == ScalarType::BFloat16, "effllm: bf16 tiles take bf16 activations");
  const int64_t groups = bits ? values.size(1) * 16 / bits : values.size(1);
  STD_TORCH_CHECK(n > (tiles - 1) * 16 && n <= tiles * 16 && groups % 8 == 0 && groups == (k + 31) / 32 * 8, "effllm: the tiles do not fit the activation");
  STD_TORCH_CHECK(values.is_contiguous() && index.is_contiguous() && index.numel() == tiles * groups * 8 && index.scalar_type() == ScalarType::Byte, "effllm: the index does not fit the values");
  STD_TORCH_CHECK(values.numel() == tiles * groups * (bits ? 4 * bits : 32) && (bits || values.scalar_type() == ScalarType::BFloat16), "effllm: wrong values");
  STD_TORCH_CHECK(!scale || (scale->dim() == 3 && scale->size(0) == tiles && scale->size(2) == 16 && (group == 0 || scale->size(1) * group >= 2 * groups)), "effllm: too few groups for the values");
  Tiles core;
  core.n = n, core.unit = n >= 1024 ? 64 : 32, core.columns = true;
  core.w = {static_cast<const uint8_t*>(values.const_data_ptr()), static_cast<const uint8_t*>(index.const_data_ptr()), scale ? scale->const_data_ptr() : nullptr,
            minimum ? minimum->const_data_ptr() : nullptr, scale && scale->scalar_type() == ScalarType::Half, static_cast<float>(zero), static_cast<int>(bits), n, tiles, groups, group,
            scale ? scale->size(1) : 0};
  return multiply(core, x, left, right, bias, threads, expand_from);
#else
  STD_TORCH_CHECK(false, "effllm: tiles of 2:4 weights need AVX-512 with BF16");
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("nm_rows(Tensor x, Tensor values, Tensor? scale, Tensor? minimum, Tensor index, Tensor? left, Tensor? right, Tensor? bias, int n, int keep, int of, int bits, int group, float zero, int threads=0, int expand_from=0) -> Tensor");
  m.def("nm_tiles(Tensor x, Tensor values, Tensor? scale, Tensor? minimum, Tensor index, Tensor? left, Tensor? right, Tensor? bias, int n, int keep, int of, int bits, int group, float zero, int threads=0, int expand_from=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) {
  effllm::offer(m, "nm_rows", TORCH_BOX(&nm_rows));
  effllm::offer(m, "nm_tiles", TORCH_BOX(&nm_tiles));
}
