// Packed weights and their tiles: what a call chose, the codes of a step, and how the integer sums of a segment become floats and go to y.
// The maths, the layout and the numerics are in bipolar.h.
#pragma once
#include "activation.h"
#include "vector.h"

namespace effllm {

constexpr int64_t kChunkBytes = 512 << 10;

// What the caller chose (choose.py); 0 is the kernel's own choice for every field.
struct Plan {
  int64_t threads;      // at most so many
  int64_t unpack_from;  // rows from which codes are unpacked to bytes first
  int64_t expand_from;  // rows from which they are expanded to bf16; 0: never
  int64_t rows;         // tokens of a pass over the codes
  int64_t tiles;        // tiles of 16 rows side by side
  int64_t chunk;        // KiB of activations that are to stay in cache (unpack)
};

struct Weight {
  const uint8_t* codes;
  const void* scale;
  const void* minimum;  // null unless affine
  bool half;            // scale and minimum are fp16, else fp32
  int64_t n, tiles, blocks, groups, group;  // group 0: per channel
  int64_t ldy, col;     // columns of y, and the first one that is this weight's
};

// Whether one token of int8 activations takes the masked path (single.h), where it exists: with a part of one bit it loses.
inline bool single_wanted(int64_t bits, const Plan& plan) { return plan.tiles > 0 || (plan.rows == 0 && bits % 2 == 0); }

constexpr int part_width(int bits, int part) {  // 3 = 2+1, 5 = 4+1, 6 = 4+2, 7 = 4+2+1
  return bits == 8 ? (part == 0 ? 8 : 0)
       : part == 0 ? (bits >= 4 ? 4 : bits >= 2 ? 2 : 1)
       : part == 1 ? (bits == 3 || bits == 5 ? 1 : bits >= 6 ? 2 : 0)
                   : (bits == 7 ? 1 : 0);
}
constexpr int part_above(int bits, int part) {  // bits in parts before this one: also its offset in units of 64 bytes
  int a = 0; for (int p = 0; p < part; ++p) a += part_width(bits, p); return a;
}

// The 16 x 4 codes of step 0..7 of a block, parts merged.
template <class V, int BITS, int STEP> inline typename V::W codes_at(const uint8_t* block) {
  typename V::W w{};
  auto part = [&]<int P>() {
    constexpr int width = part_width(BITS, P);
    if constexpr (width > 0) {
      constexpr int fields = 8 / width, above = part_above(BITS, P), below = BITS - above - width;
      const auto unit = V::load(block + 64 * (above + STEP / fields));
      if constexpr (width == 8) w = unit;
      else {
        const auto f = V::template field<(STEP % fields) * width - below, (((1 << width) - 1) << below)>(unit);
        w = P == 0 ? f : V::either(w, f);
      }
    }
  };
  part.template operator()<0>(); part.template operator()<1>(); part.template operator()<2>();
  return w;
}

template <class V> inline typename V::F load_scale(const void* p, int64_t i, bool half) {
  return half ? V::load_h(static_cast<const uint16_t*>(p) + i) : V::load_f(static_cast<const float*>(p) + i);
}

// The integer sums of a segment's digits as one number a row.
template <class V, int D> inline typename V::F joined(typename V::I a0, typename V::I a1, typename V::I a2) {
  if constexpr (D == 1) return V::to_float(a0);
  else if constexpr (D == 2) return V::to_float(V::shift_add(a0, a1));
  else return V::fma1(V::to_float(V::shift_add(a0, a1)), 256.f, V::to_float(a2));
}

// Fold one segment of one token, `a`, into its 16 sums.
template <class V, int D> inline typename V::F fold(typename V::F a, typename V::F sum, typename V::F scale, typename V::F minimum, bool affine, float step, float corr) {
  if (affine) {
    if constexpr (D > 1) a = V::axpb(a, step, 0.f);
    return V::fma1(minimum, corr, V::fma(scale, a, sum));
  }
  if constexpr (D == 1) return V::fma(scale, V::plus(a, corr), sum);  // no multiply-add: those units have the dot products to do
  else return V::fma(scale, V::axpb(a, step, corr), sum);
}

template <class V> inline void finish(typename V::F sum, float factor, const float* bias, void* y, int64_t at, int64_t count, Type type) {
  if (count < 16) {
    float out[16];
    V::store_f(out, sum);
    for (int64_t r = 0; r < count; ++r) store_from_float(y, at + r, type, out[r] * factor + (bias ? bias[r] : 0.f));
    return;
  }
  const auto f = V::fma1(sum, factor, bias ? V::load_f(bias) : V::zero_f());
  if (type == Type::f32) V::store_f(static_cast<float*>(y) + at, f);
  else if (type == Type::bf16) V::store_bf16(static_cast<uint16_t*>(y) + at, f);
  else V::store_h(static_cast<uint16_t*>(y) + at, f);
}

// Where the scales of a segment are: groups of 16 give two segments per block.
inline int64_t group_of(const Weight& w, const Activations& x, int64_t seg) {
  if (w.group == x.seg) return seg;  // as a rule: a division takes as long as a tenth of a segment's products
  return w.group == 0 ? 0 : static_cast<uint32_t>(seg * x.seg) / static_cast<uint32_t>(w.group);
}

// Segment s of MR tokens and T tiles, `tiles` of which are there, into their sums; total(m, t) are its products as one number a row.
template <class V, int D, int MR, int T, class Total>
__attribute__((always_inline)) inline void fold_segment(const Weight& w, const Activations& x, int64_t s, int64_t tile, int tiles, int64_t m0, typename V::F (&sum)[MR][T], Total&& total) {
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    if (t >= tiles) break;
    const int64_t g = ((tile + t) * w.groups + group_of(w, x, s)) * 16, size = w.half ? 2 : 4;
    const auto scale = load_scale<V>(w.scale, g, w.half);
    const auto low = w.minimum ? load_scale<V>(w.minimum, g, w.half) : V::zero_f();
    const int64_t next = (g + T * w.groups * 16) * size;  // of the tile after these; rows of scales are too short for hardware to fetch ahead
    __builtin_prefetch(static_cast<const char*>(w.scale) + next);
    if (w.minimum) __builtin_prefetch(static_cast<const char*>(w.minimum) + next);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const size_t i = static_cast<size_t>((m0 + m) * x.segs + s);
      sum[m][t] = fold<V, D>(total(m, t), sum[m][t], scale, low, w.minimum != nullptr, D > 1 ? x.step[i] : 1.f, x.corr[i]);
    }
  }
}

