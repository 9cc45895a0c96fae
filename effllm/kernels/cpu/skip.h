// Which channels are read: magnitudes against thresholds, and the list of the channels that pass.
//
// Maths     row i of a call reads channel c where not |x_ic| norm_c <= t_c: NaN passes. A list holds what any of up to four rows reads, in order,
//           with each row's values, zero where that row does not read the channel. Weights are finite, so such zeros add nothing.
// Layout    index int32, values fp32, both padded: to whole quads with the last channel at value zero, and by `kAhead` more that may be prefetched.
// Numerics  comparisons in fp32, of activations that are exact there.
#pragma once
#include "gemv.h"
#include "operands.h"
#include "phases.h"

namespace effllm::skip {

using torch::stable::Tensor;

constexpr int64_t kMost = 4;    // rows of a call that share a list
constexpr int64_t kAhead = 64;  // channels that may be prefetched past the end

struct Mask {
  const float* threshold = nullptr;
  bool each = false;            // a threshold per channel, else one
  const float* norm = nullptr;  // or null
  bool passes(float x, int64_t c) const {
    const float size = std::fabs(x) * (norm ? norm[c] : 1.f);
    return !(size <= threshold[each ? c : 0]);
  }
};

struct Active {
  int64_t count = 0, padded = 0, m = 0, ld = 0;
  std::vector<int32_t> index;
  std::vector<float> values;
  float* row(int64_t i) { return values.data() + i * ld; }
  const float* row(int64_t i) const { return values.data() + i * ld; }
  void shape(int64_t m_, int64_t k) {
    m = m_, count = 0, ld = k + 32;
    if (static_cast<int64_t>(index.size()) < k + 32 + kAhead) index.resize(static_cast<size_t>(k + 32 + kAhead));
    if (static_cast<int64_t>(values.size()) < m * ld) values.resize(static_cast<size_t>(m * ld));
  }
  void finish() {
    padded = (count + 3) & ~int64_t{3};
    const int32_t last = count ? index[static_cast<size_t>(count - 1)] : 0;
    for (int64_t c = count; c < padded + kAhead; ++c) index[static_cast<size_t>(c)] = last;
    for (int64_t i = 0; i < m; ++i)
      for (int64_t c = count; c < padded; ++c) row(i)[c] = 0.f;
  }
};

// Channels from .. of a list, one at a time; without branches, so that masks without a pattern cost no mispredictions.
inline void take_each(Active& a, const void* x, Type type, int64_t from, int64_t k, const Mask& mask) {
  for (int64_t c = from; c < k; ++c) {
    bool any = false;
    for (int64_t i = 0; i < a.m; ++i) {
      const float f = load_as_float(x, i * k + c, type);
      const bool on = mask.passes(f, c);
      a.row(i)[a.count] = on ? f : 0.f;
      any |= on;
    }
    a.index[static_cast<size_t>(a.count)] = static_cast<int32_t>(c);
    a.count += any;
  }
}

template <class V> int64_t take_vectors(Active&, const void*, Type, int64_t, const Mask&) { return 0; }  // channels taken

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
// Which lanes go first, for every set of eight: a compress that AVX2 does not have.
struct Compress {
  uint8_t lanes[256][8] = {};
  constexpr Compress() {
    for (int set = 0; set < 256; ++set)
      for (int lane = 0, to = 0; lane < 8; ++lane)
        if (set >> lane & 1) lanes[set][to++] = static_cast<uint8_t>(lane);
  }
};
inline constexpr Compress kCompress;

inline __m256 load8(const void* p, int64_t at, Type type) {
  if (type == Type::f32) return _mm256_loadu_ps(static_cast<const float*>(p) + at);
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const uint16_t*>(p) + at));
  return type == Type::f16 ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
