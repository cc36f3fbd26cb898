// y = post (core (pre x)) for block diagonal matrices around a sparse core: kind armor, on a CPU. Each step is rounded to x's type.
#include "../native/dots.h"
#include "../native/jobs.h"

extern "C" int CC_NAME(cc_masked)(const Masked* weight, const Call* call);

namespace CC_NAME(cc) {
namespace {

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Diagonal {  // [count][block][block] of `type`, and what it is multiplied with and written to, M rows of count * block numbers
  const void* blocks;
  int64_t count, block;
  int type;
};

constexpr int64_t CHUNK = 48, WIDE = 256;  // rows of x, and the largest block, whose inputs are copied together

// A quad of outputs lies in one block, so that the block's inputs serve all four; blocks of other than 4 k rows end in a shorter quad.
template <class Math, int type, bool copied>
void quads(const Diagonal& d, int64_t M, const typename Math::X* x, int64_t stride, int64_t block, void* y, int64_t m_first) {
  const int64_t b = d.block, width = d.count * b;
  for (int64_t first = 0; first < b; first += 4) {
    const int64_t here = b - first < 4 ? b - first : 4;
    const char* at = static_cast<const char*>(d.blocks) + (block * b + first) * b * Math::SIZE;
    const char* w[4];
    for (int64_t r = 0; r < 4; r++) w[r] = at + (r < here ? r : 0) * b * Math::SIZE;
    blocks<6>(M, [&](auto size, int64_t m0) {
      constexpr int MR = decltype(size)::value;
      F sum[MR][4];
      for (int m = 0; m < MR; m++)
        for (int r = 0; r < 4; r++) sum[m][r] = set_f(0);
      dots<Math, 4, MR, copied>(w, copied ? x + m0 * b : x + m0 * stride, stride, b, 4 * b * Math::SIZE, sum);
      for (int m = 0; m < MR; m++) {
        float four[4];
        sums4(sum[m][0], sum[m][1], sum[m][2], sum[m][3], four);
        store_four(y, (m_first + m0 + m) * width + block * b + first, type, four, here);
      }
    });
  }
}

// Rows of x lie a multiple of pages apart and would push each other out of the cache, so a block's inputs are copied, steps side by side.
template <class Math, int type>
void product(const Diagonal& d, int64_t M, const typename Math::X* x, int64_t stride, int threads, void* y) {
  typedef typename Math::X X;
  const int64_t b = d.block;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t block = 0; block < d.count; block++) {
    const X* from = x + block * b;
    if (M < 3 || b > WIDE || b % Math::STEP) {
      quads<Math, type, false>(d, M, from, stride, block, y, 0);
      continue;
    }
    alignas(64) X space[CHUNK * WIDE];
    for (int64_t first = 0; first < M; first += CHUNK) {
      const int64_t count = M - first < CHUNK ? M - first : CHUNK;
      blocks<6>(count, [&](auto size, int64_t m0) {
        constexpr int MR = decltype(size)::value;
        X* to = space + m0 * b;
        for (int64_t k = 0; k < b; k += Math::STEP)
          for (int m = 0; m < MR; m++, to += Math::STEP) __builtin_memcpy(to, from + (first + m0 + m) * stride + k, sizeof(X) * Math::STEP);
      });
      quads<Math, type, true>(d, count, space, 0, block, y, first);
    }
  }
}

// x as fp32, unless numbers of x's own type are multiplied
const float* widened(const void* x, int64_t M, int64_t stride, int64_t width, int type, int threads, float* out) {
#pragma omp parallel for num_threads(threads) schedule(static) if (M > 8)
  for (int64_t m = 0; m < M; m++)
    for (int64_t k = 0; k < width; k++) out[m * width + k] = load_one(x, m * stride + k, type);
  return out;
}

template <int type> void diagonal(const Diagonal& d, const Call& c, const void* x, int64_t stride, float* wide, void* y) {
#if CC_ISA == 3
  if (type == BF16) return product<Words, BF16>(d, c.M, static_cast<const uint16_t*>(x), stride, c.threads, y);
#endif
  const int64_t width = d.count * d.block;
  product<Floats<type>, type>(d, c.M, widened(x, c.M, stride, width, type, c.threads, wide), width, c.threads, y);
}

void diagonal(const Diagonal& d, const Call& c, const void* x, int64_t stride, float* wide, void* y) {
  if (c.type == BF16) diagonal<BF16>(d, c, x, stride, wide, y);
  else if (c.type == F16) diagonal<F16>(d, c, x, stride, wide, y);
  else diagonal<F32>(d, c, x, stride, wide, y);
}

}  // namespace
}  // namespace

extern "C" int CC_NAME(cc_armor)(const Armor* weight, const Call* call) {
  using namespace CC_NAME(cc);
  const Armor& w = *weight;
  const Call& c = *call;
  if (c.type < F32 || c.type > F16) return CC_BAD_TYPE;
  if (!w.core || c.M < 0 || c.threads < 1) return CC_BAD_SHAPE;
  const int64_t K = w.core->K, N = w.core->N;
  if (K < 1 || N < 1 || w.block_in < 1 || w.block_out < 1 || K % w.block_in || N % w.block_out) return CC_BAD_SHAPE;
  if (c.M > 1 && c.stride < K) return CC_BAD_SHAPE;
  // in a row: pre's outputs, the core's outputs, and the core's own space, which serves as x in fp32 too
  const int64_t size = bytes_of(c.type), before = aligned(c.M * K * size), after = aligned(c.M * N * size);
  const int64_t most = K > N ? K : N, own = c.M ? 4 * (c.M + 16) * ((most + 31) / 32 * 32 + 32) : 0;
  if (c.workspace_bytes < before + after + own) return CC_SMALL_WORKSPACE;
  char* first = static_cast<char*>(c.workspace);
  char *second = first + before, *space = second + after;
  const Call inner = {c.M, K, c.type, c.threads, first, second, space, own};
  Call nothing = inner;
  nothing.M = 0;
  const int wrong = CC_NAME(cc_masked)(w.core, &nothing);  // before anything is written
  if (wrong) return wrong;
  diagonal({w.pre, K / w.block_in, w.block_in, c.type}, c, c.x, c.stride, reinterpret_cast<float*>(space), first);
  CC_NAME(cc_masked)(w.core, &inner);
  diagonal({w.post, N / w.block_out, w.block_out, c.type}, c, second, N, reinterpret_cast<float*>(space), c.y);
  return CC_OK;
}
