// Products of many rows of x in bf16 with matrices whose rows are made piece by piece: what kinds share that expand, merge or copy W.
//
// x lies in panels: 16 of its rows fill a vector's lanes, a pair of columns in each, so that one number of W serves them all and
// sums need no adding up at the end. Pieces of R rows of W are made in the nearest cache and multiplied with two or three panels at a
// time; while they are, what the next piece is made from is asked for. A sum runs over the columns in their order, pair by pair.
#pragma once
#include "dots.h"

namespace CC_NAME(cc) {

struct Ahead {  // lines of memory to ask for, a few at a time
  static constexpr int MOST = 1024;
  const char* line[MOST];
  int count = 0, next = 0;
  inline void clear() { count = next = 0; }
  inline void add(const void* p, int64_t bytes) {
    const char *at = static_cast<const char*>(p), *end = at + bytes;
    at -= reinterpret_cast<uint64_t>(at) % 64;
    for (; at < end && count < MOST; at += 64) line[count++] = at;
  }
  CC_INLINE void some(int n) {
    const int end = next + n < count ? next + n : count;
    for (; next < end; next++) __builtin_prefetch(line[next], 0, 2);
  }
};

#if CC_ISA == 3

// What a code less its zero point is, in bf16, for every zero point of 4 bits
struct Tables {
  alignas(64) uint16_t at[16][32];
  constexpr Tables() : at() {
    constexpr uint16_t SIZE[16] = {0,      0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0,
                                   0x4100, 0x4110, 0x4120, 0x4130, 0x4140, 0x4150, 0x4160, 0x4170};
    for (int z = 0; z < 16; z++)
      for (int q = 0; q < 32; q++) at[z][q] = q % 16 >= z ? SIZE[q % 16 - z] : uint16_t(0x8000 | SIZE[z - q % 16]);
  }
};
constexpr Tables TABLES;

constexpr int64_t PANEL = 16, PANELS = 18;  // rows of x in a panel; panels that are multiplied together, for pieces of x to stay in the cache
template <int R> constexpr int64_t WIDTH = 8192 / R;          // columns of a piece of R rows of W,
template <int R> constexpr int64_t PITCH = WIDTH<R> + 32;     // and from one of its rows to the next
constexpr int64_t CHUNK_ROWS = 64, NEAR = 1 << 19;   // rows of W whose pieces are multiplied in turn, where x has more bytes than NEAR

// numbers from one panel of x to the next; not a multiple of pages, where they would push each other out of the cache
inline int64_t panel_size(int64_t K) { return (K + 31) / 32 * 32 * PANEL + 32; }
inline int64_t panels_of(int64_t rows) { return (rows + PANEL - 1) / PANEL; }

inline void transpose_pairs(I* a) {  // 16 x 16 lanes of 32 bits
  I b[16];
  for (int i = 0; i < 16; i += 2) b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]), b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]), a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  for (int i = 0; i < 4; i++) {  // a[i], a[4 + i], ... have column i of each 128 bits for four rows
    const I low = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), high = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88);
    const I low2 = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd), high2 = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
    b[i] = _mm512_shuffle_i32x4(low, high, 0x88), b[8 + i] = _mm512_shuffle_i32x4(low, high, 0xdd);
    b[4 + i] = _mm512_shuffle_i32x4(low2, high2, 0x88), b[12 + i] = _mm512_shuffle_i32x4(low2, high2, 0xdd);
  }
  for (int i = 0; i < 16; i++) a[i] = b[i];
}

// A panel of K columns of 16 rows of x, null ones being zeros
inline void pack_panel(const uint16_t* const* rows, int64_t K, uint16_t* out) {
  for (int64_t k = 0; k < K; k += 32, out += 32 * PANEL) {
    I a[16];
    const uint32_t inside = K - k >= 32 ? ~0u : (1u << (K - k)) - 1;
    for (int i = 0; i < 16; i++) a[i] = rows[i] ? _mm512_maskz_loadu_epi16(inside, rows[i] + k) : set_i(0);
    transpose_pairs(a);
    for (int i = 0; i < 16; i++) store_i(out + 32 * i, a[i]);
  }
}

constexpr int64_t SOON = 64;  // columns of x between what is multiplied and what is asked for

// sum[r][v] += row r of a piece of W times panel v of x, `count` columns; every 64 of them `each` lines are asked for
template <int R, int NV>
CC_INLINE void lanes(const uint16_t* w, const uint16_t* x, int64_t size, int64_t count, Ahead& ahead, int each, F (*sum)[NV]) {
  for (int64_t start = 0; start < count; start += 64) {
    const int64_t end = start + 64 < count ? start + 64 : count;
    for (int64_t k = start; k < end; k += 2) {
      I v[NV];
      for (int i = 0; i < NV; i++) v[i] = load_i(x + i * size + k * PANEL), __builtin_prefetch(x + i * size + (k + SOON) * PANEL);
      for (int r = 0; r < R; r++) {
        int32_t pair;
        __builtin_memcpy(&pair, w + r * PITCH<R> + k, 4);
        const I both = set_i(pair);
        for (int i = 0; i < NV; i++) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], (__m512bh)both, (__m512bh)v[i]);
      }
    }
    ahead.some(each);
  }
}

