// Linears with floating-point weights that skip channels: by input (axpy of the columns that are read) and by output (dots of those rows).
//
// Maths     sparse_linear     y = sum over read k of x_k weight_t[k] + bias
//           rsparse_linear    the same + u (v rest), rest = x where it is not read
//           sparse_up_linear  y_j = gate_j (weight[j] . x + bias_j) where gate_j is read, else 0
// Layout    weight_t (K, N), weight (N, K), u (N, r), v (r, K) row-major in bf16, fp16 or fp32.
// Bytes     the rows of weight_t (weight) that are read, once; skipped rows not at all. Rows of a call read the union of their channels.
// Order     by input: outputs in blocks, a task each, whose fp32 sums stay in the first-level cache; channels in quads, so that a sum is
//           loaded and stored once for four of them; the lines of a later quad are prefetched, since the hardware cannot guess it.
//           by output: rows in quads that share each load of x.
// Numerics  fp32 sums in the order of channels, whatever the threads; one rounding to the output's dtype. bf16 sums lie as `place` says.
// Many rows a product of PyTorch's own, of x or of x masked.
#include "offer.h"
#include "skip.h"

namespace {

using namespace effllm::skip;
using effllm::Matrix;
using effllm::Type;
using effllm::Vectors;
using effllm::place;
using effllm::size_of;
using V = effllm::EFFLLM_ISA;
using F = V::F;

struct How {  // a configuration: threads, outputs of a task, channels that a prefetch runs ahead
  int64_t threads, block, ahead;
};

// acc (MR, lda) += values of the quads of `a` times columns from .. from + width of w, in the order of `place`.
template <Type T, int MR> void axpy(const Matrix& w, const Active& a, int64_t first, int64_t from, int64_t width, float* acc, int64_t lda, int64_t ahead) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const int64_t whole = width & ~int64_t{31};
  for (int64_t i = 0; i < a.padded; i += 4) {
    const char *at[4], *next[4];
    float x[MR][4];
    for (int r = 0; r < 4; ++r) {
      at[r] = w.row(a.index[static_cast<size_t>(i + r)]) + from * size;
      next[r] = w.row(a.index[static_cast<size_t>(i + r + ahead)]) + from * size;
      for (int j = 0; j < MR; ++j) x[j][r] = a.row(first + j)[i + r];
    }
    auto step = [&](float* sums, auto&& column) {
      F s0[MR], s1[MR];
      for (int j = 0; j < MR; ++j) s0[j] = V::load_f(sums + j * lda), s1[j] = V::load_f(sums + j * lda + 16);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        F even, odd;
        effllm::widen<V, T>(column(r), even, odd);
#pragma GCC unroll 4
        for (int j = 0; j < MR; ++j) s0[j] = V::fma1(even, x[j][r], s0[j]), s1[j] = V::fma1(odd, x[j][r], s1[j]);
      }
      for (int j = 0; j < MR; ++j) V::store_f(sums + j * lda, s0[j]), V::store_f(sums + j * lda + 16, s1[j]);
    };
    for (int64_t c = 0; c < whole; c += 32) {
      for (int r = 0; r < 4; ++r) {
        __builtin_prefetch(next[r] + c * size);
        if constexpr (T == Type::f32) __builtin_prefetch(next[r] + c * size + 64);
      }
      step(acc + c, [&](int r) { return at[r] + c * size; });
    }
    if (whole < width) {
      alignas(64) char rest[4][32 * size] = {};
      for (int r = 0; r < 4; ++r) std::memcpy(rest[r], at[r] + whole * size, static_cast<size_t>((width - whole) * size));
      step(acc + whole, [&](int r) { return rest[r]; });
    }
  }
}

template <Type T> void axpy_of(const Matrix& w, const Active& a, int64_t from, int64_t width, float* acc, int64_t lda, int64_t ahead) {
  if (a.m == 1) return axpy<T, 1>(w, a, 0, from, width, acc, lda, ahead);
  if (a.m == 2) return axpy<T, 2>(w, a, 0, from, width, acc, lda, ahead);
  axpy<T, 2>(w, a, 0, from, width, acc, lda, ahead);
  if (a.m == 4) axpy<T, 2>(w, a, 2, from, width, acc + 2 * lda, lda, ahead);
  else axpy<T, 1>(w, a, 2, from, width, acc + 2 * lda, lda, ahead);
}

