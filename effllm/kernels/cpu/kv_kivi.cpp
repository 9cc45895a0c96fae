// Attention over KIVI and GEAR pages (effllm/runtime/caches/kivi.py, gear.py), codes never turned into dense keys and values.
//
// Maths    keys K^[t,c] = C[t,c] S[g,c] + Z[g,c], g the token group:   q K^_t = sum_c (q_c S[g,c]) C[t,c] + sum_c q_c Z[g,c]
//          values V^[t,c] = C[t,c] S[t,k] + Z[t,k], k the channel group:   sum_t p_t V^[t,c] = sum_t (p_t S[t,k]) C[t,c] + sum_t p_t Z[t,k]
//          GEAR adds A B^T and a few exact corrections:   (q B) A_t + sum of q_c X[t,c],   (p A) B_c + sum of p_t X[t,c]
// Numerics q_c S and p_t S become integer digits of 8 bits (two for bf16 and fp16, three for fp32), so both sums are byte dot products of
//          codes; the rounding is 2^-16 (2^-24) of the largest factor of the sum. Everything else is fp32.
// Layout   codes 16 rows by 4 columns to 64 bytes (runtime/caches/codes.py): rows tokens and columns channels for keys, the other way for values.
#include "gemv.h"
#include "kv.h"
#include "offer.h"

