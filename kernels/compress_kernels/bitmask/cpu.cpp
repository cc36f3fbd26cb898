// y = x Wᵀ for weights of which a mask of single bits names the kept ones: kinds bitmask, sparse24 and sparse24_int, on a CPU.
//
// A row is read in steps of LANES columns: its next kept values are loaded, moved to the columns that the mask names, and
// multiplied with x, in fp32. Two output rows are in work at once, as each waits for the count of its own ones. Where the machine has
// AVX-512's VBMI2 and BF16 and x is bf16, steps are 32 columns: words are moved, and pairs of bf16 multiplied, exactly, into fp32 sums.
// From FEW rows of x on, pieces of four rows of W are expanded once, into the nearest cache, for all of them.
#include "../native/dots.h"
#include "../native/jobs.h"
#include "words.h"

namespace CC_NAME(cc) {
namespace {

inline uint32_t bits_at(const uint8_t* mask, int64_t k) {
  uint16_t two;
  __builtin_memcpy(&two, mask + k / 8, LANES == 16 ? 2 : 1);
  return LANES == 16 ? two : uint32_t(two & 255);
}

// LANES/2 codes of 4 bits, in the first lanes
inline I nibbles(const uint8_t* p) {
#if CC_ISA >= 2
  int32_t word;
  __builtin_memcpy(&word, p, 4);
  const I shifts = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 0, 0, 0, 0, 0, 0, 0);
  return and_i(_mm512_srlv_epi32(set_i(word), shifts), set_i(15));
#elif CC_ISA == 1
  uint16_t word;
  __builtin_memcpy(&word, p, 2);
  return and_i(_mm256_srlv_epi32(set_i(word), _mm256_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0)), set_i(15));
#else
  I a = set_i(0);
  for (int i = 0; i < LANES / 2; i++) a.v[i] = p[i / 2] >> (4 * (i % 2)) & 15;
  return a;
#endif
}

template <int type, int MR> struct Floats {  // one row of W times MR rows of x
  const char* value;
  const uint8_t* mask;
  F acc[MR];
  inline Floats(const Masked& w, int64_t row)
      : value(static_cast<const char*>(w.values) + w.start[row] * (type == F32 ? 4 : 2)), mask(w.mask + row * mask_bytes(w)) {
    for (int m = 0; m < MR; m++) acc[m] = set_f(0);
  }
  inline void step(int64_t k, const float* x, int64_t stride) {
    const uint32_t ones = bits_at(mask, k);
    const F f = expand(load_16<type>(value), ones);
    value += __builtin_popcount(ones) * (type == F32 ? 4 : 2);
    for (int m = 0; m < MR; m++) acc[m] = fma(f, load_f(x + m * stride + k), acc[m]);
  }
};

template <int type, int MR> void row_pair(const Masked& w, const Call& c, const float* x, int64_t stride, int64_t m0, int64_t row) {
  Floats<type, MR> a(w, row), b(w, row + 1 < w.N ? row + 1 : row);
  const int64_t ahead = (w.start[row + 1 < w.N ? row + 2 : row + 1] - w.start[row]) * (type == F32 ? 4 : 2);
  for (int64_t k = 0; k < w.K; k += LANES) {
    __builtin_prefetch(a.value + ahead), __builtin_prefetch(b.value + ahead);
    a.step(k, x, stride), b.step(k, x, stride);
  }
  for (int m = 0; m < MR; m++) {
    store_one(c.y, (m0 + m) * w.N + row, c.type, sum(a.acc[m]));
    if (row + 1 < w.N) store_one(c.y, (m0 + m) * w.N + row + 1, c.type, sum(b.acc[m]));
  }
}

template <int MR> void row_codes(const Masked& w, const Call& c, const float* x, int64_t stride, int64_t m0, int64_t row) {
  const uint8_t *mask = w.mask + row * mask_bytes(w), *code = static_cast<const uint8_t*>(w.values) + row * (w.K / 4);
  F acc[MR];
  for (int m = 0; m < MR; m++) acc[m] = set_f(0);
  const int64_t groups = w.K / w.group;
  for (int64_t g = 0; g < groups; g++) {
    const F zero = set_f(w.zero ? float(w.zero[row * groups + g]) : 8.0f);
    const F scale = set_f(load_one(w.scale, row * groups + g, w.value_type));
    F part[MR];
    for (int m = 0; m < MR; m++) part[m] = set_f(0);
    for (int64_t k = g * w.group; k < (g + 1) * w.group; k += LANES, code += LANES / 4) {
      const F f = expand(sub(to_f(nibbles(code)), zero), bits_at(mask, k));
      for (int m = 0; m < MR; m++) part[m] = fma(f, load_f(x + m * stride + k), part[m]);
    }
    for (int m = 0; m < MR; m++) acc[m] = fma(part[m], scale, acc[m]);
  }
  for (int m = 0; m < MR; m++) store_one(c.y, (m0 + m) * w.N + row, c.type, sum(acc[m]));
}

template <int MR> inline void rows(const Masked& w, const Call& c, const float* x, int64_t stride, int64_t m0, int64_t row) {
  const float* here = x + m0 * stride;
  if (w.group) {
    row_codes<MR>(w, c, here, stride, m0, row);
    if (row + 1 < w.N) row_codes<MR>(w, c, here, stride, m0, row + 1);
  } else if (w.value_type == BF16) row_pair<BF16, MR>(w, c, here, stride, m0, row);
  else if (w.value_type == F16) row_pair<F16, MR>(w, c, here, stride, m0, row);
  else row_pair<F32, MR>(w, c, here, stride, m0, row);
}