// Sums of a block, in the order of `place`, to outputs from .. of a row of y.
template <Type T> void write_block(const float* acc, const float* more, const float* bias, void* y, int64_t at, int64_t width, Type type) {
  float plain[32];
  for (int64_t c = 0; c < width; c += 32) {
    const int64_t count = std::min<int64_t>(32, width - c);
#pragma omp simd
    for (int j = 0; j < 16; ++j) {
      plain[T == Type::bf16 ? 2 * j : j] = acc[c + j];
      plain[T == Type::bf16 ? 2 * j + 1 : 16 + j] = acc[c + 16 + j];
    }
    if (more)
      for (int64_t j = 0; j < count; ++j) plain[j] += more[c + j];
    write(plain, bias ? bias + c : nullptr, y, at + c, count, type);
  }
}

Matrix matrix_of(const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, "effllm: a weight must be a matrix");
  return {t.const_data_ptr(), effllm::type_of(t.scalar_type()), t.size(0), t.size(1), t.size(1)};
}

int64_t block_of(int64_t n, int64_t threads, int64_t asked) {
  const int64_t share = (n + threads - 1) / threads;
  return (std::clamp<int64_t>(asked > 0 ? asked : 2048, 32, std::max<int64_t>(32, share)) + 31) / 32 * 32;
}

struct LowRank {  // u (n, r), v (r, k)
  Matrix u, v;
};

void by_input(const Call& c, const Matrix& w, const LowRank* low, const float* bias, void* y, const How& how) {
  static thread_local Active kept;
  static thread_local Buffer vectors;
  Active& a = kept;
  take<V>(a, c.data(), c.type, c.m, c.k, c.mask);
  const double nbytes = static_cast<double>(a.count * w.row_bytes()) + (low ? static_cast<double>(low->u.n * low->u.row_bytes() + low->v.n * low->v.row_bytes()) : 0.0);
  const int64_t threads = threads_for(how.threads, nbytes), n = w.k, block = block_of(n, threads, how.block), tasks = (n + block - 1) / block;
  const int64_t ahead = std::clamp<int64_t>(how.ahead > 0 ? how.ahead : 16, 4, kAhead - 4);
  Vectors rest{}, mid{};
  int64_t chunk = 1, chunks = 0;
  if (low) {
    const int64_t r = low->v.n, ldr = Vectors::stride(c.k), ldm = Vectors::stride(r);
    float* at = vectors.take(c.m * (ldr + ldm));
    rest = {at, c.m, c.k, ldr, low->v.type}, mid = {at + c.m * ldr, c.m, r, ldm, low->u.type};
    rest.clear_tail(), mid.clear_tail();
    for (int64_t i = 0; i < c.m; ++i)
      for (int64_t j = 0; j < c.k; ++j) {
        const float f = effllm::load_as_float(c.data(), i * c.k + j, c.type);
        rest.row(i)[place(j, low->v.type)] = c.mask.passes(f, j) ? 0.f : f;
      }
    chunk = std::max<int64_t>(4, (r / (4 * threads) + 3) / 4 * 4), chunks = (r + chunk - 1) / chunk;
  }
  effllm::in_phases<2>({chunks, tasks}, threads, [&](int phase, int64_t task) {
    static thread_local Buffer sums;
    if (phase == 0) {
      const int64_t from = task * chunk, to = std::min(low->v.n, from + chunk);
      float* out = sums.take(c.m * chunk);
      effllm::dense_rows<V>(low->v, from, to, rest, out, chunk);
      for (int64_t i = 0; i < c.m; ++i)
        for (int64_t j = from; j < to; ++j) mid.row(i)[place(j, low->u.type)] = out[i * chunk + j - from];
      return;
    }
    const int64_t from = task * block, width = std::min(block, n - from), lda = block + 16;
    float* acc = sums.take(2 * c.m * lda);
    float* more = low ? acc + c.m * lda : nullptr;
    std::memset(acc, 0, static_cast<size_t>(c.m * lda) * 4);
    if (w.type == Type::bf16) axpy_of<Type::bf16>(w, a, from, width, acc, lda, ahead);
    else if (w.type == Type::f16) axpy_of<Type::f16>(w, a, from, width, acc, lda, ahead);
    else axpy_of<Type::f32>(w, a, from, width, acc, lda, ahead);
    if (low) effllm::dense_rows<V>(low->u, from, from + width, mid, more, lda);
    for (int64_t i = 0; i < c.m; ++i) {
      const float* extra = more ? more + i * lda : nullptr;
      const float* b = bias ? bias + from : nullptr;
      if (w.type == Type::bf16) write_block<Type::bf16>(acc + i * lda, extra, b, y, i * n + from, width, c.type);
      else write_block<Type::f32>(acc + i * lda, extra, b, y, i * n + from, width, c.type);
    }
  });
}

