// Attention of prompts: o = softmax(scale * q k^T + mask) v for many queries. The arithmetic is in flash.h.
//
// Layout    q (B, H, Q, D), k (B, Hk, S, D), v (B, Hk, S, Dv) with any strides but a dense last dimension; H = Hk * R (grouped-query attention).
//           Result (B, Q, H, Dv), the order in which the output projection reads it.
// Mask      none, causal (query i sees keys up to i), or (1 or B, 1 or H, 1 or Q, S) of bool (true: attend) or float (added). Which keys a tile
//           shows is read off the mask, so causal masks, windows, padding and a cache's unused tail cost nothing but that look.
// Tasks     a sequence, a key head, and a block of at most kRows rows: a query and one of the R query heads. The last queries go first: with
//           a causal mask they see most.
// Flops     4 * H * D for every query and key of a tile that is not hidden.  Bytes  per block, its keys and values once.
#include "flash.h"
#include "offer.h"
#include "phases.h"

namespace {

using namespace effllm;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

struct Call {
  View q, k, v;
  Mask mask;
  char* out;
  int64_t heads, kv, queries, keys, d, dv;
  bool causal;
  float scale;
};

// What a mask shows of the rows of a block: queries q0 .. of all heads of key head hk.
struct Shown {
  const Call& c;
  int64_t b, h0, q0, count, repeat;
  int64_t begin() const { return 0; }
  int64_t end() const { return c.causal ? std::min(c.keys, q0 + count) : c.keys; }
  const char* line(int64_t q, int64_t h, int64_t s) const {
    return static_cast<const char*>(c.mask.data) + (b * c.mask.s0 + h * c.mask.s1 + q * c.mask.s2 + s * c.mask.s3) * (c.mask.boolean ? 1 : size_of(c.mask.type));
  }
  flash::Seen tile(int64_t s, int64_t n, char* seen) const {
    if (c.causal) {
      std::fill(seen, seen + n, char{1});
      return s + n <= q0 + 1 ? flash::Seen::all : flash::Seen::some;
    }
    if (!c.mask.data) return flash::Seen::all;
    std::fill(seen, seen + n, char{0});
    bool all = c.mask.boolean;  // what a float mask adds has to be added
    const int64_t lines = c.mask.s2 ? count : 1, heads = c.mask.s1 ? repeat : 1;
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t q = 0; q < lines; ++q) {
        const char* m = line(q0 + q, h0 + h, s);
        char every = 1;
        if (c.mask.boolean && c.mask.s3 == 1)
#pragma omp simd reduction(& : every)
          for (int64_t j = 0; j < n; ++j) seen[j] |= m[j], every &= m[j];
        else if (c.mask.boolean)
          for (int64_t j = 0; j < n; ++j) seen[j] |= m[j * c.mask.s3], every &= m[j * c.mask.s3];
        else
          for (int64_t j = 0; j < n; ++j) seen[j] |= load_as_float(m, j * c.mask.s3, c.mask.type) != -INFINITY;
        all &= every != 0;
      }
    if (all) return flash::Seen::all;
    char any = 0;
    for (int64_t j = 0; j < n; ++j) any |= seen[j];
    return any ? flash::Seen::some : flash::Seen::none;
  }
  void mask(int64_t r, int64_t s, int64_t n, float* p) const {
    const int64_t q = q0 + r / repeat;
    if (c.causal) {
      std::fill(p + std::clamp<int64_t>(q + 1 - s, 0, n), p + n, -INFINITY);
      return;
    }
    const char* m = line(q, h0 + r % repeat, s);
    if (c.mask.boolean && c.mask.s3 == 1)
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) p[j] = m[j] ? p[j] : -INFINITY;
    else if (c.mask.boolean)
      for (int64_t j = 0; j < n; ++j) p[j] = m[j * c.mask.s3] ? p[j] : -INFINITY;
    else
      for (int64_t j = 0; j < n; ++j) {
        const float add = load_as_float(m, j * c.mask.s3, c.mask.type);
        p[j] = add == -INFINITY ? add : p[j] + add;  // whatever a key holds that nobody attends to
      }
  }
};

