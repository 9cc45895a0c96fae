// Monarch linears with bipolar factors: the tiles of bipolar.h, block after block, in one parallel region.
//
// Maths     stage 1 and stage 2 are exact integer dot products per segment, as bipolar.h states them; the activations of both become digits.
// Layout    tile16 with the rows of every block in tiles of their own: block b is tiles b T .. (b + 1) T.
// Bytes     I O t (P + S) codes and their scales once.
// Phases    digits of x, tiles of w1 to fp32, digits of those sums, tiles of w2.
#pragma once
#include "packed.h"
#include "monarch.h"

namespace effllm::monarch {

constexpr int64_t kCodeRows = 512;  // tokens whose sums are kept at once

struct Codes {  // a factor of `count` blocks with `rows` rows each
  Weight block0;
  int64_t bits, rows, columns, tiles;
  float factor;  // what Activations multiply their sums by

  Codes(const Tensor& codes, const Tensor& scale, const std::optional<Tensor>& minimum, int64_t count, int64_t rows_, int64_t columns_, int64_t bits_, int64_t group, double zero)
      : bits(bits_), rows(rows_), columns(columns_), tiles((rows_ + 15) / 16) {
    STD_TORCH_CHECK(bits >= 1 && bits <= 8, "effllm: bits must be 1 to 8");
    STD_TORCH_CHECK(codes.dim() == 3 && codes.size(0) == count * tiles && codes.size(2) == 64 * bits && codes.is_contiguous(), "effllm: codes must be (blocks * tiles, blocks of columns, 64 * bits), contiguous");
    STD_TORCH_CHECK(scale.dim() == 3 && scale.size(0) == codes.size(0) && scale.size(2) == 16 && scale.is_contiguous(), "effllm: scale must be (blocks * tiles, groups, 16), contiguous");
    STD_TORCH_CHECK(!minimum || (minimum->is_contiguous() && minimum->numel() == scale.numel() && minimum->scalar_type() == scale.scalar_type()), "effllm: minimum must be as scale");
    const int64_t kb = codes.size(1), groups = scale.size(1);
    STD_TORCH_CHECK(columns <= kb * 32 && columns > (kb - (group > 32 ? group / 32 : 1)) * 32 - 32 && (group == 0 || kb * 32 <= groups * group), "effllm: the codes do not fit the block's columns");
    block0 = {static_cast<const uint8_t*>(codes.const_data_ptr()), scale.const_data_ptr(), minimum ? minimum->const_data_ptr() : nullptr, scale.scalar_type() == ScalarType::Half,
              rows, tiles, kb, groups, group, 0, 0};
    factor = minimum ? 0.5f : -static_cast<float>(zero);
  }
  double nbytes() const { return static_cast<double>(tiles * block0.blocks * 64 * bits); }  // of one block
  Weight block(int64_t b) const {
    Weight w = block0;
    const int64_t at = b * tiles * w.groups * 16 * (w.half ? 2 : 4);
    w.codes += b * tiles * w.blocks * 64 * bits;
    w.scale = static_cast<const char*>(w.scale) + at;
    if (w.minimum) w.minimum = static_cast<const char*>(w.minimum) + at;
    return w;
  }
  void shape(Activations& a, int64_t m, int digits) const {
    const int64_t kp = block0.blocks * 32;
    a.shape<V>(m, columns, kp, block0.group == 16 ? 16 : 32, digits, bits);
  }
};

struct CodeBuffers {
  std::vector<Activations> x, z;
  Buffer input, sums;
};

inline void through_codes(const Sizes& z, const void* x, Type type, const Codes& w1, const Codes& w2, const float* bias, void* y, int64_t threads) {
  static thread_local CodeBuffers kept;
  const int digits = type == Type::f32 ? 3 : 2;
  kept.x.resize(static_cast<size_t>(z.in));
  kept.z.resize(static_cast<size_t>(z.out));
  const int64_t q = z.out * z.rank;
  float* input = kept.input.take(std::max(z.in * z.m * z.p, z.out * z.m * z.inner()));
  float* sums = kept.sums.take(z.in * z.m * q);
  Activations *xs = kept.x.data(), *zs = kept.z.data();
  // tiles in pairs
  const Chunks cut1(w1.tiles, w1.nbytes() / static_cast<double>(w1.tiles), 2), cut2(w2.tiles, w2.nbytes() / static_cast<double>(w2.tiles), 2);
  const int64_t counts[4] = {z.in, z.in * cut1.each, z.out, z.out * cut2.each};
  const double nbytes = w1.nbytes() * static_cast<double>(z.in) + w2.nbytes() * static_cast<double>(z.out);
  in_phases(counts, threads_for(threads, nbytes, 2 * z.m), [&](int phase, int64_t task) {
    static thread_local Buffer scratch;
    if (phase == 0) {
      float* to = input + task * z.m * z.p;
      const int64_t width = z.width(task);
      w1.shape(xs[task], z.m, digits);
      for (int64_t m = 0; m < z.m; ++m) {
        for (int64_t c = 0; c < z.p; ++c) to[m * z.p + c] = c < width ? load_as_float(x, m * z.k + task * z.p + c, type) : 0.f;
        xs[task].take_float(m, to, Type::f32, w1.factor);
      }
    } else if (phase == 1) {
      const int64_t block = task / cut1.each;
      Weight w = w1.block(block);
      w.ldy = q;
      multiply_range<V>(w, w1.bits, xs[block], cut1.from(task), cut1.to(task), nullptr, nullptr, sums + block * z.m * q, Type::f32, Plan{});
    } else if (phase == 2) {
      float* to = input + task * z.m * z.inner();
      w2.shape(zs[task], z.m, digits);
      for (int64_t m = 0; m < z.m; ++m) {
        for (int64_t i = 0; i < z.in; ++i)
          std::memcpy(to + m * z.inner() + i * z.rank, sums + (i * z.m + m) * q + task * z.rank, static_cast<size_t>(z.rank) * 4);
        zs[task].take_float(m, to, Type::f32, w2.factor);
      }
    } else {
      const int64_t block = task / cut2.each, from = cut2.from(task), to = cut2.to(task), rows = std::min(z.s, to * 16) - from * 16;
      Weight w = w2.block(block);
      w.ldy = rows;
      w.col = -from * 16;
      float* out = scratch.take(z.m * rows);
      multiply_range<V>(w, w2.bits, zs[block], from, to, nullptr, nullptr, out, Type::f32, Plan{});
      finish(z, block, from * 16, from * 16 + rows, out, rows, bias, y, type);
    }
  });
}

}  // namespace effllm::monarch
