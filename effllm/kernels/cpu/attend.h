// What the attention kernels share: rows as fp32, and an exponential that vectorizes.
#pragma once
#include "activation.h"

namespace effllm {

// exp for x <= 0, relative error below 2e-7: 2^round(x log2 e) times a degree-6 polynomial of the rest.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float n = std::nearbyint(x * 1.44269504f);
  const float r = std::fma(n, -1.90465421e-9f, std::fma(n, -0.693147180f, x));  // ln 2 in two parts
  float p = 1.f / 720;
  p = p * r + 1.f / 120; p = p * r + 1.f / 24; p = p * r + 1.f / 6; p = p * r + 0.5f; p = p * r + 1.f; p = p * r + 1.f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float two; std::memcpy(&two, &bits, 4);
  return p * two;
}

template <Type T> inline void widen(const void* base, int64_t at, int64_t d, float* out) {
  if constexpr (T == Type::f32) std::memcpy(out, static_cast<const float*>(base) + at, static_cast<size_t>(d) * 4);
  else
#pragma omp simd
    for (int64_t i = 0; i < d; ++i) out[i] = load_as_float(base, at + i, T);
}

}  // namespace effllm
