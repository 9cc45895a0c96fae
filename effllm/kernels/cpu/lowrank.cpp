// y = concat(x B^T, x[channels]) A^T + S x + bias: low-rank weights with dense factors, whole input channels and a sparse part.
//
// Layout    b (r, K), a (N, r + c) row-major in bf16, fp16 or fp32; channels int64 (c); S in CSR: values (nnz), columns (nnz) uint16 or int32,
//           rows int32 (N + 1). Several pairs that share x give their outputs side by side.
// Bytes     both factors once; x and the intermediate stay in cache.
// Grid      one parallel region for both stages (phases.h): tasks of some rows of B, then tasks of some rows of A.
// Numerics  the intermediate is fp32 and never rounded; fp32 sums, one rounding to the output's dtype. From `products_from` rows on two products
//           of PyTorch's own with the intermediate in x's dtype.
#include "gemv.h"
#include "offer.h"
#include "operands.h"
#include "phases.h"
#include "sparse.h"

namespace {

using effllm::Matrix;
using effllm::Type;
using effllm::Vectors;
using torch::stable::Tensor;
using V = effllm::EFFLLM_ISA;

constexpr int64_t kTaskBytes = 48 << 10;
constexpr double kBytesPerNs = 15, kWorthNs = 4000;  // of one core; what waking a thread must save

struct Pair {
  Matrix a, b;
  int64_t col, rows1, rows2, tasks1, tasks2;  // first column of y; rows a task, tasks, of either stage
  Vectors mid;
  const int64_t* places;  // null, or where each of the outputs concat(z, A z) goes among the pair's columns
  int64_t outputs() const { return a.n + (places ? b.n : 0); }
};

Matrix matrix_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous(), "effllm: a factor must be a contiguous matrix");
  return {t.const_data_ptr(), effllm::type_of(t.scalar_type()), t.size(0), t.size(1), t.size(1)};
}

int64_t rows_a_task(const Matrix& w, int64_t threads) {
  const int64_t fits = kTaskBytes / std::max<int64_t>(1, w.row_bytes()), share = (w.n + 4 * threads - 1) / (4 * threads);
  return (std::max<int64_t>(1, std::min(fits, share)) + 3) / 4 * 4;
}

// Buffers that calls of a thread reuse.
struct Scratch {
  std::vector<float> data;
  float* take(int64_t count) {
    if (static_cast<int64_t>(data.size()) < count + 16) data.resize(static_cast<size_t>(count + 16));
    return data.data() + (64 - reinterpret_cast<uintptr_t>(data.data()) % 64) % 64 / 4;
  }
};

struct Call {
  Tensor x;  // (m, k), contiguous
  int64_t m, k, n;
  const int64_t* channels;
  int64_t count;  // of channels
  effllm::Sparse sparse;
  const float* bias;
  void* y;
  Type type;
};

// Outputs of row m: `o` is `count` of a pair's concat(z, A z) from `first` on (without places: of A z).
void write(const Call& c, const Pair& p, int64_t m, int64_t first, int64_t count, float* o) {
  if (p.places) {
    for (int64_t i = 0; i < count; ++i) {
      const int64_t col = p.col + p.places[first + i];
      effllm::store_from_float(c.y, m * c.n + col, c.type, o[i] + (c.bias ? c.bias[col] : 0.f));
    }
    return;
  }
  if (c.bias)
    for (int64_t i = 0; i < count; ++i) o[i] += c.bias[p.col + first + i];
  const int64_t here = m * c.n + p.col + first;
  if (c.type == Type::f32) std::memcpy(static_cast<float*>(c.y) + here, o, static_cast<size_t>(count) * 4);
  else for (int64_t i = 0; i < count; ++i) effllm::store_from_float(c.y, here + i, c.type, o[i]);
}