// R rows at `base` times MR vectors: out[r * kMost + i]; lines of the rows at `next` are prefetched.
template <Type T, int R, int MR> void dots_at(const char* const* base, const char* const* next, int64_t k, const Vectors& x, int64_t first, float* out) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  F acc[R][MR];
  for (auto& row : acc)
    for (auto& f : row) f = V::zero_f();
  auto step = [&](const float* xs, auto&& at) {
    F x0[MR], x1[MR];
    for (int i = 0; i < MR; ++i) x0[i] = V::load_f(xs + i * x.ld), x1[i] = V::load_f(xs + i * x.ld + 16);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      F even, odd;
      effllm::widen<V, T>(at(r), even, odd);
#pragma GCC unroll 4
      for (int i = 0; i < MR; ++i) acc[r][i] = V::fma(odd, x1[i], V::fma(even, x0[i], acc[r][i]));
    }
  };
  const float* xs = x.row(first);
  const int64_t whole = k & ~int64_t{31};
  for (int64_t c = 0; c < whole; c += 32) {
    for (int r = 0; r < R; ++r) {
      __builtin_prefetch(next[r] + c * size);
      if constexpr (T == Type::f32) __builtin_prefetch(next[r] + c * size + 64);
    }
    step(xs + c, [&](int r) { return base[r] + c * size; });
  }
  if (whole < k) {
    alignas(64) char rest[R][32 * size] = {};
    for (int r = 0; r < R; ++r) std::memcpy(rest[r], base[r] + whole * size, static_cast<size_t>((k - whole) * size));
    step(xs + whole, [&](int r) { return rest[r]; });
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < MR; ++i) out[r * kMost + first + i] = effllm::sum16(acc[r][i]);
}

template <Type T> void dots_of(const char* const* base, const char* const* next, int64_t k, const Vectors& x, float* out) {
  int64_t i = 0;
  for (; i + 2 <= x.m; i += 2) dots_at<T, 4, 2>(base, next, k, x, i, out);
  if (i < x.m) dots_at<T, 4, 1>(base, next, k, x, i, out);
}

