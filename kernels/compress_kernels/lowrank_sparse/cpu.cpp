// y = U [A x_first ; x_last] for thin factors and whole columns: kinds lowrank_sparse and lost, on a CPU.
//
// x's columns are gathered row by row, A's product is rounded to x's type and put where U expects it, and U's product is y. Plain
// factors are read row by row as they are stored; coded ones go through int_grouped's product.
#include "../native/dots.h"
#include "../native/jobs.h"

extern "C" int CC_NAME(cc_int_grouped)(const IntGrouped* weight, const Call* call);
extern "C" float expf(float);

namespace CC_NAME(cc) {
namespace {

// Space that `coded` needs for M rows of x, as int_grouped/cpu.cpp counts it
int64_t space_of(const IntGrouped* coded, int64_t M) {
  if (!coded) return 0;
  return M * (coded->exact ? 4 * (coded->K / coded->group + coded->K) : 8 * (coded->K / coded->sub) + coded->K);
}

struct Plan {  // of the workspace
  int64_t size;                        // bytes of a number that is multiplied
  int64_t inner, joined, hidden, own;  // bytes of A's inputs, U's inputs, A's coded outputs, and of a coded product
  int64_t all() const { return inner + joined + hidden + own; }
};

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

Plan plan(const Factors& w, const Call& c, bool words) {
  const int64_t a = space_of(w.coded_A, c.M), u = space_of(w.coded_U, c.M);
  const int64_t size = words || w.coded_U ? bytes_of(c.type) : 4;
  return {size, aligned(c.M * w.padded * size), aligned(c.M * w.joined * size), w.coded_A ? aligned(c.M * w.rank * size) : 0, a > u ? a : u};
}

inline float rounded(float f, int type) {
  uint32_t bits = 0;
  store_one(&bits, 0, type, f);
  return load_one(&bits, 0, type);
}

// What becomes of an output of A, in steps that are rounded as the reference's are
inline float passed(const Factors& w, float h, int type) {
  h = rounded(h, type);
  if (w.silu) h = rounded(h / (1 + expf(-h)), type);
  return w.scaled ? rounded(h * w.low, type) : h;
}

// Columns first .. first+count of x in their order, as `type`, and zeros up to `width`
void gather(const Factors& w, const Call& c, int64_t m, int64_t first, int64_t count, int64_t width, int type, void* out) {
  const char* x = static_cast<const char*>(c.x) + m * c.stride * bytes_of(c.type);
  if (type == c.type && bytes_of(type) == 2) {
    const uint16_t* from = reinterpret_cast<const uint16_t*>(x);
    uint16_t* to = static_cast<uint16_t*>(out);
    if (w.order) for (int64_t i = 0; i < count; i++) to[i] = from[w.order[first + i]];
    else __builtin_memcpy(to, from + first, 2 * count);
  } else {
    for (int64_t i = 0; i < count; i++) store_one(out, i, type, load_one(x, w.order ? w.order[first + i] : first + i, c.type));
  }
  __builtin_memset(static_cast<char*>(out) + count * bytes_of(type), 0, (width - count) * bytes_of(type));
}

template <class Math> void product(const Factors& w, const Call& c, const Plan& p, int type) {
  char* inner = static_cast<char*>(c.workspace);
  char* joined = inner + p.inner;
  const int64_t size = p.size, count = c.M;
#pragma omp parallel for num_threads(c.threads) schedule(static) if (count > 8)
  for (int64_t m = 0; m < count; m++) {
    char* to = joined + (m * w.joined + w.rank) * size;
    if (w.rank) gather(w, c, m, 0, w.first, w.padded, type, inner + m * w.padded * size);
    gather(w, c, m, w.first, w.last, w.joined - w.rank, type, to);
    if (w.scaled)
      for (int64_t i = 0; i < w.last; i++) store_one(to, i, type, rounded(load_one(to, i, type) * w.direct, c.type));
  }
  typedef typename Math::X X;
  if (w.coded_A) {
    char* hidden = joined + p.joined;
    const Call call = {c.M, w.padded, type, c.threads, inner, hidden, hidden + p.hidden, p.own};
    CC_NAME(cc_int_grouped)(w.coded_A, &call);
    for (int64_t m = 0; m < count; m++)
      for (int64_t r = 0; r < w.rank; r++)
        store_one(joined, m * w.joined + r, type, passed(w, load_one(hidden, m * w.rank + r, type), c.type));
  } else if (w.rank) {
    const X* x = reinterpret_cast<const X*>(inner);
    plain<Math>(static_cast<const char*>(w.A), w.rank, w.padded, x, w.padded, count, c.threads, [&](int64_t m, int64_t n, const float* four) {
      if (type == c.type && !w.silu && !w.scaled) return store_four(joined, m * w.joined + n, type, four, w.rank - n);
      for (int64_t r = 0; r < 4 && n + r < w.rank; r++) store_one(joined, m * w.joined + n + r, type, passed(w, four[r], c.type));
    });
  }
  if (w.coded_U) {
    const Call call = {c.M, w.joined, type, c.threads, joined, c.y, joined + p.joined + p.hidden, p.own};
    CC_NAME(cc_int_grouped)(w.coded_U, &call);
    return;
  }
  const X* x = reinterpret_cast<const X*>(joined);
  plain<Math>(static_cast<const char*>(w.U), w.N, w.joined, x, w.joined, count, c.threads, [&](int64_t m, int64_t n, const float* four) {
    store_four(c.y, m * w.N + n, c.type, four, w.N - n);
  });
}

int unfit(const IntGrouped* coded, int64_t K, int64_t N) {
  if (!coded) return CC_OK;
  if (coded->K != K || coded->N != N) return CC_BAD_SHAPE;
  const Call nothing = {0, K, F32, 1, nullptr, nullptr, nullptr, 0};
  return CC_NAME(cc_int_grouped)(coded, &nothing);
}

}  // namespace
}  // namespace

