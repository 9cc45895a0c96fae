// Packing KIVI pages (effllm/runtime/caches/kivi.py): codes of 2, 4 or 8 bits, a half scale and minimum a group.
//
// Maths   scale = half((max - min) / (2^bits - 1)), 1 where that is 0; code = round((x - half(min)) / scale), half to even, in 0 .. 2^bits - 1, 0 where that
//         is no number. Keys: groups of tokens, per channel. Values: groups of channels, per token.
// Bytes   a page of keys and values read once, codes and scales written once; some 3 operations an element and one division.
#include <cfloat>

#include "kv_append.h"

namespace {

using effllm::Type;
using effllm::kv::Tensor;

struct Packer {
  Type type;
  int64_t page, dim, bits, group, vgroup, kscale, kmin, vcodes, vscale, vmin;
  std::vector<float> x, low, high, scale;
  std::vector<uint8_t> codes;  // (rows, columns) as they are packed

  Packer(Type type_, int64_t page_, int64_t dim_, int64_t bits_, int64_t group_) : type(type_), page(page_), dim(dim_), bits(bits_), group(group_), vgroup(std::min(group_, dim_)) {
    int64_t at = 0;
    auto take = [&at](int64_t bytes) { const int64_t here = at; at += (bytes + 63) / 64 * 64; return here; };
    const int64_t packed = page * dim * bits / 8;
    take(packed), kscale = take(page / group * dim * 2), kmin = take(page / group * dim * 2);
    vcodes = take(packed), vscale = take(dim / vgroup * page * 2), vmin = take(dim / vgroup * page * 2);
    record = at;
  }
  int64_t record = 0;

  float top() const { return static_cast<float>((1 << bits) - 1); }

  // scale and minimum as stored, and as numbers for `encode`.
  void range(float least, float most, uint16_t* s, uint16_t* m, float* sf, float* mf) const {
    uint16_t half = effllm::kv::half_of((most - least) / top());
    if ((half & 0x7FFF) == 0) half = 0x3C00;  // 1
    *s = half, *m = effllm::kv::half_of(least);
    *sf = effllm::kv::of_half(*s), *mf = effllm::kv::of_half(*m);
  }
  static float code(float x, float minimum, float scale, float most) {
    const float v = std::nearbyint((x - minimum) / scale);
    const float held = std::fabs(v) <= FLT_MAX ? v : 0.f;  // a NaN compares false
    return held < 0.f ? 0.f : held > most ? most : held;
  }

  void keys(const void* from, uint8_t* out) {
    effllm::kv::widen_all(type, from, page * dim, x.data());
    uint16_t *s = reinterpret_cast<uint16_t*>(out + kscale), *m = reinterpret_cast<uint16_t*>(out + kmin);
    for (int64_t g = 0; g < page / group; ++g) {
      const float* rows = x.data() + g * group * dim;
      std::copy(rows, rows + dim, low.data());
      std::copy(rows, rows + dim, high.data());
      for (int64_t t = 1; t < group; ++t) {
        float *lo = low.data(), *hi = high.data();
        const float* line = rows + t * dim;
#pragma omp simd
        for (int64_t c = 0; c < dim; ++c) {
          const float v = line[c];
          lo[c] = v < lo[c] || v != v ? v : lo[c];  // a NaN stays
          hi[c] = v > hi[c] || v != v ? v : hi[c];
        }
      }
      for (int64_t c = 0; c < dim; ++c) range(low[c], high[c], s + g * dim + c, m + g * dim + c, scale.data() + c, low.data() + c);
      const float most = top();
      for (int64_t t = 0; t < group; ++t) {
        const float *line = rows + t * dim, *lo = low.data(), *by = scale.data();
        uint8_t* to = codes.data() + (g * group + t) * dim;
#pragma omp simd
        for (int64_t c = 0; c < dim; ++c) to[c] = static_cast<uint8_t>(static_cast<int32_t>(code(line[c], lo[c], by[c], most)));
      }
    }
    pack(page, dim, out);
  }

