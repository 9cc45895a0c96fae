// The quantizer of KIVI and GEAR pages (effllm/runtime/caches/codes.py): a matrix (rows, columns), groups along rows, codes of 2, 4 or 8 bits.
//
// Maths   scale = half((max - min) / (2^bits - 1)), 1 where that is 0; code = round((x - half(min)) / scale), half to even, in 0 .. 2^bits - 1, 0 where that
//         is no number. A NaN stays in the scale and minimum of its group.
#pragma once
#include <cfloat>

#include "kv_append.h"

namespace effllm::kv {

struct Quantizer {
  int64_t rows, columns, bits, group;
  std::vector<uint8_t> codes;  // (rows, columns)
  std::vector<float> scale, low, high;

  Quantizer(int64_t rows_, int64_t columns_, int64_t bits_, int64_t group_) : rows(rows_), columns(columns_), bits(bits_), group(group_) {}

  // Codes of x, and scales and minima (rows / group, columns) as halves.
  void encode(const float* x, uint16_t* s, uint16_t* m) {
    codes.resize(static_cast<size_t>(rows * columns));
    for (auto* v : {&scale, &low, &high}) v->resize(static_cast<size_t>(columns));
    const float most = static_cast<float>((1 << bits) - 1);
    float *lo = low.data(), *hi = high.data(), *by = scale.data();
    for (int64_t g = 0; g < rows / group; ++g, x += group * columns, s += columns, m += columns) {
      std::copy(x, x + columns, lo);
      std::copy(x, x + columns, hi);
      for (int64_t t = 1; t < group; ++t) {
        const float* line = x + t * columns;
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) {
          const float v = line[c];
          lo[c] = v < lo[c] || v != v ? v : lo[c];  // a NaN stays
          hi[c] = v > hi[c] || v != v ? v : hi[c];
        }
      }
      for (int64_t c = 0; c < columns; ++c) {
        s[c] = half_of((hi[c] - lo[c]) / most), m[c] = half_of(lo[c]);
        if ((s[c] & 0x7FFF) == 0) s[c] = 0x3C00;  // 1
        by[c] = of_half(s[c]), lo[c] = of_half(m[c]);
      }
      for (int64_t t = 0; t < group; ++t) {
        const float* line = x + t * columns;
        uint8_t* to = codes.data() + (g * group + t) * columns;
#pragma omp simd
        for (int64_t c = 0; c < columns; ++c) {
          const float v = std::nearbyint((line[c] - lo[c]) / by[c]);
          const float held = std::fabs(v) <= FLT_MAX ? v : 0.f;  // a NaN compares false
          to[c] = static_cast<uint8_t>(static_cast<int32_t>(held < 0.f ? 0.f : held > most ? most : held));
        }
      }
    }
  }

  // 16 rows by 4 columns to 64 bytes, 8 / bits such blocks on top of one another.
  void pack(uint8_t* out) const {
    const int64_t fields = 8 / bits;
    for (int64_t a = 0; a < rows / 16; ++a)
      for (int64_t j = 0; j < columns / (4 * fields); ++j, out += 64)
        for (int64_t r = 0; r < 16; ++r) {
          const uint8_t* from = codes.data() + (16 * a + r) * columns + 4 * fields * j;
          uint32_t four = 0;
          for (int64_t f = 0; f < fields; ++f) {
            uint32_t next; std::memcpy(&next, from + 4 * f, 4);
            four |= next << (bits * f);
          }
          std::memcpy(out + 4 * r, &four, 4);
        }
  }
};

// Offsets of the fields of a KIVI record; GEAR's follow.
struct KiviPlaces {
  int64_t kscale, kmin, vcodes, vscale, vmin, end;
  KiviPlaces(int64_t page, int64_t dim, int64_t bits, int64_t group) {
    int64_t at = 0;
    auto take = [&at](int64_t bytes) { const int64_t here = at; at += (bytes + 63) / 64 * 64; return here; };
    const int64_t packed = page * dim * bits / 8, scales = page / group * dim * 2, vscales = dim / std::min(group, dim) * page * 2;
    take(packed), kscale = take(scales), kmin = take(scales), vcodes = take(packed), vscale = take(vscales), vmin = take(vscales);
    end = at;
  }
};

inline void check_kivi(const Appended& z, int64_t bits, int64_t group) {
  STD_TORCH_CHECK((bits == 2 || bits == 4 || bits == 8) && group > 0 && group % 16 == 0 && z.page % group == 0 && z.dim % 16 == 0 && z.dim % std::min(group, z.dim) == 0,
                  "effllm: the pages do not fit these settings");
}

inline uint16_t* halves(uint8_t* p) { return reinterpret_cast<uint16_t*>(p); }

// (rows, columns) to (columns, rows).
inline void transpose(const float* x, int64_t rows, int64_t columns, float* out) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) out[j * rows + i] = x[i * columns + j];
}

}  // namespace effllm::kv
