// Norms, rotation and attention of one token, for block/cpu.cpp; fp32, keys and values as the cache has them.
#pragma once
#include "../native/jobs.h"
#include "../native/vec.h"

namespace CC_NAME(cc) {
namespace {

constexpr int64_t HEAD = 512, TOGETHER = 4;  // the largest head, heads that are computed together

inline int64_t size_of(int type) { return type == F32 ? 4 : 2; }

inline F load_at(const void* p, int64_t i, int type) {
  const char* at = static_cast<const char*>(p) + i * size_of(type);
  return type == BF16 ? load_16<BF16>(at) : type == F16 ? load_16<F16>(at) : load_16<F32>(at);
}

inline F larger(F a, F b) {
#if CC_ISA >= 2
  return _mm512_max_ps(a, b);
#elif CC_ISA == 1
  return _mm256_max_ps(a, b);
#else
  CC_EACH a.v[i] = b.v[i] > a.v[i] ? b.v[i] : a.v[i];
  return a;
#endif
}

// the sums of four vectors
inline void sums(const F* a, float* out) {
#if CC_ISA >= 2
  const F ab = add(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
  const F cd = add(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
  const F all = add(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif CC_ISA == 1
  const F ab = _mm256_hadd_ps(a[0], a[1]), cd = _mm256_hadd_ps(a[2], a[3]), all = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
#else
  for (int i = 0; i < 4; i++) out[i] = sum(a[i]);
#endif
}

// e^x to 2 units in the last place, x clamped to -86 .. 88; NaN stays NaN
inline float exponential(float x) {
  x = x < -86.0f ? -86.0f : x;
  x = x > 88.0f ? 88.0f : x;
  const float rounded = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the nearest integer is in the low bits
  const float n = rounded - 12582912.0f, r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  return p * from_bits((to_bits(rounded) - 0x4b400000u + 127u) << 23);
}

// out = x / sqrt(mean x^2 + eps) * weight
void rms_norm(const float* x, const void* weight, int type, int64_t n, float eps, float* out) {
  F squares = set_f(0);
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) squares = fma(load_f(x + i), load_f(x + i), squares);
  float total = sum(squares);
  for (; i < n; i++) total += x[i] * x[i];
  const float by = 1.0f / __builtin_sqrtf(total / float(n) + eps);
  for (i = 0; i + LANES <= n; i += LANES) store_f(out + i, mul(mul(load_f(x + i), set_f(by)), load_at(weight, i, type)));
  for (; i < n; i++) out[i] = x[i] * by * load_one(weight, i, type);
}

// one head of q or k: its norm, then its rotation
void turn(const float* x, const void* weight, const Decoder& d, const float* cos, const float* sin, float* out) {
  const int64_t half = d.head_dim / 2;
  float normed[HEAD];
  if (weight) {
    rms_norm(x, weight, d.norm_type, d.head_dim, d.eps, normed);
    x = normed;
  }
  for (int64_t i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    out[i] = a * cos[i] - b * sin[i];
    out[i + half] = b * cos[i] + a * sin[i];
  }
}

// scores become the softmax of scale times them (scale > 0), not yet divided by its sum, which is returned; there is room for LANES more
float soften(float* scores, int64_t count, float scale) {
  for (int64_t i = count; i < (count + LANES - 1) / LANES * LANES; i++) scores[i] = -__builtin_inff();
  F most = set_f(-__builtin_inff());
  for (int64_t i = 0; i < count; i += LANES) most = larger(load_f(scores + i), most);
  float lanes[LANES], top = -__builtin_inff();
  store_f(lanes, most);
  for (int i = 0; i < LANES; i++) top = lanes[i] > top ? lanes[i] : top;
  for (int64_t i = 0; i < count; i++) scores[i] = exponential((scores[i] - top) * scale);
  F total = set_f(0);
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) total = add(total, load_f(scores + i));
  float all = sum(total);
  for (; i < count; i++) all += scores[i];
  return all;
}

// V vectors of the outputs of R heads: the values' rows, weighted
template <int type, int R, int V>
void weigh(const char* values, const char* last, int64_t row, int64_t count, const float* p, int64_t stride, const float* by, float* out, int64_t head) {
  F acc[R][V];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) acc[r][v] = set_f(0);
  for (int64_t s = 0; s <= count; s++) {
    const char* at = s < count ? values + s * row : last;
    for (int v = 0; v < V; v++) {
      const F f = load_16<type>(at + v * LANES * (type == F32 ? 4 : 2));
      for (int r = 0; r < R; r++) acc[r][v] = fma(set_f(p[r * stride + s]), f, acc[r][v]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store_f(out + r * head + v * LANES, mul(acc[r][v], set_f(by[r])));
}

struct Past {  // of one row of x and one head of keys and values
  const char *keys, *values;      // `count` places
  const char *key, *value;        // and the token's own
  int64_t count;
};

// R heads that share keys and values: q [R][head_dim] -> out [R][head_dim]
template <int type, int R> void attend(const Decoder& d, const Past& past, const float* q, float* scores, int64_t stride, float* out) {
  const int64_t head = d.head_dim, size = size_of(type), row = head * size;
  for (int64_t s = 0; s <= past.count; s += 4) {  // four keys at once; beyond the last, the last again
    const char* key[4];
    for (int k = 0; k < 4; k++) key[k] = s + k < past.count ? past.keys + (s + k) * row : past.key;
    F acc[R][4];
    for (int r = 0; r < R; r++)
      for (int k = 0; k < 4; k++) acc[r][k] = set_f(0);
    for (int64_t i = 0; i < head; i += LANES)
      for (int k = 0; k < 4; k++) {
        const F f = load_16<type>(key[k] + i * size);
        for (int r = 0; r < R; r++) acc[r][k] = fma(f, load_f(q + r * head + i), acc[r][k]);
      }
    for (int r = 0; r < R; r++) sums(acc[r], scores + r * stride + s);
  }
  float by[R];
  for (int r = 0; r < R; r++) by[r] = 1.0f / soften(scores + r * stride, past.count + 1, d.scale);
  for (int64_t i = 0; i < head;) {
    const int64_t left = (head - i) / LANES;
    const char *values = past.values + i * size, *last = past.value + i * size;
    if (left >= 4) weigh<type, R, 4>(values, last, row, past.count, scores, stride, by, out + i, head), i += 4 * LANES;
    else if (left >= 2) weigh<type, R, 2>(values, last, row, past.count, scores, stride, by, out + i, head), i += 2 * LANES;
    else weigh<type, R, 1>(values, last, row, past.count, scores, stride, by, out + i, head), i += LANES;
  }
}

template <int type> void attend_some(const Decoder& d, const Past& past, int64_t R, const float* q, float* scores, int64_t stride, float* out) {
  if (R == 4) attend<type, 4>(d, past, q, scores, stride, out);
  else if (R == 3) attend<type, 3>(d, past, q, scores, stride, out);
  else if (R == 2) attend<type, 2>(d, past, q, scores, stride, out);
  else attend<type, 1>(d, past, q, scores, stride, out);
}

}  // namespace
}  // namespace
