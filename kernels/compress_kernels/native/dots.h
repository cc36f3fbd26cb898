// Dot products of rows of W with rows of x, a block of both at a time: what kinds share whose rows lie, or are expanded, as plain numbers.
//
// A block is R rows of W by MR rows of x, one sum vector for each pair; lanes are added up at the very end. So a sum's order depends on
// the number of columns alone, not on the block's size nor on who computes it.
#pragma once
#include "vec.h"

namespace CC_NAME(cc) {

// How numbers are multiplied. X is a number of x as it lies in memory, V a vector of STEP columns.
template <int type> struct Floats {  // W of a type, x in fp32
  typedef float X;
  typedef F V;
  static constexpr int STEP = LANES, SIZE = bytes_of(type);
  static inline V w(const char* p) { return load_16<type>(p); }
  static inline V w_some(const char* p, int64_t count) {
    alignas(64) char last[64] = {0};
    __builtin_memcpy(last, p, count * SIZE);
    return load_16<type>(last);
  }
  static inline V x(const X* p) { return load_f(p); }
  static inline V x_some(const X* p, int64_t count) {
    alignas(64) float last[LANES] = {0};
    __builtin_memcpy(last, p, count * 4);
    return load_f(last);
  }
  static inline F add(F sum, V w, V x) { return fma(w, x, sum); }
};

#if CC_ISA == 3
struct Words {  // both bf16: pairs are multiplied exactly, and added in fp32
  typedef uint16_t X;
  typedef I V;
  static constexpr int STEP = 32, SIZE = 2;
  static inline V w(const char* p) { return load_i(p); }
  static inline V w_some(const char* p, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, p); }
  static inline V x(const X* p) { return load_i(p); }
  static inline V x_some(const X* p, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, p); }
  static inline F add(F sum, V w, V x) { return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)x); }
};
#endif

// sum[m][r] += row r of W times row m of x, `count` columns from w[r] and from x on. A row of x follows the one before by `stride`
// numbers; or, with stride 0, steps of the MR rows lie side by side. `ahead` bytes beyond are asked for.
template <class Math, int R, int MR, bool side_by_side = false>
CC_INLINE void dots(const char* const* w, const typename Math::X* x, int64_t stride, int64_t count, int64_t ahead, F (*sum)[R]) {
  typedef typename Math::V V;
  int64_t k = 0;
  for (; k + Math::STEP <= count; k += Math::STEP) {
    V rows[R];
    for (int r = 0; r < R; r++) {
      rows[r] = Math::w(w[r] + k * Math::SIZE);
      if (MR == 1) __builtin_prefetch(w[r] + k * Math::SIZE + ahead);
    }
    for (int m = 0; m < MR; m++) {
      const V v = Math::x(side_by_side ? x + k * MR + m * Math::STEP : x + m * stride + k);
      for (int r = 0; r < R; r++) sum[m][r] = Math::add(sum[m][r], rows[r], v);
    }
  }
  if (!side_by_side && k < count) {
    V rows[R];
    for (int r = 0; r < R; r++) rows[r] = Math::w_some(w[r] + k * Math::SIZE, count - k);
    for (int m = 0; m < MR; m++) {
      const V v = Math::x_some(x + m * stride + k, count - k);
      for (int r = 0; r < R; r++) sum[m][r] = Math::add(sum[m][r], rows[r], v);
    }
  }
}

template <int n> struct Size {
  static constexpr int value = n;
};

// Calls block(Size<MR>(), m) for blocks of at most `most` rows, 3, 4 or 6, that cover `count` of them.
template <int most, class Block> inline void blocks(int64_t count, Block block) {
  int64_t m = 0;
  for (; m + most <= count; m += most) block(Size<most>(), m);
  if constexpr (most > 4)
    if (m + 4 <= count) block(Size<4>(), m), m += 4;
  if (m + 2 <= count) block(Size<2>(), m), m += 2;
  if (m < count) block(Size<1>(), m);
}

// A row's place among such blocks of `count` rows: the first row of its block, and how many there are
struct Rows {
  int64_t first, size;
};

template <int most> inline Rows rows_with(int64_t count, int64_t m) {
  Rows found = {0, 0};
  blocks<most>(count, [&](auto size, int64_t first) {
    if (first <= m) found = {first, decltype(size)::value};
  });
  return found;
}

// Products of a matrix W (N, K) of plain numbers with x: write(m, n, four) gets four outputs of a row of x, those below N count.
template <class Math, class Write>
void plain(const char* W, int64_t N, int64_t K, const typename Math::X* x, int64_t stride, int64_t M, int threads, Write write) {
  const int64_t quads = (N + 3) / 4, row = K * Math::SIZE;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t quad = 0; quad < quads; quad++) {
    const char* w[4];
    for (int r = 0; r < 4; r++) w[r] = W + (4 * quad + r < N ? 4 * quad + r : N - 1) * row;
    blocks<6>(M, [&](auto size, int64_t m0) {
      constexpr int MR = decltype(size)::value;
      F sum[MR][4];
      for (int m = 0; m < MR; m++)
        for (int r = 0; r < 4; r++) sum[m][r] = set_f(0);
      dots<Math, 4, MR>(w, x + m0 * stride, stride, K, 4 * row, sum);
      for (int m = 0; m < MR; m++) {
        float four[4];
        sums4(sum[m][0], sum[m][1], sum[m][2], sum[m][3], four);
        write(m0 + m, 4 * quad, four);
      }
    });
  }
}

}  // namespace
