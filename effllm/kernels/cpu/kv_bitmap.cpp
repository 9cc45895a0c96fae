// Attention over pruned keys and values in bitmap pages (Mustafar).
//
// Layout    a record holds, for one key head and a page of T tokens, K = kept channels a token, at byte offsets that the caller gives:
//             kval  (T / 64, 64 K)  kept key elements: block of 64 tokens, channel, token      kmap (T / 64, D) uint64
//             vval  (T, K)          kept value elements: token, channel                        vmap (T, ceil(D / 64)) uint64
//             kscale, vscale        (T, 2) fp16: least, step of a token, only for 4- and 8-bit elements
//           Bit i of a map is element i of its tile: 64 tokens of a channel (keys), 64 channels of a token (values). Elements are the model's
//           dtype, or sign and level in 8 or 4 bits (two a byte, low first): x = +-(least + level step).
// Bytes     per token and matrix: K * element + D / 8 (+ 4 for scales).
// Numerics  fp32 products; with AVX512-BF16 and bf16 elements bf16 products (of exact bf16 keys, values and queries, probabilities rounded to
//           bf16) summed in fp32.
#include "kv.h"
#include "offer.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace {

using namespace effllm;
using effllm::kv::Tensor;
using kv::axpy;

struct Places {
  int64_t keep, bits, kval, kmap, vval, vmap, kscale, vscale;
};

// The set elements of a tile, in order, at their places among 64 floats; the others zero. Reads past the elements it uses, inside the record.
template <Type T> inline const uint8_t* expand(uint64_t map, const uint8_t* from, float* out) {
#if defined(__AVX512F__)
  for (int part = 0; part < 4; ++part) {
    const __mmask16 m = static_cast<__mmask16>(map >> (16 * part));
    __m512 x;
    if constexpr (T == Type::f32) x = _mm512_loadu_ps(from);
    else if constexpr (T == Type::f16) x = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    else x = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))), 16));
    _mm512_storeu_ps(out + 16 * part, _mm512_maskz_expand_ps(m, x));
    from += __builtin_popcount(m) * (T == Type::f32 ? 4 : 2);
  }
  return from;
#else
  std::memset(out, 0, 256);
  int64_t i = 0;
  for (uint64_t m = map; m; m &= m - 1) out[__builtin_ctzll(m)] = load_as_float(from, i++, T);
  return from + i * (T == Type::f32 ? 4 : 2);
#endif
}

