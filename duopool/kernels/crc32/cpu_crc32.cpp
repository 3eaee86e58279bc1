// CRC-32 of bytes: the polynomial and the value of zlib's `crc32`, by carry-less products where the processor has them.
//
// Bytes are coefficients of a polynomial over GF(2), earlier bytes and lower bits of higher degree. A block of it may be
// moved back by n bits by multiplying with x^n mod P ("folding"), which leaves the remainder by P the same: so the bytes
// are folded onto their last 16, and a table gives the remainder of those. V. Gopal et al., "Fast CRC computation for
// generic polynomials using PCLMULQDQ instruction", Intel, 2009.

#include "library.h"

#include <array>
#include <cstddef>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr uint32_t POLYNOMIAL = 0xEDB88320;  // degree 31 is bit 0

constexpr std::array<uint32_t, 256> make_table() {
    std::array<uint32_t, 256> table{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? POLYNOMIAL : 0);
        table[byte] = value;
    }
    return table;
}

constexpr auto TABLE = make_table();

uint32_t by_table(uint32_t state, const uint8_t* bytes, size_t count) {
    for (size_t i = 0; i < count; ++i) state = state >> 8 ^ TABLE[(state ^ bytes[i]) & 255];
    return state;
}

#if defined(__x86_64__)

// x^n mod P, shifted by one: the product of two reversed polynomials comes out one bit low.
constexpr uint64_t power(int n) {
    uint32_t value = 0x80000000;
    for (int i = 0; i < n; ++i) value = value >> 1 ^ (value & 1 ? POLYNOMIAL : 0);
    return uint64_t{value} << 1;
}

#define CLMUL __attribute__((target("pclmul,sse4.1")))
#define CLMUL512 __attribute__((target("vpclmulqdq,avx512f,avx512vl,pclmul")))

// Moves 16 bytes by `Bits`: the lower half is the one of higher degree.
template <int Bits>
CLMUL inline __m128i fold(__m128i data, __m128i next) {
    const __m128i by = _mm_set_epi64x(power(Bits - 32), power(Bits + 32));
    const __m128i low = _mm_clmulepi64_si128(data, by, 0x00), high = _mm_clmulepi64_si128(data, by, 0x11);
    return _mm_xor_si128(_mm_xor_si128(low, high), next);
}

CLMUL inline __m128i load(const uint8_t* bytes) { return _mm_loadu_si128((const __m128i*)bytes); }

// `count` is at least 64; `first` has the state in it already.
CLMUL uint32_t by_products(__m128i first, const uint8_t* bytes, size_t count) {
    __m128i a = first, b = load(bytes + 16), c = load(bytes + 32), d = load(bytes + 48);
    bytes += 64, count -= 64;
    for (; count >= 64; bytes += 64, count -= 64) {
        a = fold<512>(a, load(bytes)), b = fold<512>(b, load(bytes + 16));
        c = fold<512>(c, load(bytes + 32)), d = fold<512>(d, load(bytes + 48));
    }
    a = fold<128>(fold<128>(fold<128>(a, b), c), d);
    for (; count >= 16; bytes += 16, count -= 16) a = fold<128>(a, load(bytes));
    uint8_t rest[16];
    _mm_storeu_si128((__m128i*)rest, a);
    return by_table(by_table(0, rest, 16), bytes, count);
}

CLMUL512 inline __m512i fold_wide(__m512i data, __m512i by, const uint8_t* next) {
    const __m512i low = _mm512_clmulepi64_epi128(data, by, 0x00), high = _mm512_clmulepi64_epi128(data, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, _mm512_loadu_si512(next), 0x96);
}

// `count` is at least 256.
CLMUL512 uint32_t by_wide_products(uint32_t state, const uint8_t* bytes, size_t count) {
    const __m512i by = _mm512_broadcast_i32x4(_mm_set_epi64x(power(2048 - 32), power(2048 + 32)));
    __m512i a = _mm512_loadu_si512(bytes), b = _mm512_loadu_si512(bytes + 64);
    __m512i c = _mm512_loadu_si512(bytes + 128), d = _mm512_loadu_si512(bytes + 192);
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(state))));
    bytes += 256, count -= 256;
    for (; count >= 256; bytes += 256, count -= 256) {
        a = fold_wide(a, by, bytes), b = fold_wide(b, by, bytes + 64);
        c = fold_wide(c, by, bytes + 128), d = fold_wide(d, by, bytes + 192);
    }
    uint8_t folded[256];
    _mm512_storeu_si512(folded, a), _mm512_storeu_si512(folded + 64, b);
    _mm512_storeu_si512(folded + 128, c), _mm512_storeu_si512(folded + 192, d);
    return by_table(by_products(load(folded), folded, 256), bytes, count);
}

#endif

uint32_t crc32(uint32_t state, const uint8_t* bytes, size_t count) {
#if defined(__x86_64__)
    static const bool has_products = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    static const bool has_wide_products = has_products && __builtin_cpu_supports("vpclmulqdq") &&
                                          __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    if (has_wide_products && count >= 256) return by_wide_products(state, bytes, count);
    if (has_products && count >= 64)
        return by_products(_mm_xor_si128(load(bytes), _mm_cvtsi32_si128(int(state))), bytes, count);
#endif
    return by_table(state, bytes, count);
}

}  // namespace

// zlib's crc32(0, bytes, count).
DUOPOOL_EXPORT uint32_t duopool_crc32(const void* bytes, int64_t count) {
    return ~crc32(0xFFFFFFFF, (const uint8_t*)bytes, size_t(count));
}