  void values(const void* from, uint8_t* out) {
    effllm::kv::widen_all(type, from, page * dim, x.data());
    uint16_t *s = reinterpret_cast<uint16_t*>(out + vscale), *m = reinterpret_cast<uint16_t*>(out + vmin);
    const float most = top();
    uint8_t line[64];
    for (int64_t t = 0; t < page; ++t)
      for (int64_t g = 0; g < dim / vgroup; ++g) {
        const float* row = x.data() + t * dim + g * vgroup;
        float least = row[0], largest = row[0], poison = 0;
#pragma omp simd reduction(min : least) reduction(max : largest) reduction(+ : poison)
        for (int64_t c = 0; c < vgroup; ++c) {
          least = row[c] < least ? row[c] : least;
          largest = row[c] > largest ? row[c] : largest;
          poison += row[c] != row[c] ? 1.f : 0.f;
        }
        if (poison != 0.f) least = largest = NAN;
        float by, lo;
        range(least, largest, s + g * page + t, m + g * page + t, &by, &lo);
        for (int64_t c = 0; c < vgroup; c += 16) {  // groups are multiples of 16
#pragma omp simd
          for (int64_t i = 0; i < 16; ++i) line[i] = static_cast<uint8_t>(static_cast<int32_t>(code(row[c + i], lo, by, most)));
          for (int64_t i = 0; i < 16; ++i) codes[static_cast<size_t>((g * vgroup + c + i) * page + t)] = line[i];
        }
      }
    pack(dim, page, out + vcodes);
  }

  // 16 rows by 4 columns to 64 bytes, 8 / bits such blocks on top of one another (runtime/caches/codes.py).
  void pack(int64_t rows, int64_t columns, uint8_t* out) const {
    const int64_t fields = 8 / bits;
    for (int64_t a = 0; a < rows / 16; ++a)
      for (int64_t j = 0; j < columns / (4 * fields); ++j, out += 64)
        for (int64_t r = 0; r < 16; ++r) {
          const uint8_t* from = codes.data() + (16 * a + r) * columns + 4 * fields * j;
          uint32_t four = 0;
          for (int64_t f = 0; f < fields; ++f) {
            uint32_t next; std::memcpy(&next, from + 4 * f, 4);
            four |= next << (bits * f);
          }
          std::memcpy(out + 4 * r, &four, 4);
        }
  }

  void pack(const void* k, const void* v, int64_t, uint8_t* out) {
    x.resize(static_cast<size_t>(page * dim)), codes.resize(static_cast<size_t>(page * dim));
    low.resize(static_cast<size_t>(dim)), high.resize(static_cast<size_t>(dim)), scale.resize(static_cast<size_t>(dim));
    keys(k, out);
    values(v, out);
  }
};

void kv_append_kivi(Tensor pages, Tensor ring, Tensor lens, const Tensor start, const Tensor k, const Tensor v, int64_t page, int64_t bits, int64_t group) {
  const auto z = effllm::kv::append_of(pages, ring, lens, start, k, v, page);
  STD_TORCH_CHECK((bits == 2 || bits == 4 || bits == 8) && group > 0 && group % 16 == 0 && page % group == 0 && z.dim % 16 == 0 && z.dim % std::min(group, z.dim) == 0 &&
                      z.dim % (32 / bits) == 0 && page % (32 / bits) == 0, "effllm: the pages do not fit these settings");
  const Packer packer(z.type, page, z.dim, bits, group);
  STD_TORCH_CHECK(z.count == 0 || z.page_bytes == packer.record * z.heads, "effllm: the pages do not fit these settings");
  effllm::kv::append(z, packer);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_append_kivi(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, int page, int bits, int group) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { m.impl("kv_append_kivi", TORCH_BOX(&kv_append_kivi)); }
