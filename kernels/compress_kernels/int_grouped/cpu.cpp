// y = x Wᵀ for grouped integers of 2, 3, 4 and 8 bits, with or without outliers, on a CPU.
//
// A tile is 16 output rows. Its codes lie so that one 32-bit lane holds four neighbouring columns of one row as bytes, the lanes
// of a 64-byte unit being the 16 rows: one dot-product instruction then does four columns of 16 rows with four activations that
// all rows share, and sums never cross lanes. Codes below 8 bits lie on top of each other in the units of a chunk:
//
//   bits  chunk  units  columns 4i..4i+3 of the chunk are
//   8     8      2      unit i
//   4     16     2      unit i/2, shifted by 4 (i%2)
//   2     16     1      unit 0, shifted by 2 i
//   3     32     3      unit i/4, shifted by 2 (i%4), and the third bits in unit 2, shifted by i
//
// Activations are quantized to int8 per `sub` columns and row of x (symmetric, the largest is 127), or, where `exact`, kept: in fp32, or as
// the bf16 that they are where the machine multiplies pairs of these (codes become bf16 by a table, exactly).
// y = Σ_groups scale (Σ code x - zero Σ x), groups in order, whatever the number of threads or of rows of x. Rows of x are taken in blocks
// of 8, 4, 2 and 1, and a block's numbers lie interleaved: those that a lane is multiplied with, of all rows, side by side.
#include "../native/inputs.h"

