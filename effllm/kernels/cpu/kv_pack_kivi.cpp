// Packing KIVI pages (effllm/runtime/caches/kivi.py): keys (page, D) in groups of tokens, values turned to (D, page) in groups of channels (kv_quantize.h).
//
// Bytes   a page of keys and values read once, codes and scales written once; some 4 operations an element and one division.
#include "kv_quantize.h"
#include "offer.h"

namespace {

using effllm::Type;
using effllm::kv::halves;
using effllm::kv::Tensor;

struct Packer {
  Type type;
  int64_t page, dim;
  effllm::kv::KiviPlaces at;
  effllm::kv::Quantizer keys, values;
  std::vector<float> x, turned;

  Packer(Type type, int64_t page, int64_t dim, int64_t bits, int64_t group)
      : type(type), page(page), dim(dim), at(page, dim, bits, group), keys(page, dim, bits, group), values(dim, page, bits, std::min(group, dim)) {}

  void pack(const void* k, const void* v, int64_t, uint8_t* out) {
    x.resize(static_cast<size_t>(page * dim)), turned.resize(x.size());
    effllm::kv::widen_all(type, k, page * dim, x.data());
    keys.encode(x.data(), halves(out + at.kscale), halves(out + at.kmin));
    keys.pack(out);
    effllm::kv::widen_all(type, v, page * dim, x.data());
    effllm::kv::transpose(x.data(), page, dim, turned.data());
    values.encode(turned.data(), halves(out + at.vscale), halves(out + at.vmin));
    values.pack(out + at.vcodes);
  }
};

void kv_append_kivi(Tensor pages, Tensor ring, Tensor lens, const Tensor start, const Tensor k, const Tensor v, int64_t page, int64_t bits, int64_t group) {
  const auto z = effllm::kv::append_of(pages, ring, lens, start, k, v, page);
  effllm::kv::check_kivi(z, bits, group);
  const Packer packer(z.type, page, z.dim, bits, group);
  STD_TORCH_CHECK(z.count == 0 || z.page_bytes == packer.at.end * z.heads, "effllm: the pages do not fit these settings");
  effllm::kv::append(z, packer);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_append_kivi(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, int page, int bits, int group) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_append_kivi", TORCH_BOX(&kv_append_kivi)); }