void by_output(const Call& c, const Tensor& gate, Type gate_type, const Matrix& w, const float* bias, void* y, const How& how) {
  static thread_local Active kept;
  static thread_local Buffer vectors;
  Active& a = kept;
  take<V>(a, gate.const_data_ptr(), gate_type, c.m, w.n, c.mask);
  const int64_t ld = Vectors::stride(c.k), n = w.n;
  const Vectors x{vectors.take(c.m * ld), c.m, c.k, ld, w.type};
  x.clear_tail();
  for (int64_t i = 0; i < c.m; ++i) x.take(i, 0, c.data(), i * c.k, c.k, c.type);
  std::memset(y, 0, static_cast<size_t>(c.m * n * size_of(c.type)));
  const int64_t quads = a.padded / 4, threads = threads_for(how.threads, static_cast<double>(a.count * w.row_bytes()));
  const int64_t each = std::clamp<int64_t>(how.block > 0 ? how.block / 4 : 16, 1, std::max<int64_t>(1, (quads + threads - 1) / threads));
  const int64_t ahead = std::clamp<int64_t>(how.ahead > 0 ? how.ahead : 8, 4, kAhead - 4);
  effllm::in_phases<1>({(quads + each - 1) / each}, threads, [&](int, int64_t task) {
    float out[4 * kMost];
    for (int64_t q = task * each; q < std::min(quads, (task + 1) * each); ++q) {
      const char *base[4], *next[4];
      for (int r = 0; r < 4; ++r) {
        base[r] = w.row(a.index[static_cast<size_t>(4 * q + r)]);
        next[r] = w.row(a.index[static_cast<size_t>(4 * q + r + ahead)]);
      }
      if (w.type == Type::bf16) dots_of<Type::bf16>(base, next, c.k, x, out);
      else if (w.type == Type::f16) dots_of<Type::f16>(base, next, c.k, x, out);
      else dots_of<Type::f32>(base, next, c.k, x, out);
      for (int r = 0; r < 4 && 4 * q + r < a.count; ++r) {
        const int64_t j = a.index[static_cast<size_t>(4 * q + r)];
        for (int64_t i = 0; i < c.m; ++i) {
          const float g = effllm::load_as_float(gate.const_data_ptr(), i * n + j, gate_type);
          if (c.mask.passes(g, j)) effllm::store_from_float(y, i * n + j, c.type, g * (out[r * kMost + i] + (bias ? bias[j] : 0.f)));
        }
      }
    }
  });
}

std::optional<Tensor> bias_as(const std::optional<Tensor>& bias, torch::headeronly::ScalarType dtype) {
  return bias ? std::optional<Tensor>(as(*bias, dtype)) : std::nullopt;
}

Tensor dense_by_input(const Call& c, const Tensor& w, const std::optional<Tensor>& bias) {
  const auto dtype = c.x.scalar_type();
  return effllm::dense_linear(c.sparse ? masked(c.x, c.mask) : c.x, torch::stable::transpose(as(w, dtype), 0, 1), bias_as(bias, dtype));
}

Tensor skip_input(const Tensor x, const Tensor threshold, const Tensor weight_t, std::optional<Tensor> bias, int64_t limit, int64_t threads, int64_t block, int64_t ahead) {
  const Call c = call_of(x, threshold, -1, limit);
  const Tensor held = torch::stable::contiguous(weight_t);
  const Matrix w = matrix_of(held);
  STD_TORCH_CHECK(w.n == c.k, "effllm: weight_t has ", w.n, " inputs, the activation ", c.k);
  if (c.m && w.k && !c.few()) return shaped(dense_by_input(c, held, bias), x);
  const Tensor y = effllm::result(x, w.k, x.scalar_type());
  if (c.m == 0 || w.k == 0) return y;
  const std::vector<float> b = effllm::floats_of(bias, w.k);
  by_input(c, w, nullptr, b.empty() ? nullptr : b.data(), y.mutable_data_ptr(), {threads, block, ahead});
  return y;
}

