// y = x baseᵀ + factor x dᵀ, one base weight and a delta for every task made of shared numbers and the task's own bits, on a CPU.
//
// A pass over the base and the shared numbers serves all rows of x, whatever their tasks: two output rows are in work, and for each row
// of x one sum of the base and one of the delta, which the task's factor is multiplied with at the end. Bits become masks of lanes.
// With bf16 x and AVX-512 BF16 pairs of bf16 are multiplied: shared numbers as they are, or a code less its zero, exactly, and
// a group's scale is multiplied with the group's sum. Elsewhere shared numbers are decoded to fp32.
#include "../native/dots.h"
#include "../native/jobs.h"

namespace CC_NAME(cc) {
namespace {

enum { PLAIN = 0, BYTES = 1, NIBBLES = 2, CONSTANT = 3 };
constexpr int ROWS = 2;  // of W

inline int64_t row_bytes(const SharedVector& s, int64_t K) {
  return s.kind == PLAIN ? 2 * K : s.kind == BYTES ? (K + 3) / 4 * 4 : s.kind == NIBBLES ? (K + 7) / 8 * 4 : 0;
}

inline float scale_of(const SharedVector& s, int64_t K, int64_t row, int64_t k) {
  return from_bits(uint32_t(s.scale[row * ((K + s.group - 1) / s.group) + k / s.group]) << 16);
}

inline int code_of(const SharedVector& s, const uint8_t* row, int64_t k) {
  return (s.kind == BYTES ? row[k] : row[k / 2] >> (4 * (k % 2)) & 15) - s.zero;
}

// the bits of LANES columns
inline uint32_t bits_of(const uint32_t* mask, int64_t k) { return mask[k / 32] >> (k % 32); }

struct Ordered {  // rows of x, those of a task side by side
  int64_t count;
  const int64_t* order;  // their places in x and y
};

inline void finish(const MaskedDelta& w, const Call& c, int64_t m, int64_t row, float base, float delta) {
  const int32_t task = w.task[m];
  if (w.bias) base += load_one(w.bias, row, c.type);
  store_one(c.y, m * w.N + row, c.type, task < 0 ? base : base + w.factor[task] * delta);
}

// -- numbers of any type, in fp32

// a row of shared numbers
void decode(const SharedVector& s, int64_t K, int64_t row, float* out) {
  if (s.kind == CONSTANT) {
    const float value = *static_cast<const float*>(s.values);
    for (int64_t k = 0; k < K; k++) out[k] = value;
  } else if (s.kind == PLAIN) {
    const uint16_t* from = static_cast<const uint16_t*>(s.values) + row * K;
    for (int64_t k = 0; k < K; k++) out[k] = from_bits(uint32_t(from[k]) << 16);
  } else {
    const uint8_t* from = static_cast<const uint8_t*>(s.values) + row * row_bytes(s, K);
    for (int64_t start = 0; start < K; start += s.group) {
      const float scale = scale_of(s, K, row, start);
      const int64_t end = start + s.group < K ? start + s.group : K;
      for (int64_t k = start; k < end; k++) out[k] = float(code_of(s, from, k)) * scale;
    }
  }
}

template <int type, int MR>
void floats(const MaskedDelta& w, const Call& c, const float* x, int64_t stride, const int64_t* order, int64_t row, const float* zero, const float* one) {
  typedef Floats<type> Math;
  const char* base = static_cast<const char*>(w.base) + row * w.K * Math::SIZE;
  const int64_t words = (w.K + 31) / 32;
  const uint32_t* mask[MR];
  F sum[MR], delta[MR];
  for (int m = 0; m < MR; m++) {
    const int32_t task = w.task[order[m]];
    mask[m] = w.mask[task < 0 ? 0 : task] + row * words;
    sum[m] = delta[m] = set_f(0);
  }
  for (int64_t k = 0; k < w.K; k += LANES) {
    const F b = k + LANES <= w.K ? Math::w(base + k * Math::SIZE) : Math::w_some(base + k * Math::SIZE, w.K - k);
    const F lower = load_f(zero + k), upper = load_f(one + k);
    for (int m = 0; m < MR; m++) {
      const F v = load_f(x + order[m] * stride + k);
      sum[m] = fma(b, v, sum[m]);
      delta[m] = fma(choose(bits_of(mask[m], k), lower, upper), v, delta[m]);
    }
  }
  for (int m = 0; m < MR; m++) {
    float both[4];
    sums4(sum[m], delta[m], sum[m], delta[m], both);
    finish(w, c, order[m], row, both[0], both[1]);
  }
}

template <int type> void product_in_floats(const MaskedDelta& w, const Call& c, const Ordered& rows, float* space) {
  const int64_t stride = (w.K + 31) / 32 * 32, count = c.M;
  float* x = space;
  float* scratch = space + count * stride;  // [threads][2][stride]
#pragma omp parallel for num_threads(c.threads) schedule(static) if (count > 8)
  for (int64_t m = 0; m < count; m++)
    for (int64_t k = 0; k < stride; k++) x[m * stride + k] = k < w.K ? load_one(c.x, m * c.stride + k, c.type) : 0.0f;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t part = 0; part < c.threads; part++) {
    float *one = scratch + part * 2 * stride, *zero = one + stride;
    __builtin_memset(one, 0, 8 * stride);
    for (int64_t row = w.N * part / c.threads; row < w.N * (part + 1) / c.threads; row++) {
      if (w.one.kind != CONSTANT || row == w.N * part / c.threads) decode(w.one, w.K, row, one);
      if (w.has_low) decode(w.low, w.K, row, zero);
      else if (w.signs) for (int64_t k = 0; k < w.K; k++) zero[k] = -one[k];
      blocks<6>(rows.count, [&](auto size, int64_t m) {
        constexpr int MR = decltype(size)::value;
        floats<type, MR>(w, c, x, stride, rows.order + m, row, zero, one);
      });
    }
  }
}

#if CC_ISA == 3

// -- pairs of bf16

// What a code of 4 bits is less a zero of 8, and less none, in bf16
struct Tables {
  alignas(64) uint16_t at[2][32];
  constexpr Tables() : at() {
    constexpr uint16_t SIZE[16] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                   0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    for (int q = 0; q < 32; q++) at[0][q] = SIZE[q % 16], at[1][q] = q % 16 >= 8 ? SIZE[q % 16 - 8] : uint16_t(0x8000 | SIZE[8 - q % 16]);
  }
};
constexpr Tables TABLES;

// 32 codes less their zero
inline I coded(const SharedVector& s, const uint8_t* p) {
  if (s.kind == NIBBLES) {
    const __m128i packed = _mm_loadu_si128((const __m128i*)p), low = _mm_set1_epi8(15);
    const __m128i even = _mm_and_si128(packed, low), odd = _mm_and_si128(_mm_srli_epi16(packed, 4), low);
    const __m256i bytes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(bytes), load_i(TABLES.at[s.zero == 8]));
  }
  const I zero = set_i(s.zero);
  const F a = to_f(_mm512_sub_epi32(widen_u8(p), zero)), b = to_f(_mm512_sub_epi32(widen_u8(p + 16), zero));
  return (I)_mm512_cvtne2ps_pbh(b, a);
}

