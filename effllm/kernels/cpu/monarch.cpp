// Monarch linears: y = x M^T + bias through two block-diagonal factors, dense or bipolar-INT.
//
// Maths     z[o][i t + r] = sum_p w1[(i O + o) t + r][p] x[i][p]        y[o][s] = sum_c w2[o S + s][c] z[o][c]
// Layout    w1 (I O t, P) and w2 (O S, I t) row-major (runtime/formats/monarch.py); bipolar factors as tile16, each block's rows in tiles of
//           their own. Output column o S + s, strided form s O + o; columns past n are not written.
// Bytes     I O t (P + S) values once. z, O I t floats a token, stays in the first two cache levels.
// Paths     few rows: both stages as tasks of one parallel region (phases.h), rows of a block at a time, fp32 between the stages (gemv.h).
//           many rows: I + O products of PyTorch's own; the columns of stage 1 are stored straight where stage 2 reads them.
// Numerics  few rows: fp32 throughout, one rounding. Many rows: z rounded to the output's dtype, as a dense chain of two layers would.
#include "monarch.h"
#include "monarch_codes.h"
#include "offer.h"

namespace {

using namespace effllm::monarch;
using effllm::Matrix;
using effllm::Type;
using effllm::Vectors;

void few_rows(const Sizes& z, const void* x, Type type, const Matrix& w1, const Matrix& w2, const float* bias, void* y, int64_t threads) {
  static thread_local Buffer kept;
  const int64_t ldx = Vectors::stride(z.p), ldz = Vectors::stride(z.inner());
  float* memory = kept.take(z.m * (z.in * ldx + z.out * ldz));
  auto inputs = [&](int64_t i) { return Vectors{memory + i * z.m * ldx, z.m, z.p, ldx, w1.type}; };
  auto middle = [&](int64_t o) { return Vectors{memory + z.m * (z.in * ldx + o * ldz), z.m, z.inner(), ldz, w2.type}; };
  const Chunks first(z.out * z.rank, static_cast<double>(w1.row_bytes()), 4), second(z.s, static_cast<double>(w2.row_bytes()), 4);
  const int64_t counts[3] = {z.in + z.out, z.in * first.each, z.out * second.each};
  effllm::in_phases(counts, threads_for(threads, static_cast<double>(w1.n * w1.row_bytes() + w2.n * w2.row_bytes()), z.m), [&](int phase, int64_t task) {
    static thread_local Buffer scratch;
    if (phase == 0) {
      if (task >= z.in) { middle(task - z.in).clear_tail(); return; }
      const Vectors to = inputs(task);
      const int64_t width = z.width(task);
      for (int64_t m = 0; m < z.m; ++m) {
        to.take(m, 0, x, m * z.k + task * z.p, width, type);
        for (int64_t c = width; c < z.p; ++c) to.row(m)[effllm::place(c, w1.type)] = 0.f;
      }
      to.clear_tail();
      return;
    }
    const Chunks& cut = phase == 1 ? first : second;
    const int64_t block = task / cut.each, from = cut.from(task), to = cut.to(task), ldo = to - from;
    float* out = scratch.take(z.m * ldo);
    if (phase == 1) {
      effllm::dense_rows<V>(w1, block * cut.rows + from, block * cut.rows + to, inputs(block), out, ldo);
      for (int64_t q = from; q < to;) {
        const int64_t o = q / z.rank, end = std::min(to, (o + 1) * z.rank), at = block * z.rank + q - o * z.rank;
        const Vectors v = middle(o);
        for (int64_t m = 0; m < z.m; ++m)
          for (int64_t c = 0; c < end - q; ++c) v.row(m)[effllm::place(at + c, w2.type)] = out[m * ldo + q - from + c];
        q = end;
      }
    } else {
      effllm::dense_rows<V>(w2, block * cut.rows + from, block * cut.rows + to, middle(block), out, ldo);
      finish(z, block, from, to, out, ldo, bias, y, type);
    }
  });
}

// x (m, k), w1 and w2 of x's dtype.
void many_rows(const Sizes& z, const Tensor& x, const Tensor& w1, const Tensor& w2, const float* bias, char* y, Type type) {
  const int64_t size = effllm::size_of(type), inner = z.inner(), q = z.out * z.rank;
  Tensor middle = torch::stable::new_empty(x, {z.out, z.m, inner});
  auto* mid = static_cast<char*>(middle.mutable_data_ptr());
  for (int64_t i = 0; i < z.in; ++i) {
    const int64_t width = z.width(i);
    if (width == 0) {  // a block of padding alone
      for (int64_t row = 0; row < z.out * z.m; ++row) std::memset(mid + (row * inner + i * z.rank) * size, 0, static_cast<size_t>(z.rank * size));
      continue;
    }
    Tensor xs = x, ws = w1;
    xs = torch::stable::narrow(xs, 1, i * z.p, width);
    ws = torch::stable::narrow(ws, 0, i * q, q);
    if (width < z.p) ws = torch::stable::narrow(ws, 1, 0, width);
    const Tensor part = torch::stable::matmul(xs, torch::stable::transpose(ws, 0, 1));
    const auto* from = static_cast<const char*>(part.const_data_ptr());
    torch::stable::parallel_for(0, z.m, 16, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b; ++m)
        for (int64_t o = 0; o < z.out; ++o)
          std::memcpy(mid + ((o * z.m + m) * inner + i * z.rank) * size, from + (m * q + o * z.rank) * size, static_cast<size_t>(z.rank * size));
    });
  }
  for (int64_t o = 0; o < z.out; ++o) {
    Tensor ws = w2;
    ws = torch::stable::narrow(ws, 0, o * z.s, z.s);
    const Tensor part = torch::stable::matmul(torch::stable::select(middle, 0, o), torch::stable::transpose(ws, 0, 1));
    const auto* from = static_cast<const char*>(part.const_data_ptr());
    torch::stable::parallel_for(0, z.m, 16, [&](int64_t a, int64_t b) {
      for (int64_t m = a; m < b; ++m) {
        if (!z.strided && !bias) {
          const int64_t count = std::clamp<int64_t>(z.n - o * z.s, 0, z.s);
          std::memcpy(y + (m * z.n + o * z.s) * size, from + m * z.s * size, static_cast<size_t>(count * size));
          continue;
        }
        for (int64_t j = 0; j < z.s; ++j) {
          const int64_t c = z.column(o, j);
          if (c < z.n) effllm::store_from_float(y, m * z.n + c, type, effllm::load_as_float(from, m * z.s + j, type) + (bias ? bias[c] : 0.f));
        }
      }
    });
  }
}

