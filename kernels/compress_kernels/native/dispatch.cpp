// The library's entry points: which instruction set this machine has, and the functions compiled for it.
#include "jobs.h"

#define CC_DECLARE(isa)                                                            \
  extern "C" int cc_int_grouped_isa##isa(const IntGrouped* w, const Call* c);      \
  extern "C" int cc_masked_isa##isa(const Masked* w, const Call* c);              \
  extern "C" int cc_masked_rows_isa##isa(const Masked* w, int64_t first, int64_t count, int type, void* out, int threads); \
  extern "C" int cc_factors_isa##isa(const Factors* w, const Call* c);            \
  extern "C" int cc_masked_delta_isa##isa(const MaskedDelta* w, const Call* c);   \
  extern "C" int cc_armor_isa##isa(const Armor* w, const Call* c); \
  extern "C" int cc_decode_isa##isa(const Decoder* decoder, const Step* step);     \
  extern "C" int64_t cc_decode_bytes_isa##isa(const Decoder* decoder, const Step* step);

CC_DECLARE(0)
#if defined(__x86_64__)
CC_DECLARE(1)
CC_DECLARE(2)
CC_DECLARE(3)
#endif

extern "C" {
#define CC_EXPORT __attribute__((visibility("default")))

CC_EXPORT int cc_version() { return CC_VERSION; }

// 3 AVX-512 (F, BW, VL, DQ, VNNI, VBMI2, BF16), 2 without the last two, 1 AVX2 with FMA and F16C, 0 neither; what the system saves of the registers is looked at too
CC_EXPORT int cc_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni"))
    return __builtin_cpu_supports("avx512vbmi2") && __builtin_cpu_supports("avx512bf16") ? 3 : 2;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

#if defined(__x86_64__)
#define CC_DISPATCH(function, ...)                  \
  if (isa > cc_isa() || isa < 0) return CC_NO_ISA;  \
  return isa == 3 ? function##_isa3(__VA_ARGS__) : isa == 2 ? function##_isa2(__VA_ARGS__) : isa == 1 ? function##_isa1(__VA_ARGS__) : function##_isa0(__VA_ARGS__)
#else
#define CC_DISPATCH(function, ...) return isa != 0 ? CC_NO_ISA : function##_isa0(__VA_ARGS__)
#endif

CC_EXPORT int cc_int_grouped(int isa, const IntGrouped* w, const Call* c) { CC_DISPATCH(cc_int_grouped, w, c); }

CC_EXPORT int cc_masked(int isa, const Masked* w, const Call* c) { CC_DISPATCH(cc_masked, w, c); }

CC_EXPORT int cc_masked_rows(int isa, const Masked* w, int64_t first, int64_t count, int type, void* out, int threads) {
  CC_DISPATCH(cc_masked_rows, w, first, count, type, out, threads);
}

CC_EXPORT int cc_factors(int isa, const Factors* w, const Call* c) { CC_DISPATCH(cc_factors, w, c); }

CC_EXPORT int cc_masked_delta(int isa, const MaskedDelta* w, const Call* c) { CC_DISPATCH(cc_masked_delta, w, c); }

CC_EXPORT int cc_armor(int isa, const Armor* w, const Call* c) { CC_DISPATCH(cc_armor, w, c); }

// one token through a whole model; a step of no rows only looks whether the decoder can be run
CC_EXPORT int cc_decode(int isa, const Decoder* decoder, const Step* step) { CC_DISPATCH(cc_decode, decoder, step); }

// how many bytes of workspace a step needs
CC_EXPORT int64_t cc_decode_bytes(int isa, const Decoder* decoder, const Step* step) { CC_DISPATCH(cc_decode_bytes, decoder, step); }

}  // extern "C"
