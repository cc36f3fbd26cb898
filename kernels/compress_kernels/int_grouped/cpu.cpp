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
// Activations are quantized to int8 per `sub` columns and row of x (symmetric, the largest is 127), or, where `exact`, kept in fp32.
// sums: y = Σ_groups scale (Σ code x - zero Σ x), groups in order, whatever the number of threads or of rows of x.
#include "../native/jobs.h"
#include "../native/vec.h"

namespace CC_NAME(cc) {
namespace {

constexpr int ROWS = 16, HALVES = ROWS / LANES, UNIT = 64, MOST = 128;  // MOST columns of an activation's scale

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
  float* sum;    // [M][K/sub], exact: [M][K/group]; what a zero point is multiplied with
  void* x;       // [M][K] int8, exact: fp32
};

// One row of x to int8. A block that holds NaN or Inf gets the scale NaN, and so does every output.
void quantize(const IntGrouped& w, const Call& c, int64_t m, const Inputs& in) {
  const int64_t blocks = w.K / w.sub;
  float block[MOST];
  for (int64_t b = 0; b < blocks; b++) {
    widen(c.x, m * c.stride + b * w.sub, c.type, w.sub, block);
    int32_t largest = 0;
    for (int64_t i = 0; i < w.sub; i++) {
      const int32_t size = int32_t(to_bits(block[i]) & 0x7fffffff);
      largest = size > largest ? size : largest;
    }
    int8_t* out = static_cast<int8_t*>(in.x) + m * w.K + b * w.sub;
    const float most = from_bits(uint32_t(largest));
    const bool finite = largest < 0x7f800000;
    const float to = finite && most > 1e-30f ? 127.0f / most : 0.0f;
    int32_t sum = 0;
    for (int64_t i = 0; i < w.sub; i++) {
      // adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits
      const int32_t q = int32_t(to_bits((finite ? block[i] : 0.0f) * to + 12582912.0f)) - 0x4b400000;
      out[i] = int8_t(q);
      sum += q;
    }
    in.scale[m * blocks + b] = finite ? most / 127.0f : from_bits(0x7fc00000);
    in.sum[m * blocks + b] = float(sum);
  }
}

void widen_row(const IntGrouped& w, const Call& c, int64_t m, const Inputs& in) {
  float* x = static_cast<float*>(in.x) + m * w.K;
  widen(c.x, m * c.stride, c.type, w.K, x);
  const int64_t groups = w.K / w.group;
  for (int64_t g = 0; g < groups; g++) {
    float sum = 0;
    for (int64_t i = 0; i < w.group; i++) sum += x[g * w.group + i];
    in.sum[m * groups + g] = sum;
  }
}

inline F zero_of(const IntGrouped& w, int64_t at) { return w.zero ? to_f(widen_u8(w.zero + at)) : set_f(float(1 << (w.bits - 1))); }

// y of MR rows of x and one tile, int8 activations
template <int bits, int MR> void tile_int8(const IntGrouped& w, const Inputs& in, int64_t tile, int64_t m0, F (*y)[HALVES]) {
  typedef Codes<bits> C;
  constexpr int QUADS = C::CHUNK / 4, SUMS = MR == 1 ? (QUADS < 4 ? QUADS : 4) : MR == 2 ? 2 : 1;
  const int64_t blocks = w.K / w.sub, groups = w.K / w.group, chunks = w.sub / C::CHUNK;
  const uint8_t* p = w.codes + tile * (w.K / C::CHUNK) * C::UNITS * UNIT;
  const int8_t* x = static_cast<const int8_t*>(in.x) + m0 * w.K;
  for (int m = 0; m < MR; m++)
    for (int h = 0; h < HALVES; h++) y[m][h] = set_f(0);
  for (int64_t b = 0; b < blocks; b++) {
    I acc[MR][HALVES][SUMS];
    for (int m = 0; m < MR; m++)
      for (int h = 0; h < HALVES; h++)
        for (int s = 0; s < SUMS; s++) acc[m][h][s] = set_i(0);
    for (int64_t chunk = 0; chunk < chunks; chunk++, p += C::UNITS * UNIT, x += C::CHUNK)
      for (int h = 0; h < HALVES; h++) {
        I quads[QUADS];
        C::bytes(p + h * LANES * 4, quads);
        for (int q = 0; q < QUADS; q++)
          for (int m = 0; m < MR; m++) {
            int32_t four;
            __builtin_memcpy(&four, x + m * w.K + 4 * q, 4);
            acc[m][h][q % SUMS] = dot4(acc[m][h][q % SUMS], quads[q], set_i(four));
          }
      }
    const int64_t at = (tile * groups + b * w.sub / w.group) * ROWS;
    for (int h = 0; h < HALVES; h++) {
      const F scale = load_typed(w.scale, at + h * LANES, w.scale_type), zero = zero_of(w, at + h * LANES);
      for (int m = 0; m < MR; m++) {
        F f = to_f(acc[m][h][0]);
        for (int s = 1; s < SUMS; s++) f = add(f, to_f(acc[m][h][s]));
        const int64_t i = (m0 + m) * blocks + b;
        f = fnma(zero, set_f(in.sum[i]), f);
        y[m][h] = fma(f, mul(scale, set_f(in.scale[i])), y[m][h]);
      }
    }
  }
}

// the same with fp32 activations
template <int bits, int MR> void tile_exact(const IntGrouped& w, const Inputs& in, int64_t tile, int64_t m0, F (*y)[HALVES]) {
  typedef Codes<bits> C;
  constexpr int QUADS = C::CHUNK / 4, SUMS = MR == 1 ? 4 : MR == 2 ? 2 : 1;
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
    for (int64_t chunk = 0; chunk < chunks; chunk++, p += C::UNITS * UNIT, x += C::CHUNK)
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
    const int64_t at = (tile * groups + g) * ROWS;
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

// adds the outliers and writes one row of x's 16 outputs
void finish(const IntGrouped& w, const Call& c, int64_t tile, int64_t m, const F* y) {
  if (c.type == F32 && !w.indptr && (tile + 1) * ROWS <= w.N) {
    for (int h = 0; h < HALVES; h++) store_f(static_cast<float*>(c.y) + m * w.N + tile * ROWS + h * LANES, y[h]);
    return;
  }
  float out[ROWS];
  for (int h = 0; h < HALVES; h++) store_f(out + h * LANES, y[h]);
  const int64_t first = tile * ROWS, rows = w.N - first < ROWS ? w.N - first : ROWS;
  for (int64_t r = 0; r < rows; r++) {
    if (w.indptr)
      for (int64_t i = w.indptr[first + r]; i < w.indptr[first + r + 1]; i++)
        out[r] += load_one(w.value, i, w.value_type) * load_one(c.x, m * c.stride + w.index[i], c.type);
    store_one(c.y, m * w.N + first + r, c.type, out[r]);
  }
}

template <int bits, int MR> void rows_of_x(const IntGrouped& w, const Call& c, const Inputs& in, int64_t tile, int64_t m0) {
  F y[MR][HALVES];
  if (w.exact) tile_exact<bits, MR>(w, in, tile, m0, y);
  else tile_int8<bits, MR>(w, in, tile, m0, y);
  for (int m = 0; m < MR; m++) finish(w, c, tile, m0 + m, y[m]);
}

template <int bits> void product(const IntGrouped& w, const Call& c, const Inputs& in) {
  const int64_t tiles = (w.N + ROWS - 1) / ROWS;
  each(c.threads, tiles, [&](int64_t tile) {
    int64_t m = 0;
    for (; m + 8 <= c.M; m += 8) rows_of_x<bits, 8>(w, c, in, tile, m);
    if (m + 4 <= c.M) rows_of_x<bits, 4>(w, c, in, tile, m), m += 4;
    if (m + 2 <= c.M) rows_of_x<bits, 2>(w, c, in, tile, m), m += 2;
    if (m < c.M) rows_of_x<bits, 1>(w, c, in, tile, m);
  });
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
  float* at = static_cast<float*>(c.workspace);
  const Inputs in = {at, at + scales, at + scales + sums};
  each(c.M > 8 ? c.threads : 1, c.ready ? 0 : c.M, [&](int64_t m) {
    if (w.exact) widen_row(w, c, m, in);
    else quantize(w, c, m, in);
  });
  switch (w.bits) {
    case 2: product<2>(w, c, in); break;
    case 3: product<3>(w, c, in); break;
    case 4: product<4>(w, c, in); break;
    default: product<8>(w, c, in);
  }
  return CC_OK;
}
