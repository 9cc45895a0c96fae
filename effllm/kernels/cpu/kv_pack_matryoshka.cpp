// Packing Matryoshka pages (effllm/runtime/caches/matryoshka.py): keys and values projected onto leading columns of a basis per key head.
//
// Maths    z = (x - mean) U_r of every token, rounded to the cache's dtype by way of fp32.
// Layout   kv_matryoshka.cpp: one record for all heads, for every head in turn (T, r) from byte `at` on. Bases fp32 (G, D, D), means (G, D).
// Tiles    4 tokens by 8 or 16 columns stay in registers over all channels; a task widens its head's columns once.
// Bytes    a page read once, r of D columns of a basis a task; T D r multiply-adds in fp64.
// Numerics sums are fp64, as in Python, so that their order does not show in what is stored.
#include "kv_append.h"
#include "offer.h"

namespace {

using effllm::Type;
using effllm::kv::Tensor;
using torch::headeronly::ScalarType;

typedef double Wide __attribute__((vector_size(64)));
constexpr int64_t ROWS = 4, LANES = 8;
#if defined(__AVX512F__)
constexpr int64_t PARTS = 2;
#else
constexpr int64_t PARTS = 1;
#endif
constexpr int64_t TILE = LANES * PARTS;

struct Basis {
  const float *u, *mean;
  const int64_t* ranks;
  int64_t at;
};

struct Packer {
  static constexpr bool shared = true;  // all heads write to one record
  Type type;
  int64_t page, dim, heads, page_bytes;
  Basis sides[2];
  std::vector<float> x, z;
  std::vector<double> u, d;  // the head's columns (D, padded rank); tokens without the mean (padded page, D)

  int64_t size() const { return type == Type::f32 ? 4 : 2; }
  int64_t begin(const Basis& b, int64_t g) const {
    int64_t sum = 0;
    for (int64_t h = 0; h < g; ++h) sum += b.ranks[h];
    return b.at + sum * page * size();
  }

  void side(const void* from, const Basis& b, int64_t g, uint8_t* out) {
    const int64_t rank = b.ranks[g], padded = (rank + TILE - 1) / TILE * TILE, rows = (page + ROWS - 1) / ROWS * ROWS;
    x.resize(static_cast<size_t>(page * dim)), z.resize(static_cast<size_t>(page * rank));
    u.assign(static_cast<size_t>(dim * padded), 0.), d.assign(static_cast<size_t>(rows * dim), 0.);
    effllm::kv::widen_all(type, from, page * dim, x.data());
    const float *basis = b.u + g * dim * dim, *mean = b.mean + g * dim;
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t j = 0; j < rank; ++j) u[static_cast<size_t>(c * padded + j)] = basis[c * dim + j];
    for (int64_t t = 0; t < page; ++t)
      for (int64_t c = 0; c < dim; ++c) d[static_cast<size_t>(t * dim + c)] = static_cast<double>(x[static_cast<size_t>(t * dim + c)]) - mean[c];
    for (int64_t j = 0; j < padded; j += TILE)
      for (int64_t t = 0; t < rows; t += ROWS) {
        Wide sum[ROWS][PARTS] = {};
        for (int64_t c = 0; c < dim; ++c) {
          Wide column[PARTS];
          std::memcpy(column, u.data() + c * padded + j, sizeof(column));
          for (int64_t i = 0; i < ROWS; ++i)
            for (int64_t p = 0; p < PARTS; ++p) sum[i][p] += column[p] * d[static_cast<size_t>((t + i) * dim + c)];
        }
        for (int64_t i = 0; i < ROWS && t + i < page; ++i)
          for (int64_t k = 0; k < TILE && j + k < rank; ++k) z[static_cast<size_t>((t + i) * rank + j + k)] = static_cast<float>(sum[i][k / LANES][k % LANES]);
      }
    effllm::kv::narrow_all(type, z.data(), page * rank, out + begin(b, g));
  }

  void pack(const void* k, const void* v, int64_t g, uint8_t* page_) {
    side(k, sides[0], g, page_);
    side(v, sides[1], g, page_);
    if (g + 1 < heads) return;
    const int64_t first = begin(sides[0], heads), last = begin(sides[1], heads);  // what lies behind the keys and behind the values
    std::memset(page_ + first, 0, static_cast<size_t>(sides[1].at - first));
    std::memset(page_ + last, 0, static_cast<size_t>(page_bytes - last));
  }
};

void kv_append_matryoshka(Tensor pages, Tensor ring, Tensor lens, const Tensor start, const Tensor k, const Tensor v, const Tensor uk, const Tensor mk, const Tensor uv, const Tensor mv,
                          int64_t page, std::vector<int64_t> kranks, std::vector<int64_t> vranks, int64_t kat, int64_t vat) {
  const auto z = effllm::kv::append_of(pages, ring, lens, start, k, v, page);
  auto basis = [&](const Tensor& u, const Tensor& mean, const std::vector<int64_t>& ranks, int64_t at) {
    auto given = [](const Tensor& t, int64_t count) { return t.is_contiguous() && t.numel() == count && t.scalar_type() == ScalarType::Float; };
    STD_TORCH_CHECK(given(u, z.heads * z.dim * z.dim) && given(mean, z.heads * z.dim), "effllm: a basis is fp32 (heads, D, D) with means (heads, D)");
    STD_TORCH_CHECK(static_cast<int64_t>(ranks.size()) == z.heads, "effllm: one rank per key head");
    for (const int64_t r : ranks) STD_TORCH_CHECK(r > 0 && r <= z.dim, "effllm: a rank exceeds the head");
    return Basis{static_cast<const float*>(u.const_data_ptr()), static_cast<const float*>(mean.const_data_ptr()), ranks.data(), at};
  };
  const Packer packer{z.type, page, z.dim, z.heads, z.page_bytes, {basis(uk, mk, kranks, kat), basis(uv, mv, vranks, vat)}};
  const int64_t first = packer.begin(packer.sides[0], z.heads), last = packer.begin(packer.sides[1], z.heads);
  STD_TORCH_CHECK(z.count == 0 || (kat == 0 && first <= vat && last <= z.page_bytes), "effllm: the pages do not fit these settings");
  effllm::kv::append(z, packer);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_append_matryoshka(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, Tensor uk, Tensor mk, Tensor uv, Tensor mv, int page, int[] kranks, int[] vranks, int kat, int vat) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_append_matryoshka", TORCH_BOX(&kv_append_matryoshka)); }
