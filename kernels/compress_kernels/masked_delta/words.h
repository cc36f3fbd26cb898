// Merging a base weight and shared numbers in registers, 32 columns at a time, where both go to bf16 and the machine has AVX-512 BF16.
//
// Shared numbers are words of bf16, a code less its zero being one exactly, times a scale of the group. Even and odd columns are halves
// of 32-bit lanes, and fp32 but for a shift.
#pragma once
#include "../native/jobs.h"
#include "../native/vec.h"

namespace CC_NAME(cc) {
namespace {

enum { PLAIN = 0, BYTES = 1, NIBBLES = 2, CONSTANT = 3 };

inline int64_t row_bytes(const SharedVector& s, int64_t K) {
  return s.kind == PLAIN ? 2 * K : s.kind == BYTES ? (K + 3) / 4 * 4 : s.kind == NIBBLES ? (K + 7) / 8 * 4 : 0;
}

#if CC_ISA == 3

struct Line {  // a row of shared numbers
  const char* at;
  const uint16_t* scales;
  int64_t group, until;  // columns of a scale, and the first one of the next
  int32_t kind, zero;
  F scale;

  inline void open(const SharedVector& s, int64_t K, int64_t row, int64_t k) {
    at = static_cast<const char*>(s.values) + row * row_bytes(s, K);
    kind = s.kind, zero = s.zero, group = s.group, until = K + 32, scale = set_f(1);
    if (kind == CONSTANT) scale = set_f(*static_cast<const float*>(s.values));
    if (kind != BYTES && kind != NIBBLES) return;
    scales = s.scale + row * ((K + group - 1) / group) + k / group;
    until = k / group * group;
    next();
  }
  inline void next() { scale = set_f(from_bits(uint32_t(*scales++) << 16)), until += group; }

  inline const char* place(int64_t k) const { return kind == PLAIN ? at + 2 * k : kind == BYTES ? at + k : kind == NIBBLES ? at + k / 2 : at; }

