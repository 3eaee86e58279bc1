// What this processor can do, and which build of the library this is.

#include "library.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

// Changes with every change of a function's arguments; cpu_library.py refuses a library with another number.
DUOPOOL_EXPORT int32_t duopool_abi() { return 6; }

// The widest instruction set of every_isa.h that may run here.
DUOPOOL_EXPORT int32_t duopool_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni") ? AVX512_DOTS : AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

// Whether torch's own products of bfloat16 matrices run on matrix tiles (AMX), which nothing here is made for.
DUOPOOL_EXPORT int32_t duopool_has_bfloat16_tiles() {
#if defined(__x86_64__)
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1);
#else
    return 0;
#endif
}