// a row of shared numbers without their scales, for `stride` columns
void decode_words(const SharedVector& s, int64_t K, int64_t row, int64_t stride, uint16_t* out) {
  const uint8_t* from = static_cast<const uint8_t*>(s.values) + row * row_bytes(s, K);
  const int64_t step = s.kind == NIBBLES ? 16 : 32, ahead = ROWS * row_bytes(s, K);
  int64_t k = 0;
  for (; k + 32 <= K; k += 32) {
    __builtin_prefetch(from + k / 32 * step + ahead);
    _mm512_storeu_si512(out + k, coded(s, from + k / 32 * step));
  }
  for (; k < stride; k++) out[k] = k < K ? float_to_bfloat(float(code_of(s, from, k))) : 0;
}

// Sums of MR rows of x and two rows of W
template <int MR> struct Sums {
  F at[MR][ROWS];
  inline Sums() {
    for (int m = 0; m < MR; m++)
      for (int r = 0; r < ROWS; r++) at[m][r] = set_f(0);
  }
};

struct Place {  // what a pair of rows of W is multiplied from
  const uint16_t* base[ROWS];    // of K columns
  const uint16_t* shared[ROWS];  // of K columns
  int64_t ahead;                 // bytes from here to the next pair
  uint32_t flip, signs;          // all ones where a number is for the bits 0, and where bits of 0 stand for -number
};

struct Inputs {  // MR rows of x
  const uint16_t* x[4];
  const uint32_t* mask[4][ROWS];
};