template <Type T> struct Bitmap {
  kv::State c;
  Places at;
  int64_t rows = 0, tiles, width;
  const float* q = nullptr;
  std::vector<uint8_t> codes;   // the codes of 64 tokens, one a byte
  std::vector<int32_t> pairs;   // two bf16 queries, then two bf16 probabilities, per lane
  Bitmap(const kv::State& c, const Places& at) : c(c), at(at), tiles((c.dim + 63) / 64), width(tiles * 64) {
    if (at.bits < 16) codes.resize(static_cast<size_t>(64 * at.keep + 64));
  }
  void begin(int64_t, int64_t, const float* given, int64_t count) {
    q = given, rows = count;
    if (!fast()) return;
    pairs.resize(static_cast<size_t>(rows * (c.dim / 2)));
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t i = 0; i < c.dim; i += 2)
        pairs[static_cast<size_t>(r * (c.dim / 2) + i / 2)] = static_cast<int32_t>(float_to_bf16(q[r * c.dim + i]) | static_cast<uint32_t>(float_to_bf16(q[r * c.dim + i + 1])) << 16);
  }
  bool fast() const {
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    return T == Type::bf16 && at.bits == 16 && c.dim % 2 == 0;
#else
    return false;
#endif
  }
  float round(float p) const { return fast() ? bf16_to_float(float_to_bf16(p)) : p; }
  const uint64_t* map(const uint8_t* record, int64_t offset) const { return reinterpret_cast<const uint64_t*>(record + offset); }

  void scores(const uint8_t* record, const float*, int64_t, float* s) {
    for (int64_t t = 0; t < c.page; t += 64) scores_of(record, t, s + t);
  }
  void values(const uint8_t* record, const float* p, int64_t, float* acc) {
    for (int64_t t = 0; t < c.page; t += 64) values_of(record, t, p + t, acc);
  }

  // 64 tokens from t on; rows of s are a page apart.
  void scores_of(const uint8_t* record, int64_t t, float* s) {
    const uint64_t* maps = map(record, at.kmap) + t / 64 * c.dim;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    if (fast()) {
      const uint8_t* from = record + at.kval + t * at.keep * 2;
      for (int64_t r = 0; r < rows; r += 4)
        switch (std::min<int64_t>(4, rows - r)) {
          case 1: fast_scores<1>(maps, from, r, s); break;
          case 2: fast_scores<2>(maps, from, r, s); break;
          case 3: fast_scores<3>(maps, from, r, s); break;
          default: fast_scores<4>(maps, from, r, s);
        }
      return;
    }
#endif
    for (int64_t r = 0; r < rows; ++r) std::fill(s + r * c.page, s + r * c.page + 64, 0.f);
    alignas(64) float tile[64], least[64], step[64];
    const uint8_t* from = elements(record + at.kval, t);
    if (at.bits < 16) scales(record + at.kscale, t, least, step);
    for (int64_t i = 0; i < c.dim; ++i) {
      if (at.bits == 16) from = expand<T>(maps[i], from, tile);
      else from = restore(maps[i], from, least, step, 1, tile);
      for (int64_t r = 0; r < rows; ++r) axpy(s + r * c.page, q[r * c.dim + i], tile, 64);
    }
  }

  void values_of(const uint8_t* record, int64_t t, const float* p, float* acc) {
    const uint64_t* maps = map(record, at.vmap) + t * tiles;
#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
    if (fast()) {
      const uint8_t* from = record + at.vval + t * at.keep * 2;
      for (int64_t w = 0; w < tiles; ++w)
        for (int64_t r = 0; r < rows; r += 4)
          switch (std::min<int64_t>(4, rows - r)) {
            case 1: fast_values<1>(maps, from, w, r, p, acc); break;
            case 2: fast_values<2>(maps, from, w, r, p, acc); break;
            case 3: fast_values<3>(maps, from, w, r, p, acc); break;
            default: fast_values<4>(maps, from, w, r, p, acc);
          }
      return;
    }
#endif
    alignas(64) float tile[64], least[64], step[64];
    const uint8_t* from = elements(record + at.vval, t);
    if (at.bits < 16) scales(record + at.vscale, t, least, step);
    for (int64_t i = 0; i < 64; ++i)
      for (int64_t w = 0; w < tiles; ++w) {
        const uint64_t m = maps[i * tiles + w];
        if (at.bits == 16) from = expand<T>(m, from, tile);
        else from = restore(m, from, least + i, step + i, 0, tile);
        for (int64_t r = 0; r < rows; ++r) axpy(acc + r * width + 64 * w, p[r * c.page + i], tile, 64);
      }
  }

  void finish(const float* acc, const float*, int64_t, float* out) const {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(out + r * c.dim, acc + r * width, static_cast<size_t>(c.dim) * 4);
  }

  // Where the elements of 64 tokens from t begin; quantized ones are spread to one a byte first.
  const uint8_t* elements(const uint8_t* base, int64_t t) {
    const int64_t count = 64 * at.keep;
    if (at.bits == 16) return base + t * at.keep * (T == Type::f32 ? 4 : 2);
    if (at.bits == 8) { std::memcpy(codes.data(), base + t * at.keep, static_cast<size_t>(count)); return codes.data(); }
    const uint8_t* packed = base + t * at.keep / 2;
    for (int64_t i = 0; i < count / 2; ++i) {
      const uint16_t two = static_cast<uint16_t>((packed[i] & 15) | (packed[i] >> 4) << 8);  // first element at the lower address
      std::memcpy(codes.data() + 2 * i, &two, 2);
    }
    return codes.data();
  }
  static void scales(const uint8_t* base, int64_t t, float* least, float* step) {
    for (int64_t i = 0; i < 64; ++i) least[i] = load_as_float(base, 2 * (t + i), Type::f16), step[i] = load_as_float(base, 2 * (t + i) + 1, Type::f16);
  }
  // The next elements of a tile from codes, one a byte: +-(least + level step) where the map has a bit, else zero. `stride` 1: one scale an element
  // of the tile (keys), 0: one for all of it (values).
  const uint8_t* restore(uint64_t map, const uint8_t* from, const float* least, const float* step, int stride, float* out) const {
    const int half = 1 << (at.bits - 1);
#if defined(__AVX512VBMI2__)
    alignas(64) uint8_t bytes[64];
    _mm512_store_si512(bytes, _mm512_maskz_expand_epi8(map, _mm512_loadu_si512(from)));
    const __m512i sign = _mm512_set1_epi32(half), levels = _mm512_set1_epi32(half - 1), flip = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    for (int part = 0; part < 4; ++part) {
      const __m512i code = _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes) + part));
      const __m512 l = stride ? _mm512_loadu_ps(least + 16 * part) : _mm512_set1_ps(*least), d = stride ? _mm512_loadu_ps(step + 16 * part) : _mm512_set1_ps(*step);
      const __m512i x = _mm512_castps_si512(_mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_and_si512(code, levels)), d, l));
      const __m512i y = _mm512_mask_xor_epi32(x, _mm512_test_epi32_mask(code, sign), x, flip);
      _mm512_storeu_ps(out + 16 * part, _mm512_castsi512_ps(_mm512_maskz_mov_epi32(static_cast<__mmask16>(map >> (16 * part)), y)));
    }
    return from + __builtin_popcountll(map);
