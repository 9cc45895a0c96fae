// Packing GEAR pages (effllm/runtime/caches/gear.py): KIVI codes of a matrix without its extremes, a power iteration on what they lose, exact outliers.
//
// Maths   of X (M, N), vectors along M: keys (page, D), values turned to (D, page). S: each vector's `count` / 2 smallest and largest entries. Y: X - A B^T with S
//         replaced by the vector's mean; H = dequantized codes of Y; E = X - H, 0 at S; A, B: `loops` turns Q = orth(E orth(P)), P = E^T Q from a fixed start,
//         stored as halves or their upper bytes; `rounds` times. Stored at S: X - A B^T - H.
// Numerics the sums, means and norms are fp64, as in Python, so that their order does not show in the halves that are stored; the quantizer is fp32.
// Bytes   a page read once; 4 loops rank M N multiply-adds a matrix.
#include <numeric>

#include "kv_quantize.h"
#include "offer.h"

namespace {

using effllm::Type;
using effllm::kv::halves;
using effllm::kv::Tensor;

// A double as the upper byte of a half, nearest, ties to even (e5m2); through fp32, as torch converts.
inline uint8_t upper_byte(float f) {
  uint32_t u; std::memcpy(&u, &f, 4);
  const uint8_t sign = static_cast<uint8_t>(u >> 24 & 0x80);
  const float a = std::fabs(f);
  if (a != a) return sign | 0x7F;
  if (a >= 61440.f) return sign | 0x7C;  // halfway from the largest, 57344, to 2^16
  if (a < 6.103515625e-05f) return sign | static_cast<uint8_t>(std::nearbyint(a * 65536.f));  // below 2^-14: steps of 2^-16
  int e;
  const float m = std::frexp(a, &e);                                   // a = m 2^e, m in [1/2, 1)
  const int32_t code = static_cast<int32_t>(std::nearbyint(m * 8.f));  // 4 .. 8 eighths
  return sign | static_cast<uint8_t>(((e + 14) << 2) + code - 4);      // 8 eighths carry into the exponent
}
inline float of_upper_byte(uint8_t b) { return effllm::kv::of_half(static_cast<uint16_t>(b << 8)); }

struct Settings {
  int64_t rank, loops, rounds, factor;  // factor: bytes of an element of A or B
};

// One matrix of a page.
struct Side {
  int64_t m, n, count;
  Settings o;
  effllm::kv::Quantizer quantizer;
  std::vector<int32_t> index, order;  // (n, count) positions of extremes
  std::vector<float> y, held;
  std::vector<double> e, a, b, low;  // E (m, n); A (rank, m), B (rank, n); A B^T

  Side(int64_t m, int64_t n, int64_t bits, int64_t group, int64_t count, Settings o) : m(m), n(n), count(count), o(o), quantizer(m, n, bits, group) {}

  void extremes(const float* x) {
    index.resize(static_cast<size_t>(n * count)), order.resize(static_cast<size_t>(m));
    if (count == 2 && m > 2) {  // a NaN is both: the first and the last of them
      for (int64_t c = 0; c < n; ++c) index[2 * c] = index[2 * c + 1] = 0;
      for (int64_t t = 1; t < m; ++t)
        for (int64_t c = 0; c < n; ++c) {
          const float v = x[t * n + c], least = x[index[2 * c] * n + c], most = x[index[2 * c + 1] * n + c];
          if (least == least && (v < least || v != v)) index[2 * c] = static_cast<int32_t>(t);
          if (v >= most || v != v) index[2 * c + 1] = static_cast<int32_t>(t);
        }
      return;
    }
    for (int64_t c = 0; c < n; ++c) {
      std::iota(order.begin(), order.end(), 0);
      if (count < m)
        std::stable_sort(order.begin(), order.end(), [&](int32_t i, int32_t j) {
          const float u = x[i * n + c], v = x[j * n + c];
          return u < v || (v != v && u == u);  // NaN last
        });
      for (int64_t i = 0; i < count; ++i) index[c * count + i] = order[count >= m || i < count / 2 ? i : m - count + i];
    }
  }