template <int MR, bool same, bool with_base, bool whole>
CC_INLINE void step(const Place& p, const Inputs& in, int64_t k, uint32_t inside, Sums<MR>& sum, Sums<MR>& delta) {
  I base[ROWS], one[ROWS], zero[ROWS], d[ROWS];
  const I sign = set_i(int32_t(p.signs & 0x80008000u)), kept = set_i(int32_t(p.signs));
  for (int r = 0; r < ROWS; r++) {
    one[r] = whole ? load_i(p.shared[r] + k) : _mm512_maskz_loadu_epi16(inside, p.shared[r] + k);
    zero[r] = and_i(_mm512_xor_si512(one[r], sign), kept);
    if (with_base) base[r] = whole ? load_i(p.base[r] + k) : _mm512_maskz_loadu_epi16(inside, p.base[r] + k);
    if (whole && with_base) {
      __builtin_prefetch(reinterpret_cast<const char*>(p.base[r] + k) + p.ahead);
      __builtin_prefetch(reinterpret_cast<const char*>(p.shared[r] + k) + p.ahead);
    }
  }
  for (int m = 0; m < MR; m++) {
    const I v = load_i(in.x[m] + k);
    for (int r = 0; r < ROWS; r++) {
      if (!same || m == 0) d[r] = _mm512_mask_mov_epi16(zero[r], in.mask[m][r][k / 32] ^ p.flip, one[r]);
      if (with_base) sum.at[m][r] = _mm512_dpbf16_ps(sum.at[m][r], (__m512bh)base[r], (__m512bh)v);
      delta.at[m][r] = _mm512_dpbf16_ps(delta.at[m][r], (__m512bh)d[r], (__m512bh)v);
    }
  }
}

// Adds all columns: the base's to sum, and to delta the shared numbers' with the scales of rows first and second
template <int MR, bool same, bool with_base>
CC_INLINE void columns(const MaskedDelta& w, const SharedVector& s, const Place& p, const Inputs& in, const int64_t* rows, Sums<MR>& sum, Sums<MR>& delta) {
  const bool scaled = s.kind == BYTES || s.kind == NIBBLES;
  const int64_t group = scaled ? s.group : w.K;
  for (int64_t start = 0; start < w.K; start += group) {
    const int64_t end = start + group < w.K ? start + group : w.K;
    Sums<MR> part;
    int64_t k = start;
    for (; k + 32 <= end; k += 32) step<MR, same, with_base, true>(p, in, k, 0, sum, part);
    if (k < end) step<MR, same, with_base, false>(p, in, k, (1u << (end - k)) - 1, sum, part);
    const float value = s.kind == CONSTANT ? *static_cast<const float*>(s.values) : 1.0f;
    for (int r = 0; r < ROWS; r++) {
      const F scale = set_f(scaled ? scale_of(s, w.K, rows[r], start) : value);
      for (int m = 0; m < MR; m++) delta.at[m][r] = fma(part.at[m][r], scale, delta.at[m][r]);
    }
  }
}

template <int MR, bool same>
void pair(const MaskedDelta& w, const Call& c, const Place& one, const Place& low, const Inputs& in, const int64_t* order, const int64_t* rows) {
  Sums<MR> sum, delta;
  columns<MR, same, true>(w, w.one, one, in, rows, sum, delta);
  if (w.has_low) columns<MR, same, false>(w, w.low, low, in, rows, sum, delta);
  for (int m = 0; m < MR; m++) {
    float both[4];
    sums4(sum.at[m][0], sum.at[m][1], delta.at[m][0], delta.at[m][1], both);
    finish(w, c, order[m], rows[0], both[0], both[2]);
    if (rows[1] != rows[0]) finish(w, c, order[m], rows[1], both[1], both[3]);
  }
}

void rows_of_x(const MaskedDelta& w, const Call& c, const Ordered& all, const uint16_t* x, int64_t stride, const Place& one, const Place& low, const int64_t* rows) {
  const int64_t words = (w.K + 31) / 32;
  blocks<4>(all.count, [&](auto size, int64_t first) {
    constexpr int MR = decltype(size)::value;
    const int64_t* order = all.order + first;
    Inputs in;
    for (int m = 0; m < MR; m++) {
      const int32_t task = w.task[order[m]];
      in.x[m] = x + order[m] * stride;
      for (int r = 0; r < ROWS; r++) in.mask[m][r] = w.mask[task < 0 ? 0 : task] + rows[r] * words;
    }
    if (w.task[order[0]] == w.task[order[MR - 1]]) pair<MR, true>(w, c, one, low, in, order, rows);
    else pair<MR, false>(w, c, one, low, in, order, rows);
  });
}

// The rows' shared numbers: where they lie, or decoded to `space`
void open(const SharedVector& s, int64_t K, const int64_t* rows, int64_t stride, uint16_t* space, Place& p) {
  for (int r = 0; r < ROWS; r++) {
    p.shared[r] = space + r * stride;
    if (s.kind == PLAIN) p.shared[r] = static_cast<const uint16_t*>(s.values) + rows[r] * K;
    else if (s.kind != CONSTANT) decode_words(s, K, rows[r], stride, space + r * stride);
  }
}