namespace CC_NAME(cc) {
namespace {

constexpr int ROWS = 16, HALVES = ROWS / LANES, UNIT = 64;
constexpr int AHEAD = 8192, SOON = 256;  // bytes, of codes and of scales: the CPU itself stops looking ahead every 4 KB
constexpr int NEXT = 1024;  // outliers
constexpr int64_t TOGETHER = 32;  // tiles whose outliers are taken one after the other

template <int bits> struct Codes;

template <> struct Codes<8> {
  static constexpr int CHUNK = 8, UNITS = 2;
  static inline void bytes(const uint8_t* p, I* w) { w[0] = load_i(p), w[1] = load_i(p + UNIT); }
};

template <> struct Codes<4> {
  static constexpr int CHUNK = 16, UNITS = 2;
  static inline void bytes(const uint8_t* p, I* w) {
    const I low = set_i(0x0f0f0f0f), a = load_i(p), b = load_i(p + UNIT);
    w[0] = and_i(a, low), w[1] = and_i(right<4>(a), low), w[2] = and_i(b, low), w[3] = and_i(right<4>(b), low);
  }
};

template <> struct Codes<2> {
  static constexpr int CHUNK = 16, UNITS = 1;
  static inline void bytes(const uint8_t* p, I* w) {
    const I low = set_i(0x03030303), a = load_i(p);
    w[0] = and_i(a, low), w[1] = and_i(right<2>(a), low), w[2] = and_i(right<4>(a), low), w[3] = and_i(right<6>(a), low);
  }
};

template <> struct Codes<3> {
  static constexpr int CHUNK = 32, UNITS = 3;
  static inline void bytes(const uint8_t* p, I* w) {
    const I low = set_i(0x03030303), top = set_i(0x04040404), a = load_i(p), b = load_i(p + UNIT), c = load_i(p + 2 * UNIT);
    w[0] = or_i(and_i(a, low), and_i(left<2>(c), top));
    w[1] = or_i(and_i(right<2>(a), low), and_i(left<1>(c), top));
    w[2] = or_i(and_i(right<4>(a), low), and_i(c, top));
    w[3] = or_i(and_i(right<6>(a), low), and_i(right<1>(c), top));
    w[4] = or_i(and_i(b, low), and_i(right<2>(c), top));
    w[5] = or_i(and_i(right<2>(b), low), and_i(right<3>(c), top));
    w[6] = or_i(and_i(right<4>(b), low), and_i(right<4>(c), top));
    w[7] = or_i(and_i(right<6>(b), low), and_i(right<5>(c), top));
  }
};

inline int chunk_of(int bits) { return bits == 8 ? 8 : bits == 3 ? 32 : 16; }

inline F zero_of(const IntGrouped& w, int64_t at) { return w.zero ? to_f(widen_u8(w.zero + at)) : set_f(float(1 << (w.bits - 1))); }

template <int bits> inline void ask_codes(const uint8_t* p) {
  for (int u = 0; u < Codes<bits>::UNITS; u++) ask_near(p + AHEAD + u * UNIT);
}

inline void ask_scales(const IntGrouped& w, int64_t at) {
  ask_near(static_cast<const char*>(w.scale) + at * bytes_of(w.scale_type) + SOON);
  if (w.zero) ask_near(w.zero + at + SOON);
}

// y of MR rows of x and one tile, int8 activations; SUB, where not 0, is w.sub
template <int bits, int MR, int SUB> void tile_int8(const IntGrouped& w, const Inputs& in, int64_t tile, int64_t m0, F (*y)[HALVES]) {
  typedef Codes<bits> C;
  constexpr int QUADS = C::CHUNK / 4, SUMS = MR == 1 ? (QUADS < 4 ? QUADS : 4) : MR == 2 ? 2 : 1;
  const int64_t blocks = w.K / w.sub, groups = w.K / w.group, chunks = (SUB ? SUB : w.sub) / C::CHUNK, each = w.group / w.sub;
  const uint8_t* p = w.codes + tile * (w.K / C::CHUNK) * C::UNITS * UNIT;
  const int8_t* x = static_cast<const int8_t*>(in.x) + m0 * w.K;
  const float *x_scale = in.scale + m0 * blocks, *x_sum = in.sum + m0 * groups;
  for (int m = 0; m < MR; m++)
    for (int h = 0; h < HALVES; h++) y[m][h] = set_f(0);
  for (int64_t g = 0; g < groups; g++) {
    F part[MR][HALVES];
    for (int m = 0; m < MR; m++)
      for (int h = 0; h < HALVES; h++) part[m][h] = set_f(0);
    for (int64_t b = g * each; b < (g + 1) * each; b++) {
      I acc[MR][HALVES][SUMS];
      for (int m = 0; m < MR; m++)
        for (int h = 0; h < HALVES; h++)
          for (int s = 0; s < SUMS; s++) acc[m][h][s] = set_i(0);
#pragma GCC unroll 4
      for (int64_t chunk = 0; chunk < chunks; chunk++, p += C::UNITS * UNIT, x += C::CHUNK * MR) {
        ask_codes<bits>(p);
        for (int h = 0; h < HALVES; h++) {
          I quads[QUADS];
          C::bytes(p + h * LANES * 4, quads);
          for (int q = 0; q < QUADS; q++)
            for (int m = 0; m < MR; m++) {
              int32_t four;
              __builtin_memcpy(&four, x + 4 * (q * MR + m), 4);
              acc[m][h][q % SUMS] = dot4(acc[m][h][q % SUMS], quads[q], set_i(four));
            }
        }
      }
      for (int m = 0; m < MR; m++)
        for (int h = 0; h < HALVES; h++) {
          I all = acc[m][h][0];
          for (int s = 1; s < SUMS; s++) all = add_i(all, acc[m][h][s]);
          part[m][h] = fma(to_f(all), set_f(x_scale[m * blocks + b]), part[m][h]);
        }
    }
    const int64_t at = (tile * groups + g) * ROWS;
    ask_scales(w, at);
    for (int h = 0; h < HALVES; h++) {
      const F scale = load_typed(w.scale, at + h * LANES, w.scale_type), zero = zero_of(w, at + h * LANES);
      for (int m = 0; m < MR; m++) y[m][h] = fma(fnma(zero, set_f(x_sum[m * groups + g]), part[m][h]), scale, y[m][h]);
    }
  }
}

#if CC_ISA == 3

// Codes to pairs of bf16, by the lowest five bits of each word: their number, or, for the three above them, 32 times that
struct Numbers {
  alignas(64) uint16_t low4[32], low5[32], high3[32];
  static constexpr uint16_t of(int n) {  // of 0 .. 255, exact
    int power = 0;
    while (n >> (power + 1)) power++;
    return n ? uint16_t((127 + power) << 7 | ((n << 7 >> power) & 127)) : 0;
  }
  constexpr Numbers() : low4(), low5(), high3() {
    for (int i = 0; i < 32; i++) low4[i] = of(i % 16), low5[i] = of(i), high3[i] = of(i % 8 * 32);
  }
};
constexpr Numbers NUMBERS;

inline I pair_at(const uint16_t* x) {
  int32_t two;
  __builtin_memcpy(&two, x, 4);
  return set_i(two);
}

inline F dot2(F sum, I w, I x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }

// the same with bf16 activations as they are
template <int bits, int MR> void tile_words(const IntGrouped& w, const Inputs& in, int64_t tile, int64_t m0, F (*y)[HALVES]) {
  typedef Codes<bits> C;
  constexpr int QUADS = C::CHUNK / 4;
  const int64_t groups = w.K / w.group, chunks = w.group / C::CHUNK;
  const uint8_t* p = w.codes + tile * (w.K / C::CHUNK) * C::UNITS * UNIT;
  const uint16_t* x = static_cast<const uint16_t*>(in.x) + m0 * w.K;
  const I low = load_i(bits == 8 ? NUMBERS.low5 : NUMBERS.low4), high = load_i(NUMBERS.high3);
  for (int m = 0; m < MR; m++) y[m][0] = set_f(0);
  for (int64_t g = 0; g < groups; g++) {
    F even[MR], odd[MR];
    for (int m = 0; m < MR; m++) even[m] = odd[m] = set_f(0);
    for (int64_t chunk = 0; chunk < chunks; chunk++, p += C::UNITS * UNIT, x += C::CHUNK * MR) {
      I quads[QUADS];
      ask_codes<bits>(p);
      C::bytes(p, quads);
      for (int q = 0; q < QUADS; q++) {
        const I a = _mm512_permutexvar_epi16(quads[q], low), b = _mm512_permutexvar_epi16(right<8>(quads[q]), low);
        for (int m = 0; m < MR; m++) {
          const I first = pair_at(x + 4 * (q * MR + m)), second = pair_at(x + 4 * (q * MR + m) + 2);
          even[m] = dot2(even[m], a, first), odd[m] = dot2(odd[m], b, second);
          if (bits == 8) {
            even[m] = dot2(even[m], _mm512_permutexvar_epi16(right<5>(quads[q]), high), first);
            odd[m] = dot2(odd[m], _mm512_permutexvar_epi16(right<13>(quads[q]), high), second);
          }
        }
      }
    }
    const int64_t at = (tile * groups + g) * ROWS;
    ask_scales(w, at);
    const F scale = load_typed(w.scale, at, w.scale_type), zero = zero_of(w, at);
    for (int m = 0; m < MR; m++) {
      const F sum = set_f(in.sum[(m0 + m) * groups + g]);
      y[m][0] = fma(fnma(zero, sum, add(even[m], odd[m])), scale, y[m][0]);
    }
  }
}

#endif

// the same with fp32 activations
template <int bits, int MR> void tile_exact(const IntGrouped& w, const Inputs& in, int64_t tile, int64_t m0, F (*y)[HALVES]) {
  typedef Codes<bits> C;
  constexpr int QUADS = C::CHUNK / 4, SUMS = 2;
  const int64_t groups = w.K / w.group, chunks = w.group / C::CHUNK;
  const uint8_t* p = w.codes + tile * (w.K / C::CHUNK) * C::UNITS * UNIT;
  const float* x = static_cast<const float*>(in.x) + m0 * w.K;
  for (int m = 0; m < MR; m++)
    for (int h = 0; h < HALVES; h++) y[m][h] = set_f(0);
  for (int64_t g = 0; g < groups; g++) {
    F acc[MR][HALVES][SUMS];
    for (int m = 0; m < MR; m++)
      for (int h = 0; h < HALVES; h++)
        for (int s = 0; s < SUMS; s++) acc[m][h][s] = set_f(0);
    for (int64_t chunk = 0; chunk < chunks; chunk++, p += C::UNITS * UNIT, x += C::CHUNK) {
      ask_codes<bits>(p);
      for (int h = 0; h < HALVES; h++) {
        I quads[QUADS];
        C::bytes(p + h * LANES * 4, quads);
        for (int q = 0; q < QUADS; q++) {
          const F f[4] = {byte_to_f<0>(quads[q]), byte_to_f<1>(quads[q]), byte_to_f<2>(quads[q]), byte_to_f<3>(quads[q])};
          for (int m = 0; m < MR; m++)
            for (int i = 0; i < 4; i++) {
              F& sum = acc[m][h][i % SUMS];
              sum = fma(f[i], set_f(x[m * w.K + 4 * q + i]), sum);
            }
        }
      }
    }
    const int64_t at = (tile * groups + g) * ROWS;
    ask_scales(w, at);
    for (int h = 0; h < HALVES; h++) {
      const F scale = load_typed(w.scale, at + h * LANES, w.scale_type), zero = zero_of(w, at + h * LANES);
      for (int m = 0; m < MR; m++) {
        F f = acc[m][h][0];
        for (int s = 1; s < SUMS; s++) f = add(f, acc[m][h][s]);
        y[m][h] = fma(fnma(zero, set_f(in.sum[(m0 + m) * groups + g]), f), scale, y[m][h]);
      }
    }
  }
}

inline I columns_at(const IntGrouped& w, int64_t at) {
  return w.step_short ? widen_u16(static_cast<const uint16_t*>(w.step_index) + at) : load_i(static_cast<const int32_t*>(w.step_index) + at);
}

// The outliers' part, in steps, of the outputs of a tile and a row of x; or of 16 rows of x
template <class Column> void outliers_of_one(const IntGrouped& w, const float* x, int64_t tile, float* out) {
  const Column* column = static_cast<const Column*>(w.step_index);
  const uint8_t* codes = w.codes + tile * 2 * w.K * w.bits + AHEAD;
  F sum[HALVES];
  for (int h = 0; h < HALVES; h++) sum[h] = set_f(0);
  for (int64_t i = w.step[tile] * ROWS; i < w.step[tile + 1] * ROWS; i += ROWS) {
    ask_near(column + i + NEXT);
    ask_near(static_cast<const uint16_t*>(w.step_value) + i + NEXT);
    ask_far(codes), codes += UNIT;
    for (int h = 0; h < HALVES; h++)
      sum[h] = fma(load_typed(w.step_value, i + h * LANES, w.value_type), pick(x, column + i + h * LANES), sum[h]);
  }
  for (int h = 0; h < HALVES; h++) store_f(out + h * LANES, sum[h]);
}

void outliers_of_many(const IntGrouped& w, const float* x, int64_t tile, float* out) {
  alignas(64) float turned[ROWS][16], value[ROWS];
  alignas(64) int32_t column[ROWS];
  for (int h = 0; h < HALVES; h++) {
    F sum[ROWS];
    for (int r = 0; r < ROWS; r++) sum[r] = set_f(0);
    for (int64_t i = w.step[tile] * ROWS; i < w.step[tile + 1] * ROWS; i += ROWS) {
      for (int part = 0; part < HALVES; part++) {
        store_f(value + part * LANES, load_typed(w.step_value, i + part * LANES, w.value_type));
        store_i(column + part * LANES, columns_at(w, i + part * LANES));
      }
      for (int r = 0; r < ROWS; r++) sum[r] = fma(set_f(value[r]), load_f(x + int64_t(column[r]) * 16 + h * LANES), sum[r]);
    }
    for (int r = 0; r < ROWS; r++) store_f(turned[r] + h * LANES, sum[r]);
  }
  transpose(turned, out);
}

// writes one row of x's 16 outputs, with the outliers' part that has been summed up, and the others one by one
void finish(const IntGrouped& w, const Call& c, int64_t tile, int64_t m, F* y, const float* extra) {
  const int64_t first = tile * ROWS, rows = w.N - first < ROWS ? w.N - first : ROWS;
  const int64_t at = m * w.N + first;
  for (int h = 0; extra && h < HALVES; h++) y[h] = add(y[h], load_f(extra + h * LANES));
  if (rows == ROWS && !(w.indptr && w.indptr[first] < w.indptr[first + rows])) {
    for (int h = 0; h < HALVES; h++) store_16(static_cast<char*>(c.y) + (at + h * LANES) * bytes_of(c.type), y[h], c.type);
    return;
  }
  float out[ROWS];
  for (int h = 0; h < HALVES; h++) store_f(out + h * LANES, y[h]);
  for (int64_t r = 0; r < rows; r++) {
    if (w.indptr)
      for (int64_t i = w.indptr[first + r]; i < w.indptr[first + r + 1]; i++)
        out[r] += load_one(w.value, i, w.value_type) * load_one(c.x, m * c.stride + w.index[i], c.type);
    store_one(c.y, at + r, c.type, out[r]);
  }
}

inline bool in_words(const IntGrouped& w, const Call& c) { return CC_ISA == 3 && w.exact && c.type == BF16; }

template <int bits, int MR> void rows_of_x(const IntGrouped& w, const Call& c, const Inputs& in, int64_t tile, int64_t m0, const float (*extra)[ROWS]) {
  F y[MR][HALVES];
  if (!w.exact && w.sub == 32) tile_int8<bits, MR, 32>(w, in, tile, m0, y);
  else if (!w.exact) tile_int8<bits, MR, 0>(w, in, tile, m0, y);
#if CC_ISA == 3
  else if (in_words(w, c)) tile_words<bits, MR>(w, in, tile, m0, y);
#endif
  else tile_exact<bits, MR>(w, in, tile, m0, y);
  for (int m = 0; m < MR; m++) finish(w, c, tile, m0 + m, y[m], extra ? extra[m] : nullptr);
}

// outputs of one row of x of some tiles: first the outliers of all, for which x stays in the nearest cache
template <int bits> void tiles_of_one(const IntGrouped& w, const Call& c, const Inputs& in, int64_t begin, int64_t end) {
  alignas(64) float sums[TOGETHER][ROWS];
  for (int64_t tile = begin; tile < end; tile++)
    if (w.step_short) outliers_of_one<uint16_t>(w, in.turned, tile, sums[tile - begin]);
    else outliers_of_one<int32_t>(w, in.turned, tile, sums[tile - begin]);
  for (int64_t tile = begin; tile < end; tile++) rows_of_x<bits, 1>(w, c, in, tile, 0, sums + (tile - begin));
}

// a tile's outputs of the rows start .. stop of x
template <int bits> void tile_rows(const IntGrouped& w, const Call& c, const Inputs& in, int64_t tile, int64_t start, int64_t stop) {
  alignas(64) float sums[16][ROWS];
  for (int64_t m = start, end = 0; m < stop; m = end) {
    const float(*extra)[ROWS] = w.step ? sums : nullptr;
    if (w.step) outliers_of_many(w, in.turned + m * w.K, tile, sums[0]);
    end = m + 16 < stop ? m + 16 : stop;
    int64_t i = 0;
    for (; m + i + 8 <= end; i += 8) rows_of_x<bits, 8>(w, c, in, tile, m + i, extra ? extra + i : nullptr);
    if (m + i + 4 <= end) rows_of_x<bits, 4>(w, c, in, tile, m + i, extra ? extra + i : nullptr), i += 4;
    if (m + i + 2 <= end) rows_of_x<bits, 2>(w, c, in, tile, m + i, extra ? extra + i : nullptr), i += 2;
    if (m + i < end) rows_of_x<bits, 1>(w, c, in, tile, m + i, extra ? extra + i : nullptr);
  }
}

template <int bits> void product(const IntGrouped& w, const Call& c, const Inputs& in) {
  const int64_t tiles = (w.N + ROWS - 1) / ROWS;
  if (w.step && c.M == 1) {
    const int64_t fair = (tiles + c.threads - 1) / c.threads, some = fair < TOGETHER ? fair : TOGETHER;
    each(c.threads, (tiles + some - 1) / some, [&](int64_t i) {
      tiles_of_one<bits>(w, c, in, i * some, (i + 1) * some < tiles ? (i + 1) * some : tiles);
    });
    return;
  }
  // outliers jump about in x: as many of its rows are taken together as stay near
  const int64_t near = 1 << 18, rows = w.step ? (16 * w.K < near ? near / w.K / 16 * 16 : 16) : c.M;
  for (int64_t start = 0; start < c.M; start += rows) {
    const int64_t stop = start + rows < c.M ? start + rows : c.M;
    each(c.threads, tiles, [&](int64_t tile) { tile_rows<bits>(w, c, in, tile, start, stop); });
  }
}

}  // namespace
}  // namespace

