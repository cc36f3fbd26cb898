// One token through all blocks of a Llama-like model and its head, on a CPU.
//
//   x += o(attention(rope(norm(q(n))), rope(norm(k(n))), v(n))), n = norm_in(x)      norms of q and k where the model has them
//   x += down(silu(gate(n)) up(n)), n = norm_mid(x)
//   y  = head(norm(x))
//
// All threads run the whole token, in one parallel region, in five phases per block. A phase is pieces of output rows of products, by the
// kernels of int_grouped and bitmask (or a dense one, below), or of heads. Threads take the pieces as they come, and a phase ends
// when its pieces are done, not when all threads have arrived: one that the system holds back holds nobody up unless in a piece.
// What is cheap (norms, rounding x to int8) every thread does for itself. All is fp32 but what a kernel rounds x to, and the cache.
#include "../native/jobs.h"
#include "../native/vec.h"
#include "attention.h"

extern "C" int CC_NAME(cc_int_grouped)(const IntGrouped* weight, const Call* call);
extern "C" int CC_NAME(cc_masked)(const Masked* weight, const Call* call);
extern "C" int omp_get_thread_num();
extern "C" int sched_yield();

namespace CC_NAME(cc) {
namespace {

constexpr int64_t UNIT = 16, PIECE = 1 << 17, MOST = 8;  // rows of a tile; weights of a piece; pieces for each thread

// -- products ---------------------------------------------------------------------------------------------------------

IntGrouped rows_of(const IntGrouped& w, int64_t begin, int64_t end) {  // begin is a multiple of a tile's 16 rows
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

// y [M][end-begin] = x [M][K] times rows begin .. end of a matrix
template <int type> void dense(const Linear& l, int64_t M, const float* x, int64_t begin, int64_t end, float* y) {
  const int64_t K = l.K, whole = K / LANES * LANES, size = size_of(type), count = end - begin;
  const char* W = static_cast<const char*>(l.weight);
  for (int64_t n = begin; n < end; n += 4) {
    const int64_t rows = end - n < 4 ? end - n : 4;
    const char* row[4];
    for (int r = 0; r < 4; r++) row[r] = W + (n + (r < rows ? r : 0)) * K * size;
    for (int64_t m = 0; m < M; m++) {
      F acc[4] = {set_f(0), set_f(0), set_f(0), set_f(0)};
      for (int64_t k = 0; k < whole; k += LANES) {
        const F v = load_f(x + m * K + k);
        for (int r = 0; r < 4; r++) acc[r] = fma(load_16<type>(row[r] + k * size), v, acc[r]);
      }
      for (int r = 0; r < rows; r++) {
        float f = sum(acc[r]);
        for (int64_t k = whole; k < K; k++) f += load_one(row[r], k, type) * x[m * K + k];
        y[m * count + n - begin + r] = f;
      }
    }
  }
}

struct Phase { int32_t taken, done; };  // pieces

struct Room {  // a thread's own
  float *x, *y, *scores;
  void* kernel;
  int64_t kernel_bytes;
  Phase* phase;
  const Linear* held;  // whose x is in `kernel`, or null
  bool normed;         // whether this phase's norm is in `x`
  int code;
};

struct Piece {  // of a phase
  int64_t at, of;
  inline int64_t from(int64_t items) const { return items * at / of; }
  inline int64_t to(int64_t items) const { return items * (at + 1) / of; }
};

inline void wait(int64_t turns) {
  if (turns % 4096 == 4095) sched_yield();
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The next phase, in so many pieces
template <class Work> void share(Room& room, int64_t pieces, const Work& work) {
  Phase& phase = *room.phase++;
  room.held = nullptr, room.normed = false;
  for (;;) {
    const int32_t at = __atomic_fetch_add(&phase.taken, 1, __ATOMIC_RELAXED);
    if (at >= pieces) break;
    work(Piece{at, pieces});
    __atomic_fetch_add(&phase.done, 1, __ATOMIC_ACQ_REL);
  }
  for (int64_t turns = 0; __atomic_load_n(&phase.done, __ATOMIC_ACQUIRE) < pieces; turns++) wait(turns);
}

inline int64_t pieces_of(int64_t weights, int threads) {
  const int64_t wanted = weights / PIECE;
  return threads == 1 ? 1 : wanted < threads ? threads : wanted > MOST * threads ? MOST * threads : wanted;
}

int64_t kernel_bytes(const Linear& l, int64_t M) {
  if (l.kind == CC_MASKED) return 4 * M * ((l.K + 15) / 16 * 16);
  if (l.kind != CC_INTS) return 0;
  const IntGrouped& w = *static_cast<const IntGrouped*>(l.weight);
  const int64_t bytes = M * (w.exact ? 4 * (w.K / w.group) + 4 * w.K : 8 * (w.K / w.sub) + w.K);
  return w.step ? (bytes + 63) / 64 * 64 + 4 * w.K * (M > 1 ? (M + 15) / 16 * 16 : 1) : bytes;
}

// y [M][end-begin] = x [M][K] times rows begin .. end; the bias is not in it
int product(const Linear& l, int64_t M, const float* x, int64_t begin, int64_t end, float* y, bool ready, const Room& room) {
  if (l.kind == CC_DENSE) {
    if (l.type == BF16) dense<BF16>(l, M, x, begin, end, y);
    else if (l.type == F16) dense<F16>(l, M, x, begin, end, y);
    else dense<F32>(l, M, x, begin, end, y);
    return CC_OK;
  }
  Call call = {M, l.K, F32, 1, x, y, room.kernel, room.kernel_bytes, ready, 0};
  if (l.kind == CC_INTS) {
    const IntGrouped part = rows_of(*static_cast<const IntGrouped*>(l.weight), begin, end);
    return CC_NAME(cc_int_grouped)(&part, &call);
  }
  const Masked part = rows_of(*static_cast<const Masked*>(l.weight), begin, end);
  const int64_t inputs = M * l.K, outputs = M * (end - begin);
  call.type = l.type;
  if (l.type == F32) return CC_NAME(cc_masked)(&part, &call);
  char* narrow = static_cast<char*>(room.kernel) + room.kernel_bytes;  // x, then y, rounded
  for (int64_t i = 0; i < inputs; i++) store_one(narrow, i, l.type, x[i]);
  call.x = narrow, call.y = narrow + 2 * inputs;
  const int code = CC_NAME(cc_masked)(&part, &call);
  for (int64_t i = 0; i < outputs; i++) y[i] = load_one(call.y, i, l.type);
  return code;
}

// whether two linears read the same x in the same form
bool alike(const Linear& a, const Linear& b) {
  if (a.kind != CC_INTS || b.kind != CC_INTS) return false;
  const IntGrouped &v = *static_cast<const IntGrouped*>(a.weight), &w = *static_cast<const IntGrouped*>(b.weight);
  return v.exact == w.exact && v.group == w.group && v.sub == w.sub && (v.step != nullptr) == (w.step != nullptr);
}

struct Rows {  // of a linear, a piece's
  int64_t begin, end;
  inline Rows(int64_t N, const Piece& piece) {
    const int64_t units = (N + UNIT - 1) / UNIT, stop = piece.to(units) * UNIT;
    begin = piece.from(units) * UNIT, end = stop < N ? stop : N;
  }
  inline int64_t count() const { return end - begin; }
};

// A piece's rows of y [M][N] = (add ? y : 0) + x Wᵀ + bias; x is the same for all pieces and linears of a phase
void linear(const Linear& l, int64_t M, const float* x, float* y, bool add, const Piece& piece, Room& room) {
  const Rows rows(l.N, piece);
  const int64_t count = rows.count();
  if (count <= 0) return;
  const bool direct = M == 1 && !add;
  float* part = direct ? y + rows.begin : room.y;
  room.code |= product(l, M, x, rows.begin, rows.end, part, room.held && alike(*room.held, l), room);
  room.held = l.kind == CC_INTS ? &l : l.kind == CC_MASKED ? nullptr : room.held;
  for (int64_t m = 0; m < M; m++) {
    float *from = part + m * count, *to = y + m * l.N + rows.begin;
    if (l.bias)
      for (int64_t i = 0; i < count; i++) from[i] += load_one(l.bias, rows.begin + i, l.bias_type);
    if (add)
      for (int64_t i = 0; i < count; i++) to[i] += from[i];
    else if (!direct) __builtin_memcpy(to, from, 4 * count);
  }
}

// -- the token --------------------------------------------------------------------------------------------------------

struct Shared {  // what the threads exchange, [B][…] each
  float *x, *q, *k, *v, *mixed, *gate, *up;
};

inline int64_t places(const Step& s) { return (s.capacity + 1 + LANES - 1) / LANES * LANES; }

// a piece's heads: keys and values to the cache, attention to shared.mixed
void heads(const Decoder& d, const Block& b, const Step& s, int64_t block, const Shared& shared, const Piece& piece, const Room& room) {
  const int64_t head = d.head_dim, repeats = d.heads / d.kv_heads, size = size_of(d.cache_type), row = head * size;
  const int64_t half = s.B * d.kv_heads * s.capacity * row, end = piece.to(s.B * d.heads);
  float turned[HEAD], q[TOGETHER * HEAD];
  char key[HEAD * 4], value[HEAD * 4];
  for (int64_t i = piece.from(s.B * d.heads); i < end;) {
    const int64_t m = i / d.heads, h = i % d.heads, g = h / repeats, at = m * d.kv_heads + g;
    const float *cos = s.cos + m * head / 2, *sin = s.sin + m * head / 2;
    char* keys = static_cast<char*>(s.cache[block]) + at * s.capacity * row;
    turn(shared.k + at * head, b.norm_k, d, cos, sin, turned);
    for (int64_t j = 0; j < head; j++) store_one(key, j, d.cache_type, turned[j]), store_one(value, j, d.cache_type, shared.v[at * head + j]);
    if (h % repeats == 0) {  // nobody reads these places before the next token
      __builtin_memcpy(keys + s.slot * row, key, row);
      __builtin_memcpy(keys + half + s.slot * row, value, row);
    }
    const Past past = {keys + s.first[m] * row, keys + half + s.first[m] * row, key, value, s.slot - s.first[m]};
    const int64_t group = m * d.heads + (g + 1) * repeats, stop = group < end ? group : end;
    while (i < stop) {
      const int64_t R = stop - i < TOGETHER ? stop - i : TOGETHER;
      for (int64_t r = 0; r < R; r++) turn(shared.q + (i + r) * head, b.norm_q, d, cos, sin, q + r * head);
      float* out = shared.mixed + i * head;
      if (d.cache_type == BF16) attend_some<BF16>(d, past, R, q, room.scores, places(s), out);
      else if (d.cache_type == F16) attend_some<F16>(d, past, R, q, room.scores, places(s), out);
      else attend_some<F32>(d, past, R, q, room.scores, places(s), out);
      i += R;
    }
  }
}

const float* normed(const Decoder& d, const Step& s, const void* weight, const Shared& shared, Room& room) {
  for (int64_t m = 0; m < s.B && !room.normed; m++)
    rms_norm(shared.x + m * d.D, weight, d.norm_type, d.D, d.eps, room.x + m * d.D);
  room.normed = true;
  return room.x;
}

// a piece of silu(gate) up, in the place of gate
void gated(const Decoder& d, const Step& s, const Shared& shared, const Piece& piece) {
  const Rows rows(d.inner, piece);
  for (int64_t m = 0; m < s.B; m++) {
    float* gate = shared.gate + m * d.inner;
    const float* up = shared.up + m * d.inner;
    for (int64_t i = rows.begin; i < rows.end; i++) gate[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
  }
}

void token(const Decoder& d, const Step& s, const Shared& shared, Room& room) {
  const int64_t M = s.B, Q = d.heads * d.head_dim, items = M * d.heads;
  const int64_t qkv = pieces_of(d.D * (Q + 2 * d.kv_heads * d.head_dim), s.threads), out = pieces_of(d.D * Q, s.threads);
  const int64_t gate_up = pieces_of(2 * d.D * d.inner, s.threads), down = pieces_of(d.D * d.inner, s.threads);
  const int64_t some = s.threads == 1 ? 1 : items < 2 * s.threads ? items : 2 * s.threads;
  for (int64_t i = 0; i < d.blocks; i++) {
    const Block& b = d.block[i];
    share(room, qkv, [&](const Piece& piece) {
      const float* x = normed(d, s, b.norm_in, shared, room);
      linear(b.q, M, x, shared.q, false, piece, room);
      linear(b.k, M, x, shared.k, false, piece, room);
      linear(b.v, M, x, shared.v, false, piece, room);
    });
    share(room, some, [&](const Piece& piece) { heads(d, b, s, i, shared, piece, room); });
    share(room, out, [&](const Piece& piece) { linear(b.o, M, shared.mixed, shared.x, true, piece, room); });
    share(room, gate_up, [&](const Piece& piece) {
      const float* x = normed(d, s, b.norm_mid, shared, room);
      linear(b.gate, M, x, shared.gate, false, piece, room);
      linear(b.up, M, x, shared.up, false, piece, room);
      gated(d, s, shared, piece);
    });
    share(room, down, [&](const Piece& piece) { linear(b.down, M, shared.gate, shared.x, true, piece, room); });
  }
  share(room, pieces_of(d.D * d.head.N, s.threads), [&](const Piece& piece) {
    linear(d.head, M, normed(d, s, d.norm, shared, room), s.y, false, piece, room);
  });
}

inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Sizes {  // bytes
  int64_t phases, shared, x, y, scores, kernel, narrow;
  inline int64_t common() const { return phases + shared; }
  inline int64_t own() const { return x + y + scores + kernel + narrow; }
};

Sizes sizes(const Decoder& d, const Step& s) {
  int64_t K = most(d.D, most(d.inner, d.heads * d.head_dim)), N = most(K, d.head.N), kernel = kernel_bytes(d.head, s.B);
  for (int64_t i = 0; i < d.blocks; i++) {
    const Block& b = d.block[i];
    const Linear* const all[] = {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down};
    for (const Linear* l : all) kernel = most(kernel, kernel_bytes(*l, s.B));
  }
  const int64_t floats = d.D + 2 * d.heads * d.head_dim + 2 * d.kv_heads * d.head_dim + 2 * d.inner;
  return {aligned((5 * d.blocks + 1) * int64_t(sizeof(Phase))), aligned(4 * s.B * floats), aligned(4 * s.B * d.D), aligned(4 * s.B * N), aligned(4 * TOGETHER * places(s)),
          aligned(kernel), aligned(2 * s.B * (K + N))};
}

int unfit(const Linear& l, int64_t K, int64_t N) {
  if (l.K != K || l.N != N || !l.weight) return CC_BAD_SHAPE;
  if (l.bias && (l.bias_type < F32 || l.bias_type > F16)) return CC_BAD_TYPE;
  if (l.kind == CC_DENSE) return l.type < F32 || l.type > F16 ? CC_BAD_TYPE : CC_OK;
  const Call nothing = {0, K, l.kind == CC_INTS ? F32 : l.type, 1, nullptr, nullptr, nullptr, 0, 0, 0};
  if (l.kind == CC_INTS) {
    const IntGrouped& w = *static_cast<const IntGrouped*>(l.weight);
    return w.K != K || w.N != N ? CC_BAD_SHAPE : CC_NAME(cc_int_grouped)(&w, &nothing);
  }
  if (l.kind != CC_MASKED) return CC_BAD_TYPE;
  const Masked& w = *static_cast<const Masked*>(l.weight);
  return w.K != K || w.N != N ? CC_BAD_SHAPE : CC_NAME(cc_masked)(&w, &nothing);
}

int unfit(const Decoder& d) {
  if (d.blocks < 0 || d.D < 1 || d.inner < 1 || d.heads < 1 || d.kv_heads < 1 || d.heads % d.kv_heads) return CC_BAD_SHAPE;
  if (d.head_dim < 16 || d.head_dim > HEAD || d.head_dim % 16) return CC_BAD_SHAPE;
  if (!(d.scale > 0)) return CC_BAD_SHAPE;
  if (d.norm_type < F32 || d.norm_type > F16 || d.cache_type < F32 || d.cache_type > F16) return CC_BAD_TYPE;
  const int64_t Q = d.heads * d.head_dim, KV = d.kv_heads * d.head_dim;
  int code = unfit(d.head, d.D, d.head.N);
  for (int64_t i = 0; i < d.blocks && !code; i++) {
    const Block& b = d.block[i];
    const struct { const Linear& l; int64_t K, N; } all[] = {{b.q, d.D, Q}, {b.k, d.D, KV}, {b.v, d.D, KV}, {b.o, Q, d.D},
                                                             {b.gate, d.D, d.inner}, {b.up, d.D, d.inner}, {b.down, d.inner, d.D}};
    for (const auto& one : all)
      if (!code) code = unfit(one.l, one.K, one.N);
  }
  return code;
}

}  // namespace
}  // namespace

// B = 0 only looks whether the decoder can be run. Otherwise that must have been done, and only the step is looked at.
extern "C" int CC_NAME(cc_decode)(const Decoder* decoder, const Step* step) {
  using namespace CC_NAME(cc);
  const Decoder& d = *decoder;
  const Step& s = *step;
  if (s.B == 0) return unfit(d);
  if (s.type < F32 || s.type > F16) return CC_BAD_TYPE;
  if (s.B < 0 || s.slot < 0 || s.slot >= s.capacity || s.threads < 1) return CC_BAD_SHAPE;
  for (int64_t m = 0; m < s.B; m++)
    if (s.first[m] < 0 || s.first[m] > s.slot) return CC_BAD_SHAPE;
  const Sizes z = sizes(d, s);
  if (s.workspace_bytes < z.common() + s.threads * z.own()) return CC_SMALL_WORKSPACE;
  __builtin_memset(s.workspace, 0, z.phases);
  float* at = reinterpret_cast<float*>(static_cast<char*>(s.workspace) + z.phases);
  Shared shared;
  shared.x = at, at += s.B * d.D;
  shared.q = at, at += s.B * d.heads * d.head_dim;
  shared.k = at, at += s.B * d.kv_heads * d.head_dim;
  shared.v = at, at += s.B * d.kv_heads * d.head_dim;
  shared.mixed = at, at += s.B * d.heads * d.head_dim;
  shared.gate = at, at += s.B * d.inner;
  shared.up = at;
  const int64_t count = s.B * d.D;
  for (int64_t i = 0; i < count; i++) shared.x[i] = load_one(s.x, i, s.type);
  int code = CC_OK;
#pragma omp parallel num_threads(s.threads) reduction(| : code)
  {
    char* own = static_cast<char*>(s.workspace) + z.common() + omp_get_thread_num() * z.own();
    Room room;
    room.x = reinterpret_cast<float*>(own);
    room.y = reinterpret_cast<float*>(own + z.x);
    room.scores = reinterpret_cast<float*>(own + z.x + z.y);
    room.kernel = own + z.x + z.y + z.scores;
    room.kernel_bytes = z.kernel;
    room.phase = static_cast<Phase*>(s.workspace);
    room.code = CC_OK;
    token(d, s, shared, room);
    code |= room.code;
  }
  return code ? CC_BAD_SHAPE : CC_OK;
}

extern "C" int64_t CC_NAME(cc_decode_bytes)(const Decoder* decoder, const Step* step) {
  using namespace CC_NAME(cc);
  const Sizes z = sizes(*decoder, *step);
  return z.common() + step->threads * z.own();
}
