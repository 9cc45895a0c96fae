// Many tokens of bf16: the codes are expanded to bf16 columns a few megabytes at a time, and the product is PyTorch's own.
//
// Maths     W[n, k] = 2 scale (u - zero), or 2 scale u + minimum, rounded to bf16 once: what a dense bf16 model holds.
// Layout    out[k][n]: a step of tile16 gives 16 rows of 4 columns, which are stored as 4 runs of 16 values.
// Bytes     the packed weight once, 2 bytes a weight written and read again in cache.
// Why       oneDNN's bf16 product does as many multiply-adds an instruction as two int8 digits do, without their folding.
#pragma once
#include "bipolar.h"

namespace effllm {

constexpr int64_t kExpandBytes = 4 << 20;

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
template <class V, int BITS, int STEP>
inline void expand_steps(const uint8_t* block, const Weight& w, int64_t tile, int64_t b, int64_t k, float zero, uint16_t* out, int64_t ld) {
  if constexpr (STEP < 8) {
    const int64_t first = b * 32 + 4 * STEP;
    if (first >= k) return;
    const int64_t g = (tile * w.groups + (w.group ? first / w.group : 0)) * 16;
    const auto step = V::axpb(load_scale<V>(w.scale, g, w.half), 2.f, 0.f);
    const auto low = w.minimum ? load_scale<V>(w.minimum, g, w.half) : V::axpb(step, -zero, 0.f);
    const auto u = codes_at<V, BITS, STEP>(block);
    uint16_t* at = out + first * ld;
    V::store_bf16(at, V::fma(V::template column<0>(u), step, low));
    if (first + 1 < k) V::store_bf16(at + ld, V::fma(V::template column<1>(u), step, low));
    if (first + 2 < k) V::store_bf16(at + 2 * ld, V::fma(V::template column<2>(u), step, low));
    if (first + 3 < k) V::store_bf16(at + 3 * ld, V::fma(V::template column<3>(u), step, low));
    expand_steps<V, BITS, STEP + 1>(block, w, tile, b, k, zero, out, ld);
  }
}

// Tiles from .. to of w as (k, ld) bf16 at `out`, whose first column is tile `origin`.
template <class V, int BITS> void expand_tiles(const Weight& w, int64_t k, float zero, int64_t from, int64_t to, int64_t origin, uint16_t* out, int64_t ld) {
  for (int64_t t = from; t < to; ++t)
    for (int64_t b = 0; b < w.blocks; ++b)
      expand_steps<V, BITS, 0>(w.codes + (t * w.blocks + b) * 64 * BITS, w, t, b, k, zero, out + (t - origin) * 16, ld);
}
#endif

}  // namespace effllm