// The sums of MR tokens and T tiles, `tiles` of which are there, times `factor` and the token's scale, to y.
template <class V, int MR, int T>
__attribute__((always_inline)) inline void finish_tiles(const Weight& w, int64_t tile, int tiles, int64_t m0, const typename V::F (&sum)[MR][T], float factor, const float* out_scale, const float* bias, void* y, Type type) {
#pragma GCC unroll 4
  for (int t = 0; t < T; ++t) {
    if (t >= tiles) break;
    const int64_t first = (tile + t) * 16, count = std::min<int64_t>(16, w.n - first);
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m)
      finish<V>(sum[m][t], out_scale ? factor * out_scale[m0 + m] : factor, bias ? bias + first : nullptr, y, (m0 + m) * w.ldy + w.col + first, count, type);
  }
}

// Codes some KB ahead: hardware prefetchers stop at every page, and a tile is about one page long.
constexpr int64_t kAhead = 1024;
template <int BITS, int64_t AHEAD = kAhead> inline void fetch_ahead(const uint8_t* block) {
#pragma GCC unroll 8
  for (int i = 0; i < BITS; ++i) __builtin_prefetch(block + AHEAD + 64 * i);
}

// Tokens of a chunk whose activations, `bytes` each, stay in the second-level cache while all tiles pass by.
inline int64_t chunk_of(const Plan& plan, int64_t bytes) { return std::max<int64_t>(48, (plan.chunk ? plan.chunk << 10 : kChunkBytes) / bytes / 24 * 24); }

}  // namespace effllm