extern "C" int CC_NAME(cc_int_grouped)(const IntGrouped* weight, const Call* call) {
  using namespace CC_NAME(cc);
  const IntGrouped& w = *weight;
  const Call& c = *call;
  if (w.bits != 2 && w.bits != 3 && w.bits != 4 && w.bits != 8) return CC_BAD_TYPE;
  if (c.type < F32 || c.type > F16 || w.scale_type < F32 || w.scale_type > F16) return CC_BAD_TYPE;
  const int chunk = chunk_of(w.bits);
  if (c.M < 0 || w.N < 1 || w.K < 1 || w.group < 1 || w.sub < 1 || w.sub > MOST || c.threads < 1) return CC_BAD_SHAPE;
  if (w.K % w.group || w.group % w.sub || w.sub % chunk || (c.M > 1 && c.stride < w.K)) return CC_BAD_SHAPE;
  const int64_t sums = c.M * (w.K / (w.exact ? w.group : w.sub)), scales = w.exact ? 0 : sums;
  const int64_t bytes = 4 * (sums + scales) + c.M * w.K * (w.exact ? 4 : 1);
  if (c.workspace_bytes < bytes) return CC_SMALL_WORKSPACE;
  const int64_t blocks = c.M > 1 ? (c.M + 15) / 16 : 1, before = (bytes + 63) / 64 * 64;
  if (w.step && c.M > 0 && c.workspace_bytes < before + 4 * w.K * (c.M > 1 ? 16 * blocks : 1)) return CC_SMALL_WORKSPACE;
  float* at = static_cast<float*>(c.workspace);
  const Inputs in = {at, at + scales, at + scales + sums, at + before / 4};
  const bool words = in_words(w, c);
  each(c.M > 8 ? c.threads : 1, c.ready ? 0 : c.M, [&](int64_t m) {
    if (w.exact) widen_row(w, c, m, in, words);
    else quantize(w, c, m, in);
  });
  if (w.step && !c.ready && c.M == 1) widen(c.x, 0, c.type, w.K, in.turned);
  else if (w.step && !c.ready && c.M > 1) each(c.M > 16 ? c.threads : 1, blocks, [&](int64_t block) { turn(w, c, block, in.turned + block * 16 * w.K); });
  switch (w.bits) {
    case 2: product<2>(w, c, in); break;
    case 3: product<3>(w, c, in); break;
    case 4: product<4>(w, c, in); break;
    default: product<8>(w, c, in);
  }
  return CC_OK;
}
