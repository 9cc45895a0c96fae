// Packing block-floating-point pages (effllm/runtime/formats/kv/bfp.py): codes of 2 to 8 bits, one exponent per block of channels.
//
// Maths   e = floor(log2 max|x|) of a block, at least -110, one more by rule "raise" where rounding the largest would overflow; code = round(x 2^(bits - 2 - e)),
//         half to even, within +-(2^(bits-1) - 1). A block with something that is not finite has exponent 127 and codes 0.
// Layout  codes (T, D) bytes, or (T, D / 2) for at most 4 bits: channel i in the low half, i + D / 2 in the high one; exponents (T, D / block). Channels lie in
//         the order of the tables (G, D).
#include "kv_append.h"
#include "offer.h"

namespace {

using effllm::Type;
using effllm::kv::Tensor;

struct Packer {
  Type type;
  int64_t page, dim, block, bits[2], codes[2], exponents[2];
  bool raise;
  const int64_t* order[2];
  std::vector<float> given, x;
  std::vector<int8_t> line;

  void side(const void* from, int which, int64_t g, uint8_t* out) {
    const int64_t m = bits[which], bytes = m <= 4 ? dim / 2 : dim;
    const int64_t* at = order[which] + g * dim;
    const float top = static_cast<float>((1 << (m - 1)) - 1);
    int8_t* exps = reinterpret_cast<int8_t*>(out + exponents[which]);
    for (int64_t t = 0; t < page; ++t) {
      effllm::kv::widen_all(type, static_cast<const char*>(from) + t * dim * (type == Type::f32 ? 4 : 2), dim, given.data());
      for (int64_t c = 0; c < dim; ++c) x[static_cast<size_t>(c)] = given[static_cast<size_t>(at[c])];
      for (int64_t n = 0; n < dim / block; ++n) {
        const float* v = x.data() + n * block;
        int8_t* to = line.data() + n * block;
        float most = 0, poison = 0;
        for (int64_t c = 0; c < block; ++c) most = std::fabs(v[c]) > most ? std::fabs(v[c]) : most, poison += v[c] * 0.f;
        if (poison != 0.f) {  // NaN: something is not finite
          exps[t * (dim / block) + n] = 127;
          std::fill(to, to + block, 0);
          continue;
        }
        int e = -110;
        if (most != 0.f) std::frexp(most, &e), e = std::clamp(e - 1, -110, 125);
        if (raise && std::nearbyint(std::ldexp(most, static_cast<int>(m) - 2 - e)) > top) ++e;
        const float by = std::ldexp(1.f, static_cast<int>(m) - 2 - e);
#pragma omp simd
        for (int64_t c = 0; c < block; ++c) {
          const float r = std::nearbyint(v[c] * by);
          to[c] = static_cast<int8_t>(static_cast<int32_t>(r < -top ? -top : r > top ? top : r));
        }
        exps[t * (dim / block) + n] = static_cast<int8_t>(e);
      }
      uint8_t* packed = out + codes[which] + t * bytes;
      if (m > 4) std::memcpy(packed, line.data(), static_cast<size_t>(dim));
      else
        for (int64_t c = 0; c < bytes; ++c) packed[c] = static_cast<uint8_t>((line[static_cast<size_t>(c)] & 15) | (line[static_cast<size_t>(c + bytes)] & 15) << 4);
    }
  }

  void pack(const void* k, const void* v, int64_t g, uint8_t* out) {
    given.resize(static_cast<size_t>(dim)), x.resize(static_cast<size_t>(dim)), line.resize(static_cast<size_t>(dim));
    side(k, 0, g, out);
    side(v, 1, g, out);
  }
};

void kv_append_bfp(Tensor pages, Tensor ring, Tensor lens, const Tensor start, const Tensor k, const Tensor v, const Tensor korder, const Tensor vorder, int64_t page, int64_t block,
                   int64_t bits, int64_t vbits, bool up, int64_t kcodes, int64_t kexp, int64_t vcodes, int64_t vexp) {
  const auto z = effllm::kv::append_of(pages, ring, lens, start, k, v, page);
  const int64_t record = z.page_bytes / z.heads;
  auto inside = [&](int64_t at, int64_t bytes) { return at >= 0 && at + bytes <= record; };
  auto width = [&](int64_t m) { return m <= 4 ? z.dim / 2 : z.dim; };
  STD_TORCH_CHECK(block > 0 && z.dim % block == 0 && z.dim % 2 == 0 && bits >= 2 && bits <= 8 && vbits >= 2 && vbits <= 8, "effllm: the pages do not fit these settings");
  STD_TORCH_CHECK(z.count == 0 || (inside(kcodes, page * width(bits)) && inside(vcodes, page * width(vbits)) && inside(kexp, page * (z.dim / block)) &&
                                   inside(vexp, page * (z.dim / block))), "effllm: the pages do not fit these settings");
  Packer packer{z.type, page, z.dim, block, {bits, vbits}, {kcodes, vcodes}, {kexp, vexp}, up, {}};
  for (int i = 0; i < 2; ++i) {
    const Tensor& order = i ? vorder : korder;
    STD_TORCH_CHECK(order.scalar_type() == torch::headeronly::ScalarType::Long && order.is_contiguous() && order.numel() == z.heads * z.dim, "effllm: the order of channels does not fit the heads");
    packer.order[i] = static_cast<const int64_t*>(order.const_data_ptr());
    for (int64_t c = 0; c < z.heads * z.dim; ++c) STD_TORCH_CHECK(packer.order[i][c] >= 0 && packer.order[i][c] < z.dim, "effllm: the order of channels does not fit the heads");
  }
  effllm::kv::append(z, packer);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_append_bfp(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, Tensor korder, Tensor vorder, int page, int block, int bits, int vbits, bool up, int kcodes, int kexp, int vcodes, int vexp) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_append_bfp", TORCH_BOX(&kv_append_bfp)); }