template <> inline int64_t take_vectors<Avx2>(Active& a, const void* x, Type type, int64_t k, const Mask& mask) {
  const __m256 one = _mm256_set1_ps(mask.threshold[0]), sign = _mm256_set1_ps(-0.f);
  __m256i at = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  int64_t c = 0;
  for (; c + 8 <= k; c += 8, at = _mm256_add_epi32(at, _mm256_set1_epi32(8))) {
    const __m256 t = mask.each ? _mm256_loadu_ps(mask.threshold + c) : one;
    __m256 f[kMost];
    int any = 0;
    for (int64_t i = 0; i < a.m; ++i) {
      const __m256 v = load8(x, i * k + c, type);
      __m256 size = _mm256_andnot_ps(sign, v);
      if (mask.norm) size = _mm256_mul_ps(size, _mm256_loadu_ps(mask.norm + c));
      const __m256 on = _mm256_cmp_ps(size, t, _CMP_NLE_UQ);
      f[i] = _mm256_and_ps(v, on);
      any |= _mm256_movemask_ps(on);
    }
    const __m256i order = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kCompress.lanes[any])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(a.index.data() + a.count), _mm256_permutevar8x32_epi32(at, order));
    for (int64_t i = 0; i < a.m; ++i) _mm256_storeu_ps(a.row(i) + a.count, _mm256_permutevar8x32_ps(f[i], order));
    a.count += __builtin_popcount(static_cast<unsigned>(any));
  }
  return c;
}
#endif

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
inline __m512 load16(const void* p, int64_t at, Type type) {
  if (type == Type::f32) return _mm512_loadu_ps(static_cast<const float*>(p) + at);
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(static_cast<const uint16_t*>(p) + at));
  return type == Type::f16 ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
template <> inline int64_t take_vectors<Avx512>(Active& a, const void* x, Type type, int64_t k, const Mask& mask) {
  const __m512 one = _mm512_set1_ps(mask.threshold[0]);
  __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  int64_t c = 0;
  for (; c + 16 <= k; c += 16, at = _mm512_add_epi32(at, _mm512_set1_epi32(16))) {
    const __m512 t = mask.each ? _mm512_loadu_ps(mask.threshold + c) : one;
    __m512 f[kMost];
    __mmask16 any = 0;
    for (int64_t i = 0; i < a.m; ++i) {
      const __m512 v = load16(x, i * k + c, type);
      __m512 size = _mm512_abs_ps(v);
      if (mask.norm) size = _mm512_mul_ps(size, _mm512_loadu_ps(mask.norm + c));
      const __mmask16 on = _mm512_cmp_ps_mask(size, t, _CMP_NLE_UQ);
      f[i] = _mm512_maskz_mov_ps(on, v);
      any = static_cast<__mmask16>(any | on);
    }
    // compressed in a register: compressing stores are slow on some processors
    _mm512_storeu_si512(a.index.data() + a.count, _mm512_maskz_compress_epi32(any, at));
    for (int64_t i = 0; i < a.m; ++i) _mm512_storeu_ps(a.row(i) + a.count, _mm512_maskz_compress_ps(any, f[i]));
    a.count += __builtin_popcount(any);
  }
  return c;
}
#endif

template <class V> void take(Active& a, const void* x, Type type, int64_t m, int64_t k, const Mask& mask) {
  a.shape(m, k);
  take_each(a, x, type, take_vectors<V>(a, x, type, k, mask), k, mask);
  a.finish();
}

inline void floats(const void* x, int64_t at, int64_t count, Type type, float* to) {
  if (type == Type::f32) std::memcpy(to, static_cast<const float*>(x) + at, static_cast<size_t>(count) * 4);
  else if (type == Type::bf16)
    for (int64_t c = 0; c < count; ++c) to[c] = bf16_to_float(static_cast<const uint16_t*>(x)[at + c]);
  else
    for (int64_t c = 0; c < count; ++c) to[c] = load_as_float(x, at + c, Type::f16);
}

struct Buffer {  // floats of one calling thread, kept between calls, at a cache line
  std::vector<float> data;
  float* take(int64_t count) {
    if (static_cast<int64_t>(data.size()) < count + 16) data.resize(static_cast<size_t>(count + 16));
    return data.data() + (64 - reinterpret_cast<uintptr_t>(data.data()) % 64) % 64 / 4;
  }
};

