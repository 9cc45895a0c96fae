// Attention over keys and values projected onto leading columns of a basis per key head (MatryoshkaKV).
//
// Maths     k = mean_k + z_k U_k^T, v = mean_v + z_v U_v^T: scores are (q U_k) . z_k + q . mean_k, the output is (sum p z_v) U_v^T + (sum p) mean_v.
//           The mean's part of the scores is the same for all projected keys, but not for those of the dense ring, so it stays.
// Layout    a page is one record: for every key head g in turn z_k (T, r_g), at byte kat 2 T (r_0 + .. + r_(g-1)) further on; z_v alike at vat.
//           Elements are the queries' dtype. uk, uv fp32 (G, D, D), mk, mv fp32 (G, D); kranks, vranks (G,).
// Bytes     per token: (sum of kranks + sum of vranks) elements.
// Numerics  fp32 throughout, one rounding at the end.
#include "kv.h"
#include "offer.h"

namespace {

using namespace effllm;
using effllm::kv::Tensor;
using kv::axpy;
using kv::dot;
using torch::headeronly::ScalarType;

struct Basis {
  const float *u, *mean;
  const int64_t* ranks;
  int64_t at;
};
struct Format {
  Basis k, v;
};

template <Type T> struct Projected {
  static constexpr int64_t element = T == Type::f32 ? 4 : 2;
  kv::State c;
  Format f;
  int64_t g = 0, rank = 0, width = 0, kfrom = 0, vfrom = 0;
  std::vector<float> q, bias, line;
  Projected(const kv::State& c, const Format& f) : c(c), f(f), line(static_cast<size_t>(c.dim)) {}
  void begin(int64_t, int64_t head, const float* given, int64_t rows) {
    g = head, rank = f.k.ranks[g], width = f.v.ranks[g];
    q.assign(static_cast<size_t>(rows * rank), 0.f);
    bias.resize(static_cast<size_t>(rows));
    const float *u = f.k.u + g * c.dim * c.dim, *mean = f.k.mean + g * c.dim;
    for (int64_t r = 0; r < rows; ++r) {
      bias[static_cast<size_t>(r)] = dot(given + r * c.dim, mean, c.dim);
      for (int64_t i = 0; i < c.dim; ++i) axpy(q.data() + r * rank, given[r * c.dim + i], u + i * c.dim, rank);
    }
    kfrom = f.k.at + before(f.k) * c.page * element;
    vfrom = f.v.at + before(f.v) * c.page * element;
  }
  int64_t before(const Basis& b) const {
    int64_t sum = 0;
    for (int64_t h = 0; h < g; ++h) sum += b.ranks[h];
    return sum;
  }
  float round(float p) const { return p; }
  void scores(const uint8_t* record, const float*, int64_t rows, float* s) {
    for (int64_t t = 0; t < c.page; ++t) {
      widen<T>(record + kfrom, t * rank, rank, line.data());
      for (int64_t r = 0; r < rows; ++r) s[r * c.page + t] = bias[static_cast<size_t>(r)] + dot(q.data() + r * rank, line.data(), rank);
    }
  }
  void values(const uint8_t* record, const float* p, int64_t rows, float* acc) {
    for (int64_t t = 0; t < c.page; ++t) {
      widen<T>(record + vfrom, t * width, width, line.data());
      for (int64_t r = 0; r < rows; ++r) axpy(acc + r * width, p[r * c.page + t], line.data(), width);
    }
  }
  void finish(const float* acc, const float* sums, int64_t rows, float* out) const {
    const float *u = f.v.u + g * c.dim * c.dim, *mean = f.v.mean + g * c.dim;
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < c.dim; ++i) out[r * c.dim + i] = dot(u + i * c.dim, acc + r * width, width) + sums[r] * mean[i];
  }
};

Tensor kv_attend_matryoshka(const Tensor q, const Tensor pages, const Tensor ring, const Tensor lens, const Tensor uk, const Tensor mk, const Tensor uv, const Tensor mv, std::optional<Tensor> mask,
                            double scale, int64_t page, std::vector<int64_t> kranks, std::vector<int64_t> vranks, int64_t kat, int64_t vat, std::optional<Tensor> row, std::optional<Tensor> cos, std::optional<Tensor> sin, bool half) {
  const kv::State c = kv::state_of(pages, ring, lens, page, 1);
  STD_TORCH_CHECK(q.scalar_type() == ring.scalar_type(), "effllm: queries and cache differ in dtype");
  auto basis = [&](const Tensor& u, const Tensor& mean, const std::vector<int64_t>& ranks, int64_t at) {
    STD_TORCH_CHECK(u.is_contiguous() && mean.is_contiguous() && u.numel() == c.heads * c.dim * c.dim && mean.numel() == c.heads * c.dim && u.scalar_type() == ScalarType::Float && mean.scalar_type() == ScalarType::Float, "effllm: a basis is fp32 (heads, D, D) with means (heads, D)");
    STD_TORCH_CHECK(static_cast<int64_t>(ranks.size()) == c.heads, "effllm: one rank per key head");
    for (const int64_t r : ranks) STD_TORCH_CHECK(r > 0 && r <= c.dim, "effllm: a rank exceeds the head");
    return Basis{static_cast<const float*>(u.const_data_ptr()), static_cast<const float*>(mean.const_data_ptr()), ranks.data(), at};
  };
  const Format f{basis(uk, mk, kranks, kat), basis(uv, mv, vranks, vat)};
  const Shift shift = shift_of(row, cos, sin, half, c.dim, c.keys());
  if (c.type == Type::f32) return kv::attend(q, c, mask, scale, Projected<Type::f32>(c, f), shift);
  if (c.type == Type::bf16) return kv::attend(q, c, mask, scale, Projected<Type::bf16>(c, f), shift);
  return kv::attend(q, c, mask, scale, Projected<Type::f16>(c, f), shift);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_attend_matryoshka(Tensor q, Tensor pages, Tensor ring, Tensor lens, Tensor uk, Tensor mk, Tensor uv, Tensor mv, Tensor? mask, float scale, int page, int[] kranks, int[] vranks, int kat, int vat, Tensor? row, Tensor? cos, Tensor? sin, bool half) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_attend_matryoshka", TORCH_BOX(&kv_attend_matryoshka)); }
