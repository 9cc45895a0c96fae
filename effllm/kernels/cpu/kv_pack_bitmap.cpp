// Packing Mustafar pages (effllm/runtime/formats/kv/bitmap.py): of every token the channels of largest magnitude, exactly `keep` of them.
//
// Maths   The keep-th largest magnitude is found bit by bit from the top, on the bits of |x|, which are ordered as magnitudes are (a NaN counts as infinite): a
//         bit stays set where at least `keep` channels reach it. Of channels that equal it the first are kept.
// Layout  kv_bitmap.cpp. `bits` 16 keeps elements as they are; 8 and 4: sign and level between least and largest kept magnitude, halves, per token.
// Bytes   a page read once, elements and maps written once; up to 15 counts (31 for fp32) of D channels a token.
#include <cfloat>

#include "kv_append.h"
#include "offer.h"

namespace {

using effllm::Type;
using effllm::kv::Tensor;

template <class U> struct Packer {  // U: unsigned integer of an element's size
  Type type;
  int64_t page, dim, keep, bits, kval, kmap, vval, vmap, kscale, vscale;
  std::vector<U> size;          // magnitudes of a token
  std::vector<uint8_t> kept, codes, line;  // (page, D) flags and codes; codes in order of the elements
  std::vector<float> x;

  U infinite() const { return sizeof(U) == 4 ? static_cast<U>(0x7F800000u) : type == Type::bf16 ? static_cast<U>(0x7F80) : static_cast<U>(0x7C00); }

  // Flags of the kept channels of a token.
  void choose(const U* from, uint8_t* flags) {
    const U inf = infinite(), all = static_cast<U>(~U{0}) >> 1;
    U* m = size.data();
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) {
      const U v = from[c] & all;
      m[c] = v > inf ? inf : v;
    }
    auto reach = [&](U at) {
      int32_t n = 0;
#pragma omp simd reduction(+ : n)
      for (int64_t c = 0; c < dim; ++c) n += m[c] >= at;
      return n;
    };
    U least = 0;
    int64_t there = dim;  // channels of at least that magnitude
    for (U bit = (all >> 1) + 1; bit && there > keep; bit >>= 1) {
      const int64_t n = reach(least | bit);
      if (n >= keep) least |= bit, there = n;
    }
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) flags[c] = m[c] >= least;
    for (int64_t c = dim - 1; there > keep; --c)  // more than fit: the last of the equal ones go
      if (m[c] == least) flags[c] = 0, --there;
  }

  // Levels of a token's channels to `to`, least and step to `s`.
  void levels(const void* from, const uint8_t* flags, uint8_t* to, uint16_t* s) {
    effllm::kv::widen_all(type, from, dim, x.data());
    float least = INFINITY, most = 0, poison = 0;
    const float* v = x.data();
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : poison)
    for (int64_t c = 0; c < dim; ++c) {
      const float a = std::fabs(v[c]), low = flags[c] ? a : INFINITY, high = flags[c] ? a : 0.f;
      least = low < least ? low : least, most = high > most ? high : most, poison += high != high ? 1.f : 0.f;
    }
    if (poison != 0.f) least = most = NAN;
    const float top = static_cast<float>((1 << (bits - 1)) - 1);
    s[0] = effllm::kv::half_of(least);
    const float low = effllm::kv::of_half(s[0]);
    float step = (most - low) / top;
    step = step < 0.f ? 0.f : step;  // a NaN stays
    s[1] = effllm::kv::half_of(step);
    if ((s[1] & 0x7FFF) == 0) s[1] = 0x3C00;  // 1
    const float by = effllm::kv::of_half(s[1]);
    const int32_t sign = 1 << (bits - 1);
