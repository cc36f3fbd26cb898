// One token through all blocks of a Llama-like model and its head, on a CPU.
//
//   x += o(attention(rope(norm(q(n))), rope(norm(k(n))), v(n))), n = norm_in(x)      norms of q and k where the model has them
//   x += down(silu(gate(n)) up(n)), n = norm_mid(x)
//   y  = head(norm(x))
//
// All threads run the whole token, in one parallel region, in five phases per block, or more where products have several steps
// (products.h). A phase is pieces of output rows of products, or of heads. Threads take the pieces as they come, and a phase ends
// when its pieces are done, not when all threads have arrived: one that the system holds back holds nobody up unless in a piece.
// What is cheap (norms, rounding x to int8) every thread does for itself. All is fp32 but what a kernel rounds x to, and the cache.
#include "../native/jobs.h"
#include "../native/vec.h"
#include "attention.h"
#include "products.h"

extern "C" int omp_get_thread_num();
extern "C" int sched_yield();

namespace CC_NAME(cc) {
namespace {

constexpr int64_t UNIT = 16, PIECE = 1 << 17, MOST = 8;  // rows of a tile; weights of a piece; pieces for each thread
constexpr int STEPS = 3;                                 // of a product, at most

// -- threads ----------------------------------------------------------------------------------------------------------

struct Phase { int32_t taken, done; };  // pieces

struct Room : Space {  // a thread's own
  float *x, *y, *scores;
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

// -- products ---------------------------------------------------------------------------------------------------------

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

struct Product {
  const Linear& l;
  float* y;  // [M][N]
};

// A piece's rows of one step of a product: to y [M][N] for the last one, which gets the bias and may be added; else to `own`, where the
// steps' outputs lie one after the other. x is the same for all pieces and products of a phase.
void run(const Product& p, int step, int64_t M, const float* x, float* own, bool add, const Piece& piece, Room& room) {
  const Linear& l = p.l;
  const bool last = step + 1 == steps(l);
  const int64_t N = outputs(l, step);
  const Rows rows(N, piece);
  const int64_t count = rows.count();
  if (count <= 0) return;
  const float* before = own;
  for (int i = 0; i < step; i++) before = own, own += M * outputs(l, i);
  float* to = last ? p.y : own;
  const bool direct = M == 1 && !(last && add);
  float* part = direct ? to + rows.begin : room.y;
  room.code |= step_rows(l, step, M, x, before, rows.begin, rows.end, part, room.held && alike(*room.held, l), room);
  room.held = l.kind == CC_INTS ? &l : l.kind == CC_DENSE ? room.held : nullptr;
  for (int64_t m = 0; m < M; m++) {
    float *from = part + m * count, *at = to + m * N + rows.begin;
    if (last && l.bias)
      for (int64_t i = 0; i < count; i++) from[i] += load_one(l.bias, rows.begin + i, l.bias_type);
    if (last && add)
      for (int64_t i = 0; i < count; i++) at[i] += from[i];
    else if (!direct) __builtin_memcpy(at, from, 4 * count);
  }
}

// Products of the same input(), in as many phases as the longest has steps, the last ones together; then after(piece)
template <int count, class Input, class After>
void products(const Step& s, float* own, const Product (&all)[count], bool add, Room& room, const Input& input, const After& after) {
  int longest = 1;
  for (const Product& p : all) longest = steps(p.l) > longest ? steps(p.l) : longest;
  for (int left = longest - 1; left >= 0; left--) {  // steps behind this one
    int64_t weights = 0;
    for (const Product& p : all) {
      const int step = steps(p.l) - 1 - left;
      if (step >= 0) weights += outputs(p.l, step) * inputs(p.l, step);
    }
    share(room, pieces_of(weights, s.threads), [&](const Piece& piece) {
      float* at = own;
      for (const Product& p : all) {
        const int step = steps(p.l) - 1 - left;
        if (step >= 0) run(p, step, s.B, reads_x(p.l, step) ? input() : nullptr, at, add, piece, room);
        at += s.B * between(p.l);
      }
      if (left == 0) after(piece);
    });
  }
}

// -- the token --------------------------------------------------------------------------------------------------------

struct Shared {  // what the threads exchange, [B][…] each
  float *x, *q, *k, *v, *mixed, *gate, *up, *between;
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
  const int64_t items = s.B * d.heads;
  const int64_t some = s.threads == 1 ? 1 : items < 2 * s.threads ? items : 2 * s.threads;
  const auto nothing = [](const Piece&) {};
  float* own = shared.between;
  for (int64_t i = 0; i < d.blocks; i++) {
    const Block& b = d.block[i];
    const Product qkv[] = {{b.q, shared.q}, {b.k, shared.k}, {b.v, shared.v}}, o[] = {{b.o, shared.x}};
    const Product gate_up[] = {{b.gate, shared.gate}, {b.up, shared.up}}, down[] = {{b.down, shared.x}};
    products(s, own, qkv, false, room, [&] { return normed(d, s, b.norm_in, shared, room); }, nothing);
    share(room, some, [&](const Piece& piece) { heads(d, b, s, i, shared, piece, room); });
    products(s, own, o, true, room, [&] { return shared.mixed; }, nothing);
    products(s, own, gate_up, false, room, [&] { return normed(d, s, b.norm_mid, shared, room); },
             [&](const Piece& piece) { gated(d, s, shared, piece); });
    products(s, own, down, true, room, [&] { return shared.gate; }, nothing);
  }
  const Product head[] = {{d.head, s.y}};
  products(s, own, head, false, room, [&] { return normed(d, s, d.norm, shared, room); }, nothing);
}

inline int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

struct Sizes {  // bytes
  int64_t phases, shared, between, x, y, scores, input, kernel, narrow;
  inline int64_t common() const { return phases + shared + between; }
  inline int64_t own() const { return x + y + scores + input + kernel + narrow; }
};

Sizes sizes(const Decoder& d, const Step& s) {
  int64_t K = most(d.D, most(d.inner, d.heads * d.head_dim)), N = most(K, d.head.N);
  int64_t kernel = kernel_bytes(d.head, s.B), own = between(d.head), input = input_width(d.head);
  N = most(N, own);
  for (int64_t i = 0; i < d.blocks; i++) {
    const Block& b = d.block[i];
    const Linear* const all[] = {&b.q, &b.k, &b.v, &b.o, &b.gate, &b.up, &b.down};
    for (const Linear* l : all) kernel = most(kernel, kernel_bytes(*l, s.B)), input = most(input, input_width(*l)), N = most(N, between(*l));
    own = most(own, most(between(b.q) + between(b.k) + between(b.v), most(between(b.o), most(between(b.gate) + between(b.up), between(b.down)))));
  }
  const int64_t floats = d.D + 2 * d.heads * d.head_dim + 2 * d.kv_heads * d.head_dim + 2 * d.inner;
  const int64_t phases = (4 * STEPS + 1) * d.blocks + STEPS;
  return {aligned(phases * int64_t(sizeof(Phase))), aligned(4 * s.B * floats), aligned(4 * s.B * own), aligned(4 * s.B * d.D), aligned(4 * s.B * N),
          aligned(4 * TOGETHER * places(s)), aligned(4 * s.B * input), aligned(kernel), aligned(2 * s.B * (K + N))};
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
  shared.up = at, at += s.B * d.inner;
  shared.between = reinterpret_cast<float*>(static_cast<char*>(s.workspace) + z.phases + z.shared);
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
    room.input = reinterpret_cast<float*>(own + z.x + z.y + z.scores);
    room.kernel = own + z.x + z.y + z.scores + z.input;
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
