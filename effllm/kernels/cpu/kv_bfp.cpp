// Attention over block-floating-point keys and values.
//
// Layout    a record holds, for one key head and a page of T tokens, at byte offsets that the caller gives:
//             codes (T, D / 2) for at most 4 bits: low half of a byte channel i, high half channel i + D / 2, two's complement; else int8 (T, D)
//             exp   (T, D / block) int8: the value is code * 2^(exp - bits + 2); 127 marks a block that is NaN
//           order   int64 (G, D) for keys and for values: stored channel i is channel order[i]
// Bytes     per token and matrix: D bits / 8 + D / block, bits 4 or 8.
// Numerics  codes times powers of two are exact in fp32; products and sums in fp32.
#include "kv.h"
#include "offer.h"

namespace {

using namespace effllm;
using effllm::kv::Tensor;
using kv::axpy;
using kv::dot;

struct Side {
  int64_t codes, exp, bits;
  const int64_t* order;  // (G, D)
};
struct Format {
  int64_t block;
  Side k, v;
};

inline float power(int e) {  // 2^e for -126 <= e <= 127
  const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
  float f; std::memcpy(&f, &bits, 4);
  return f;
}

struct Bfp {
  kv::State c;
  Format f;
  int64_t width;
  const int64_t* back = nullptr;  // where accumulated channels go
  std::vector<float> q;           // (rows, D) in the stored order of channels
  std::vector<float> line;        // one token
  Bfp(const kv::State& c, const Format& f) : c(c), f(f), width(c.dim), line(static_cast<size_t>(c.dim)) {}
  void begin(int64_t, int64_t g, const float* given, int64_t rows) {
    back = f.v.order + g * c.dim;
    q.resize(static_cast<size_t>(rows * c.dim));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < c.dim; ++i) q[static_cast<size_t>(r * c.dim + i)] = given[r * c.dim + f.k.order[g * c.dim + i]];
  }
  float round(float p) const { return p; }

  void token(const uint8_t* record, const Side& side, int64_t t) {
    const int64_t d = c.dim, half = d / 2, block = f.block;
    float* out = line.data();
    if (side.bits <= 4) {
      const int8_t* from = reinterpret_cast<const int8_t*>(record + side.codes) + t * half;
#pragma omp simd
      for (int64_t i = 0; i < half; ++i) {
        const int x = from[i];
        out[i] = static_cast<float>(static_cast<int>(static_cast<uint32_t>(x) << 28) >> 28);
        out[i + half] = static_cast<float>(x >> 4);
      }
    } else {
      const int8_t* from = reinterpret_cast<const int8_t*>(record + side.codes) + t * d;
#pragma omp simd
      for (int64_t i = 0; i < d; ++i) out[i] = static_cast<float>(from[i]);
    }
    const int8_t* e = reinterpret_cast<const int8_t*>(record + side.exp) + t * (d / block);
    const int shift = 2 - static_cast<int>(side.bits);
    for (int64_t b = 0; b < d / block; ++b) {
      const float scale = e[b] == 127 ? NAN : power(e[b] + shift);
      float* x = out + b * block;
#pragma omp simd
      for (int64_t i = 0; i < block; ++i) x[i] *= scale;
    }
  }
  void scores(const uint8_t* record, const float*, int64_t rows, float* s) {
    for (int64_t t = 0; t < c.page; ++t) {
      token(record, f.k, t);
      for (int64_t r = 0; r < rows; ++r) s[r * c.page + t] = dot(q.data() + r * c.dim, line.data(), c.dim);
    }
  }
  void values(const uint8_t* record, const float* p, int64_t rows, float* acc) {
    for (int64_t t = 0; t < c.page; ++t) {
      token(record, f.v, t);
      for (int64_t r = 0; r < rows; ++r) axpy(acc + r * width, p[r * c.page + t], line.data(), c.dim);
    }
  }
  void finish(const float* acc, const float*, int64_t rows, float* out) const {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < c.dim; ++i) out[r * c.dim + back[i]] = acc[r * width + i];
  }
};

Tensor kv_attend_bfp(const Tensor q, const Tensor pages, const Tensor ring, const Tensor lens, const Tensor korder, const Tensor vorder, std::optional<Tensor> mask, double scale,
                     int64_t page, int64_t block, int64_t bits, int64_t vbits, int64_t kcodes, int64_t kexp, int64_t vcodes, int64_t vexp, std::optional<Tensor> row, std::optional<Tensor> cos, std::optional<Tensor> sin, bool half) {
  const kv::State c = kv::state_of(pages, ring, lens, page, ring.size(2));
  STD_TORCH_CHECK(block > 0 && c.dim % block == 0 && c.dim % 2 == 0, "effllm: blocks do not divide the head");
  for (const Tensor* order : {&korder, &vorder})
    STD_TORCH_CHECK(order->is_contiguous() && order->scalar_type() == torch::headeronly::ScalarType::Long && order->numel() == c.heads * c.dim, "effllm: an order of channels is int64 (heads, channels)");
  const Format f{block, {kcodes, kexp, bits, static_cast<const int64_t*>(korder.const_data_ptr())}, {vcodes, vexp, vbits, static_cast<const int64_t*>(vorder.const_data_ptr())}};
  return kv::attend(q, c, mask, scale, Bfp(c, f), shift_of(row, cos, sin, half, c.dim, c.keys()));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_attend_bfp(Tensor q, Tensor pages, Tensor ring, Tensor lens, Tensor korder, Tensor vorder, Tensor? mask, float scale, int page, int block, int bits, int vbits, int kcodes, int kexp, int vcodes, int vexp, Tensor? row, Tensor? cos, Tensor? sin, bool half) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_attend_bfp", TORCH_BOX(&kv_attend_bfp)); }
