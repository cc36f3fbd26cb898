// Masked weights for bf16 x where the machine has AVX-512's VBMI2 and BF16: steps are 32 columns, words are moved, and pairs of bf16
// multiplied, exactly, into fp32 sums. From FEW rows of x on, pieces of four rows of W are expanded once, into the nearest cache, for
// all of them; from MANY on, pieces of eight, and x lies in panels (native/panels.h).
#pragma once
#include "../native/dots.h"
#include "../native/jobs.h"
#include "../native/panels.h"

namespace CC_NAME(cc) {
namespace {

inline int64_t mask_bytes(const Masked& w) { return (w.K + 31) / 32 * 4; }

#if CC_ISA == 3

inline uint32_t word_at(const uint8_t* mask, int64_t k) {
  uint32_t word;
  __builtin_memcpy(&word, mask + k / 8, 4);
  return word;
}

inline I expand_words(uint32_t mask, I words) {  // as expand() in vec.h
  asm("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(words) : "Yk"(mask));
  return words;
}

template <int MR> inline void multiply(__m512i words, const uint16_t* x, int64_t stride, F* acc) {
  for (int m = 0; m < MR; m++) acc[m] = _mm512_dpbf16_ps(acc[m], (__m512bh)words, (__m512bh)load_i(x + m * stride));
}

constexpr int FEW = 4, MANY = PANEL + 1;                // rows of x: from which on W is expanded, and x lies in panels
constexpr int PIECE = 2048, BAND = 4, BLOCK = 6;       // columns and rows of W that are expanded together; rows of x multiplied with

// R rows of W from `row` on, those beyond the last one being the last one again
template <int R, int MR> void words_direct(const Masked& w, const Call& c, const uint16_t* x, int64_t stride, int64_t m0, int64_t row) {
  const uint16_t *values = static_cast<const uint16_t*>(w.values), *at[R];
  const uint8_t* mask[R];
  F acc[R][MR];
  int64_t rows[R];
  for (int r = 0; r < R; r++) {
    rows[r] = row + r < w.N ? row + r : w.N - 1;
    at[r] = values + w.start[rows[r]], mask[r] = w.mask + rows[r] * mask_bytes(w);
    for (int m = 0; m < MR; m++) acc[r][m] = set_f(0);
  }
  const int64_t ahead = w.start[rows[R - 1] + 1] - w.start[row];  // the next rows' values: too short for the machine's own guess
  for (int64_t k = 0; k < w.K; k += 32)
    for (int r = 0; r < R; r++) {
      const uint32_t ones = word_at(mask[r], k);
      multiply<MR>(expand_words(ones, load_i(at[r])), x + k, stride, acc[r]);
      __builtin_prefetch(at[r] + ahead);
      at[r] += __builtin_popcount(ones);
    }
  for (int m = 0; m < MR; m++) {
    float out[4];
    sums4(acc[0][m], acc[1 % R][m], acc[2 % R][m], acc[3 % R][m], out);
    for (int r = 0; r < R && row + r < w.N; r++) store_one(c.y, (m0 + m) * w.N + row + r, c.type, out[r]);
  }
}

// 16 codes of 4 bits as 16-bit words
inline __m256i code_words(const uint8_t* p) {
  const __m128i eight = _mm_loadl_epi64((const __m128i*)p), low = _mm_set1_epi8(15);
  return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(_mm_and_si128(eight, low), _mm_and_si128(_mm_srli_epi16(eight, 4), low)));
}

// groups of multiples of 32 columns
template <int MR> void words_codes(const Masked& w, const Call& c, const uint16_t* x, int64_t stride, int64_t m0, int64_t row) {
  const uint8_t *mask = w.mask + row * mask_bytes(w), *code = static_cast<const uint8_t*>(w.values) + row * (w.K / 4);
  F acc[MR];
  for (int m = 0; m < MR; m++) acc[m] = set_f(0);
  const int64_t groups = w.K / w.group;
  for (int64_t g = 0; g < groups; g++) {
    const I table = load_i(TABLES.at[w.zero ? w.zero[row * groups + g] & 15 : 8]);
    const F scale = set_f(load_one(w.scale, row * groups + g, w.value_type));
    F part[MR];
    for (int m = 0; m < MR; m++) part[m] = set_f(0);
    for (int64_t k = g * w.group; k < (g + 1) * w.group; k += 32, code += 8) {
      __builtin_prefetch(code + 1024);
      const I words = _mm512_permutexvar_epi16(_mm512_castsi256_si512(code_words(code)), table);
      multiply<MR>(expand_words(word_at(mask, k), words), x + k, stride, part);
    }
    for (int m = 0; m < MR; m++) acc[m] = fma(part[m], scale, acc[m]);
  }
  for (int m = 0; m < MR; m++) {
    float out[4];
    sums4(acc[m], acc[m], acc[m], acc[m], out);
    store_one(c.y, (m0 + m) * w.N + row, c.type, out[0]);
  }
}

inline bool in_words(const Masked& w, const Call& c) { return c.type == BF16 && (w.group ? w.group % 32 == 0 : w.value_type == BF16); }

struct Cursor {  // where a row's next kept values lie
  const uint16_t* value;
  const uint8_t *code, *mask;
  int64_t ahead;  // values from here to what is asked for beforehand
  inline void open(const Masked& w, int64_t row, int64_t distance) {
    value = w.group ? nullptr : static_cast<const uint16_t*>(w.values) + w.start[row];
    code = w.group ? static_cast<const uint8_t*>(w.values) + row * (w.K / 4) : nullptr;
    mask = w.mask + row * mask_bytes(w);
    ahead = distance;
  }
};

// columns k .. end of a row, whole steps; codes of one group by `table`
template <bool ask> inline void expand_values(Cursor& at, int64_t k, int64_t end, uint16_t* out) {
  const uint16_t* value = at.value;  // a local name: what is written might be the cursor, for all that the compiler knows
  const uint8_t* mask = at.mask;
  for (const int64_t ahead = at.ahead; k < end; k += 32, out += 32) {
    const uint32_t ones = word_at(mask, k);
    if (ask) __builtin_prefetch(value + ahead);
    _mm512_storeu_si512(out, expand_words(ones, load_i(value)));
    value += __builtin_popcount(ones);
  }
  at.value = value;
}

template <bool ask> inline void expand_codes(Cursor& at, I table, int64_t k, int64_t end, uint16_t* out) {
  const uint8_t *code = at.code, *mask = at.mask;
  for (; k < end; k += 32, out += 32, code += 8) {
    if (ask) __builtin_prefetch(code + 1024);
    const I words = _mm512_permutexvar_epi16(_mm512_castsi256_si512(code_words(code)), table);
    _mm512_storeu_si512(out, expand_words(word_at(mask, k), words));
  }
  at.code = code;
}

// columns k .. end of a row, rounded to bf16: codes become what they stand for. `ask`: for what will be read later
template <bool ask> inline void expand_row(const Masked& w, int64_t row, Cursor& at, int64_t k, int64_t end, uint16_t* out) {
  if (!w.group) return expand_values<ask>(at, k, end, out);
  const I codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int64_t groups = w.K / w.group;
  while (k < end) {
    const int64_t g = k / w.group, stop = (g + 1) * w.group < end ? (g + 1) * w.group : end;
    const F zero = set_f(w.zero ? float(w.zero[row * groups + g]) : 8.0f);
    const F numbers = mul(sub(to_f(codes), zero), set_f(load_one(w.scale, row * groups + g, w.value_type)));
    const __m256i words = bfloats(numbers);  // not by way of memory: a load of two stores' bytes waits for both
    expand_codes<ask>(at, _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1), k, stop, out);
    out += stop - k, k = stop;
  }
}

// R rows of W times fewer than MANY rows of x
template <int R, int most> void words_pieces(const Masked& w, const Call& c, const uint16_t* x, int64_t stride, int64_t row) {
  alignas(64) uint16_t scratch[R][PIECE + 32];  // not a page apart, where rows would fall on each other in the cache
  alignas(64) F sums[MANY][R];
  int64_t rows[R];
  Cursor at[R];
  const char* lines[R];
  for (int r = 0; r < R; r++) rows[r] = row + r < w.N ? row + r : w.N - 1, lines[r] = reinterpret_cast<const char*>(scratch[r]);
  for (int r = 0; r < R; r++) at[r].open(w, rows[r], w.group ? 0 : w.start[rows[R - 1] + 1] - w.start[row]);
  for (int64_t start = 0; start < stride; start += PIECE) {
    const int64_t end = start + PIECE < stride ? start + PIECE : stride;
    for (int r = 0; r < R; r++) expand_row<true>(w, rows[r], at[r], start, end, scratch[r]);
    blocks<most>(c.M, [&](auto size, int64_t m0) {
      constexpr int MR = decltype(size)::value;
      F sum[MR][R];
      for (int m = 0; m < MR; m++)
        for (int r = 0; r < R; r++) sum[m][r] = start ? sums[m0 + m][r] : set_f(0);
      dots<Words, R, MR, true>(lines, x + m0 * stride + start * MR, 0, end - start, 0, sum);
      for (int m = 0; m < MR; m++)
        for (int r = 0; r < R; r++) sums[m0 + m][r] = sum[m][r];
    });
  }
  for (int64_t m = 0; m < c.M; m++) {
    float out[R];
    for (int r = 0; r < R; r += 4) {
      sums4(sums[m][r], sums[m][r + 1], sums[m][r + 2], sums[m][r + 3], out + r);
      store_four(c.y, m * w.N + row + r, c.type, out + r, w.N - row - r);
    }
  }
}

template <int MR> inline void word_rows(const Masked& w, const Call& c, const uint16_t* x, int64_t stride, int64_t m0, int64_t row) {
  const uint16_t* here = x + m0 * stride;
  if (!w.group) return words_direct<4, MR>(w, c, here, stride, m0, row);
  for (int64_t r = row; r < row + 4 && r < w.N; r++) words_codes<MR>(w, c, here, stride, m0, r);
}

struct Expanded {  // W's rows, for panels
  const Masked& w;
  struct Rows {
    const Masked& w;
    int64_t first;
    Cursor cursor[CHUNK_ROWS];
    inline int64_t row(int64_t at) const { return first + at < w.N ? first + at : w.N - 1; }
    Rows(const Expanded& e, int64_t from, int64_t count) : w(e.w), first(from) {
      for (int64_t r = 0; r < count; r++) cursor[r].open(w, row(r), 0);
    }
    void make(int64_t at, int R, int64_t k, int64_t end, int32_t, uint16_t* out, int64_t pitch) {
      for (int64_t r = 0; r < R; r++) expand_row<false>(w, row(at + r), cursor[at + r], k, end, out + r * pitch);
    }
    void ask(int64_t at, int R, int64_t k, int64_t end, Ahead& ahead) const {
      for (int64_t r = 0; r < R && first + at + r < w.N; r++) {
        const Cursor& here = cursor[at + r];
        ahead.add(here.mask + k / 8, (end - k) / 8);
        if (w.group) ahead.add(here.code, (end - k) / 4);
        else ahead.add(here.value, 64 + 2 * (w.start[first + at + r + 1] - w.start[first + at + r]) * (end - k) / w.K);
      }
    }
  };
};

// Bytes of the panels that M rows of x of K columns take
inline int64_t panel_bytes(int64_t M, int64_t K) { return 2 * panel_size(K) * (panels_of(M) < PANELS ? panels_of(M) : PANELS); }

void product_in_panels(const Masked& w, const Call& c) {
  uint16_t* x = static_cast<uint16_t*>(c.workspace);
  const int64_t size = panel_size(w.K), panels = panels_of(c.M), times = (panels + PANELS - 1) / PANELS;
  for (int64_t i = 0; i < times; i++) {
    const int64_t first = panels * i / times, count = panels * (i + 1) / times - first;
    const auto row_of = [&](int64_t panel, int64_t lane) { return (first + panel) * PANEL + lane; };
    each(c.threads, count, [&](int64_t panel) {
      const uint16_t* from[PANEL];
      for (int64_t l = 0; l < PANEL; l++) from[l] = row_of(panel, l) < c.M ? static_cast<const uint16_t*>(c.x) + row_of(panel, l) * c.stride : nullptr;
      pack_panel(from, w.K, x + panel * size);
    });
    const Part all = {0, count, 0};
    panel_product(Expanded{w}, w.N, w.K, &all, 1, x, c.threads, [&](int64_t panel, int64_t n, const F* sum) {
      uint16_t* at[PANEL];
      for (int64_t l = 0; l < PANEL; l++) at[l] = row_of(panel, l) < c.M ? static_cast<uint16_t*>(c.y) + row_of(panel, l) * w.N + n : nullptr;
      store_panel(sum, at, w.N - n);
    });
  }
}

void product_in_words(const Masked& w, const Call& c) {
  if (c.M >= MANY) return product_in_panels(w, c);
  const int64_t stride = (w.K + 31) / 32 * 32, count = c.M, quads = (w.N + 3) / 4;
  uint16_t* x = static_cast<uint16_t*>(c.workspace);
  const bool pieces = count >= FEW;
  for (int64_t m = 0; m < count; m++) {
    const uint16_t* from = static_cast<const uint16_t*>(c.x) + m * c.stride;
    const Rows own = pieces ? rows_with<BLOCK>(count, m) : Rows{m, 1};
    uint16_t* to = x + own.first * stride + (m - own.first) * 32;
    for (int64_t k = 0; k < stride; k += 32, to += own.size * 32) {
      const int64_t left = w.K - k;
      _mm512_storeu_si512(to, left >= 32 ? load_i(from + k) : _mm512_maskz_loadu_epi16((1u << left) - 1, from + k));
    }
  }
  if (pieces) return each(c.threads, quads, [&](int64_t quad) { words_pieces<BAND, BLOCK>(w, c, x, stride, BAND * quad); });
  each(c.threads, quads, [&](int64_t quad) {
    int64_t m = 0;
    for (; m + 4 <= count; m += 4) word_rows<4>(w, c, x, stride, m, 4 * quad);
    if (m + 2 <= count) word_rows<2>(w, c, x, stride, m, 4 * quad), m += 2;
    if (m < count) word_rows<1>(w, c, x, stride, m, 4 * quad);
  });
}

void decode_words(const Masked& w, int64_t row, uint16_t* out) {
  Cursor at;
  at.open(w, row, 1024);
  alignas(64) uint16_t last[32];
  const int64_t whole = w.K / 32 * 32;
  expand_row<true>(w, row, at, 0, whole, out);
  if (whole == w.K) return;
  expand_row<true>(w, row, at, whole, w.K, last);
  __builtin_memcpy(out + whole, last, 2 * (w.K - whole));
}

#endif

}  // namespace
}  // namespace