Tensor skip_rest(const Tensor x, const Tensor threshold, const Tensor colnorm, const Tensor weight_t, const Tensor u, const Tensor v, std::optional<Tensor> bias, int64_t limit, int64_t threads,
                 int64_t block, int64_t ahead) {
  Call c = call_of(x, threshold, 1, limit);
  c.mask.norm = floats_at(c.norm, colnorm, c.k, c.k, "column norms must be float32, one per input");
  const Tensor held = torch::stable::contiguous(weight_t), hu = torch::stable::contiguous(u), hv = torch::stable::contiguous(v);
  const Matrix w = matrix_of(held);
  const LowRank low{matrix_of(hu), matrix_of(hv)};
  STD_TORCH_CHECK(w.n == c.k && low.v.k == c.k && low.u.n == w.k && low.u.k == low.v.n, "effllm: the weight, u and v do not fit the activation or one another");
  if (c.m && w.k && !c.few()) {
    const Tensor y = dense_by_input(c, held, bias);
    if (!c.sparse) return shaped(y, x);
    const auto dtype = c.x.scalar_type();
    const Tensor kept = masked(c.x, c.mask), rest = torch::stable::new_empty(c.x, {c.m, c.k});
    const int64_t size = size_of(c.type);
    auto* to = static_cast<char*>(rest.mutable_data_ptr());
    std::memcpy(to, c.data(), static_cast<size_t>(c.m * c.k * size));
    for (int64_t i = 0; i < c.m * c.k; ++i)
      if (c.mask.passes(effllm::load_as_float(c.data(), i, c.type), i % c.k)) std::memset(to + i * size, 0, static_cast<size_t>(size));
    const Tensor part = effllm::dense_linear(effllm::dense_linear(rest, as(hv, dtype), std::nullopt), as(hu, dtype), std::nullopt);
    auto* sum = y.mutable_data_ptr();
    for (int64_t i = 0; i < y.numel(); ++i) effllm::store_from_float(sum, i, c.type, effllm::load_as_float(sum, i, c.type) + effllm::load_as_float(part.const_data_ptr(), i, c.type));
    return shaped(y, x);
  }
  const Tensor y = effllm::result(x, w.k, x.scalar_type());
  if (c.m == 0 || w.k == 0) return y;
  const std::vector<float> b = effllm::floats_of(bias, w.k);
  by_input(c, w, c.sparse ? &low : nullptr, b.empty() ? nullptr : b.data(), y.mutable_data_ptr(), {threads, block, ahead});
  return y;
}

Tensor skip_output(const Tensor x, const Tensor gate, const Tensor threshold, const Tensor weight, std::optional<Tensor> bias, int64_t limit, int64_t threads, int64_t block, int64_t ahead) {
  const Tensor held = torch::stable::contiguous(weight);
  const Matrix w = matrix_of(held);
  const Call c = call_of(x, threshold, w.n, limit);
  STD_TORCH_CHECK(w.k == c.k && gate.numel() == c.m * w.n, "effllm: the weight or the gate does not fit the activation");
  const Tensor g = torch::stable::contiguous(gate);
  const Type type = effllm::type_of(g.scalar_type());
  if (c.m && w.n && !c.few()) {
    const auto dtype = c.x.scalar_type();
    const Tensor y = effllm::dense_linear(c.x, as(held, dtype), bias_as(bias, dtype));
    void* to = y.mutable_data_ptr();
    torch::stable::parallel_for(0, c.m, std::max<int64_t>(1, 32768 / w.n), [&](int64_t i0, int64_t i1) {
      for (int64_t i = i0 * w.n; i < i1 * w.n; ++i) {
        const float f = effllm::load_as_float(g.const_data_ptr(), i, type);
        effllm::store_from_float(to, i, c.type, c.sparse && !c.mask.passes(f, i % w.n) ? 0.f : f * effllm::load_as_float(to, i, c.type));
      }
    });
    return shaped(y, x);
  }
  const Tensor y = effllm::result(x, w.n, x.scalar_type());
  if (c.m == 0 || w.n == 0) return y;
  const std::vector<float> b = effllm::floats_of(bias, w.n);
  by_output(c, g, type, w, b.empty() ? nullptr : b.data(), y.mutable_data_ptr(), {threads, block, ahead});
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("skip_input(Tensor x, Tensor threshold, Tensor weight_t, Tensor? bias, int limit, int threads=0, int block=0, int ahead=0) -> Tensor");
  m.def("skip_rest(Tensor x, Tensor threshold, Tensor colnorm, Tensor weight_t, Tensor u, Tensor v, Tensor? bias, int limit, int threads=0, int block=0, int ahead=0) -> Tensor");
  m.def("skip_output(Tensor x, Tensor gate, Tensor threshold, Tensor weight, Tensor? bias, int limit, int threads=0, int block=0, int ahead=0) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) {
  effllm::offer(m, "skip_input", TORCH_BOX(&skip_input));
  effllm::offer(m, "skip_rest", TORCH_BOX(&skip_rest));
  effllm::offer(m, "skip_output", TORCH_BOX(&skip_output));
}