// What every op checks: x (m, k), thresholds of `channels` channels.
struct Call {
  Tensor x, threshold, norm;
  int64_t m = 0, k = 0;
  Type type = Type::f32;
  Mask mask;
  bool sparse = false;  // thresholds apply
  bool few() const { return m <= kMost; }  // else PyTorch's product
  const void* data() const { return x.const_data_ptr(); }
};

inline const float* floats_at(Tensor& held, const Tensor& t, int64_t least, int64_t most, const char* what) {
  STD_TORCH_CHECK(t.scalar_type() == torch::headeronly::ScalarType::Float && (t.numel() == least || t.numel() == most), "effllm: ", what);
  held = torch::stable::contiguous(t);
  return static_cast<const float*>(held.const_data_ptr());
}

inline Call call_of(const Tensor& x, const Tensor& threshold, int64_t channels, int64_t limit) {
  STD_TORCH_CHECK(x.dim() >= 1, "effllm: the activation has no dimension");
  Call c;
  c.k = x.size(x.dim() - 1), c.m = c.k ? x.numel() / c.k : 0, c.type = type_of(x.scalar_type());
  c.x = torch::stable::view(torch::stable::contiguous(x), {c.m, c.k});
  c.mask.threshold = floats_at(c.threshold, threshold, 1, channels < 0 ? c.k : channels, "thresholds must be float32, one or one per channel");
  c.mask.each = threshold.numel() > 1;
  c.sparse = limit < 0 || c.m <= limit;
  static const float nothing = -1.f;  // dense calls of few rows: the same kernels read every channel
  if (!c.sparse) c.mask.threshold = &nothing, c.mask.each = false;
  return c;
}

// x with zeros where a row does not read the channel, for PyTorch's own product.
inline Tensor masked(const Tensor& x, const Mask& mask) {
  const int64_t m = x.size(0), k = x.size(1), size = size_of(type_of(x.scalar_type()));
  const Type type = type_of(x.scalar_type());
  const Tensor kept = torch::stable::new_empty(x, {m, k});
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  auto* to = static_cast<char*>(kept.mutable_data_ptr());
  torch::stable::parallel_for(0, m, std::max<int64_t>(1, 32768 / std::max<int64_t>(1, k)), [&](int64_t i0, int64_t i1) {
    std::memcpy(to + i0 * k * size, from + i0 * k * size, static_cast<size_t>((i1 - i0) * k * size));
    for (int64_t i = i0; i < i1; ++i)
      for (int64_t c = 0; c < k; ++c)
        if (!mask.passes(load_as_float(from, i * k + c, type), c)) std::memset(to + (i * k + c) * size, 0, static_cast<size_t>(size));
  });
  return kept;
}

inline Tensor as(const Tensor& t, torch::headeronly::ScalarType dtype) { return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype); }

// (m, n) in x's leading dimensions.
inline Tensor shaped(const Tensor& y, const Tensor& x) {
  std::vector<int64_t> shape;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) shape.push_back(x.size(i));
  shape.push_back(y.size(1));
  return torch::stable::view(y, shape);
}

// count sums, and a bias or none, to y[at ..].
inline void write(float* sums, const float* bias, void* y, int64_t at, int64_t count, Type type) {
  if (bias)
    for (int64_t j = 0; j < count; ++j) sums[j] += bias[j];
  if (type == Type::bf16) {
    auto* to = static_cast<uint16_t*>(y) + at;
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) to[j] = float_to_bf16(sums[j]);
  } else if (type == Type::f32) {
    std::memcpy(static_cast<float*>(y) + at, sums, static_cast<size_t>(count) * 4);
  } else {
    for (int64_t j = 0; j < count; ++j) store_from_float(y, at + j, type, sums[j]);
  }
}

// One core reads some 20 bytes a nanosecond; a thread is worth waking for 3 us.
inline int64_t threads_for(int64_t asked, double nbytes) {
  const auto most = static_cast<int64_t>(torch::stable::get_num_threads());
  if (asked > 0) return std::min(asked, most);
  return std::clamp<int64_t>(static_cast<int64_t>(nbytes / 20.0 / 3000.0), 1, most);
}

}  // namespace effllm::skip
