// y = x Wᵀ for weights of which a mask of single bits names the kept ones: kinds bitmask, sparse24 and sparse24_int, on a CPU.
//
// A row is read in steps of LANES columns: its next kept values are loaded, moved to the columns that the mask names, and
// multiplied with x, in fp32. Two output rows are in work at once, as each waits for the count of its own ones. Where the machine has
// AVX-512's VBMI2 and BF16 and x is bf16, steps are 32 columns: words are moved, and pairs of bf16 multiplied, exactly, into fp32 sums.
// From FEW rows of x on, pieces of four rows of W are expanded once, into the nearest cache, for all of them.
#include "../native/dots.h"
#include "../native/jobs.h"

namespace CC_NAME(cc) {
namespace {

inline int64_t mask_bytes(const Masked& w) { return (w.K + 31) / 32 * 4; }

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

constexpr int FEW = 4, MOST = 96;                       // rows of x: from which on W is expanded; whose sums are held
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
inline void expand_values(Cursor& at, int64_t k, int64_t end, uint16_t* out) {
  const uint16_t* value = at.value;  // a local name: what is written might be the cursor, for all that the compiler knows
  const uint8_t* mask = at.mask;
  for (const int64_t ahead = at.ahead; k < end; k += 32, out += 32) {
    const uint32_t ones = word_at(mask, k);
    __builtin_prefetch(value + ahead);
    _mm512_storeu_si512(out, expand_words(ones, load_i(value)));
    value += __builtin_popcount(ones);
  }
  at.value = value;
}

inline void expand_codes(Cursor& at, I table, int64_t k, int64_t end, uint16_t* out) {
  const uint8_t *code = at.code, *mask = at.mask;
  for (; k < end; k += 32, out += 32, code += 8) {
    __builtin_prefetch(code + 1024);
    const I words = _mm512_permutexvar_epi16(_mm512_castsi256_si512(code_words(code)), table);
    _mm512_storeu_si512(out, expand_words(word_at(mask, k), words));
  }
  at.code = code;
}

// columns k .. end of a row, rounded to bf16: codes become what they stand for
inline void expand_row(const Masked& w, int64_t row, Cursor& at, int64_t k, int64_t end, uint16_t* out) {
  if (!w.group) return expand_values(at, k, end, out);
  const I codes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const int64_t groups = w.K / w.group;
  while (k < end) {
    const int64_t g = k / w.group, stop = (g + 1) * w.group < end ? (g + 1) * w.group : end;
    const F zero = set_f(w.zero ? float(w.zero[row * groups + g]) : 8.0f);
    const F numbers = mul(sub(to_f(codes), zero), set_f(load_one(w.scale, row * groups + g, w.value_type)));
    const __m256i words = bfloats(numbers);  // not by way of memory: a load of two stores' bytes waits for both
    expand_codes(at, _mm512_inserti64x4(_mm512_castsi256_si512(words), words, 1), k, stop, out);
    out += stop - k, k = stop;
  }
}

// R rows of W times all rows of x
template <int R, int most> void words_pieces(const Masked& w, const Call& c, const uint16_t* x, int64_t stride, int64_t row) {
  alignas(64) uint16_t scratch[R][PIECE + 32];  // not a page apart, where rows would fall on each other in the cache
  alignas(64) F sums[MOST][R];
  int64_t rows[R];
  Cursor at[R];
  const char* lines[R];
  for (int r = 0; r < R; r++) rows[r] = row + r < w.N ? row + r : w.N - 1, lines[r] = reinterpret_cast<const char*>(scratch[r]);
  for (int64_t first = 0; first < c.M; first += MOST) {
    const int64_t count = c.M - first < MOST ? c.M - first : MOST;
    for (int r = 0; r < R; r++) at[r].open(w, rows[r], first || w.group ? 0 : w.start[rows[R - 1] + 1] - w.start[row]);
    for (int64_t start = 0; start < stride; start += PIECE) {
      const int64_t end = start + PIECE < stride ? start + PIECE : stride;
      for (int r = 0; r < R; r++) expand_row(w, rows[r], at[r], start, end, scratch[r]);
      blocks<most>(count, [&](auto size, int64_t m0) {
        constexpr int MR = decltype(size)::value;
        F sum[MR][R];
        for (int m = 0; m < MR; m++)
          for (int r = 0; r < R; r++) sum[m][r] = start ? sums[m0 + m][r] : set_f(0);
        dots<Words, R, MR, true>(lines, x + (first + m0) * stride + start * MR, 0, end - start, 0, sum);
        for (int m = 0; m < MR; m++)
          for (int r = 0; r < R; r++) sums[m0 + m][r] = sum[m][r];
      });
    }
    for (int64_t m = 0; m < count; m++) {
      float out[R];
      for (int r = 0; r < R; r += 4) {
        sums4(sums[m][r], sums[m][r + 1], sums[m][r + 2], sums[m][r + 3], out + r);
        store_four(c.y, (first + m) * w.N + row + r, c.type, out + r, w.N - row - r);
      }
    }
  }
}

template <int MR> inline void word_rows(const Masked& w, const Call& c, const uint16_t* x, int64_t stride, int64_t m0, int64_t row) {
  const uint16_t* here = x + m0 * stride;
  if (!w.group) return words_direct<4, MR>(w, c, here, stride, m0, row);
  for (int64_t r = row; r < row + 4 && r < w.N; r++) words_codes<MR>(w, c, here, stride, m0, r);
}

void product_in_words(const Masked& w, const Call& c) {
  const int64_t stride = (w.K + 31) / 32 * 32, count = c.M, quads = (w.N + 3) / 4;
  uint16_t* x = static_cast<uint16_t*>(c.workspace);
  const bool pieces = count >= FEW;
#pragma omp parallel for num_threads(c.threads) schedule(static) if (count > 32)
  for (int64_t m = 0; m < count; m++) {
    const uint16_t* from = static_cast<const uint16_t*>(c.x) + m * c.stride;
    const int64_t start = m / MOST * MOST;
    const Rows own = pieces ? rows_with<BLOCK>(count - start < MOST ? count - start : MOST, m - start) : Rows{m, 1};
    uint16_t* to = x + (start + own.first) * stride + (m - start - own.first) * 32;
    if (!pieces) to = x + m * stride;
    for (int64_t k = 0; k < stride; k += 32, to += own.size * 32) {
      const int64_t left = w.K - k;
      _mm512_storeu_si512(to, left >= 32 ? load_i(from + k) : _mm512_maskz_loadu_epi16((1u << left) - 1, from + k));
    }
  }
  if (pieces) {
    const int64_t bands = (w.N + BAND - 1) / BAND;
#pragma omp parallel for num_threads(c.threads) schedule(static)
    for (int64_t band = 0; band < bands; band++) words_pieces<BAND, BLOCK>(w, c, x, stride, BAND * band);
    return;
  }
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
  expand_row(w, row, at, 0, whole, out);
  if (whole == w.K) return;
  expand_row(w, row, at, whole, w.K, last);
  __builtin_memcpy(out + whole, last, 2 * (w.K - whole));
}

#endif

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
  if (c.workspace_bytes < 4 * c.M * stride) return CC_SMALL_WORKSPACE;
  float* x = static_cast<float*>(c.workspace);
#if CC_ISA == 3
  if (in_words(w, c)) {
    product_in_words(w, c);
    return CC_OK;
  }
#endif
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
