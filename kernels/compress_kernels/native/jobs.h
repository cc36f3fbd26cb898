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

struct Shared {            // what a bit stands for, [N][K]
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
  struct Shared one, low;
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
};
