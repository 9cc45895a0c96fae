// Appending to a compressed cache of any format: the usual step writes one slot of the ring; where pages have to be written and the format has no packer
// here, its own encoder does all of it (op effllm::kv_append_reference).
//
// Bytes   2 * B * G * n * D * element size read and written.
#include "kv_append.h"
#include "offer.h"

namespace {

using torch::stable::Tensor;

void kv_append(Tensor pages, Tensor ring, Tensor lens, const Tensor start, const Tensor k, const Tensor v, std::vector<Tensor> tables, const std::string spec, int64_t page) {
  const auto z = effllm::kv::append_of(pages, ring, lens, start, k, v, page);
  if (z.until == z.flushed) return z.finish();
  std::array<StableIValue, 8> stack{torch::stable::detail::from(pages), torch::stable::detail::from(ring), torch::stable::detail::from(lens), torch::stable::detail::from(start),
                                    torch::stable::detail::from(k), torch::stable::detail::from(v), torch::stable::detail::from(tables), torch::stable::detail::from(spec)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("effllm::kv_append_reference", "", stack.data(), TORCH_ABI_VERSION));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_append(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, Tensor[] tables, str spec, int page) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_append", TORCH_BOX(&kv_append)); }
