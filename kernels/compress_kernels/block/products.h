// Rows of a decoder's products, of every kind of weight, for block/cpu.cpp: by the kernels of the kinds on a slice of the weight.
//
// A product may be several one after the other, its steps: thin factors are two, ARMOR's are three. All output rows of a step must be
// there before the next one begins. Numbers between steps are fp32; `masked` and `masked_delta` round what they are given to their type.
#pragma once
#include "../native/jobs.h"
#include "../native/vec.h"
#include "attention.h"

extern "C" int CC_NAME(cc_int_grouped)(const IntGrouped* weight, const Call* call);
extern "C" int CC_NAME(cc_masked)(const Masked* weight, const Call* call);
extern "C" int CC_NAME(cc_masked_delta)(const MaskedDelta* weight, const Call* call);
extern "C" int CC_NAME(cc_factors)(const Factors* weight, const Call* call);
extern "C" int CC_NAME(cc_armor)(const Armor* weight, const Call* call);

namespace CC_NAME(cc) {
namespace {

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

template <class Weight> inline const Weight& as(const Linear& l) { return *static_cast<const Weight*>(l.weight); }

// -- slices of weights: rows begin .. end, begin a multiple of 16 ------------------------------------------------------

IntGrouped rows_of(const IntGrouped& w, int64_t begin, int64_t end) {
  IntGrouped part = w;
  const int64_t statistics = begin * (w.K / w.group);
  part.N = end - begin;
  part.codes += begin / 16 * 2 * w.K * w.bits;
  part.scale = static_cast<const char*>(w.scale) + statistics * size_of(w.scale_type);
  if (w.zero) part.zero += statistics;
  if (w.indptr) part.indptr += begin;
  if (w.step) part.step += begin / 16;
  return part;
}

Masked rows_of(const Masked& w, int64_t begin, int64_t end) {
  Masked part = w;
  part.N = end - begin;
  part.mask += begin * ((w.K + 31) / 32 * 4);
  if (!w.group) {
    part.start += begin;
    return part;
  }
  const int64_t statistics = begin * (w.K / w.group);
  part.values = static_cast<const char*>(w.values) + begin * (w.K / 4);
  part.scale = static_cast<const char*>(w.scale) + statistics * size_of(w.value_type);
  if (w.zero) part.zero += statistics;
  return part;
}

SharedVector rows_of(const SharedVector& s, int64_t K, int64_t begin) {
  SharedVector part = s;
  const int64_t row = s.kind == 0 ? 2 * K : s.kind == 1 ? (K + 3) / 4 * 4 : s.kind == 2 ? (K + 7) / 8 * 4 : 0;
  part.values = static_cast<const char*>(s.values) + begin * row;
  if (s.kind == 1 || s.kind == 2) part.scale += begin * ((K + s.group - 1) / s.group);
  return part;
}

// `mask` must live as long as the slice
MaskedDelta rows_of(const MaskedDelta& w, int type, int64_t begin, int64_t end, const uint32_t** mask) {
  MaskedDelta part = w;
  part.N = end - begin;
  part.base = static_cast<const char*>(w.base) + begin * w.K * size_of(type);
  part.one = rows_of(w.one, w.K, begin);
  if (w.has_low) part.low = rows_of(w.low, w.K, begin);
  *mask = w.mask[0] + begin * ((w.K + 31) / 32);
  part.mask = mask;
  return part;
}

// -- plain matrices ---------------------------------------------------------------------------------------------------

// y [M][rows] of a row-major matrix W [rows][K] and M rows of x; rows of x and of y lie x_stride and y_stride apart
template <int type>
void matrix(const char* W, int64_t K, int64_t M, const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride) {
  const int64_t whole = K / LANES * LANES, size = size_of(type);
  for (int64_t n = 0; n < rows; n += 4) {
    const int64_t here = rows - n < 4 ? rows - n : 4;
    const char* row[4];
    for (int r = 0; r < 4; r++) row[r] = W + (n + (r < here ? r : 0)) * K * size;
    for (int64_t m = 0; m < M; m++) {
      const float* from = x + m * x_stride;
      F acc[4] = {set_f(0), set_f(0), set_f(0), set_f(0)};
      for (int64_t k = 0; k < whole; k += LANES) {
        const F v = load_f(from + k);
        for (int r = 0; r < 4; r++) acc[r] = fma(load_16<type>(row[r] + k * size), v, acc[r]);
      }
      float four[4];
      sums4(acc[0], acc[1], acc[2], acc[3], four);
      for (int r = 0; r < here; r++) {
        for (int64_t k = whole; k < K; k++) four[r] += load_one(row[r], k, type) * from[k];
        y[m * y_stride + n + r] = four[r];
      }
    }
  }
}

void matrix(const void* W, int type, int64_t K, int64_t M, const float* x, int64_t x_stride, int64_t rows, float* y, int64_t y_stride) {
  const char* at = static_cast<const char*>(W);
  if (type == BF16) matrix<BF16>(at, K, M, x, x_stride, rows, y, y_stride);
  else if (type == F16) matrix<F16>(at, K, M, x, x_stride, rows, y, y_stride);
  else matrix<F32>(at, K, M, x, x_stride, rows, y, y_stride);
}

// The same of a block diagonal matrix of blocks [b][b], rows begin .. end; x [M][width]
void diagonal(const void* blocks, int64_t b, int type, int64_t M, const float* x, int64_t width, int64_t begin, int64_t end, float* y) {
  for (int64_t n = begin; n < end;) {
    const int64_t first = n / b * b, stop = first + b < end ? first + b : end;
    matrix(static_cast<const char*>(blocks) + n * b * size_of(type), type, b, M, x + first, width, stop - n, y + n - begin, end - begin);
    n = stop;
  }
}

// -- steps ------------------------------------------------------------------------------------------------------------

struct Space {  // a thread's own
  void* kernel;
  int64_t kernel_bytes;
  float* input;  // [M][input_width] of the widest factor
};

inline int steps(const Linear& l) { return l.kind == CC_ARMOR ? 3 : l.kind == CC_FACTORS && as<Factors>(l).rank ? 2 : 1; }

// How many outputs a step has
inline int64_t outputs(const Linear& l, int step) {
  if (step + 1 == steps(l)) return l.N;
  return l.kind == CC_FACTORS ? as<Factors>(l).rank : step ? l.N : l.K;
}

// How many inputs, about, each of them takes: what a step's work is shared out by
inline int64_t inputs(const Linear& l, int step) {
  if (l.kind == CC_FACTORS) return step + 1 == steps(l) ? as<Factors>(l).joined : as<Factors>(l).padded;
  if (l.kind == CC_ARMOR && step != 1) return step ? as<Armor>(l).block_out : as<Armor>(l).block_in;
  return l.K;
}

// Numbers that go from step to step, for each row of x
inline int64_t between(const Linear& l) {
  int64_t sum = 0;
  for (int step = 0; step + 1 < steps(l); step++) sum += outputs(l, step);
  return sum;
}

inline bool reads_x(const Linear& l, int step) { return l.kind != CC_ARMOR || step == 0; }

inline int64_t input_width(const Linear& l) { return l.kind == CC_FACTORS ? most(as<Factors>(l).padded, as<Factors>(l).joined) : 0; }

inline Linear factor(const Linear& l, bool last) {
  const Factors& w = as<Factors>(l);
  const IntGrouped* coded = last ? w.coded_U : w.coded_A;
  const void* weight = coded ? static_cast<const void*>(coded) : last ? w.U : w.A;
  return {last ? w.joined : w.padded, last ? w.N : w.rank, coded ? CC_INTS : CC_DENSE, l.type, 0, 0, weight, nullptr};
}

int64_t kernel_bytes(const Linear& l, int64_t M) {
  if (l.kind == CC_MASKED || l.kind == CC_ARMOR) return 4 * (M + 16) * ((l.K + 31) / 32 * 32 + 32);  // rows, or panels of them
  if (l.kind == CC_DELTA) return 8 * M + 4 * (M + 2) * ((l.K + 31) / 32 * 32 + 32);
  if (l.kind == CC_FACTORS) return most(steps(l) > 1 ? kernel_bytes(factor(l, false), M) : 0, kernel_bytes(factor(l, true), M));
  if (l.kind != CC_INTS) return 0;
  const IntGrouped& w = as<IntGrouped>(l);
  const int64_t bytes = M * (w.exact ? 4 * (w.K / w.group) + 4 * w.K : 8 * (w.K / w.sub) + w.K);
  return w.step ? (bytes + 63) / 64 * 64 + 4 * w.K * (M > 1 ? (M + 15) / 16 * 16 : 1) : bytes;
}

// x to l.type, `run`, and what it wrote back to fp32
template <class Run> int narrowed(const Linear& l, Call call, int64_t count, float* y, const Space& space, const Run& run) {
  call.type = l.type;
  if (l.type == F32) return run(call);
  const float* x = static_cast<const float*>(call.x);
  const int64_t numbers = call.M * l.K;
  char* narrow = static_cast<char*>(space.kernel) + space.kernel_bytes;
  for (int64_t i = 0; i < numbers; i++) store_one(narrow, i, l.type, x[i]);
  call.x = narrow, call.y = narrow + 2 * numbers;
  const int code = run(call);
  for (int64_t i = 0; i < call.M * count; i++) y[i] = load_one(call.y, i, l.type);
  return code;
}

// y [M][end-begin] = x [M][K] times rows begin .. end of a weight of one step; the bias is not in it
int product(const Linear& l, int64_t M, const float* x, int64_t begin, int64_t end, float* y, bool ready, const Space& space) {
  const int64_t count = end - begin;
  if (l.kind == CC_DENSE) {
    matrix(static_cast<const char*>(l.weight) + begin * l.K * size_of(l.type), l.type, l.K, M, x, l.K, count, y, count);
    return CC_OK;
  }
  const Call call = {M, l.K, F32, 1, x, y, space.kernel, space.kernel_bytes, ready, 0};
  if (l.kind == CC_INTS) {
    const IntGrouped part = rows_of(as<IntGrouped>(l), begin, end);
    return CC_NAME(cc_int_grouped)(&part, &call);
  }
  if (l.kind == CC_DELTA) {
    const uint32_t* mask;
    const MaskedDelta part = rows_of(as<MaskedDelta>(l), l.type, begin, end, &mask);
    return narrowed(l, call, count, y, space, [&](const Call& c) { return CC_NAME(cc_masked_delta)(&part, &c); });
  }
  const Masked part = rows_of(as<Masked>(l), begin, end);
  return narrowed(l, call, count, y, space, [&](const Call& c) { return CC_NAME(cc_masked)(&part, &c); });
}

// Columns first .. first+count of x in their order, times `by`
inline void gather(const Factors& w, const float* x, int64_t first, int64_t count, float by, float* out) {
  for (int64_t i = 0; i < count; i++) out[i] = x[w.order ? w.order[first + i] : first + i] * by;
}

// A row of what a factor is multiplied with, from a row of x and, for the last one, of A's outputs
inline void factor_input(const Factors& w, bool last, const float* x, const float* before, float* out) {
  const int64_t from = last ? w.rank : 0, count = last ? w.last : w.first, width = last ? w.joined : w.padded;
  if (last) __builtin_memcpy(out, before, 4 * w.rank);
  gather(w, x, last ? w.first : 0, count, last && w.scaled ? w.direct : 1.0f, out + from);
  __builtin_memset(out + from + count, 0, 4 * (width - from - count));
}

// Rows begin .. end of a step's outputs, to y [M][end-begin]: of x [M][K], and of the outputs of the step before
int step_rows(const Linear& l, int step, int64_t M, const float* x, const float* before, int64_t begin, int64_t end, float* y, bool ready, const Space& space) {
  if (l.kind == CC_ARMOR) {
    const Armor& w = as<Armor>(l);
    const Linear core = {l.K, l.N, CC_MASKED, l.type, 0, 0, w.core, nullptr};
    if (step == 1) return product(core, M, before, begin, end, y, false, space);
    if (step == 0) diagonal(w.pre, w.block_in, l.type, M, x, l.K, begin, end, y);
    else diagonal(w.post, w.block_out, l.type, M, before, l.N, begin, end, y);
    return CC_OK;
  }
  if (l.kind != CC_FACTORS) return product(l, M, x, begin, end, y, ready, space);
  const Factors& w = as<Factors>(l);
  const bool last = step + 1 == steps(l);
  const Linear own = factor(l, last);
  for (int64_t m = 0; m < M; m++) factor_input(w, last, x + m * l.K, before + m * w.rank, space.input + m * own.K);
  const int code = product(own, M, space.input, begin, end, y, false, space);
  for (int64_t i = 0; !last && i < M * (end - begin); i++) {
    if (w.silu) y[i] = y[i] / (1.0f + exponential(-y[i]));
    if (w.scaled) y[i] *= w.low;
  }
  return code;
}

// -- what cannot be run -----------------------------------------------------------------------------------------------

int unfit(const Linear& l, int64_t K, int64_t N) {
  if (l.K != K || l.N != N || !l.weight) return CC_BAD_SHAPE;
  if (l.bias && (l.bias_type < F32 || l.bias_type > F16)) return CC_BAD_TYPE;
  if (l.kind != CC_INTS && (l.type < F32 || l.type > F16)) return CC_BAD_TYPE;
  const Call nothing = {0, K, l.kind == CC_INTS ? F32 : l.type, 1, nullptr, nullptr, nullptr, 0, 0, 0};
  switch (l.kind) {
    case CC_DENSE: return CC_OK;
    case CC_INTS: {
      const IntGrouped& w = as<IntGrouped>(l);
      return w.K != K || w.N != N ? CC_BAD_SHAPE : CC_NAME(cc_int_grouped)(&w, &nothing);
    }
    case CC_MASKED: {
      const Masked& w = as<Masked>(l);
      return w.K != K || w.N != N ? CC_BAD_SHAPE : CC_NAME(cc_masked)(&w, &nothing);
    }
    case CC_FACTORS: {
      const Factors& w = as<Factors>(l);
      return w.K != K || w.N != N ? CC_BAD_SHAPE : CC_NAME(cc_factors)(&w, &nothing);
    }
    case CC_ARMOR: {
      const Armor& w = as<Armor>(l);
      return !w.core || w.core->K != K || w.core->N != N ? CC_BAD_SHAPE : CC_NAME(cc_armor)(&w, &nothing);
    }
    case CC_DELTA: {
      const MaskedDelta& w = as<MaskedDelta>(l);
      if (w.K != K || w.N != N || w.tasks != 1 || w.bias) return CC_BAD_SHAPE;
      const int code = CC_NAME(cc_masked_delta)(&w, &nothing);  // it looks at its workspace last
      return code == CC_SMALL_WORKSPACE ? CC_OK : code;
    }
  }
  return CC_BAD_TYPE;
}

}  // namespace
}  // namespace
