// The rows of x that int_grouped's products take: in int8 with scales, or as they are, in the order in which a tile's codes lie.
#pragma once
#include "jobs.h"
#include "vec.h"

namespace CC_NAME(cc) {
namespace {

constexpr int MOST = 128;  // columns of an activation's scale

inline F load_typed(const void* p, int64_t i, int type) {
  const char* at = static_cast<const char*>(p) + i * (type == F32 ? 4 : 2);
  return type == BF16 ? load_16<BF16>(at) : type == F16 ? load_16<F16>(at) : load_16<F32>(at);
}

// `count` numbers of x as fp32
inline void widen(const void* x, int64_t at, int type, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store_f(out + i, load_typed(x, at + i, type));
  for (; i < count; i++) out[i] = load_one(x, at + i, type);
}

struct Inputs {  // of all rows of x; in the workspace
  float* scale;  // [M][K/sub], exact: unused
  float* sum;    // [M][K/group]; what a zero point is multiplied with
  void* x;       // [block][K/4][rows of the block][4] int8, or bf16 in the order 0, 2, 1, 3; fp32: [M][K]
  float* turned; // [ceil(M/16)][K][16], for outliers in steps; of one row [K]
};

struct Block {  // of rows of x
  int64_t first, size;
};

inline Block block_of(int64_t M, int64_t m) {
  const int64_t whole = M / 8 * 8;
  if (m < whole) return {m / 8 * 8, 8};
  int64_t first = whole;
  for (int64_t size = 4; size > 1; size /= 2)
    if (M - first >= size) {
      if (m < first + size) return {first, size};
      first += size;
    }
  return {m, 1};
}

// `count` numbers of x to int8, whose sum is returned; the scale is NaN where they hold NaN or Inf, and so is every output then
inline int32_t quantize_block(const void* x, int64_t at, int type, int64_t count, int8_t* q, float* scale) {
  const F magic = set_f(12582912.0f);  // adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits
  F v[MOST / LANES];
  I largest = set_i(0);
  const int64_t vectors = (count + LANES - 1) / LANES;
  for (int64_t i = 0; i < vectors; i++) {
    if ((i + 1) * LANES <= count) {
      v[i] = load_typed(x, at + i * LANES, type);
    } else {
      float some[LANES] = {0};
      for (int64_t j = i * LANES; j < count; j++) some[j - i * LANES] = load_one(x, at + j, type);
      v[i] = load_f(some);
    }
    largest = max_i(largest, and_i(bits_f(v[i]), set_i(0x7fffffff)));
  }
  const int32_t size = most(largest);
  const bool finite = size < 0x7f800000;
  const float top = from_bits(uint32_t(size)), to = finite && top > 1e-30f ? 127.0f / top : 0.0f;
  I total = set_i(0);
  for (int64_t i = 0; i < vectors; i++) {
    const F scaled = finite ? mul(v[i], set_f(to)) : set_f(0);
    const I code = sub_i(bits_f(add(scaled, magic)), set_i(0x4b400000));
    store_i8(q + i * LANES, code);
    total = add_i(total, code);
  }
  *scale = finite ? top / 127.0f : from_bits(0x7fc00000);
  return sum(total);
}

// One row of x
void quantize(const IntGrouped& w, const Call& c, int64_t m, const Inputs& in) {
  const int64_t blocks = w.K / w.sub, groups = w.K / w.group, each = w.group / w.sub;
  const Block own = block_of(c.M, m);
  int8_t* out = static_cast<int8_t*>(in.x) + own.first * w.K + 4 * (m - own.first);
  alignas(64) int8_t q[MOST + LANES];
  for (int64_t g = 0, b = 0; g < groups; g++) {
    float sum = 0;
    for (int64_t i = 0; i < each; i++, b++) {
      float scale;
      const int32_t part = quantize_block(c.x, m * c.stride + b * w.sub, c.type, w.sub, q, &scale);
      for (int64_t j = 0; j < w.sub; j += 4, out += 4 * own.size) __builtin_memcpy(out, q + j, 4);
      in.scale[m * blocks + b] = scale;
      sum += scale * float(part);
    }
    in.sum[m * groups + g] = sum;
  }
}

void widen_row(const IntGrouped& w, const Call& c, int64_t m, const Inputs& in, bool words) {
  float here[MOST];
  const int64_t groups = w.K / w.group;
  const Block own = block_of(c.M, m);
  uint16_t* out = static_cast<uint16_t*>(in.x) + own.first * w.K + 4 * (m - own.first);
  for (int64_t g = 0; g < groups; g++) {
    float sum = 0;
    for (int64_t k = g * w.group; k < (g + 1) * w.group; k += w.sub) {
      float* to = words ? here : static_cast<float*>(in.x) + m * w.K + k;
      widen(c.x, m * c.stride + k, c.type, w.sub, to);
      for (int64_t i = 0; i < w.sub; i++) sum += to[i];
      for (int64_t i = 0; words && i < w.sub; i += 4, out += 4 * own.size)
        for (int j = 0; j < 4; j++) out[j] = uint16_t(to_bits(to[i + (j == 1 ? 2 : j == 2 ? 1 : j)]) >> 16);
    }
    in.sum[m * groups + g] = sum;
  }
}

void transpose(const float (*in)[16], float* out) {  // 16 x 16
#if CC_ISA >= 2
  F a[16], b[16];
  for (int i = 0; i < 8; i++) {
    const F x = load_f(in[2 * i]), y = load_f(in[2 * i + 1]);
    a[2 * i] = _mm512_unpacklo_ps(x, y), a[2 * i + 1] = _mm512_unpackhi_ps(x, y);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      const __m512d x = _mm512_castps_pd(a[i + j]), y = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
    }
  for (int i = 0; i < 4; i++) {  // b[i], b[4 + i], ... have column i of each 128 bits for four rows
    const F low = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88), high = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0x88);
    const F low2 = _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd), high2 = _mm512_shuffle_f32x4(b[8 + i], b[12 + i], 0xdd);
    store_f(out + 16 * i, _mm512_shuffle_f32x4(low, high, 0x88)), store_f(out + 16 * (8 + i), _mm512_shuffle_f32x4(low, high, 0xdd));
    store_f(out + 16 * (4 + i), _mm512_shuffle_f32x4(low2, high2, 0x88)), store_f(out + 16 * (12 + i), _mm512_shuffle_f32x4(low2, high2, 0xdd));
  }
#else
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 16; j++) out[16 * j + i] = in[i][j];
#endif
}

// 16 rows of x, columns first; rows beyond the last one are 0
void turn(const IntGrouped& w, const Call& c, int64_t block, float* out) {
  const int64_t first = block * 16, rows = c.M - first < 16 ? c.M - first : 16;
  alignas(64) float here[16][16];
  __builtin_memset(here, 0, sizeof here);
  for (int64_t k = 0; k < w.K; k += 16) {
    const int64_t count = w.K - k < 16 ? w.K - k : 16;
    for (int64_t i = 0; i < rows; i++) widen(c.x, (first + i) * c.stride + k, c.type, count, here[i]);
    if (count == 16) {
      transpose(here, out + k * 16);
      continue;
    }
    for (int64_t j = 0; j < count; j++)
      for (int64_t i = 0; i < 16; i++) out[(k + j) * 16 + i] = here[i][j];
  }
}

}  // namespace
}  // namespace
