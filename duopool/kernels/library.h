// What C and Python agree on: instruction sets, element types, and which functions leave the library.

#pragma once

#include <cstdint>

// AVX512_DOTS adds the products of bfloat16 pairs and of bytes (avx512bf16, avx512vnni).
enum Isa : int32_t { PORTABLE = 0, AVX2 = 1, AVX512 = 2, AVX512_DOTS = 3 };

struct Bfloat16 {
    uint16_t bits;
};

#define DUOPOOL_EXPORT extern "C" __attribute__((visibility("default")))