namespace {

using effllm::sum16;
using effllm::Type;
using effllm::kv::Tensor;

constexpr int kRows = 4;  // queries at a time: 4 rows of 2 digits keep their sums in registers

// f (n) ~ unit * sum_d 256^(DIGITS-1-d) x[d], x[d] of `stride` bytes, `big` the largest |f|; n a multiple of 16. Returns unit.
template <class A, int DIGITS> inline float split(const float* f, int64_t n, float big, int8_t* x, int64_t stride) {
  const float unit = big / (DIGITS == 2 ? 127.f * 256.f : 127.f * 65536.f), inv = unit > 1e-37f ? 1.f / unit : 0.f;
  if constexpr (DIGITS == 2) {
    for (int64_t i = 0; i < n; i += 16) A::digits(A::load_f(f + i), inv, x + i, x + stride + i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      int32_t v = static_cast<int32_t>(std::nearbyint(f[i] * inv));
      for (int d = DIGITS - 1; d > 0; --d) {
        const int8_t low = static_cast<int8_t>(v);
        x[d * stride + i] = low;
        v = (v - low) >> 8;
      }
      x[i] = static_cast<int8_t>(v);
    }
  }
  return inv > 0 ? unit : 0.f;
}

// acc[b][r][d] (16 rows) = sum over columns of the codes of BLOCKS blocks * digits; x[(r * DIGITS + d) * stride] are digit streams.
template <class A, int BITS, int ROWS, int DIGITS, int BLOCKS>
inline void dots32(const uint8_t* codes, int64_t lines, const int8_t* x, int64_t stride, typename A::I (&acc)[BLOCKS][ROWS][DIGITS]) {
  constexpr int F = 8 / BITS, MASK = (1 << BITS) - 1;
  for (auto& block : acc) for (auto& row : block) for (auto& sum : row) sum = A::zero_i();
  auto step = [&](const typename A::W& w, int b, const int8_t* at) {
    for (int r = 0; r < ROWS; ++r)
      for (int d = 0; d < DIGITS; ++d) acc[b][r][d] = A::template dp<BITS == 8>(acc[b][r][d], w, at + (r * DIGITS + d) * stride);
  };
  for (int64_t j = 0; j < lines; ++j)
    for (int b = 0; b < BLOCKS; ++b) {
      const auto w = A::load(codes + (b * lines + j) * 64);
      const int8_t* at = x + 4 * F * j;
      step(A::template field<0, MASK>(w), b, at);
      if constexpr (F > 1) step(A::template field<BITS, MASK>(w), b, at + 4);
      if constexpr (F > 2) {
        step(A::template field<2 * BITS, MASK>(w), b, at + 8);
        step(A::template field<3 * BITS, MASK>(w), b, at + 12);
      }
    }
}

// The same of one block where products of small codes gather in 16 bits: sums of few rows at a time, which fit into sixteen registers.
template <class A, int BITS, int ROWS, int DIGITS>
[[gnu::noinline]] void dots16(const uint8_t* codes, int64_t lines, const int8_t* x, int64_t stride, typename A::I* acc) {
  constexpr int F = 8 / BITS, MASK = (1 << BITS) - 1;
  constexpr int64_t most = 32767 / (2 * MASK * 128) / F;  // lines between two gatherings
  for (int i = 0; i < ROWS * DIGITS; ++i) acc[i] = A::zero_i();  // in memory, so that the sums of the loop have the registers
  for (int64_t j = 0; j < lines;) {
    typename A::S sums[ROWS * DIGITS];
    for (auto& sum : sums) sum = A::zero_s();
    auto step = [&](const typename A::W& w, const int8_t* at) {
      for (int i = 0; i < ROWS * DIGITS; ++i) sums[i] = A::dp_short(sums[i], w, at + i * stride);
    };
    for (const int64_t end = std::min(lines, j + most); j < end; ++j) {
      const auto w = A::load(codes + j * 64);
      const int8_t* at = x + 4 * F * j;
      step(A::template field<0, MASK>(w), at);
      step(A::template field<BITS, MASK>(w), at + 4);
      if constexpr (F > 2) {
        step(A::template field<2 * BITS, MASK>(w), at + 8);
        step(A::template field<3 * BITS, MASK>(w), at + 12);
      }
    }
    for (int i = 0; i < ROWS * DIGITS; ++i) acc[i] = A::add_short(acc[i], sums[i]);
  }
}

// out[b][r] (16 rows each) = sum over columns of codes * digits, BLOCKS blocks of rows from `codes`.
template <class A, int BITS, int ROWS, int DIGITS, int BLOCKS>
inline void dots(const uint8_t* codes, int64_t quads, const int8_t* x, int64_t stride, typename A::F (&out)[BLOCKS][ROWS]) {
  const int64_t lines = quads * BITS / 8;
  typename A::I acc[BLOCKS][ROWS][DIGITS];
  if constexpr (BITS < 8 && requires { typename A::S; }) {
    for (int b = 0; b < BLOCKS; ++b) {
      constexpr int AT_ONCE = DIGITS == 2 ? 2 : 1;
      const uint8_t* block = codes + b * lines * 64;
      int r = 0;
      for (; r + AT_ONCE <= ROWS; r += AT_ONCE) dots16<A, BITS, AT_ONCE, DIGITS>(block, lines, x + r * DIGITS * stride, stride, acc[b][r]);
      for (; r < ROWS; ++r) dots16<A, BITS, 1, DIGITS>(block, lines, x + r * DIGITS * stride, stride, acc[b][r]);
    }
  }
  else dots32<A, BITS, ROWS, DIGITS, BLOCKS>(codes, lines, x, stride, acc);
  for (int b = 0; b < BLOCKS; ++b)
    for (int r = 0; r < ROWS; ++r) {
      auto f = A::to_float(acc[b][r][0]);
      for (int d = 1; d < DIGITS; ++d) f = A::fma1(f, 256.f, A::to_float(acc[b][r][d]));
      out[b][r] = f;
    }
}

// Offsets of the fields inside a record; `rank`, `kout` and `vout` are 0 for KIVI.
struct Shape {
  int64_t page, dim, bits, group, vgroup, rank, kout, vout, factor;  // factor: bytes of an element of A and B
  int64_t kcodes, kscale, kmin, vcodes, vscale, vmin, ka, kb, va, vb, kidx, kval, vidx, vval, record;
  Shape(int64_t page_, int64_t dim_, int64_t bits_, int64_t group_, int64_t rank_, int64_t kout_, int64_t vout_, int64_t factors)
      : page(page_), dim(dim_), bits(bits_), group(group_), vgroup(std::min(group_, dim_)), rank(rank_), kout(kout_), vout(vout_), factor(factors / 8) {
    int64_t at = 0;
    auto take = [&at](int64_t bytes) { const int64_t here = at; at += (bytes + 63) / 64 * 64; return here; };
    const int64_t codes = page * dim * bits / 8;
    kcodes = take(codes), kscale = take(page / group * dim * 2), kmin = take(page / group * dim * 2);
    vcodes = take(codes), vscale = take(dim / vgroup * page * 2), vmin = take(dim / vgroup * page * 2);
    ka = take(rank * page * factor), kb = take(rank * dim * factor), va = take(rank * page * factor), vb = take(rank * dim * factor);
    kidx = take(dim * kout), kval = take(dim * kout * 2), vidx = take(page * vout), vval = take(page * vout * 2);
    record = at;
  }
};

template <class A, int BITS, int DIGITS> struct Codec : effllm::kv::Plain {
  Shape z;
  std::vector<int8_t> x;   // digits of kRows rows
  std::vector<float> f;       // kRows rows of scaled queries or weights
  std::vector<uint16_t> a, b;  // one row of A and of B as halves
  int64_t stride;

  explicit Codec(const Shape& shape) : z(shape), stride(std::max(shape.page, shape.dim)) {
    x.resize(static_cast<size_t>(kRows * DIGITS * stride));
    f.resize(static_cast<size_t>(kRows * stride));
    a.resize(static_cast<size_t>(stride));
    b.resize(static_cast<size_t>(stride));
  }

  static const uint16_t* halves(const uint8_t* p) { return reinterpret_cast<const uint16_t*>(p); }

  // to = rows of a, `ld` floats apart, times scales; unit the largest of them, bias the sum of a * minimum, NaN where anything is not finite. n a
  // multiple of 16.
  template <int ROWS> void fold(const float* a, int64_t ld, const uint16_t* scale, const uint16_t* minimum, int64_t n, float* to, float* unit, float* bias) {
    constexpr int AT_ONCE = A::gemm_rows > 2 ? 4 : 2;  // whose sums fit into registers
    if constexpr (ROWS > AT_ONCE) {
      fold<AT_ONCE>(a, ld, scale, minimum, n, to, unit, bias);
      fold<ROWS - AT_ONCE>(a + AT_ONCE * ld, ld, scale, minimum, n, to + AT_ONCE * stride, unit + AT_ONCE, bias + AT_ONCE);
    } else {
      typename A::F total[ROWS], big[ROWS];
      for (int r = 0; r < ROWS; ++r) total[r] = big[r] = A::zero_f();
      for (int64_t i = 0; i < n; i += 16) {
        const auto s = A::load_h(scale + i), low = A::load_h(minimum + i);
        for (int r = 0; r < ROWS; ++r) {
          const auto v = A::load_f(a + r * ld + i), w = A::fma(v, s, A::zero_f());
          A::store_f(to + r * stride + i, w);
          total[r] = A::fma1(w, 0.f, A::fma(v, low, total[r]));
          big[r] = A::larger(big[r], w);
        }
      }
      for (int r = 0; r < ROWS; ++r) bias[r] = sum16(total[r]), unit[r] = A::most(big[r]);
    }
  }
  template <int ROWS> void fold_and_split(const float* a, int64_t ld, const uint8_t* scale, const uint8_t* minimum, int64_t group, int64_t n, float (&unit)[ROWS], float (&bias)[ROWS]) {
    fold<ROWS>(a, ld, halves(scale) + group * n, halves(minimum) + group * n, n, f.data(), unit, bias);
    for (int r = 0; r < ROWS; ++r) unit[r] = split<A, DIGITS>(f.data() + r * stride, n, unit[r], x.data() + r * DIGITS * stride, stride);
  }
  // dot of n floats with n halves.
  static float dot(const float* a, const uint16_t* b, int64_t n) {
    auto total = A::zero_f();
    for (int64_t i = 0; i < n; i += 16) total = A::fma(A::load_f(a + i), A::load_h(b + i), total);
    return sum16(total);
  }
  // y += w * halves
  static void axpy(float w, const uint16_t* b, int64_t n, float* y) {
    for (int64_t i = 0; i < n; i += 16) A::store_f(y + i, A::fma1(A::load_h(b + i), w, A::load_f(y + i)));
  }

  // Row i, of n elements, of A or B at `from` as halves: in place, or widened into `room` where they are upper bytes of halves.
  const uint16_t* factor_row(const uint8_t* from, int64_t i, int64_t n, std::vector<uint16_t>& room) const {
    if (z.factor == 2) return halves(from) + i * n;
    for (int64_t j = 0; j < n; ++j) room[static_cast<size_t>(j)] = static_cast<uint16_t>(from[i * n + j] << 8);
    return room.data();
  }

  template <int ROWS> void keys(const uint8_t* record, const float* q, float* s) {
    constexpr int BLOCKS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
    float unit[ROWS], bias[ROWS];
    for (int64_t g = 0; g < z.page / z.group; ++g) {
      fold_and_split<ROWS>(q, z.dim, record + z.kscale, record + z.kmin, g, z.dim, unit, bias);
      const int64_t quads = z.dim / 4, block = z.dim * 16 * BITS / 8;
      auto run = [&](int64_t tb, auto& out) {
        dots<A, BITS, ROWS, DIGITS>(record + z.kcodes + tb * block, quads, x.data(), stride, out);
        for (int64_t b = 0; b < static_cast<int64_t>(sizeof(out) / sizeof(out[0])); ++b)
          for (int r = 0; r < ROWS; ++r) A::store_f(s + r * z.page + (tb + b) * 16, A::axpb(out[b][r], unit[r], bias[r]));
      };
      int64_t tb = g * z.group / 16;
      const int64_t end = (g + 1) * z.group / 16;
      typename A::F many[BLOCKS][ROWS], one[1][ROWS];
      for (; tb + BLOCKS <= end; tb += BLOCKS) run(tb, many);
      for (; tb < end; ++tb) run(tb, one);
    }
  }

  template <int ROWS> void sums(const uint8_t* record, const float* p, float* acc) {
    constexpr int BLOCKS = ROWS == 1 ? 4 : ROWS == 2 ? 2 : 1;
    float unit[ROWS], bias[ROWS];
    for (int64_t k = 0; k < z.dim / z.vgroup; ++k) {
      fold_and_split<ROWS>(p, z.page, record + z.vscale, record + z.vmin, k, z.page, unit, bias);
      const int64_t quads = z.page / 4, block = z.page * 16 * BITS / 8;
      auto run = [&](int64_t cb, auto& out) {
        dots<A, BITS, ROWS, DIGITS>(record + z.vcodes + cb * block, quads, x.data(), stride, out);
        for (int64_t b = 0; b < static_cast<int64_t>(sizeof(out) / sizeof(out[0])); ++b)
          for (int r = 0; r < ROWS; ++r) {
            float* to = acc + r * z.dim + (cb + b) * 16;
            A::store_f(to, A::fma1(out[b][r], unit[r], A::axpb(A::load_f(to), 1.f, bias[r])));
          }
      };
      int64_t cb = k * z.vgroup / 16;
      const int64_t end = (k + 1) * z.vgroup / 16;
      typename A::F many[BLOCKS][ROWS], one[1][ROWS];
      for (; cb + BLOCKS <= end; cb += BLOCKS) run(cb, many);
      for (; cb < end; ++cb) run(cb, one);
    }
  }

  static float half_at(const uint8_t* p, int64_t i) { return effllm::load_as_float(p, i, Type::f16); }

  void scores(const uint8_t* record, const float* q, int64_t rows, float* s) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const float* from = q + r * z.dim;
      float* to = s + r * z.page;
      switch (std::min<int64_t>(kRows, rows - r)) {
        case 1: keys<1>(record, from, to); break;
        case 2: keys<2>(record, from, to); break;
        case 3: keys<3>(record, from, to); break;
        default: keys<4>(record, from, to);
      }
    }
    for (int64_t i = 0; i < z.rank; ++i) {
      const uint16_t *left = factor_row(record + z.ka, i, z.page, a), *right = factor_row(record + z.kb, i, z.dim, b);
      for (int64_t r = 0; r < rows; ++r) axpy(dot(q + r * z.dim, right, z.dim), left, z.page, s + r * z.page);
    }
    for (int64_t c = 0; c < (z.kout ? z.dim : 0); ++c)
      for (int64_t i = c * z.kout; i < (c + 1) * z.kout; ++i) {
        const float w = half_at(record + z.kval, i);
        for (int64_t r = 0, t = record[z.kidx + i]; r < rows; ++r) s[r * z.page + t] += q[r * z.dim + c] * w;
      }
  }

  void values(const uint8_t* record, const float* p, int64_t rows, float* acc) {
    for (int64_t r = 0; r < rows; r += kRows) {
      const float* from = p + r * z.page;
      float* to = acc + r * z.dim;
      switch (std::min<int64_t>(kRows, rows - r)) {
        case 1: sums<1>(record, from, to); break;
        case 2: sums<2>(record, from, to); break;
        case 3: sums<3>(record, from, to); break;
        default: sums<4>(record, from, to);
      }
    }
    for (int64_t i = 0; i < z.rank; ++i) {
      const uint16_t *left = factor_row(record + z.va, i, z.page, a), *right = factor_row(record + z.vb, i, z.dim, b);
      for (int64_t r = 0; r < rows; ++r) axpy(dot(p + r * z.page, left, z.page), right, z.dim, acc + r * z.dim);
    }
    for (int64_t t = 0; t < (z.vout ? z.page : 0); ++t)
      for (int64_t i = t * z.vout; i < (t + 1) * z.vout; ++i) {
        const float w = half_at(record + z.vval, i);
        for (int64_t r = 0, c = record[z.vidx + i]; r < rows; ++r) acc[r * z.dim + c] += p[r * z.page + t] * w;
      }
  }
};