// columns k.. of a row, LANES at a time, as `out` of `type` has them
template <int from> void decode_floats(const Masked& w, int64_t row, int type, char* out) {
  const int size = type == F32 ? 4 : 2;
  const char* value = static_cast<const char*>(w.values) + w.start[row] * (from == F32 ? 4 : 2);
  const uint8_t* mask = w.mask + row * mask_bytes(w);
  alignas(64) char last[64];
  for (int64_t k = 0; k < w.K; k += LANES) {
    const uint32_t ones = bits_at(mask, k);
    const bool whole = k + LANES <= w.K;
    store_16(whole ? out + k * size : last, expand(load_16<from>(value), ones), type);
    if (!whole) __builtin_memcpy(out + k * size, last, (w.K - k) * size);
    value += __builtin_popcount(ones) * (from == F32 ? 4 : 2);
  }
}

void decode_codes(const Masked& w, int64_t row, int type, char* out) {
  const uint8_t *mask = w.mask + row * mask_bytes(w), *code = static_cast<const uint8_t*>(w.values) + row * (w.K / 4);
  const int64_t groups = w.K / w.group;
  for (int64_t g = 0; g < groups; g++) {
    const F zero = set_f(w.zero ? float(w.zero[row * groups + g]) : 8.0f);
    const F scale = set_f(load_one(w.scale, row * groups + g, w.value_type));
    for (int64_t k = g * w.group; k < (g + 1) * w.group; k += LANES, code += LANES / 4)
      store_16(out + k * (type == F32 ? 4 : 2), expand(mul(sub(to_f(nibbles(code)), zero), scale), bits_at(mask, k)), type);
  }
}

}  // namespace
}  // namespace

static int unfit(const Masked& w) {
  if (w.value_type < F32 || w.value_type > F16) return CC_BAD_TYPE;
  if (w.N < 1 || w.K < 1 || w.group < 0) return CC_BAD_SHAPE;
  return w.group && (w.K % w.group || w.group % 16) ? CC_BAD_SHAPE : CC_OK;
}

// rows first .. first+count of W, dense, [count][K] of `type`
extern "C" int CC_NAME(cc_masked_rows)(const Masked* weight, int64_t first, int64_t count, int type, void* out, int threads) {
  using namespace CC_NAME(cc);
  const Masked& w = *weight;
  const int wrong = unfit(w);
  if (wrong) return wrong;
  if (type < F32 || type > F16) return CC_BAD_TYPE;
  if (first < 0 || count < 0 || first + count > w.N || threads < 1) return CC_BAD_SHAPE;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++) {
    char* here = static_cast<char*>(out) + i * w.K * (type == F32 ? 4 : 2);
#if CC_ISA == 3
    if (type == BF16 && (w.group ? w.group % 32 == 0 : w.value_type == BF16)) {
      decode_words(w, first + i, reinterpret_cast<uint16_t*>(here));
      continue;
    }
#endif
    if (w.group) decode_codes(w, first + i, type, here);
    else if (w.value_type == BF16) decode_floats<BF16>(w, first + i, type, here);
    else if (w.value_type == F16) decode_floats<F16>(w, first + i, type, here);
    else decode_floats<F32>(w, first + i, type, here);
  }
  return CC_OK;
}

extern "C" int CC_NAME(cc_masked)(const Masked* weight, const Call* call) {
  using namespace CC_NAME(cc);
  const Masked& w = *weight;
  const Call& c = *call;
  const int wrong = unfit(w);
  if (wrong) return wrong;
  if (c.type < F32 || c.type > F16) return CC_BAD_TYPE;
  if (c.M < 0 || c.threads < 1 || (c.M > 1 && c.stride < w.K)) return CC_BAD_SHAPE;
  const int64_t stride = (w.K + 15) / 16 * 16;
#if CC_ISA == 3
  if (in_words(w, c)) {
    if (c.workspace_bytes < (c.M < MANY ? 4 * c.M * stride : panel_bytes(c.M, w.K))) return CC_SMALL_WORKSPACE;
    product_in_words(w, c);
    return CC_OK;
  }
#endif
  if (c.workspace_bytes < 4 * c.M * stride) return CC_SMALL_WORKSPACE;
  float* x = static_cast<float*>(c.workspace);
  const int64_t count = c.M, pairs = (w.N + 1) / 2;
  each(count > 8 ? c.threads : 1, count, [&](int64_t m) {
    for (int64_t k = 0; k < stride; k++) x[m * stride + k] = k < w.K ? load_one(c.x, m * c.stride + k, c.type) : 0.0f;
  });
  each(c.threads, pairs, [&](int64_t pair) {
    int64_t m = 0;
    for (; m + 8 <= count; m += 8) rows<8>(w, c, x, stride, m, 2 * pair);
    if (m + 4 <= count) rows<4>(w, c, x, stride, m, 2 * pair), m += 4;
    if (m + 2 <= count) rows<2>(w, c, x, stride, m, 2 * pair), m += 2;
    if (m < count) rows<1>(w, c, x, stride, m, 2 * pair);
  });
  return CC_OK;
}