  // Columns of x (rank, size) made orthonormal one after the other, twice; without a remainder they become zero.
  void orthonormal(double* x, int64_t size) const {
    auto dot = [size](const double* u, const double* v) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < size; ++i) sum += u[i] * v[i];
      return sum;
    };
    for (int64_t r = 0; r < o.rank; ++r) {
      double* c = x + r * size;
      const double whole = std::sqrt(dot(c, c));
      for (int twice = 0; twice < 2; ++twice)
        for (int64_t other = 0; other < r; ++other) {
          const double w = dot(x + other * size, c);
          for (int64_t i = 0; i < size; ++i) c[i] -= w * x[other * size + i];
        }
      const double left = std::sqrt(dot(c, c)), by = std::max(left, 1e-30);
      for (int64_t i = 0; i < size; ++i) c[i] = left <= 1e-6 * whole ? 0. : c[i] / (left != left ? left : by);
    }
  }

  // Where the iteration starts: a hash of row and column, in -1 to 1.
  static double first(int64_t row, int64_t column) {
    uint32_t h = static_cast<uint32_t>(row + 1) * 2654435761u + static_cast<uint32_t>(column + 1) * 2246822519u;
    h = (h ^ h >> 15) * 2246822519u;
    return (h ^ h >> 13) / 2147483648. - 1.;
  }

  void factors() {
    const int64_t r = o.rank;
    a.assign(static_cast<size_t>(r * m), 0.), b.resize(static_cast<size_t>(r * n));
    for (int64_t i = 0; i < r; ++i)
      for (int64_t c = 0; c < n; ++c) b[i * n + c] = first(c, i);
    for (int64_t loop = 0; loop < o.loops; ++loop) {
      orthonormal(b.data(), n);
      for (int64_t i = 0; i < r; ++i)
        for (int64_t t = 0; t < m; ++t) {
          double sum = 0;
          const double *row = e.data() + t * n, *by = b.data() + i * n;
#pragma omp simd reduction(+ : sum)
          for (int64_t c = 0; c < n; ++c) sum += row[c] * by[c];
          a[i * m + t] = sum;
        }
      orthonormal(a.data(), m);
      std::fill(b.begin(), b.end(), 0.);
      for (int64_t i = 0; i < r; ++i)
        for (int64_t t = 0; t < m; ++t) {
          const double w = a[i * m + t], *row = e.data() + t * n;
          double* to = b.data() + i * n;
#pragma omp simd
          for (int64_t c = 0; c < n; ++c) to[c] += w * row[c];
        }
    }
  }

  // Elements as stored, and back into place.
  void store(std::vector<double>& f, uint8_t* out) const {
    for (size_t i = 0; i < f.size(); ++i) {
      const float v = static_cast<float>(f[i]);
      if (o.factor == 1) f[i] = of_upper_byte(out[i] = upper_byte(v));
      else f[i] = effllm::kv::of_half(halves(out)[i] = effllm::kv::half_of(v));
    }
  }
  double product(int64_t t, int64_t c) const {
    double sum = 0;
    for (int64_t i = 0; i < o.rank; ++i) sum += a[i * m + t] * b[i * n + c];
    return sum;
  }

  // x (m, n) to the fields.
  void pack(const float* x, uint8_t* codes, uint16_t* scale, uint16_t* minimum, uint8_t* left, uint8_t* right, uint8_t* places, uint16_t* exact) {
    const int64_t all = m * n;
    y.resize(static_cast<size_t>(all)), held.resize(y.size()), e.resize(y.size());
    low.assign(static_cast<size_t>(n), 0.);  // means
    extremes(x);
    for (int64_t round = 0; round < o.rounds; ++round) {
      for (int64_t t = 0; t < m; ++t)
        for (int64_t c = 0; c < n; ++c) y[t * n + c] = round ? static_cast<float>(static_cast<double>(x[t * n + c]) - product(t, c)) : x[t * n + c];
      if (count) {
        std::fill(low.begin(), low.end(), 0.);
        for (int64_t t = 0; t < m; ++t)
          for (int64_t c = 0; c < n; ++c) low[c] += y[t * n + c];
        for (int64_t c = 0; c < n; ++c)
          for (int64_t i = 0; i < count; ++i) y[index[c * count + i] * n + c] = static_cast<float>(low[c] / static_cast<double>(m));
      }
      quantizer.encode(y.data(), scale, minimum);
      for (int64_t t = 0; t < m; ++t) {
        const uint16_t *s = scale + t / quantizer.group * n, *z = minimum + t / quantizer.group * n;
        for (int64_t c = 0; c < n; ++c) {  // the product is exact
          held[t * n + c] = effllm::kv::of_half(z[c]) + static_cast<float>(quantizer.codes[t * n + c]) * effllm::kv::of_half(s[c]);
          e[t * n + c] = x[t * n + c] - held[t * n + c];
        }
      }
      for (int64_t c = 0; c < n; ++c)
        for (int64_t i = 0; i < count; ++i) e[index[c * count + i] * n + c] = 0.;
      if (o.rank) factors(), store(a, left), store(b, right);
    }
    quantizer.pack(codes);
    for (int64_t c = 0; c < n; ++c)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t t = index[c * count + i], at = c * count + i;
        places[at] = static_cast<uint8_t>(t);
        exact[at] = effllm::kv::half_of(static_cast<float>(static_cast<double>(x[t * n + c]) - product(t, c) - static_cast<double>(held[t * n + c])));
      }
  }
};