Tensor kv_kivi(const Tensor q, const Tensor pages, const Tensor ring, const Tensor lens, std::optional<Tensor> mask, double scale, int64_t page, int64_t bits, int64_t group,
               int64_t rank, int64_t kout, int64_t vout, int64_t factors, std::optional<Tensor> row, std::optional<Tensor> cos, std::optional<Tensor> sin, bool half) {
  const Shape z(page, ring.size(4), bits, group, rank, kout, vout, factors);
  STD_TORCH_CHECK((factors == 8 || factors == 16) && (bits == 2 || bits == 4 || bits == 8) && page % group == 0 && group % 16 == 0 && z.dim % z.vgroup == 0 && z.dim % 16 == 0 && z.vgroup % 16 == 0 &&
                      pages.size(2) == z.record * ring.size(2), "effllm: the pages do not fit these settings");
  auto go = [&](auto bits_of, auto digits_of) {
    const auto c = effllm::kv::state_of(pages, ring, lens, page, ring.size(2));
    const auto shift = effllm::shift_of(row, cos, sin, half, c.dim, c.keys());
    return effllm::kv::attend(q, c, mask, scale, Codec<effllm::EFFLLM_ISA, decltype(bits_of)::value, decltype(digits_of)::value>(z), shift);
  };
  auto by_digits = [&](auto bits_of) {
    if (effllm::type_of(q.scalar_type()) == Type::f32) return go(bits_of, std::integral_constant<int, 3>());
    return go(bits_of, std::integral_constant<int, 2>());
  };
  if (bits == 2) return by_digits(std::integral_constant<int, 2>());
  if (bits == 4) return by_digits(std::integral_constant<int, 4>());
  return by_digits(std::integral_constant<int, 8>());
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_kivi(Tensor q, Tensor pages, Tensor ring, Tensor lens, Tensor? mask, float scale, int page, int bits, int group, int rank, int kout, int vout, int factors, Tensor? row, Tensor? cos, Tensor? sin, bool half) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_kivi", TORCH_BOX(&kv_kivi)); }
