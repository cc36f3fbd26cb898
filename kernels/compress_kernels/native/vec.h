// Vectors of 32-bit lanes for one instruction set, chosen by CC_ISA: 3 AVX-512 with VNNI, VBMI2 and BF16, 2 AVX-512 with VNNI,
// 1 AVX2 with FMA and F16C, 0 plain C++.
// Every source file is compiled once per instruction set, with that set's flags, into its own namespace. No header of the C++
// standard library with inline functions is included: the linker might keep one set's copy for all.
#pragma once
#include <stdint.h>

#ifndef CC_ISA
#define CC_ISA 0
#endif
#if CC_ISA > 0
#include <immintrin.h>
#endif

#define CC_JOIN_(a, b) a##b
#define CC_JOIN(a, b) CC_JOIN_(a, b)
#define CC_NAME(function) CC_JOIN(CC_JOIN(function, _isa), CC_ISA)  // the function's name for this instruction set

#define CC_INLINE inline __attribute__((always_inline))  // where sums must stay in registers

enum Type { F32 = 0, BF16 = 1, F16 = 2 };  // of activations, scales and values

namespace CC_NAME(cc) {

inline float from_bits(uint32_t bits) {
  float f;
  __builtin_memcpy(&f, &bits, 4);
  return f;
}

inline uint32_t to_bits(float f) {
  uint32_t bits;
  __builtin_memcpy(&bits, &f, 4);
  return bits;
}

// fp16 to fp32, exact; subnormals, infinities and NaN included
inline float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, low = h & 0x7fff;
  if (low >= 0x7c00) return from_bits(sign | 0x7f800000 | (low & 0x3ff) << 13);
  if (low >= 0x0400) return from_bits(sign | ((low << 13) + (112u << 23)));
  const float f = float(low) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -f : f;
}

// fp32 to fp16, to the nearest, ties to even
inline uint16_t float_to_half(float f) {
  const uint32_t bits = to_bits(f), sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded number in the low bits
    const uint32_t rounded = to_bits(from_bits(magnitude) + 0.5f) - 0x3f000000;
    return uint16_t(sign | rounded);
  }
  return uint16_t(sign | ((magnitude + 0xfff + (magnitude >> 13 & 1) - (112u << 23)) >> 13));
}

inline uint16_t float_to_bfloat(float f) {
  const uint32_t bits = to_bits(f);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline float load_one(const void* p, int64_t i, int type) {
  if (type == F32) return static_cast<const float*>(p)[i];
  const uint16_t h = static_cast<const uint16_t*>(p)[i];
  return type == BF16 ? from_bits(uint32_t(h) << 16) : half_to_float(h);
}

inline void store_one(void* p, int64_t i, int type, float f) {
  if (type == F32) static_cast<float*>(p)[i] = f;
  else static_cast<uint16_t*>(p)[i] = type == BF16 ? float_to_bfloat(f) : float_to_half(f);
}

inline float fma_one(float a, float b, float c) {  // as fma() does it in a lane
#if CC_ISA > 0
  return _mm_cvtss_f32(_mm_fmadd_ss(_mm_set_ss(a), _mm_set_ss(b), _mm_set_ss(c)));
#else
  return c + a * b;
#endif
}

#if CC_ISA >= 2

constexpr int LANES = 16;
typedef __m512i I;
typedef __m512 F;
inline I load_i(const void* p) { return _mm512_loadu_si512(p); }
inline void store_i(void* p, I a) { _mm512_storeu_si512(p, a); }
inline I set_i(int32_t v) { return _mm512_set1_epi32(v); }
inline I and_i(I a, I b) { return _mm512_and_si512(a, b); }
inline I or_i(I a, I b) { return _mm512_or_si512(a, b); }
inline I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
template <int n> inline I right(I a) { return _mm512_srli_epi32(a, n); }
template <int n> inline I left(I a) { return _mm512_slli_epi32(a, n); }
inline I dot4(I sum, I u8, I s8) { return _mm512_dpbusd_epi32(sum, u8, s8); }
inline F to_f(I a) { return _mm512_cvtepi32_ps(a); }
inline F set_f(float v) { return _mm512_set1_ps(v); }
inline F load_f(const float* p) { return _mm512_loadu_ps(p); }
inline void store_f(float* p, F a) { _mm512_storeu_ps(p, a); }
inline F add(F a, F b) { return _mm512_add_ps(a, b); }
inline F sub(F a, F b) { return _mm512_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm512_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }    // a b + c
inline F fnma(F a, F b, F c) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
inline float sum(F a) { return _mm512_reduce_add_ps(a); }
inline I widen_u8(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline I widen_u16(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
inline void store_i8(int8_t* p, I a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a)); }
inline I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
inline I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
inline int32_t most(I a) { return _mm512_reduce_max_epi32(a); }
inline int32_t sum(I a) { return _mm512_reduce_add_epi32(a); }
inline I bits_f(F a) { return _mm512_castps_si512(a); }
template <int type> inline F load_16(const void* p) {  // LANES numbers of 16 or 32 bits
  if (type == F32) return _mm512_loadu_ps(p);
  const __m256i h = _mm256_loadu_si256((const __m256i*)p);
  return type == F16 ? _mm512_cvtph_ps(h) : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline __m256i bfloats(F a) {
  const I bits = _mm512_castps_si512(a), odd = and_i(right<16>(bits), set_i(1));
  return _mm512_cvtepi32_epi16(right<16>(_mm512_add_epi32(_mm512_add_epi32(bits, set_i(0x7fff)), odd)));
}
inline void store_16(void* p, F a, int type) {  // LANES numbers, rounded to the nearest
  if (type == F32) return _mm512_storeu_ps(p, a);
  if (type == F16) return _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  _mm256_storeu_si256((__m256i*)p, bfloats(a));
}
// LANES lanes, the next of `packed` where the mask has a one and 0 elsewhere
inline F expand(F packed, uint32_t mask) {
  // in place: Zen 5 waits for what the target register held before, five cycles for each vector, if that is another one
  asm("vexpandps %0, %0%{%1%}%{z%}" : "+v"(packed) : "Yk"((__mmask16)mask));
  return packed;
}
inline F choose(uint32_t mask, F zero, F one) { return _mm512_mask_mov_ps(zero, (__mmask16)mask, one); }  // by the mask's bits
// the sums of four vectors' lanes
inline void sums4(F a, F b, F c, F d, float* out) {
  const F ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)), cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d p = _mm512_castps_pd(ab), q = _mm512_castps_pd(cd);
  const F all = add(_mm512_castpd_ps(_mm512_unpacklo_pd(p, q)), _mm512_castpd_ps(_mm512_unpackhi_pd(p, q)));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)));
}

