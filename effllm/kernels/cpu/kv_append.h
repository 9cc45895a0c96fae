// Appending to a compressed cache (effllm/runtime/caches/paging.py): whole pages leave the ring, the rest stays dense.
//
// Work    tasks of (row of the batch, page, key head). A task gathers the page's tokens, from the ring and behind it from what is appended, puts the first
//         real token of the page in the place of padding, and has the format's packer write the record.
// Packer  pack(keys, values, g, record): keys and values (page, D) in the cache's dtype, key head g, a record of zeros. Every thread has a copy.
//         One that says `shared` gets the page instead, as it was, and writes all of it, each head its own part.
// Bytes   those of the format's encoder in Python, but for the payload of a NaN and the sign of a zero that is the least of its group.
#pragma once
#include <memory>

#include "attention.h"

namespace effllm::kv {

using torch::stable::Tensor;

// The tensors of a cache, what is appended, and where it goes.
struct Appended {
  uint8_t* pages;
  char* ring;
  int64_t* lens;
  const int64_t* start;
  View from[2];
  Type type;
  int64_t batch, heads, width, dim, count, page, page_bytes, more, total, flushed, end, until, size;  // size: bytes of an element

  char* slot(int64_t b, int64_t i, int64_t g, int64_t t) const { return ring + (((b * 2 + i) * heads + g) * width + t % width) * dim * size; }
  const char* given(int64_t b, int64_t i, int64_t g, int64_t t) const { return static_cast<const char*>(from[i].data) + from[i].at(b, g, t) * size; }

  // The newest tokens to the ring, and the lengths.
  void finish() const {
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t i = 0; i < 2; ++i)
        for (int64_t g = 0; g < heads; ++g)
          for (int64_t t = std::max<int64_t>(0, until - total); t < more; ++t) std::memcpy(slot(b, i, g, total + t), given(b, i, g, t), static_cast<size_t>(dim * size));
    lens[0] = end, lens[1] = until;
  }
};

// Checks before any write; E-KVC-FULL where there is no room.
inline Appended append_of(Tensor& pages, Tensor& ring, Tensor& lens, const Tensor& start, const Tensor& k, const Tensor& v, int64_t page) {
  STD_TORCH_CHECK(page > 0 && pages.dim() == 3 && ring.dim() == 5 && lens.numel() == 2 && k.dim() == 4 && v.dim() == 4, "effllm: the cache's tensors do not fit");
  Appended z{};
  z.batch = ring.size(0), z.heads = ring.size(2), z.width = ring.size(3), z.dim = ring.size(4), z.more = k.size(2), z.count = pages.size(1), z.page = page;
  z.page_bytes = pages.size(2), z.lens = static_cast<int64_t*>(lens.mutable_data_ptr()), z.total = z.lens[0], z.flushed = z.lens[1], z.end = z.total + z.more;
  const int64_t room = z.count * page + z.width;
  STD_TORCH_CHECK(z.end <= room, "[E-KVC-FULL] the cache holds ", z.total, " of ", room, " tokens and ", z.more,
                  " more are to be appended\n  next step: make the cache larger, let it grow, or crop or reset it; it is unchanged");
  auto fits = [&](const Tensor& t) {
    return t.scalar_type() == ring.scalar_type() && t.size(0) == z.batch && t.size(1) == z.heads && t.size(2) == z.more && t.size(3) == z.dim;
  };
  STD_TORCH_CHECK(fits(k) && fits(v) && ring.is_contiguous() && pages.is_contiguous() && pages.size(0) == z.batch && start.numel() == z.batch && start.is_contiguous(),
                  "effllm: the keys do not fit the cache");
  z.until = std::max(z.flushed, (std::max<int64_t>(0, z.end - z.width) + page - 1) / page * page);
  z.pages = static_cast<uint8_t*>(pages.mutable_data_ptr()), z.ring = static_cast<char*>(ring.mutable_data_ptr());
  z.start = static_cast<const int64_t*>(start.const_data_ptr());
  z.from[0] = view_of(k), z.from[1] = view_of(v);
  z.type = type_of(ring.scalar_type()), z.size = z.type == Type::f32 ? 4 : 2;
  return z;
}

// Packs what leaves the ring and appends the rest; `records` as in a page's layout, one per key head.
template <class Packer> void append(const Appended& z, const Packer& packer) {
  constexpr bool shared = requires { Packer::shared; };
  const int64_t record = shared ? 0 : z.page_bytes / z.heads, pages = (z.until - z.flushed) / z.page, bytes = z.dim * z.size;
  torch::stable::parallel_for(0, z.batch * pages * z.heads, std::max<int64_t>(1, 16384 / (z.page * z.dim)), [&](int64_t from, int64_t to) {
    std::vector<char> both(static_cast<size_t>(2 * z.page * bytes));
    Packer own = packer;
    for (int64_t i = from; i < to; ++i) {
      const int64_t g = i % z.heads, n = i / z.heads % pages, b = i / z.heads / pages, first = z.flushed + n * z.page;
      const int64_t lead = std::clamp<int64_t>(z.start[b] - first, 0, z.page);  // padded tokens in front
      for (int64_t s = 0; s < 2; ++s)
        for (int64_t t = 0; t < z.page; ++t) {
          const int64_t at = first + std::max(t, lead);
          char* line = both.data() + (s * z.page + t) * bytes;
          if (lead == z.page) std::memset(line, 0, static_cast<size_t>(bytes));
          else std::memcpy(line, at < z.total ? z.slot(b, s, g, at) : z.given(b, s, g, at - z.total), static_cast<size_t>(bytes));
        }
      uint8_t* out = z.pages + (b * z.count + z.flushed / z.page + n) * z.page_bytes + g * record;
      if constexpr (!shared) std::memset(out, 0, static_cast<size_t>(record));
      own.pack(both.data(), both.data() + z.page * bytes, g, out);
    }
  });
  z.finish();
}

inline uint16_t half_of(float f) {
  const _Float16 h = static_cast<_Float16>(f);
  uint16_t bits; std::memcpy(&bits, &h, 2);
  return bits;
}
inline float of_half(uint16_t bits) { _Float16 h; std::memcpy(&h, &bits, 2); return static_cast<float>(h); }

inline void widen_all(Type type, const void* from, int64_t n, float* to) {
  if (type == Type::f32) widen<Type::f32>(from, 0, n, to);
  else if (type == Type::bf16) widen<Type::bf16>(from, 0, n, to);
  else widen<Type::f16>(from, 0, n, to);
}

template <Type T> inline void narrow(const float* from, int64_t n, void* to) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) effllm::store_from_float(to, i, T, from[i]);
}

inline void narrow_all(Type type, const float* from, int64_t n, void* to) {
  if (type == Type::f32) narrow<Type::f32>(from, n, to);
  else if (type == Type::bf16) narrow<Type::bf16>(from, n, to);
  else narrow<Type::f16>(from, n, to);
}

}  // namespace effllm::kv