// Eight outputs of each of a panel's rows to bf16 rows of y: `at[lane]` is where, or null
inline void store_panel(const F* sum, uint16_t* const* at, int64_t count) {
  F a[8], b[8];
  for (int i = 0; i < 8; i += 2) a[i] = _mm512_unpacklo_ps(sum[i], sum[i + 1]), a[i + 1] = _mm512_unpackhi_ps(sum[i], sum[i + 1]);
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      const __m512d p = _mm512_castps_pd(a[i + j]), q = _mm512_castps_pd(a[i + j + 2]);
      b[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), b[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(p, q));
    }
  const I order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int i = 0; i < 4; i++) {  // lanes i, 4 + i, 8 + i, 12 + i
    const I both = _mm512_permutexvar_epi64(order, (I)_mm512_cvtne2ps_pbh(b[4 + i], b[i]));
    alignas(64) uint16_t out[32];
    store_i(out, both);
    for (int j = 0; j < 4; j++) {
      uint16_t* to = at[4 * j + i];
      if (!to) continue;
      if (count >= 8) _mm_storeu_si128((__m128i*)to, _mm_load_si128((const __m128i*)(out + 8 * j)));
      else __builtin_memcpy(to, out + 8 * j, 2 * count);
    }
  }
}

struct Part {  // panels of x that are multiplied with the same matrix
  int64_t first, count;
  int32_t which;  // of the matrices that W's rows can be made for
};

// Calls block(Size<NV>(), v) for blocks of 3 or 2 panels, or one alone, that cover `count`
template <class Block> inline void panel_blocks(int64_t count, Block block) {
  int64_t v = 0;
  while (v < count) {
    const int64_t left = count - v;
    if (left == 1) block(Size<1>(), v), v += 1;
    else if (left == 2 || left == 4) block(Size<2>(), v), v += 2;
    else block(Size<3>(), v), v += 3;
  }
}

// Products of W (N, K) with panels of x, at most PANELS. A Source makes W's rows:
//   Source::Rows rows(source, first, count)      for rows first .. first+count-1, those beyond N - 1 being that one again
//   rows.make(at, R, k, end, which, out, pitch)  columns k .. end of R rows from first+at on, `pitch` apart, zeros beyond K
//   rows.ask(at, R, k, end, ahead)               names what make will read then
// out(panel, n, sum) gets the sums of eight rows from n on.
template <int R, class Source, class Out>
void panel_chunk(const Source& w, int64_t N, int64_t K, int64_t first, int64_t count, const Part* parts, int64_t number, const uint16_t* x, const Out& out) {
  constexpr int64_t GROUPS = CHUNK_ROWS / R, COLUMNS = WIDTH<R>;
  alignas(64) float sums[GROUPS * PANELS * R * PANEL];
  alignas(64) uint16_t piece[R * PITCH<R>];
  const int64_t size = panel_size(K), stop = (K + 31) / 32 * 32, groups = (count + R - 1) / R;
  int64_t panels = 0;
  for (int64_t p = 0; p < number; p++) panels += parts[p].count;
  Ahead ahead;
  typename Source::Rows rows(w, first, groups * R);
  for (int64_t k = 0; k < stop; k += COLUMNS) {
    const int64_t end = k + COLUMNS < stop ? k + COLUMNS : stop;
    for (int64_t g = 0; g < groups; g++) {
      for (int64_t p = 0; p < number; p++) {
        rows.make(g * R, R, k, end, parts[p].which, piece, PITCH<R>);
        if (p == 0) {
          ahead.clear();
          if (g + 1 < groups) rows.ask((g + 1) * R, R, k, end, ahead);
          else if (end < stop) rows.ask(0, R, end, end + COLUMNS < stop ? end + COLUMNS : stop, ahead);
          else if (first + count < N) typename Source::Rows(w, first + count, R).ask(0, R, 0, COLUMNS < stop ? COLUMNS : stop, ahead);
        }
        const int64_t turns = (parts[p].count + 2) / 3 * ((end - k + 63) / 64);
        const int each = p == 0 ? int((ahead.count + turns - 1) / turns) : 0;
        panel_blocks(parts[p].count, [&](auto blocks, int64_t v) {
          constexpr int NV = decltype(blocks)::value;
          const int64_t here = parts[p].first + v;
          float* own = sums + (g * PANELS + here) * R * PANEL;
          F sum[R][NV];
          for (int i = 0; i < NV; i++)
            for (int r = 0; r < R; r++) sum[r][i] = k ? load_f(own + (i * R + r) * PANEL) : set_f(0);
          lanes<R, NV>(piece, x + here * size + k * PANEL, size, end - k, ahead, each, sum);
          for (int i = 0; i < NV; i++) {
            F column[R];
            for (int r = 0; r < R; r++) column[r] = sum[r][i];
            if (end < stop)
              for (int r = 0; r < R; r++) store_f(own + (i * R + r) * PANEL, column[r]);
            else
              for (int r = 0; r < R; r += 8)
                if (first + g * R + r < N) out(here + i, first + g * R + r, column + r);
          }
        });
      }
    }
  }
}

template <class Source, class Out>
void panel_product(const Source& w, int64_t N, int64_t K, const Part* parts, int64_t number, const uint16_t* x, int threads, const Out& out) {
  int64_t panels = 0;
  for (int64_t p = 0; p < number; p++) panels += parts[p].count;
  const bool single = panels == number;  // one panel alone does not keep the machine busy with eight rows
  const int64_t chunk = panels * panel_size(K) * 2 > NEAR ? CHUNK_ROWS : single ? 16 : 8, chunks = (N + chunk - 1) / chunk;
  each(threads, chunks, [&](int64_t i) {
    const int64_t count = N - i * chunk < chunk ? N - i * chunk : chunk;
    if (single) panel_chunk<16>(w, N, K, i * chunk, count, parts, number, x, out);
    else panel_chunk<8>(w, N, K, i * chunk, count, parts, number, x, out);
  });
}

#endif

}  // namespace