struct Packer {
  Type type;
  int64_t page, dim, ka, kb, va, vb, kidx, kval, vidx, vval, end;
  effllm::kv::KiviPlaces at;
  Side keys, values;
  std::vector<float> x, turned;

  Packer(Type type, int64_t page, int64_t dim, int64_t bits, int64_t group, int64_t kout, int64_t vout, Settings o)
      : type(type), page(page), dim(dim), at(page, dim, bits, group), keys(page, dim, bits, group, kout, o), values(dim, page, bits, std::min(group, dim), vout, o) {
    int64_t to = at.end;
    auto take = [&to](int64_t bytes) { const int64_t here = to; to += (bytes + 63) / 64 * 64; return here; };
    ka = take(o.rank * page * o.factor), kb = take(o.rank * dim * o.factor), va = take(o.rank * page * o.factor), vb = take(o.rank * dim * o.factor);
    kidx = take(dim * kout), kval = take(dim * kout * 2), vidx = take(page * vout), vval = take(page * vout * 2);
    end = to;
  }

  void pack(const void* k, const void* v, int64_t, uint8_t* out) {
    x.resize(static_cast<size_t>(page * dim)), turned.resize(x.size());
    effllm::kv::widen_all(type, k, page * dim, x.data());
    keys.pack(x.data(), out, halves(out + at.kscale), halves(out + at.kmin), out + ka, out + kb, out + kidx, halves(out + kval));
    effllm::kv::widen_all(type, v, page * dim, x.data());
    effllm::kv::transpose(x.data(), page, dim, turned.data());
    values.pack(turned.data(), out + at.vcodes, halves(out + at.vscale), halves(out + at.vmin), out + vb, out + va, out + vidx, halves(out + vval));
  }
};

void kv_append_gear(Tensor pages, Tensor ring, Tensor lens, const Tensor start, const Tensor k, const Tensor v, int64_t page, int64_t bits,
                    int64_t group, int64_t rank, int64_t kout, int64_t vout, int64_t factors, int64_t loops, int64_t rounds) {
  const auto z = effllm::kv::append_of(pages, ring, lens, start, k, v, page);
  effllm::kv::check_kivi(z, bits, group);
  STD_TORCH_CHECK((factors == 8 || factors == 16) && rank >= 0 && loops > 0 && rounds > 0 && kout >= 0 && kout <= page && vout >= 0 && vout <= z.dim &&
                      std::max(page, z.dim) <= 256, "effllm: the pages do not fit these settings");
  const Packer packer(z.type, page, z.dim, bits, group, kout, vout, {rank, loops, rounds, factors / 8});
  STD_TORCH_CHECK(z.count == 0 || z.page_bytes == packer.end * z.heads, "effllm: the pages do not fit these settings");
  effllm::kv::append(z, packer);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_append_gear(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, int page, int bits, int group, int rank, int kout, int vout, int factors, int loops, int rounds) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_append_gear", TORCH_BOX(&kv_append_gear)); }