  // the words of columns k .. k+32
  inline I words(int64_t k) const { return words_at(place(k)); }
  inline I words_at(const char* p) const {
    if (kind == PLAIN) return load_i(p);
    if (kind == CONSTANT) return _mm512_set1_epi16(0x3f80);
    if (kind == NIBBLES) {
      const __m128i packed = _mm_loadu_si128((const __m128i*)p), low = _mm_set1_epi8(15);
      const __m128i even = _mm_and_si128(packed, low), odd = _mm_and_si128(_mm_srli_epi16(packed, 4), low);
      const __m256i bytes = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
      return _mm512_permutexvar_epi16(_mm512_cvtepu8_epi16(bytes), load_i(TABLES.at[zero == 8 ? 8 : 0]));
    }
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(p);
    const F a = to_f(sub_i(widen_u8(bytes), set_i(zero))), b = to_f(sub_i(widen_u8(bytes + 16), set_i(zero)));
    return (I)_mm512_cvtne2ps_pbh(b, a);
  }
  // the same of the row's last columns, fewer than 32, and zeros
  inline I last(int64_t k, int64_t count) const {
    alignas(64) char some[64] = {0};
    __builtin_memcpy(some, place(k), kind == PLAIN ? 2 * count : kind == BYTES ? count : kind == NIBBLES ? (count + 1) / 2 : 0);
    return _mm512_maskz_mov_epi16((1u << count) - 1, words_at(some));
  }
};

// Whether steps of 32 columns have one scale
inline bool whole_steps(const SharedVector& s, int64_t K) { return s.kind == PLAIN || s.kind == CONSTANT || s.group % 32 == 0 || s.group >= K; }
inline bool in_words(const MaskedDelta& w) { return whole_steps(w.one, w.K) && (!w.has_low || whole_steps(w.low, w.K)); }

struct Wide {  // 32 columns in fp32
  F even, odd;
};

inline Wide widen(I words) { return {_mm512_castsi512_ps(left<16>(words)), _mm512_castsi512_ps(and_i(words, set_i(int32_t(0xffff0000u))))}; }
inline Wide times(Wide a, F b) { return {mul(a.even, b), mul(a.odd, b)}; }

inline I rounded(F even, F odd) {
  const I places = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(places, (I)_mm512_cvtne2ps_pbh(odd, even));
}

enum Mode { MASK, SIGNS, LEVELS };  // a bit of 0 adds nothing, or takes away what one of 1 adds, or adds numbers of its own
inline Mode mode_of(const MaskedDelta& w) { return w.has_low ? LEVELS : w.signs ? SIGNS : MASK; }

struct Step {  // 32 columns of a row, for any task
  I words;
  Wide base, one, low;
};

// `scaled`: not the numbers as they are
template <Mode mode, bool scaled> inline Step step_of(I base, const Line& one, I up, const Line& low, I down) {
  Step s = {base, widen(base), widen(up), {}};
  if (scaled) s.one = times(s.one, one.scale);
  if (mode == LEVELS) s.low = scaled ? times(widen(down), low.scale) : widen(down);
  return s;
}

template <Mode mode> inline I merged(const Step& s, F factor, uint32_t bits) {
  const Wide d = times(s.one, factor);
  const I up = rounded(add(s.base.even, d.even), add(s.base.odd, d.odd));
  if (mode == MASK) return _mm512_mask_mov_epi16(s.words, bits, up);
  if (mode == SIGNS) return _mm512_mask_mov_epi16(rounded(sub(s.base.even, d.even), sub(s.base.odd, d.odd)), bits, up);
  const Wide e = times(s.low, factor);
  return _mm512_mask_mov_epi16(rounded(add(s.base.even, e.even), add(s.base.odd, e.odd)), bits, up);
}

// Columns k .. k+count of a row of a task's weight, `mask` having their bits; zeros up to whole steps
template <Mode mode, bool scaled>
void merge_words(const MaskedDelta& w, int64_t row, int64_t k, int64_t count, const uint32_t* mask, float by, uint16_t* out) {
  const uint16_t* base = static_cast<const uint16_t*>(w.base) + row * w.K;
  const F factor = set_f(by);
  Line one, low;
  one.open(w.one, w.K, row, k);
  if (mode == LEVELS) low.open(w.low, w.K, row, k);
  const int64_t whole = k + count / 32 * 32;
  for (; k < whole; k += 32, out += 32, mask++) {
    if (scaled && k >= one.until) one.next();
    if (mode == LEVELS && scaled && k >= low.until) low.next();
    const I up = scaled ? one.words(k) : load_i(one.at + 2 * k), down = mode != LEVELS ? up : scaled ? low.words(k) : load_i(low.at + 2 * k);
    store_i(out, merged<mode>(step_of<mode, scaled>(load_i(base + k), one, up, low, down), factor, *mask));
  }
  if (count % 32 == 0) return;
  if (scaled && k >= one.until) one.next();
  if (mode == LEVELS && scaled && k >= low.until) low.next();
  const I last = _mm512_maskz_loadu_epi16((1u << count % 32) - 1, base + k), up = one.last(k, count % 32);
  store_i(out, merged<mode>(step_of<mode, scaled>(last, one, up, low, mode == LEVELS ? low.last(k, count % 32) : up), factor, *mask));
}

// Calls run(constant mode, constant scaled) for what W's numbers are
template <int n> struct Constant {
  static constexpr int value = n;
};
template <class Run> inline void by_mode(const MaskedDelta& w, const Run& run) {
  const bool scaled = w.one.kind != PLAIN || (w.has_low && w.low.kind != PLAIN);
  const auto both = [&](auto mode) { scaled ? run(mode, Constant<1>()) : run(mode, Constant<0>()); };
  if (w.has_low) both(Constant<LEVELS>());
  else if (w.signs) both(Constant<SIGNS>());
  else both(Constant<MASK>());
}

#endif

}  // namespace
}  // namespace