void fused(const Call& c, std::vector<Pair>& pairs, int64_t threads) {
  static thread_local Scratch inputs, middle;
  int64_t bytes = c.sparse.bytes(), width = 0;
  for (auto& p : pairs) bytes += p.a.n * p.a.row_bytes() + p.b.n * p.b.row_bytes(), width += Vectors::stride(p.a.k);
  if (threads <= 0) {
    const double ns = static_cast<double>(bytes) * static_cast<double>(c.m + 1) / 2 / kBytesPerNs;
    threads = std::max<int64_t>(1, std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(ns / kWorthNs)));
  }
  // x as fp32, placed for the rows of B; a second copy in plain order where the types of the Bs differ or columns are gathered
  const int64_t ldx = Vectors::stride(c.k);
  float* const space = inputs.take(2 * c.m * ldx);
  const Vectors placed{space, c.m, c.k, ldx, Type::bf16}, plain{space + c.m * ldx, c.m, c.k, ldx, Type::f32};
  bool need[2] = {false, c.sparse.nonzeros > 0};
  for (auto& p : pairs) need[p.b.type == Type::bf16 ? 0 : 1] = true;
  for (int i = 0; i < 2; ++i) {
    if (!need[i]) continue;
    const Vectors& v = i ? plain : placed;
    v.clear_tail();
    for (int64_t m = 0; m < c.m; ++m) v.take(m, 0, c.x.const_data_ptr(), m * c.k, c.k, c.type);
  }
  float* at = middle.take(c.m * width);
  int64_t first = 0, second = 0;
  for (auto& p : pairs) {
    p.mid = {at, c.m, p.a.k, Vectors::stride(p.a.k), p.a.type};
    at += c.m * p.mid.ld;
    p.mid.clear_tail();
    for (int64_t m = 0; m < c.m; ++m)
      for (int64_t j = 0; j < c.count; ++j) p.mid.row(m)[effllm::place(p.b.n + j, p.a.type)] = effllm::load_as_float(c.x.const_data_ptr(), m * c.k + c.channels[j], c.type);
    p.rows1 = rows_a_task(p.b, threads), p.rows2 = rows_a_task(p.a, threads);
    first += p.tasks1 = (p.b.n + p.rows1 - 1) / p.rows1;
    second += p.tasks2 = (p.a.n + p.rows2 - 1) / p.rows2;
  }
  effllm::in_phases<2>({first, second}, threads, [&](int phase, int64_t task) {
    static thread_local Scratch outputs;
    for (auto& p : pairs) {
      const int64_t tasks = phase ? p.tasks2 : p.tasks1, each = phase ? p.rows2 : p.rows1;
      if (task >= tasks) { task -= tasks; continue; }
      const Matrix& w = phase ? p.a : p.b;
      const int64_t from = task * each, to = std::min(w.n, from + each), rows = to - from;
      float* out = outputs.take(c.m * each);
      effllm::dense_rows<V>(w, from, to, phase ? p.mid : w.type == Type::bf16 ? placed : plain, out, each);
      for (int64_t m = 0; m < c.m; ++m) {
        float* o = out + m * each;
        if (phase == 0) {
          float* to_mid = p.mid.row(m);
          for (int64_t i = 0; i < rows; ++i) to_mid[effllm::place(from + i, p.a.type)] = o[i];
          if (p.places) write(c, p, m, from, rows, o);
          continue;
        }
        if (c.sparse.nonzeros) c.sparse.add(from, to, plain.row(m), o);
        write(c, p, m, p.places ? p.b.n + from : from, rows, o);
      }
      return;
    }
  });
}

Tensor as(const Tensor& t, torch::headeronly::ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

// Columns of `part` (m, width) into y (m, n) at `col`.
void place_columns(const Tensor& part, const Tensor& y, int64_t col) {
  const int64_t m = part.size(0), width = part.size(1), n = y.size(1), size = effllm::size_of(effllm::type_of(y.scalar_type()));
  const auto* from = static_cast<const char*>(part.const_data_ptr());
  auto* to = static_cast<char*>(y.mutable_data_ptr());
  torch::stable::parallel_for(0, m, 32, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i) std::memcpy(to + (i * n + col) * size, from + i * width * size, static_cast<size_t>(width * size));
  });
}

// Columns of `part` (m, width) to the columns places[0..width) of y (m, n), from `col` on.
void scatter_columns(const Tensor& part, const Tensor& y, int64_t col, const int64_t* places, const float* bias, Type type) {
  const int64_t m = part.size(0), width = part.size(1), n = y.size(1);
  const void* from = part.const_data_ptr();
  void* to = y.mutable_data_ptr();
  torch::stable::parallel_for(0, m, 8, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t j = 0; j < width; ++j) {
        const int64_t at = col + places[j];
        effllm::store_from_float(to, i * n + at, type, effllm::load_as_float(from, i * width + j, type) + (bias ? bias[at] : 0.f));
      }
  });
}

Tensor products(const Call& c, const std::vector<Tensor>& a, const std::vector<Tensor>& b, const std::vector<Pair>& pairs, const std::optional<Tensor>& bias) {
  const auto dtype = c.x.scalar_type();
  const int64_t size = effllm::size_of(c.type);
  Tensor y;
  if (a.size() > 1 || pairs[0].places) y = torch::stable::new_empty(c.x, {c.m, c.n});
  const std::vector<float> f = effllm::floats_of(bias, c.n);
  for (size_t i = 0; i < a.size(); ++i) {
    Tensor mid = effllm::dense_linear(c.x, as(b[i], dtype), std::nullopt);
    if (c.count) {
      const Tensor wide = torch::stable::new_empty(c.x, {c.m, b[i].size(0) + c.count});
      place_columns(mid, wide, 0);
      auto* to = static_cast<char*>(wide.mutable_data_ptr());
      const auto* from = static_cast<const char*>(c.x.const_data_ptr());
      for (int64_t m = 0; m < c.m; ++m)
        for (int64_t j = 0; j < c.count; ++j) std::memcpy(to + (m * wide.size(1) + b[i].size(0) + j) * size, from + (m * c.k + c.channels[j]) * size, static_cast<size_t>(size));
      mid = wide;
    }
    if (pairs[i].places) {
      const float* added = bias ? f.data() : nullptr;
      scatter_columns(mid, y, pairs[i].col, pairs[i].places, added, c.type);
      scatter_columns(effllm::dense_linear(mid, as(a[i], dtype), std::nullopt), y, pairs[i].col, pairs[i].places + b[i].size(0), added, c.type);
      continue;
    }
    std::optional<Tensor> own;
    if (bias) own = as(*bias, dtype);
    const Tensor part = effllm::dense_linear(mid, as(a[i], dtype), own);
    if (a.size() > 1) place_columns(part, y, pairs[i].col);
    else y = part;
  }
  if (c.sparse.nonzeros) c.sparse.add_many<V>(c.x.const_data_ptr(), y.mutable_data_ptr(), c.m, c.k, c.type);
  return y;
}