#else
    std::memset(out, 0, 256);
    for (uint64_t m = map; m; m &= m - 1) {
      const int i = __builtin_ctzll(m), code = *from++;
      const float x = least[i * stride] + static_cast<float>(code & (half - 1)) * step[i * stride];
      out[i] = code & half ? -x : x;
    }
    return from;
#endif
  }

#if defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
  // 32 elements a register; two tiles are interleaved to pairs, so that a bf16 dot product takes two channels (keys) or two tokens (values).
  struct Two { __m512i low, high; };
  static Two tile_of(uint64_t map, const uint8_t*& from) {
    const __mmask32 a = static_cast<__mmask32>(map), b = static_cast<__mmask32>(map >> 32);
    const uint8_t* second = from + 2 * __builtin_popcount(a);
    const Two out{_mm512_maskz_expand_epi16(a, _mm512_loadu_si512(from)), _mm512_maskz_expand_epi16(b, _mm512_loadu_si512(second))};
    from += 2 * __builtin_popcountll(map);
    return out;
  }
  static void pair_up(const Two& a, const Two& b, __m512i* x) {
    x[0] = _mm512_unpacklo_epi16(a.low, b.low), x[1] = _mm512_unpackhi_epi16(a.low, b.low);
    x[2] = _mm512_unpacklo_epi16(a.high, b.high), x[3] = _mm512_unpackhi_epi16(a.high, b.high);
  }
  static __m512 product(__m512 acc, __m512i x, __m512i y) { return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)); }
  // Undoes the order that unpacking within 128-bit lanes left.
  static void ordered(const __m512* acc, __m512* out) {
    const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i second = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int h = 0; h < 2; ++h) {
      out[2 * h] = _mm512_permutex2var_ps(acc[2 * h], first, acc[2 * h + 1]);
      out[2 * h + 1] = _mm512_permutex2var_ps(acc[2 * h], second, acc[2 * h + 1]);
    }
  }
  template <int N> void fast_scores(const uint64_t* maps, const uint8_t* from, int64_t r0, float* s) const {
    __m512 acc[N][4];
    for (auto& row : acc) for (auto& a : row) a = _mm512_setzero_ps();
    const int32_t* qp = pairs.data() + r0 * (c.dim / 2);
    for (int64_t i = 0; i < c.dim; i += 2) {
      __m512i x[4];
      const Two a = tile_of(maps[i], from), b = tile_of(maps[i + 1], from);
      pair_up(a, b, x);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const __m512i two = _mm512_set1_epi32(qp[r * (c.dim / 2) + i / 2]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[r][j] = product(acc[r][j], x[j], two);
      }
    }
    for (int r = 0; r < N; ++r) {
      __m512 out[4];
      ordered(acc[r], out);
      for (int j = 0; j < 4; ++j) _mm512_storeu_ps(s + (r0 + r) * c.page + 16 * j, out[j]);
    }
  }
  template <int N> void fast_values(const uint64_t* maps, const uint8_t* base, int64_t w, int64_t r0, const float* p, float* out) const {
    __m512 acc[N][4];
    for (auto& row : acc) for (auto& a : row) a = _mm512_setzero_ps();
    alignas(64) int32_t pp[N][32];
    for (int r = 0; r < N; ++r)
      for (int i = 0; i < 32; ++i) {  // probabilities are bf16 already: their low halves are zero
        uint32_t a, b;
        std::memcpy(&a, p + (r0 + r) * c.page + 2 * i, 4), std::memcpy(&b, p + (r0 + r) * c.page + 2 * i + 1, 4);
        pp[r][i] = static_cast<int32_t>(a >> 16 | (b & 0xFFFF0000u));
      }
    auto start = [&](int64_t t) {
      const uint8_t* from = base + t * at.keep * 2;
      for (int64_t v = 0; v < w; ++v) from += 2 * __builtin_popcountll(maps[t * tiles + v]);
      return from;
    };
    for (int64_t t = 0; t < 64; t += 2) {
      const uint8_t *fa = start(t), *fb = start(t + 1);
      __m512i x[4];
      const Two a = tile_of(maps[t * tiles + w], fa), b = tile_of(maps[(t + 1) * tiles + w], fb);
      pair_up(a, b, x);
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const __m512i two = _mm512_set1_epi32(pp[r][t / 2]);
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) acc[r][j] = product(acc[r][j], x[j], two);
      }
    }
    for (int r = 0; r < N; ++r) {
      __m512 o[4];
      ordered(acc[r], o);
      for (int j = 0; j < 4; ++j) {
        float* to = out + (r0 + r) * width + 64 * w + 16 * j;
        _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), o[j]));
      }
    }
  }