Tensor monarch_linear(const Tensor x_in, const Tensor w1_in, const Tensor w2_in, std::optional<Tensor> bias, int64_t n, int64_t blocks_in, int64_t blocks_out, bool strided, int64_t threads,
                      int64_t matmul_from) {
  const Tensor x = torch::stable::contiguous(x_in), w1 = torch::stable::contiguous(w1_in), w2 = torch::stable::contiguous(w2_in);
  STD_TORCH_CHECK(w1.dim() == 2 && w2.dim() == 2 && blocks_in > 0 && blocks_out > 0 && w1.size(0) % (blocks_in * blocks_out) == 0, "effllm: the factors do not fit the blocks");
  Sizes z = sizes_of(x, n, blocks_in, blocks_out, w1.size(0) / (blocks_in * blocks_out));
  z.strided = strided;
  STD_TORCH_CHECK(w1.size(1) == z.p && w2.size(1) == z.inner() && w2.size(0) == blocks_out * z.s, "effllm: the factors do not fit the activations or the output");
  Tensor y = result(x, n);
  if (z.m == 0 || n == 0) return y;
  const std::vector<float> b = floats(bias, n);
  const Type type = type_of(x.scalar_type());
  if (matmul_from > 0 && z.m >= matmul_from) {
    const ScalarType dtype = x.scalar_type();
    many_rows(z, torch::stable::view(x, {z.m, z.k}), w1.scalar_type() == dtype ? w1 : torch::stable::to(w1, dtype), w2.scalar_type() == dtype ? w2 : torch::stable::to(w2, dtype),
              b.empty() ? nullptr : b.data(), static_cast<char*>(y.mutable_data_ptr()), type);
    return y;
  }
  const Matrix first{w1.const_data_ptr(), type_of(w1.scalar_type()), w1.size(0), z.p, z.p}, second{w2.const_data_ptr(), type_of(w2.scalar_type()), w2.size(0), z.inner(), z.inner()};
  // the intermediate of many tokens would not fit the cache
  for (int64_t m0 = 0, all = z.m; m0 < all; m0 += 32) {
    z.m = std::min<int64_t>(32, all - m0);
    const int64_t size = effllm::size_of(type);
    few_rows(z, static_cast<const char*>(x.const_data_ptr()) + m0 * z.k * size, type, first, second, b.empty() ? nullptr : b.data(),
             static_cast<char*>(y.mutable_data_ptr()) + m0 * n * size, threads);
  }
  return y;
}

Tensor monarch_bipolar_linear(const Tensor x_in, const Tensor codes1, const Tensor scale1, std::optional<Tensor> minimum1, const Tensor codes2, const Tensor scale2, std::optional<Tensor> minimum2,
                              std::optional<Tensor> bias, int64_t n, int64_t blocks_in, int64_t blocks_out, int64_t rank, bool strided, int64_t bits1, int64_t group1, double zero1, int64_t bits2,
                              int64_t group2, double zero2, int64_t threads) {
  const Tensor x = torch::stable::contiguous(x_in);
  Sizes z = sizes_of(x, n, blocks_in, blocks_out, rank);
  z.strided = strided;
  Tensor y = result(x, n);
  if (z.m == 0 || n == 0) return y;
  const std::vector<float> b = floats(bias, n);
  const Codes w1(codes1, scale1, minimum1, blocks_in, blocks_out * rank, z.p, bits1, group1, zero1), w2(codes2, scale2, minimum2, blocks_out, z.s, z.inner(), bits2, group2, zero2);
  const Type type = type_of(x.scalar_type());
  const int64_t size = effllm::size_of(type);
  for (int64_t m0 = 0, all = z.m; m0 < all; m0 += kCodeRows) {
    z.m = std::min(kCodeRows, all - m0);
    through_codes(z, static_cast<const char*>(x.const_data_ptr()) + m0 * z.k * size, type, w1, w2, b.empty() ? nullptr : b.data(),
                  static_cast<char*>(y.mutable_data_ptr()) + m0 * n * size, threads);
  }
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("monarch_linear(Tensor x, Tensor w1, Tensor w2, Tensor? bias, int n, int blocks_in, int blocks_out, bool strided, int threads=0, int matmul_from=0) -> Tensor");
  m.def("monarch_bipolar_linear(Tensor x, Tensor codes1, Tensor scale1, Tensor? minimum1, Tensor codes2, Tensor scale2, Tensor? minimum2, Tensor? bias, int n, int blocks_in, int blocks_out, int rank, "
        "bool strided, int bits1, int group1, float zero1, int bits2, int group2, float zero2, int threads=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) {
  effllm::offer(m, "monarch_linear", TORCH_BOX(&monarch_linear));
  effllm::offer(m, "monarch_bipolar_linear", TORCH_BOX(&monarch_bipolar_linear));
}
