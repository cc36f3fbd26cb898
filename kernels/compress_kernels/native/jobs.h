// What the entry points take: plain C, as compress_kernels/native/__init__.py declares it to ctypes. A weight's part is filled once.
// Every function returns 0, or one of the errors below; shapes are looked at before any pointer is.
#pragma once
#include <stdint.h>

enum { CC_VERSION = 3 };
enum { CC_OK = 0, CC_BAD_SHAPE = 1, CC_BAD_TYPE = 2, CC_NO_ISA = 3, CC_SMALL_WORKSPACE = 4 };

struct IntGrouped {
  int64_t K, N, group, sub;  // inputs, outputs, columns of a scale, columns of an activation's scale (divides group)
  int32_t bits, scale_type, exact, value_type;
  const uint8_t* codes;   // [N/16][K/chunk][units][16 rows][4 bytes], see int_grouped/cpu.cpp
  const void* scale;      // [N/16][K/group][16]
  const uint8_t* zero;    // the same, or null where the zero point is 2^(bits-1)
  const int64_t* indptr;  // [N+1] outliers of each row, or null; of value_type
  const int32_t* index;   // their columns
  const void* value;
  const int64_t* step;        // [N/16+1] or null: more outliers, a step having one for each of a tile's 16 rows, of value 0 where a row has none
  const void* step_index;     // [steps][16] their columns, of 16 bits where step_short, else of 32
  const void* step_value;
  int64_t step_short;
};

struct Masked {
  int64_t K, N, group;     // group 0: values are floats; else columns of a scale of codes of 4 bits, 8 kept in every 16 columns
  int32_t value_type;      // of values, or of scales
  int32_t unused;
  const uint8_t* mask;     // [N][ceil(K/32)*4] bits, lowest first, none beyond the last column
  const int64_t* start;    // [N+1] of each row's values
  const void* values;      // floats, and 32 more beyond the last; or [N][K/16] words of 8 codes, and 8 bytes more
  const void* scale;       // [N][K/group]
  const uint8_t* zero;     // the same, or null where the zero point is 8
};

// y = U [A x_first ; x_last], where x_first and x_last are columns of x. A factor is a plain matrix of the type of x, or an IntGrouped.
struct Factors {
  int64_t K, N, rank;      // inputs, outputs, rows of A
  int64_t first, last;     // how many columns A and U take of x
  int64_t padded, joined;  // inputs of A, not below first; of U, not below rank + last
  const int32_t* order;    // [first+last] columns of x, or null: 0, 1, ...
  const void* A;           // [rank][padded], or null where rank is 0
  const void* U;           // [N][joined]
  const struct IntGrouped* coded_A;  // in place of A
  const struct IntGrouped* coded_U;
  int32_t silu, scaled;    // 1: SiLU follows A; 1: A's part is multiplied by low, and what goes past A by direct
  float low, direct;
};

struct SharedVector {      // what a bit stands for, [N][K]
  int32_t kind, zero;      // 0 bf16, 1 codes of 8 bits, 2 codes of 4 bits, 3 one fp32 number; the code that means 0
  int64_t group;           // columns of a scale
  const void* values;      // codes: each row begins at a word of 32 bits
  const uint16_t* scale;   // [N][ceil(K/group)] bf16, of codes
};

// y = x baseᵀ + bias + factor x dᵀ; d is one where the bit of the row's task is 1, and where it is 0: zero, -one (signs), or low
struct MaskedDelta {
  int64_t K, N;
  int32_t signs, has_low;
  const void* base;        // [N][K] of the type of x
  const void* bias;        // [N] of the type of x, or null
  struct SharedVector one, low;
  int64_t tasks;
  const uint32_t* const* mask;  // of every task [N][ceil(K/32)], lowest bit first
  const float* factor;          // of every task
  const int32_t* task;          // of every row of x, or -1
};

// y = post (core (pre x)), pre and post block diagonal matrices of the type of x
struct Armor {
  int64_t block_in, block_out;
  const void* pre;         // [K/block_in][block_in][block_in]
  const void* post;        // [N/block_out][block_out][block_out]
  const struct Masked* core;
};

struct Call {
  int64_t M, stride;  // rows of x, elements from one to the next
  int32_t type, threads;
  const void* x;
  void* y;  // [M][N] of the same type
  void* workspace;
  int64_t workspace_bytes;
  int32_t ready, unused;  // not 0: the workspace has x from the call before, of a weight of grouped integers that reads it alike
};

enum { CC_NONE = 0, CC_INTS = 1, CC_MASKED = 2, CC_DENSE = 3, CC_FACTORS = 4, CC_ARMOR = 5, CC_DELTA = 6 };

struct Linear {  // y = x Wᵀ + bias
  int64_t K, N;
  int32_t kind, type;  // CC_DENSE, CC_FACTORS, CC_ARMOR: the matrices'; CC_MASKED, CC_ARMOR, CC_DELTA: what x is rounded to; else unused
  int32_t bias_type, unused;
  const void* weight;  // an IntGrouped, a Masked, a matrix [N][K], Factors, an Armor, or a MaskedDelta of one task without a bias
  const void* bias;    // or null
};

struct Block {  // of Llama and its like
  const void *norm_in, *norm_mid, *norm_q, *norm_k;  // [D], [D], [head_dim] or null, the same
  Linear q, k, v, o, gate, up, down;
};

struct Decoder {
  int64_t blocks, D, inner, heads, kv_heads, head_dim;
  float eps, scale;  // of norms, of scores
  int32_t norm_type, cache_type;
  const Block* block;
  const void* norm;
  Linear head;
};

struct Step {  // one token in every row of a batch
  int64_t B, slot, capacity;  // rows; where the token's keys and values go, in buffers of so many places
  int32_t type, threads;      // of x
  const void* x;              // [B][D] embeddings
  void* const* cache;         // of each block [2][B][kv_heads][capacity][head_dim], keys and values
  const int64_t* first;       // [B] first place that the row attends to
  const float *cos, *sin;     // [B][head_dim/2]
  float* y;                   // [B][head.N]
  void* workspace;
  int64_t workspace_bytes;
};
