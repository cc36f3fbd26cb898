// What the entry points take: plain C, as compress_kernels/native/__init__.py declares it to ctypes. A weight's part is filled once.
// Every function returns 0, or one of the errors below; shapes are looked at before any pointer is.
#pragma once
#include <stdint.h>

enum { CC_VERSION = 1 };
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
};