#endif
};

Tensor kv_attend_bitmap(const Tensor q, const Tensor pages, const Tensor ring, const Tensor lens, std::optional<Tensor> mask, double scale, int64_t page, int64_t keep, int64_t bits,
                        int64_t kval, int64_t kmap, int64_t vval, int64_t vmap, int64_t kscale, int64_t vscale, std::optional<Tensor> row, std::optional<Tensor> cos, std::optional<Tensor> sin, bool half) {
  const kv::State c = kv::state_of(pages, ring, lens, page, ring.size(2));
  STD_TORCH_CHECK(q.scalar_type() == ring.scalar_type() && page % 64 == 0 && keep > 0 && keep <= c.dim && (bits == 4 || bits == 8 || bits == 16), "effllm: not a bitmap page");
  const Places at{keep, bits, kval, kmap, vval, vmap, kscale, vscale};
  const Shift shift = shift_of(row, cos, sin, half, c.dim, c.keys());
  if (c.type == Type::f32) return kv::attend(q, c, mask, scale, Bitmap<Type::f32>(c, at), shift);
  if (c.type == Type::bf16) return kv::attend(q, c, mask, scale, Bitmap<Type::bf16>(c, at), shift);
  return kv::attend(q, c, mask, scale, Bitmap<Type::f16>(c, at), shift);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("kv_attend_bitmap(Tensor q, Tensor pages, Tensor ring, Tensor lens, Tensor? mask, float scale, int page, int keep, int bits, int kval, int kmap, int vval, int vmap, int kscale, int vscale, Tensor? row, Tensor? cos, Tensor? sin, bool half) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "kv_attend_bitmap", TORCH_BOX(&kv_attend_bitmap)); }
