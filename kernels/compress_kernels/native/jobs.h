// What the entry points take: plain C, as compress_kernels/native/__init__.py declares it to ctypes. A weight's part is filled once.
// Every function returns 0, or one of the errors below; shapes are looked at before any pointer is.
#pragma once
#include <stdint.h>

enum { CC_VERSION = 2 };
enum { CC_OK = 0, CC_BAD_SHAPE = 1, CC_BAD_TYPE = 2, CC_NO_ISA = 3, CC_SMALL_WORKSPACE = 4 };

struct IntGrouped {
  int64_t K, N, group, sub;  // inputs, outputs, columns of a scale, columns of an activation's scale (divides group)
  int32_t bits, scale_type, exact, value_type;
  const uint8_t* codes;   // [N/16][K/chunk][units][16 rows][4 bytes], see int_grouped/cpu.cpp
  const void* scale;      // [N/16][K/group][16]
  const uint8_t* zero;    // the same, or null where the zero point is 2^(bits-1)
  const int64_t* indptr;  // [N+1] outliers of each row, or null
  const int32_t* index;   // their columns
  const void* value;
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

struct Call {
  int64_t M, stride;  // rows of x, elements from one to the next
  int32_t type, threads;
  const void* x;
  void* y;  // [M][N] of the same type
  void* workspace;
  int64_t workspace_bytes;
  int32_t ready, unused;  // not 0: the workspace has x from the call before, of a weight of grouped integers that reads it alike
};

enum { CC_NONE = 0, CC_INTS = 1, CC_MASKED = 2, CC_DENSE = 3 };

struct Linear {  // y = x Wᵀ + bias
  int64_t K, N;
  int32_t kind, type;  // CC_INTS: unused; CC_MASKED: the type that x is rounded to; CC_DENSE: the matrix's
  int32_t bias_type, unused;
  const void* weight;  // an IntGrouped, a Masked, or a matrix [N][K]
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