extern "C" int CC_NAME(cc_factors)(const Factors* weight, const Call* call) {
  using namespace CC_NAME(cc);
  const Factors& w = *weight;
  const Call& c = *call;
  if (c.type < F32 || c.type > F16) return CC_BAD_TYPE;
  if (c.M < 0 || c.threads < 1 || (c.M > 1 && c.stride < w.K)) return CC_BAD_SHAPE;
  if (w.K < 1 || w.N < 1 || w.rank < 0 || w.first < 0 || w.last < 0 || w.rank + w.last < 1) return CC_BAD_SHAPE;
  if (w.first > w.K || w.last > w.K || w.padded < w.first || w.joined < w.rank + w.last || (w.rank && w.padded < 1)) return CC_BAD_SHAPE;
  if (!w.order && w.first + w.last > w.K) return CC_BAD_SHAPE;
  const bool coded = w.coded_U != nullptr;
  if (w.rank && coded != (w.coded_A != nullptr)) return CC_BAD_SHAPE;
  int wrong = unfit(w.coded_U, w.joined, w.N);
  if (!wrong && w.rank) wrong = unfit(w.coded_A, w.padded, w.rank);
  if (wrong) return wrong;
  const bool words = CC_ISA == 3 && c.type == BF16;
  const Plan p = plan(w, c, words);
  if (c.workspace_bytes < p.all()) return CC_SMALL_WORKSPACE;
#if CC_ISA == 3
  if (words) {
    product<Words>(w, c, p, BF16);
    return CC_OK;
  }
#endif
  const int type = coded ? c.type : F32;
  if (c.type == BF16) product<Floats<BF16>>(w, c, p, type);
  else if (c.type == F16) product<Floats<F16>>(w, c, p, type);
  else product<Floats<F32>>(w, c, p, type);
  return CC_OK;
}
