// y = x W_tᵀ, where W_t is one base weight plus the task's factor times a delta of shared numbers and the task's own bits, on a CPU.
//
// W_t is never whole: pieces of its rows are merged in fp32, rounded once to the type of x, as `extract` writes them, and multiplied
// with the task's rows of x while they lie in the nearest cache. A pass over the base and the shared numbers serves all tasks of a
// batch. Tasks of many rows, where x is bf16 and the machine has AVX-512 BF16, go through panels of x (native/panels.h), others
// through dot products. Which of them depends on the task's own rows of x alone, so a batch equals the loop over its tasks.
#include "../native/dots.h"
#include "../native/jobs.h"
#include "../native/panels.h"
#include "words.h"

namespace CC_NAME(cc) {
namespace {

constexpr int64_t BAND = 4, PIECE = 1024;  // rows and columns of W that are merged together
constexpr int64_t MOST = 96, MANY = 12;    // rows of x whose sums are held; a task's rows of x from which on they go through panels

// the bits of LANES columns
inline uint32_t bits_of(const uint32_t* mask, int64_t k) { return mask[k / 32] >> (k % 32); }

// Columns k .. k+count of a row of shared numbers in fp32, and zeros up to `width`, at most PIECE; k is a multiple of 32
void decode(const SharedVector& s, int64_t K, int64_t row, int64_t k, int64_t count, int64_t width, float* out) {
  for (int64_t i = count; i < width; i++) out[i] = 0;
  if (s.kind == CONSTANT) {
    for (int64_t i = 0; i < count; i++) out[i] = *static_cast<const float*>(s.values);
    return;
  }
  if (s.kind == PLAIN) {
    const uint16_t* from = static_cast<const uint16_t*>(s.values) + row * K + k;
    for (int64_t i = 0; i < count; i++) out[i] = from_bits(uint32_t(from[i]) << 16);
    return;
  }
  const uint8_t* code = static_cast<const uint8_t*>(s.values) + row * row_bytes(s, K) + (s.kind == BYTES ? k : k / 2);
  alignas(64) uint8_t bytes[PIECE];
  if (s.kind == NIBBLES) {
    for (int64_t i = 0; i < (count + 1) / 2; i++) bytes[2 * i] = code[i] & 15, bytes[2 * i + 1] = code[i] >> 4;
    code = bytes;
  }
  const uint16_t* scales = s.scale + row * ((K + s.group - 1) / s.group);
  for (int64_t i = 0; i < count;) {
    const int64_t g = (k + i) / s.group, left = (g + 1) * s.group - k, end = left < count ? left : count;
    const float scale = from_bits(uint32_t(scales[g]) << 16);
    for (; i + LANES <= end; i += LANES) store_f(out + i, mul(sub(to_f(widen_u8(code + i)), set_f(float(s.zero))), set_f(scale)));
    for (; i < end; i++) out[i] = float(int(code[i]) - s.zero) * scale;
  }
}

// Columns k .. end of a row of a task's weight, or of the base's where task is -1, rounded to `type`; end - k is a multiple of 32, at most
// PIECE, and columns from K on are zeros.
template <int type> void merge(const MaskedDelta& w, int64_t row, int64_t k, int64_t end, int32_t task, char* out) {
  constexpr int64_t SIZE = bytes_of(type);
  const int64_t width = end - k, count = w.K - k < width ? w.K - k : width;
  const char* base = static_cast<const char*>(w.base) + (row * w.K + k) * SIZE;
  if (task < 0) {
    __builtin_memcpy(out, base, count * SIZE);
    __builtin_memset(out + count * SIZE, 0, (width - count) * SIZE);
    return;
  }
  const uint32_t* mask = w.mask[task] + row * ((w.K + 31) / 32) + k / 32;
#if CC_ISA == 3
  if (type == BF16 && in_words(w))
    return by_mode(w, [&](auto mode, auto scaled) {
      merge_words<Mode(decltype(mode)::value), decltype(scaled)::value>(w, row, k, count, mask, w.factor[task], reinterpret_cast<uint16_t*>(out));
    });
#endif
  alignas(64) float one[PIECE], zero[PIECE];
  decode(w.one, w.K, row, k, count, width, one);
  if (w.has_low) decode(w.low, w.K, row, k, count, width, zero);
  else for (int64_t i = 0; i < width; i++) zero[i] = w.signs ? -one[i] : 0.0f;
  const F factor = set_f(w.factor[task]);
  for (int64_t i = 0; i < width; i += LANES) {
    alignas(64) char some[64] = {0};
    const bool whole = i + LANES <= count;
    if (!whole && i < count) __builtin_memcpy(some, base + i * SIZE, (count - i) * SIZE);
    const F d = i < count ? choose(bits_of(mask, i), load_f(zero + i), load_f(one + i)) : set_f(0);
    store_16(out + i * SIZE, add(load_16<type>(whole ? base + i * SIZE : some), mul(d, factor)), type);
  }
}

// Names what columns k .. end of a row are merged from
inline void ask(const MaskedDelta& w, int64_t row, int64_t k, int64_t end, int64_t size, Ahead& ahead) {
  const int64_t shared = row_bytes(w.one, w.K), width = end - k;
  ahead.add(static_cast<const char*>(w.base) + (row * w.K + k) * size, width * size);
  if (shared) ahead.add(static_cast<const char*>(w.one.values) + row * shared + shared * k / w.K, shared * width / w.K);
  const int64_t low = w.has_low ? row_bytes(w.low, w.K) : 0;
  if (low) ahead.add(static_cast<const char*>(w.low.values) + row * low + low * k / w.K, low * width / w.K);
  for (int64_t t = 0; t < w.tasks; t++) ahead.add(w.mask[t] + row * ((w.K + 31) / 32) + k / 32, width / 8);
}

struct Run {  // rows of x of one task, side by side in `order`
  int64_t first, count;
  int32_t task;
};

struct Batch {
  const int64_t* order;  // places of rows in x and y
  int64_t count;
};

// The next run of rows of one task from `at` on, at most `most` of them
inline Run run_at(const MaskedDelta& w, const Batch& rows, int64_t at, int64_t most) {
  Run found = {at, 0, w.task[rows.order[at]]};
  while (found.count < most && at + found.count < rows.count && w.task[rows.order[at + found.count]] == found.task) found.count++;
  return found;
}

#if CC_ISA == 3

constexpr int DIRECT = 4;  // rows of x that are multiplied with numbers merged in registers

// BAND rows of W, merged in registers, times MR rows of x from `at` on, whose tasks may be the same; `ask`: for the next band's numbers
template <int MR, bool same, Mode mode, bool scaled>
void direct_block(const MaskedDelta& w, const int64_t* rows, const int32_t* tasks, const uint16_t* x, int64_t stride, bool ask, F (*held)[BAND]) {
  const int64_t whole = w.K / 32 * 32, words = (w.K + 31) / 32, ahead = ask ? BAND * w.K : 0;
  const int64_t ahead_one = ask ? BAND * row_bytes(w.one, w.K) : 0, ahead_low = ask && w.has_low ? BAND * row_bytes(w.low, w.K) : 0;
  const uint16_t* base[BAND];
  Line one[BAND], low[BAND];
  const uint32_t* mask[MR][BAND];
  F sum[MR][BAND], factor[MR];
  for (int r = 0; r < BAND; r++) {
    base[r] = static_cast<const uint16_t*>(w.base) + rows[r] * w.K;
    one[r].open(w.one, w.K, rows[r], 0);
    if (mode == LEVELS) low[r].open(w.low, w.K, rows[r], 0);
  }
  for (int m = 0; m < MR; m++) {
    factor[m] = set_f(w.factor[tasks[m]]);
    for (int r = 0; r < BAND; r++) mask[m][r] = w.mask[tasks[m]] + rows[r] * words, sum[m][r] = set_f(0);
  }
  const auto add_step = [&](int r, int64_t k, I b, I up, I down) __attribute__((always_inline)) {
    const Step s = step_of<mode, scaled>(b, one[r], up, low[r], down);
    I d;
    for (int m = 0; m < MR; m++) {
      if (m == 0 || (!same && tasks[m] != tasks[m - 1])) d = merged<mode>(s, factor[m], mask[m][r][k / 32]);
      sum[m][r] = _mm512_dpbf16_ps(sum[m][r], (__m512bh)d, (__m512bh)load_i(x + m * stride + k));
    }
  };
  const uint16_t *up_at[BAND], *down_at[BAND];  // of numbers that are not scaled
  for (int r = 0; r < BAND; r++) up_at[r] = reinterpret_cast<const uint16_t*>(one[r].at);
  for (int r = 0; r < BAND && mode == LEVELS; r++) down_at[r] = reinterpret_cast<const uint16_t*>(low[r].at);
  for (int64_t k = 0; k < whole; k += 32) {
    if (ask && k % 512 == 0)
      for (int m = 0; m < (same ? 1 : MR); m++)
        for (int r = 0; r < BAND; r++) __builtin_prefetch(mask[m][r] + k / 32 + BAND * words);
    I b[BAND], up[BAND], down[BAND];
    for (int r = 0; r < BAND; r++) {
      if (scaled && k >= one[r].until) one[r].next();
      if (mode == LEVELS && scaled && k >= low[r].until) low[r].next();
      b[r] = load_i(base[r] + k), up[r] = scaled ? one[r].words(k) : load_i(up_at[r] + k), down[r] = up[r];
      if (mode == LEVELS) down[r] = scaled ? low[r].words(k) : load_i(down_at[r] + k);
      __builtin_prefetch(base[r] + k + ahead);
      __builtin_prefetch((scaled ? one[r].place(k) : reinterpret_cast<const char*>(up_at[r] + k)) + ahead_one);
      if (mode == LEVELS) __builtin_prefetch((scaled ? low[r].place(k) : reinterpret_cast<const char*>(down_at[r] + k)) + ahead_low);
    }
    for (int r = 0; r < BAND; r++) add_step(r, k, b[r], up[r], down[r]);
  }
  for (int r = 0; r < BAND && whole < w.K; r++) {
    const int64_t count = w.K - whole;
    if (scaled && whole >= one[r].until) one[r].next();
    if (mode == LEVELS && scaled && whole >= low[r].until) low[r].next();
    const I up = one[r].last(whole, count);
    add_step(r, whole, _mm512_maskz_loadu_epi16((1u << count) - 1, base[r] + whole), up, mode == LEVELS ? low[r].last(whole, count) : up);
  }
  for (int m = 0; m < MR; m++)
    for (int r = 0; r < BAND; r++) held[m][r] = sum[m][r];
}

// The end of the rows of x from `at` on whose runs are merged in registers
inline int64_t direct_end(const MaskedDelta& w, const Batch& batch, int64_t at, int64_t last) {
  while (at < last) {
    const Run run = run_at(w, batch, at, last - at);
    if (!in_words(w) || run.task < 0 || run.count > DIRECT) break;
    at += run.count;
  }
  return at;
}

// Sums of four rows of W and the rows of x from `at` to `end`
void direct(const MaskedDelta& w, const Batch& batch, int64_t at, int64_t end, int64_t row, const uint16_t* x, int64_t stride, F (*held)[BAND]) {
  int32_t tasks[DIRECT];
  int64_t rows[BAND];
  for (int64_t r = 0; r < BAND; r++) rows[r] = row + r < w.N ? row + r : w.N - 1;
  blocks<DIRECT>(end - at, [&](auto size, int64_t m0) {
    constexpr int MR = decltype(size)::value;
    const uint16_t* here = x + (at + m0) * stride;
    bool same = true;
    for (int m = 0; m < MR; m++) tasks[m] = w.task[batch.order[at + m0 + m]], same &= tasks[m] == tasks[0];
    const bool ask = at + m0 == 0 && row + 2 * BAND <= w.N;
    by_mode(w, [&](auto mode, auto scaled) {
      constexpr Mode own = Mode(decltype(mode)::value);
      if (same) direct_block<MR, true, own, decltype(scaled)::value>(w, rows, tasks, here, stride, ask, held + m0);
      else direct_block<MR, false, own, decltype(scaled)::value>(w, rows, tasks, here, stride, ask, held + m0);
    });
  });
}

#endif

// Products of a few rows of x for each task; x lies in the order of the batch, a row every `stride` numbers
template <class Math, int type> void product(const MaskedDelta& w, const Call& c, const Batch& rows, const typename Math::X* x, int64_t stride) {
  const int64_t stop = (w.K + 31) / 32 * 32;
#pragma omp parallel for num_threads(c.threads) schedule(static)
  for (int64_t row = 0; row < w.N; row += BAND) {
    alignas(64) char piece[BAND][(PIECE + 32) * Math::SIZE];
    alignas(64) F sums[MOST][BAND];
    const char* lines[BAND];
    Ahead ahead;
    for (int r = 0; r < BAND; r++) lines[r] = piece[r];
    for (int64_t first = 0; first < rows.count; first += MOST) {
      const int64_t last = first + MOST < rows.count ? first + MOST : rows.count;
      for (int64_t k = 0; k < stop; k += PIECE) {
        const int64_t end = k + PIECE < stop ? k + PIECE : stop;
        int64_t at = first;
#if CC_ISA == 3
        if constexpr (sizeof(typename Math::X) == 2) {
          at = direct_end(w, rows, first, last);
          if (k == 0) direct(w, rows, first, at, row, x, stride, sums);
        }
#endif
        const int64_t below = end < stop ? row : row + BAND, then = end < stop ? end : 0;
        ahead.clear();
        for (int64_t r = below; at == 0 && r < below + BAND && r < w.N; r++) ask(w, r, then, then + PIECE < stop ? then + PIECE : stop, Math::SIZE, ahead);
        while (at < last) {
          const Run run = run_at(w, rows, at, last - at);
          for (int64_t r = 0; r < BAND; r++) {
            merge<type>(w, row + r < w.N ? row + r : w.N - 1, k, end, run.task, piece[r]);
            if (at == 0) ahead.some((ahead.count + BAND - 1) / BAND);
          }
          blocks<6>(run.count, [&](auto size, int64_t m0) {
            constexpr int MR = decltype(size)::value;
            F sum[MR][BAND], (*held)[BAND] = sums + (at - first) + m0;
            for (int m = 0; m < MR; m++)
              for (int r = 0; r < BAND; r++) sum[m][r] = k ? held[m][r] : set_f(0);
            dots<Math, BAND, MR>(lines, x + (at + m0) * stride + k, stride, end - k, 0, sum);
            for (int m = 0; m < MR; m++)
              for (int r = 0; r < BAND; r++) held[m][r] = sum[m][r];
          });
          at += run.count;
        }
      }
      for (int64_t m = first; m < last; m++) {
        float out[BAND];
        F* sum = sums[m - first];
        sums4(sum[0], sum[1], sum[2], sum[3], out);
        for (int r = 0; r < BAND && w.bias && row + r < w.N; r++) out[r] += load_one(w.bias, row + r, c.type);
        store_four(c.y, rows.order[m] * w.N + row, c.type, out, w.N - row);
      }
    }
  }
}

// Rows of x as numbers that `product` takes, in the order of the batch, with zeros beyond K
template <class X> void gather(const MaskedDelta& w, const Call& c, const Batch& rows, X* x, int64_t stride) {
  const bool same = sizeof(X) == bytes_of(c.type);
#pragma omp parallel for num_threads(c.threads) schedule(static) if (rows.count > 8)
  for (int64_t i = 0; i < rows.count; i++) {
    const int64_t from = rows.order[i] * c.stride;
    X* to = x + i * stride;
    if (same) __builtin_memcpy(to, static_cast<const char*>(c.x) + from * sizeof(X), w.K * sizeof(X));
    else for (int64_t k = 0; k < w.K; k++) to[k] = X(load_one(c.x, from + k, c.type));
    __builtin_memset(to + w.K, 0, (stride - w.K) * sizeof(X));
  }
}

template <class Math, int type> void few(const MaskedDelta& w, const Call& c, const Batch& rows, void* space) {
  typedef typename Math::X X;
  const int64_t stride = (w.K + 31) / 32 * 32 + 32;  // not a whole number of pages: rows would fall on each other in the cache
  gather(w, c, rows, static_cast<X*>(space), stride);
  product<Math, type>(w, c, rows, static_cast<const X*>(space), stride);
}

#if CC_ISA == 3

struct Merged {  // rows of all tasks' weights, for panels
  const MaskedDelta& w;
  struct Rows {
    const MaskedDelta& w;
    int64_t first;
    Rows(const Merged& m, int64_t row, int64_t) : w(m.w), first(row) {}
    inline int64_t row(int64_t at) const { return first + at < w.N ? first + at : w.N - 1; }
    void make(int64_t at, int R, int64_t k, int64_t end, int32_t task, uint16_t* out, int64_t pitch) const {
      for (int64_t r = 0; r < R; r++) merge<BF16>(w, row(at + r), k, end, task, reinterpret_cast<char*>(out + r * pitch));
    }
    void ask(int64_t at, int R, int64_t k, int64_t end, Ahead& ahead) const {
      for (int64_t r = 0; r < R && first + at + r < w.N; r++) CC_NAME(cc)::ask(w, first + at + r, k, end, 2, ahead);
    }
  };
};

// Products of many rows of x for each task
void many(const MaskedDelta& w, const Call& c, const Batch& rows, uint16_t* x) {
  for (int64_t next = 0; next < rows.count;) {
    Part parts[PANELS];
    int64_t lane[PANELS * PANEL], panels = 0, number = 0;  // the row of x of each lane, or -1
    while (next < rows.count && panels < PANELS) {
      const Run run = run_at(w, rows, next, (PANELS - panels) * PANEL);
      const Part part = {panels, panels_of(run.count), run.task};
      for (int64_t i = 0; i < part.count * PANEL; i++) lane[panels * PANEL + i] = i < run.count ? rows.order[next + i] : -1;
      parts[number++] = part, panels += part.count, next += run.count;
    }
    const int64_t size = panel_size(w.K);
    each(c.threads, panels, [&](int64_t panel) {
      const uint16_t* from[PANEL];
      for (int64_t i = 0; i < PANEL; i++) {
        const int64_t row = lane[panel * PANEL + i];
        from[i] = row < 0 ? nullptr : static_cast<const uint16_t*>(c.x) + row * c.stride;
      }
      pack_panel(from, w.K, x + panel * size);
    });
    panel_product(Merged{w}, w.N, w.K, parts, number, x, c.threads, [&](int64_t panel, int64_t n, F* sum) {
      uint16_t* at[PANEL];
      for (int64_t i = 0; i < PANEL; i++) {
        const int64_t row = lane[panel * PANEL + i];
        at[i] = row < 0 ? nullptr : static_cast<uint16_t*>(c.y) + row * w.N + n;
      }
      if (w.bias)
        for (int64_t r = 0; r < 8 && n + r < w.N; r++) sum[r] = add(sum[r], set_f(load_one(w.bias, n + r, BF16)));
      store_panel(sum, at, w.N - n);
    });
  }
}

#endif

int unfit(const SharedVector& s) {
  if (s.kind < PLAIN || s.kind > CONSTANT) return CC_BAD_TYPE;
  return (s.kind == BYTES || s.kind == NIBBLES) && (s.group < 1 || (s.zero != 0 && s.zero != (s.kind == BYTES ? 128 : 8))) ? CC_BAD_SHAPE : CC_OK;
}

}  // namespace
}  // namespace