Tensor lowrank(const Tensor x_in, std::vector<Tensor> a, std::vector<Tensor> b, std::optional<Tensor> channels, std::vector<Tensor> pivots, std::optional<Tensor> bias, std::optional<Tensor> values, std::optional<Tensor> columns,
               std::optional<Tensor> rows, int64_t threads, int64_t products_from) {
  STD_TORCH_CHECK(!a.empty() && a.size() == b.size() && x_in.dim() >= 1, "effllm: a low-rank linear takes as many first as second factors");
  STD_TORCH_CHECK(a.size() == 1 || (!channels && !bias && !values), "effllm: merged low-rank linears have no channels, bias or sparse part");
  Call c{};
  c.k = x_in.size(x_in.dim() - 1), c.m = c.k ? x_in.numel() / c.k : 0;
  c.type = effllm::type_of(x_in.scalar_type());
  Tensor picked;
  if (channels) {
    STD_TORCH_CHECK(channels->scalar_type() == torch::headeronly::ScalarType::Long, "effllm: channels must be int64");
    picked = torch::stable::contiguous(*channels);
    c.channels = static_cast<const int64_t*>(picked.const_data_ptr()), c.count = picked.numel();
    for (int64_t j = 0; j < c.count; ++j) STD_TORCH_CHECK(c.channels[j] >= 0 && c.channels[j] < c.k, "effllm: a channel is not among the inputs");
  }
  std::vector<Tensor> held;
  std::vector<Pair> pairs;
  for (size_t i = 0; i < a.size(); ++i) {
    a[i] = torch::stable::contiguous(a[i]), b[i] = torch::stable::contiguous(b[i]);
    Pair p{matrix_of(a[i]), matrix_of(b[i]), c.n, 0, 0, 0, 0, {}, nullptr};
    STD_TORCH_CHECK(p.b.k == c.k && p.a.k == p.b.n + c.count, "effllm: the factors do not fit the input, or one another");
    if (!pivots.empty()) {
      STD_TORCH_CHECK(pivots.size() == a.size() && !channels && !values, "effllm: pivots come one per pair, and not beside channels or a sparse part");
      pivots[i] = torch::stable::contiguous(pivots[i]);
      STD_TORCH_CHECK(pivots[i].scalar_type() == torch::headeronly::ScalarType::Long && pivots[i].numel() == p.a.n + p.b.n, "effllm: pivots must be int64, one per output");
      p.places = static_cast<const int64_t*>(pivots[i].const_data_ptr());
      for (int64_t j = 0; j < p.outputs(); ++j) STD_TORCH_CHECK(p.places[j] >= 0 && p.places[j] < p.outputs(), "effllm: a pivot is not among the outputs");
    }
    c.n += p.outputs();
    pairs.push_back(p);
  }
  Tensor sparse[3];
  if (values) {
    STD_TORCH_CHECK(columns && rows, "effllm: a sparse part needs values, columns and rows");
    sparse[0] = torch::stable::contiguous(*values), sparse[1] = torch::stable::contiguous(*columns), sparse[2] = torch::stable::contiguous(*rows);
    c.sparse = effllm::sparse_of(sparse[0], sparse[1], sparse[2], c.n);
  }
  if (c.m == 0 || c.n == 0) return effllm::result(x_in, c.n, x_in.scalar_type());
  c.x = torch::stable::view(x_in.is_contiguous() ? x_in : torch::stable::contiguous(x_in), {c.m, c.k});
  if (products_from > 0 && c.m >= products_from) {
    const Tensor y = products(c, a, b, pairs, bias);
    std::vector<int64_t> shape;
    for (int64_t i = 0; i + 1 < x_in.dim(); ++i) shape.push_back(x_in.size(i));
    shape.push_back(c.n);
    return torch::stable::view(y, shape);
  }
  const Tensor y = effllm::result(x_in, c.n, x_in.scalar_type());
  const std::vector<float> f = effllm::floats_of(bias, c.n);
  c.bias = bias ? f.data() : nullptr;
  c.y = y.mutable_data_ptr();
  fused(c, pairs, threads);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("lowrank(Tensor x, Tensor[] a, Tensor[] b, Tensor? channels, Tensor[] pivots, Tensor? bias, Tensor? values, Tensor? columns, Tensor? rows, int threads=0, int products_from=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "lowrank", TORCH_BOX(&lowrank)); }