template <Type T> void attend_block(const Call& c, int64_t b, int64_t hk, int64_t q0, int64_t count) {
  constexpr int64_t size = T == Type::f32 ? 4 : 2;
  const int64_t repeat = c.heads / c.kv;
  thread_local std::vector<flash::Row> rows;
  rows.resize(static_cast<size_t>(count * repeat));
  for (int64_t r = 0; r < count * repeat; ++r) {
    const int64_t h = hk * repeat + r % repeat, q = q0 + r / repeat;
    rows[static_cast<size_t>(r)] = {static_cast<const char*>(c.q.data) + c.q.at(b, h, q) * size, c.out + ((b * c.queries + q) * c.heads + h) * c.dv * size};
  }
  const flash::Keys keys{static_cast<const char*>(c.k.data) + c.k.at(b, hk, 0) * size, static_cast<const char*>(c.v.data) + c.v.at(b, hk, 0) * size, c.k.s2 * size, c.v.s2 * size, c.d, c.dv};
  Shown see{c, b, hk * repeat, q0, count, repeat};
  flash::attend<T>(rows.data(), count * repeat, keys, {c.scale, 0.f}, see);
}

Tensor prompt_attention(const Tensor q_in, const Tensor k_in, const Tensor v_in, std::optional<Tensor> mask, bool causal, double scale) {
  auto dense_last = [](const Tensor& t) { return t.stride(t.dim() - 1) == 1 || t.size(t.dim() - 1) == 1 ? t : torch::stable::contiguous(t); };
  STD_TORCH_CHECK(q_in.dim() == 4 && k_in.dim() == 4 && v_in.dim() == 4, "effllm: attention takes 4-dimensional tensors");
  const Tensor q = dense_last(q_in), k = dense_last(k_in), v = dense_last(v_in);
  const int64_t batch = q.size(0), heads = q.size(1), queries = q.size(2), d = q.size(3), kv = k.size(1), keys = k.size(2), dv = v.size(3);
  STD_TORCH_CHECK(kv > 0 && heads % kv == 0 && k.size(3) == d && v.size(2) == keys && v.size(1) == kv && k.size(0) == batch && v.size(0) == batch, "effllm: attention shapes do not fit");
  STD_TORCH_CHECK(q.scalar_type() == k.scalar_type() && q.scalar_type() == v.scalar_type(), "effllm: q, k and v differ in dtype");
  STD_TORCH_CHECK(!(causal && mask), "effllm: a mask or causal, not both");
  Tensor out = torch::stable::new_empty(q, {batch, queries, heads, dv}, q.scalar_type());
  if (out.numel() == 0) return out;
  const Type type = type_of(q.scalar_type());
  const Call call{view_of(q), view_of(k), view_of(v), mask_of(mask, batch, heads, queries, keys), static_cast<char*>(out.mutable_data_ptr()), heads, kv, queries, keys, d, dv, causal, static_cast<float>(scale)};
  const int64_t repeat = heads / kv, each = flash::block_rows(repeat) / repeat, blocks = (queries + each - 1) / each;
  // about 16 multiply-adds a nanosecond and 3 us to wake a thread
  const int64_t threads = std::min<int64_t>(torch::stable::get_num_threads(), 1 + batch * heads * queries * keys * (d + dv) / 48000);
  const auto run = type == Type::f32 ? attend_block<Type::f32> : type == Type::bf16 ? attend_block<Type::bf16> : attend_block<Type::f16>;
  in_phases<1>({batch * kv * blocks}, threads, [&](int, int64_t i) {
    const int64_t block = blocks - 1 - i / (batch * kv), head = i % (batch * kv), q0 = block * each;
    run(call, head / kv, head % kv, q0, std::min(each, queries - q0));
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(EFFLLM_NAMESPACE, m) {
  m.def("prompt_attention(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(EFFLLM_NAMESPACE, CPU, m) { effllm::offer(m, "prompt_attention", TORCH_BOX(&prompt_attention)); }