void product_in_words(const MaskedDelta& w, const Call& c, const Ordered& all, char* space) {
  const int64_t stride = (w.K + 31) / 32 * 32 + 32, count = c.M;  // not a whole number of pages: rows would fall on each other in the cache
  uint16_t* x = reinterpret_cast<uint16_t*>(space);
  uint16_t* scratch = x + count * stride;  // [threads][one, low][ROWS][stride]
  for (int64_t m = 0; m < count; m++) {
    __builtin_memcpy(x + m * stride, static_cast<const uint16_t*>(c.x) + m * c.stride, 2 * w.K);
    __builtin_memset(x + m * stride + w.K, 0, 2 * (stride - w.K));
  }
  const int64_t pairs = (w.N + ROWS - 1) / ROWS;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t part = 0; part < c.threads; part++) {
    uint16_t* own = scratch + part * 2 * ROWS * stride;
    for (int64_t i = 0; i < 2 * ROWS * stride; i++) own[i] = 0x3f80;  // what a constant is multiplied with
    for (int64_t i = pairs * part / c.threads; i < pairs * (part + 1) / c.threads; i++) {
      const int64_t rows[ROWS] = {ROWS * i, ROWS * i + 1 < w.N ? ROWS * i + 1 : ROWS * i};
      Place one, low;
      for (int r = 0; r < ROWS; r++) one.base[r] = low.base[r] = static_cast<const uint16_t*>(w.base) + rows[r] * w.K;
      one.ahead = low.ahead = 2 * ROWS * w.K;
      one.flip = low.signs = 0, low.flip = ~0u, one.signs = w.signs && !w.has_low ? ~0u : 0;
      open(w.one, w.K, rows, stride, own, one);
      if (w.has_low) open(w.low, w.K, rows, stride, own + ROWS * stride, low);
      rows_of_x(w, c, all, x, stride, one, low, rows);
    }
  }
}

inline bool whole_steps(const SharedVector& s, int64_t K) { return s.kind == PLAIN || s.kind == CONSTANT || s.group % 32 == 0 || s.group >= K; }

#endif

int unfit(const SharedVector& s) {
  if (s.kind < PLAIN || s.kind > CONSTANT) return CC_BAD_TYPE;
  return (s.kind == BYTES || s.kind == NIBBLES) && (s.group < 1 || (s.zero != 0 && s.zero != (s.kind == BYTES ? 128 : 8))) ? CC_BAD_SHAPE : CC_OK;
}

}  // namespace
}  // namespace

extern "C" int CC_NAME(cc_masked_delta)(const MaskedDelta* weight, const Call* call) {
  using namespace CC_NAME(cc);
  const MaskedDelta& w = *weight;
  const Call& c = *call;
  if (c.type < F32 || c.type > F16) return CC_BAD_TYPE;
  if (w.N < 1 || w.K < 1 || w.tasks < 1 || c.M < 0 || c.threads < 1 || (c.M > 1 && c.stride < w.K)) return CC_BAD_SHAPE;
  const int wrong = unfit(w.one) ? unfit(w.one) : w.has_low ? unfit(w.low) : CC_OK;
  if (wrong) return wrong;
  const int64_t stride = (w.K + 31) / 32 * 32;
  if (c.workspace_bytes < 8 * c.M + 4 * (c.M + 2 * c.threads) * (stride + 32)) return CC_SMALL_WORKSPACE;
  for (int64_t m = 0; m < c.M; m++)
    if (w.task[m] < -1 || w.task[m] >= w.tasks) return CC_BAD_SHAPE;
  int64_t* order = static_cast<int64_t*>(c.workspace);
  int64_t next = 0;
  for (int64_t task = -1; task < w.tasks; task++)
    for (int64_t m = 0; m < c.M; m++)
      if (w.task[m] == task) order[next++] = m;
  const Ordered rows = {c.M, order};
  char* space = static_cast<char*>(c.workspace) + 8 * c.M;
#if CC_ISA == 3
  if (c.type == BF16 && whole_steps(w.one, w.K) && (!w.has_low || whole_steps(w.low, w.K))) {
    product_in_words(w, c, rows, space);
    return CC_OK;
  }
#endif
  float* floats = reinterpret_cast<float*>(space);
  if (c.type == BF16) product_in_floats<BF16>(w, c, rows, floats);
  else if (c.type == F16) product_in_floats<F16>(w, c, rows, floats);
  else product_in_floats<F32>(w, c, rows, floats);
  return CC_OK;
}