#elif CC_ISA == 1

constexpr int LANES = 8;
typedef __m256i I;
typedef __m256 F;
inline I load_i(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline void store_i(void* p, I a) { _mm256_storeu_si256((__m256i*)p, a); }
inline I set_i(int32_t v) { return _mm256_set1_epi32(v); }
inline I and_i(I a, I b) { return _mm256_and_si256(a, b); }
inline I or_i(I a, I b) { return _mm256_or_si256(a, b); }
inline I add_i(I a, I b) { return _mm256_add_epi32(a, b); }
template <int n> inline I right(I a) { return _mm256_srli_epi32(a, n); }
template <int n> inline I left(I a) { return _mm256_slli_epi32(a, n); }
// vpmaddubsw saturates for codes of 8 bits, so bytes are widened: even ones and odd ones, signed and unsigned, to 16 bits
inline I dot4(I sum, I u8, I s8) {
  const I low = _mm256_set1_epi32(0x00ff00ff);
  const I even = _mm256_madd_epi16(_mm256_and_si256(u8, low), _mm256_srai_epi16(_mm256_slli_epi16(s8, 8), 8));
  const I odd = _mm256_madd_epi16(_mm256_srli_epi16(u8, 8), _mm256_srai_epi16(s8, 8));
  return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
}
inline F to_f(I a) { return _mm256_cvtepi32_ps(a); }
inline F set_f(float v) { return _mm256_set1_ps(v); }
inline F load_f(const float* p) { return _mm256_loadu_ps(p); }
inline void store_f(float* p, F a) { _mm256_storeu_ps(p, a); }
inline F add(F a, F b) { return _mm256_add_ps(a, b); }
inline F sub(F a, F b) { return _mm256_sub_ps(a, b); }
inline F mul(F a, F b) { return _mm256_mul_ps(a, b); }
inline F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
inline F fnma(F a, F b, F c) { return _mm256_fnmadd_ps(a, b, c); }
inline float sum(F a) {
  const __m128 h = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 q = _mm_add_ps(h, _mm_movehl_ps(h, h));
  return _mm_cvtss_f32(_mm_add_ss(q, _mm_movehdup_ps(q)));
}
inline I widen_u8(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)); }
inline I widen_u16(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)); }
inline void store_i8(int8_t* p, I a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
inline I max_i(I a, I b) { return _mm256_max_epi32(a, b); }
inline I sub_i(I a, I b) { return _mm256_sub_epi32(a, b); }
inline int32_t most(I a) {
  const __m128i h = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i q = _mm_max_epi32(h, _mm_unpackhi_epi64(h, h));
  return _mm_cvtsi128_si32(_mm_max_epi32(q, _mm_shuffle_epi32(q, 1)));
}
inline int32_t sum(I a) {
  const __m128i h = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  const __m128i q = _mm_add_epi32(h, _mm_unpackhi_epi64(h, h));
  return _mm_cvtsi128_si32(_mm_add_epi32(q, _mm_shuffle_epi32(q, 1)));
}
inline I bits_f(F a) { return _mm256_castps_si256(a); }
template <int type> inline F load_16(const void* p) {
  if (type == F32) return _mm256_loadu_ps((const float*)p);
  const __m128i h = _mm_loadu_si128((const __m128i*)p);
  return type == F16 ? _mm256_cvtph_ps(h) : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline void store_16(void* p, F a, int type) {
  if (type == F32) return _mm256_storeu_ps((float*)p, a);
  __m128i out;
  if (type == F16) {
    out = _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  } else {
    const I bits = _mm256_castps_si256(a), odd = and_i(right<16>(bits), set_i(1));
    const I rounded = right<16>(_mm256_add_epi32(_mm256_add_epi32(bits, set_i(0x7fff)), odd));
    out = _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
  }
  _mm_storeu_si128((__m128i*)p, out);
}
// where each of 8 lanes finds its number: the count of ones below it
struct Places {
  alignas(32) int32_t at[256][8];
  constexpr Places() : at() {
    for (int m = 0; m < 256; m++)
      for (int i = 0, n = 0; i < 8; i++) at[m][i] = m >> i & 1 ? n++ : 0;
  }
};
constexpr Places PLACES;
inline F expand(F packed, uint32_t mask) {
  const I bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const I kept = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits);
  const F moved = _mm256_permutevar8x32_ps(packed, _mm256_load_si256((const __m256i*)PLACES.at[mask & 255]));
  return _mm256_and_ps(moved, _mm256_castsi256_ps(kept));
}
inline F choose(uint32_t mask, F zero, F one) {
  const I bits = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  return _mm256_blendv_ps(zero, one, _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(mask), bits), bits)));
}
inline void sums4(F a, F b, F c, F d, float* out) {
  const F ab = add(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)), cd = add(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d));
  const __m256d p = _mm256_castps_pd(ab), q = _mm256_castps_pd(cd);
  const F all = add(_mm256_castpd_ps(_mm256_unpacklo_pd(p, q)), _mm256_castpd_ps(_mm256_unpackhi_pd(p, q)));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}