#pragma omp simd
    for (int64_t c = 0; c < dim; ++c) {
      const float r = std::nearbyint((std::fabs(v[c]) - low) / by), level = r != r || r < 0.f ? 0.f : r > top ? top : r;
      to[c] = static_cast<uint8_t>(static_cast<int32_t>(level) | (v[c] < 0.f ? sign : 0));
    }
  }

  // Element (t, c) behind the others.
  template <class Each> void emit(const U* from, uint8_t* out, Each&& each) {
    int64_t n = 0;
    if (bits == 16) {
      U* to = reinterpret_cast<U*>(out);
      each([&](int64_t t, int64_t c) { to[n++] = from[t * dim + c]; });
      return;
    }
    uint8_t* to = bits == 8 ? out : line.data();
    each([&](int64_t t, int64_t c) { to[n++] = codes[static_cast<size_t>(t * dim + c)]; });
    if (bits == 4)
      for (int64_t i = 0; i < n / 2; ++i) out[i] = static_cast<uint8_t>(line[static_cast<size_t>(2 * i)] | line[static_cast<size_t>(2 * i + 1)] << 4);
  }

  void side(const U* from, bool keys, uint8_t* out) {
    for (int64_t t = 0; t < page; ++t) {
      choose(from + t * dim, kept.data() + t * dim);
      if (bits < 16) levels(from + t * dim, kept.data() + t * dim, codes.data() + t * dim, reinterpret_cast<uint16_t*>(out + (keys ? kscale : vscale)) + 2 * t);
    }
    uint64_t* map = reinterpret_cast<uint64_t*>(out + (keys ? kmap : vmap));
    if (keys) {
      for (int64_t t = 0; t < page; ++t) {
        uint64_t* to = map + t / 64 * dim;
        const uint8_t* flags = kept.data() + t * dim;
#pragma omp simd
        for (int64_t c = 0; c < dim; ++c) to[c] |= static_cast<uint64_t>(flags[c]) << (t % 64);
      }
      emit(from, out + kval, [&](auto&& put) {
        for (int64_t block = 0; block < page / 64; ++block)
          for (int64_t c = 0; c < dim; ++c)
            for (uint64_t m = map[block * dim + c]; m; m &= m - 1) put(block * 64 + __builtin_ctzll(m), c);
      });
      return;
    }
    const int64_t tiles = (dim + 63) / 64;
    for (int64_t t = 0; t < page; ++t)
      for (int64_t c = 0; c < dim; ++c) map[t * tiles + c / 64] |= static_cast<uint64_t>(kept[static_cast<size_t>(t * dim + c)]) << (c % 64);
    emit(from, out + vval, [&](auto&& put) {
      for (int64_t t = 0; t < page; ++t)
        for (int64_t w = 0; w < tiles; ++w)
          for (uint64_t m = map[t * tiles + w]; m; m &= m - 1) put(t, w * 64 + __builtin_ctzll(m));
    });
  }

  void pack(const void* k, const void* v, int64_t, uint8_t* out) {
    const size_t all = static_cast<size_t>(page * dim);
    size.resize(static_cast<size_t>(dim)), kept.resize(all), x.resize(static_cast<size_t>(dim));
    if (bits < 16) codes.resize(all), line.resize(all);
    side(static_cast<const U*>(k), true, out);
    side(static_cast<const U*>(v), false, out);
  }
};

void kv_append_bitmap(Tensor pages, Tensor ring, Tensor lens, const Tensor start, const Tensor k, const Tensor v, int64_t page, int64_t keep, int64_t bits, int64_t kval,
                      int64_t kmap, int64_t vval, int64_t vmap, int64_t kscale, int64_t vscale) {
  const auto z = effllm::kv::append_of(pages, ring, lens, start, k, v, page);
  const int64_t record = z.page_bytes / z.heads, element = bits == 16 ? 8 * z.size : bits;
  auto inside = [&](int64_t at, int64_t bytes) { return at >= 0 && at % 64 == 0 && at + bytes <= record; };
  const int64_t held = page * keep * element / 8, scales = bits == 16 ? 0 : 4 * page;
  STD_TORCH_CHECK((bits == 4 || bits == 8 || bits == 16) && page % 64 == 0 && keep >= 1 && keep <= z.dim, "effllm: the pages do not fit these settings");
  STD_TORCH_CHECK(z.count == 0 || (inside(kval, held) && inside(vval, held) && inside(kmap, page / 64 * z.dim * 8) && inside(vmap, page * ((z.dim + 63) / 64) * 8) &&
                                   inside(kscale, scales) && inside(vscale, scales)), "effllm: the pages do not fit these settings");
  if (z.size == 4) effllm::kv::append(z, Packer<uint32_t>{z.type, page, z.dim, keep, bits, kval, kmap, vval, vmap, kscale, vscale});
  else effllm::kv::append(z, Packer<uint16_t>{z.type, page, z.dim, keep, bits, kval, kmap, vval, vmap, kscale, vscale});
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_append_bitmap(Tensor(a!) pages, Tensor(b!) ring, Tensor(c!) lens, Tensor start, Tensor k, Tensor v, int page, int keep, int bits, int kval, int kmap, int vval, int vmap, int kscale, int vscale) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_append_bitmap", TORCH_BOX(&kv_append_bitmap)); }