extern "C" int CC_NAME(cc_masked_delta)(const MaskedDelta* weight, const Call* call) {
  using namespace CC_NAME(cc);
  const MaskedDelta& w = *weight;
  const Call& c = *call;
  if (c.type < F32 || c.type > F16) return CC_BAD_TYPE;
  if (w.N < 1 || w.K < 1 || w.tasks < 1 || c.M < 0 || c.threads < 1 || (c.M > 1 && c.stride < w.K)) return CC_BAD_SHAPE;
  const int wrong = unfit(w.one) ? unfit(w.one) : w.has_low ? unfit(w.low) : CC_OK;
  if (wrong) return wrong;
  const int64_t rows = 8 * c.M, stride = (w.K + 31) / 32 * 32 + 32;
  if (c.workspace_bytes < rows + 64 + 4 * c.M * stride) return CC_SMALL_WORKSPACE;
  for (int64_t m = 0; m < c.M; m++)
    if (w.task[m] < -1 || w.task[m] >= w.tasks) return CC_BAD_SHAPE;
  // rows of x of tasks with few of them, then of those with many, those of a task side by side
  int64_t* order = static_cast<int64_t*>(c.workspace);
  int64_t next = 0, some = 0;
  for (int pass = 0; pass < 2; pass++) {
    for (int64_t task = -1; task < w.tasks; task++) {
      int64_t count = 0;
      for (int64_t m = 0; m < c.M; m++) count += w.task[m] == task;
      if ((CC_ISA == 3 && c.type == BF16 && count >= MANY) != (pass == 1)) continue;
      for (int64_t m = 0; m < c.M; m++)
        if (w.task[m] == task) order[next++] = m;
    }
    if (pass == 0) some = next;
  }
  char* space = static_cast<char*>(c.workspace) + (rows + 63) / 64 * 64;
  const Batch short_runs = {order, some};
#if CC_ISA == 3
  if (c.type == BF16) {
    few<Words, BF16>(w, c, short_runs, space);
    many(w, c, {order + some, c.M - some}, reinterpret_cast<uint16_t*>(space));
    return CC_OK;
  }
#endif
  if (c.type == BF16) few<Floats<BF16>, BF16>(w, c, short_runs, space);
  else if (c.type == F16) few<Floats<F16>, F16>(w, c, short_runs, space);
  else few<Floats<F32>, F32>(w, c, short_runs, space);
  return CC_OK;
}
