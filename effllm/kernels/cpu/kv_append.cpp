// Appending to a compressed cache of any format: the usual step writes one slot of the ring; where pages have to be written, the format's
// own encoder does all of it (op effllm::kv_append_reference).
//
// Bytes   2 * B * G * n * D * element size read and written.
#include "attention.h"

namespace {

using torch::stable::Tensor;

void kv_append(Tensor pages, Tensor ring, Tensor lens, const Tensor start, const Tensor k, const Tensor v, std::vector<Tensor> tables, const std::string spec, int64_t page) {
  int64_t* n = static_cast<int64_t*>(lens.mutable_data_ptr());
  const int64_t more = k.size(2), batch = ring.size(0), heads = ring.size(2), width = ring.size(3), dim = ring.size(4), end = n[0] + more;
  STD_TORCH_CHECK(end <= pages.size(1) * page + width, "[E-KVC-FULL] the cache holds ", n[0], " of ", pages.size(1) * page + width, " tokens and ", more,
                  " more are to be appended\n  next step: make the cache larger, let it grow, or crop or reset it; it is unchanged");
  if (end - n[1] > width) {
    std::array<StableIValue, 8> stack{torch::stable::detail::from(pages), torch::stable::detail::from(ring), torch::stable::detail::from(lens), torch::stable::detail::from(start),
                                      torch::stable::detail::from(k), torch::stable::detail::from(v), torch::stable::detail::from(tables), torch::stable::detail::from(spec)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("effllm::kv_append_reference", "", stack.data(), TORCH_ABI_VERSION));
    return;
  }
  STD_TORCH_CHECK(k.scalar_type() == ring.scalar_type() && v.scalar_type() == ring.scalar_type() && k.size(0) == batch && k.size(1) == heads && k.size(3) == dim && v.size(3) == dim &&
                      ring.is_contiguous(), "effllm: the keys do not fit the cache");
  const effllm::View from[2] = {effllm::view_of(k), effllm::view_of(v)};
  const int64_t size = effllm::type_of(ring.scalar_type()) == effllm::Type::f32 ? 4 : 2;
  char* to = static_cast<char*>(ring.mutable_data_ptr());
  for (int64_t b = 0; b < batch; ++b)
    for (int64_t i = 0; i < 2; ++i)
      for (int64_t g = 0; g < heads; ++g)
        for (int64_t t = 0; t < more; ++t)
          std::memcpy(to + (((b * 2 + i) * heads + g) * width + (n[0] + t) % width) * dim * size, static_cast<const char*>(from[i].data) + from[i].at(b, g, t) * size,
                      static_cast<size_t>(dim * size));
  n[0] = end;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_append(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, Tensor[] tables, str spec, int page) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { m.impl("kv_append", TORCH_BOX(&kv_append)); }
