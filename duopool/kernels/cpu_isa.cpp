// What this processor can do, and which build of the library this is.

#include "library.h"

// Changes with every change of a function's arguments; cpu_library.py refuses a library with another number.
DUOPOOL_EXPORT int32_t duopool_abi() { return 1; }

// The widest instruction set of every_isa.h that may run here.
DUOPOOL_EXPORT int32_t duopool_best_isa() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        return AVX512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return AVX2;
#endif
    return PORTABLE;
}

// Whether torch's own products of bfloat16 matrices run on instructions made for them.
DUOPOOL_EXPORT int32_t duopool_has_bfloat16_products() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512bf16") ? 1 : 0;
#else
    return 0;
#endif
}