#else

constexpr int LANES = 16;
struct I { int32_t v[LANES]; };
struct F { float v[LANES]; };
#define CC_EACH for (int i = 0; i < LANES; i++)
inline I load_i(const void* p) { I a; __builtin_memcpy(&a, p, sizeof a); return a; }
inline void store_i(void* p, I a) { __builtin_memcpy(p, &a, sizeof a); }
inline I set_i(int32_t x) { I a; CC_EACH a.v[i] = x; return a; }
inline I and_i(I a, I b) { CC_EACH a.v[i] &= b.v[i]; return a; }
inline I or_i(I a, I b) { CC_EACH a.v[i] |= b.v[i]; return a; }
inline I add_i(I a, I b) { CC_EACH a.v[i] += b.v[i]; return a; }
template <int n> inline I right(I a) { CC_EACH a.v[i] = int32_t(uint32_t(a.v[i]) >> n); return a; }
template <int n> inline I left(I a) { CC_EACH a.v[i] = int32_t(uint32_t(a.v[i]) << n); return a; }
inline I dot4(I sum, I u8, I s8) {
  CC_EACH for (int k = 0; k < 32; k += 8) sum.v[i] += int32_t(uint8_t(uint32_t(u8.v[i]) >> k)) * int8_t(uint32_t(s8.v[i]) >> k);
  return sum;
}
inline F to_f(I a) { F r; CC_EACH r.v[i] = float(a.v[i]); return r; }
inline F set_f(float x) { F a; CC_EACH a.v[i] = x; return a; }
inline F load_f(const float* p) { F a; __builtin_memcpy(&a, p, sizeof a); return a; }
inline void store_f(float* p, F a) { __builtin_memcpy(p, &a, sizeof a); }
inline F add(F a, F b) { CC_EACH a.v[i] += b.v[i]; return a; }
inline F sub(F a, F b) { CC_EACH a.v[i] -= b.v[i]; return a; }
inline F mul(F a, F b) { CC_EACH a.v[i] *= b.v[i]; return a; }
inline F fma(F a, F b, F c) { CC_EACH c.v[i] += a.v[i] * b.v[i]; return c; }
inline F fnma(F a, F b, F c) { CC_EACH c.v[i] -= a.v[i] * b.v[i]; return c; }
inline float sum(F a) { float s = 0; CC_EACH s += a.v[i]; return s; }
inline I widen_u8(const uint8_t* p) { I a; CC_EACH a.v[i] = p[i]; return a; }
inline I widen_u16(const uint16_t* p) { I a; CC_EACH a.v[i] = p[i]; return a; }
inline void store_i8(int8_t* p, I a) { CC_EACH p[i] = int8_t(a.v[i]); }
inline I max_i(I a, I b) { CC_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
inline I sub_i(I a, I b) { CC_EACH a.v[i] -= b.v[i]; return a; }
inline int32_t most(I a) { int32_t s = a.v[0]; CC_EACH s = s > a.v[i] ? s : a.v[i]; return s; }
inline int32_t sum(I a) { int32_t s = 0; CC_EACH s += a.v[i]; return s; }
inline I bits_f(F a) { I r; __builtin_memcpy(&r, &a, sizeof r); return r; }
template <int type> inline F load_16(const void* p) { F a; CC_EACH a.v[i] = load_one(p, i, type); return a; }
inline void store_16(void* p, F a, int type) { CC_EACH store_one(p, i, type, a.v[i]); }
inline F expand(F packed, uint32_t mask) {
  F a;
  for (int i = 0, n = 0; i < LANES; i++) a.v[i] = mask >> i & 1 ? packed.v[n++] : 0.0f;
  return a;
}
inline F choose(uint32_t mask, F zero, F one) { CC_EACH if (mask >> i & 1) zero.v[i] = one.v[i]; return zero; }
inline void sums4(F a, F b, F c, F d, float* out) { out[0] = sum(a), out[1] = sum(b), out[2] = sum(c), out[3] = sum(d); }

#endif

// `count` of four numbers, at p + at
inline void store_four(void* p, int64_t at, int type, const float* four, int64_t count) {
#if CC_ISA > 0
  if (count >= 4 && type != F32) {
    const __m128 f = _mm_loadu_ps(four);
    __m128i out;
    if (type == F16) {
      out = _mm_cvtps_ph(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    } else {
      const __m128i bits = _mm_castps_si128(f), odd = _mm_and_si128(_mm_srli_epi32(bits, 16), _mm_set1_epi32(1));
      out = _mm_srli_epi32(_mm_add_epi32(_mm_add_epi32(bits, _mm_set1_epi32(0x7fff)), odd), 16);
      out = _mm_packus_epi32(out, out);
    }
    _mm_storel_epi64(reinterpret_cast<__m128i*>(static_cast<uint16_t*>(p) + at), out);
    return;
  }
#endif
  for (int64_t r = 0; r < 4 && r < count; r++) store_one(p, at + r, type, four[r]);
}

// LANES numbers of x, by their columns. The gather instructions take 1.3 cycles for each on Zen 5, inserts 0.7.
template <class Column> inline F pick(const float* x, const Column* column) {
#if CC_ISA > 0
  __m128 four[LANES / 4];
  for (int i = 0; i < LANES / 4; i++) {
    Column c[4];
    uint64_t word;
    __builtin_memcpy(&word, column + 4 * i, 8);
    if (sizeof(Column) == 2) c[0] = Column(word), c[1] = Column(word >> 16), c[2] = Column(word >> 32), c[3] = Column(word >> 48);
    else __builtin_memcpy(c, column + 4 * i, sizeof c);
    const __m128 a = _mm_insert_ps(_mm_load_ss(x + c[0]), _mm_load_ss(x + c[1]), 0x10);
    four[i] = _mm_insert_ps(_mm_insert_ps(a, _mm_load_ss(x + c[2]), 0x20), _mm_load_ss(x + c[3]), 0x30);
  }
  const __m256 low = _mm256_insertf128_ps(_mm256_castps128_ps256(four[0]), four[1], 1);
#if CC_ISA == 1
  return low;
#else
  return _mm512_insertf32x8(_mm512_castps256_ps512(low), _mm256_insertf128_ps(_mm256_castps128_ps256(four[2]), four[3], 1), 1);
#endif
#else
  F a;
  CC_EACH a.v[i] = x[column[i]];
  return a;
#endif
}

inline void ask_near(const void* p) { __builtin_prefetch(p, 0, 3); }  // for the line that p lies in, or would; nothing is read
inline void ask_far(const void* p) { __builtin_prefetch(p, 0, 2); }  // only as near as the second cache

inline constexpr int bytes_of(int type) { return type == F32 ? 4 : 2; }

// f(0) … f(count-1) on so many threads. One starts no team: within another team that is half a microsecond.
template <class Function> inline void each(int threads, int64_t count, const Function& f) {
  if (threads == 1) {
    for (int64_t i = 0; i < count; i++) f(i);
    return;
  }
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; i++) f(i);
}

template <int n> inline F byte_to_f(I bytes) { return to_f(and_i(right<8 * n>(bytes), set_i(255))); }  // byte n of every lane

}  // namespace
