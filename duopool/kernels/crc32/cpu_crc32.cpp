// CRC-32 of bytes: the polynomial and the value of zlib's `crc32`, by carry-less products where the processor has them.
// Of pages also while they are copied: memory is then read once for both, and the products cost next to nothing.
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

CLMUL512 inline __m512i fold_wide(__m512i data, __m512i by, __m512i next) {
    const __m512i low = _mm512_clmulepi64_epi128(data, by, 0x00), high = _mm512_clmulepi64_epi128(data, by, 0x11);
    return _mm512_ternarylogic_epi64(low, high, next, 0x96);
}

// What becomes of the bytes: their digest, a copy that goes past the caches, or both from one load.
enum Work { DIGEST, COPY, COPY_AND_DIGEST };

template <Work work>
CLMUL512 inline __m512i take(const uint8_t* bytes, uint8_t* copy) {
    const __m512i data = _mm512_loadu_si512(bytes);
    if constexpr (work != DIGEST) _mm512_stream_si512((__m512i*)copy, data);
    return data;
}

constexpr size_t AHEAD = 2048;  // bytes asked for before they are needed: a copy waits for memory, not for products

// `count` is at least 256; `copy` is a multiple of 64, and unused for DIGEST.
template <Work work>
CLMUL512 uint32_t by_wide_products(uint32_t state, const uint8_t* bytes, uint8_t* copy, size_t count) {
    const __m512i by = _mm512_broadcast_i32x4(_mm_set_epi64x(power(2048 - 32), power(2048 + 32)));
    __m512i a = take<work>(bytes, copy), b = take<work>(bytes + 64, copy + 64);
    __m512i c = take<work>(bytes + 128, copy + 128), d = take<work>(bytes + 192, copy + 192);
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128(int(state))));
    size_t done = 256;
    for (; done + 256 <= count; done += 256) {
        const uint8_t* from = bytes + done;
        uint8_t* to = copy + done;
        if constexpr (work != DIGEST)
            for (int line = 0; line < 256; line += 64) _mm_prefetch(from + AHEAD + line, _MM_HINT_T0);
        const __m512i e = take<work>(from, to), f = take<work>(from + 64, to + 64);
        const __m512i g = take<work>(from + 128, to + 128), h = take<work>(from + 192, to + 192);
        if constexpr (work != COPY) {
            a = fold_wide(a, by, e), b = fold_wide(b, by, f);
            c = fold_wide(c, by, g), d = fold_wide(d, by, h);
        }
    }
    if constexpr (work != DIGEST) {
        std::memcpy(copy + done, bytes + done, count - done);
        bytes = copy;
    }
    if constexpr (work == COPY) return 0;
    uint8_t folded[256];
    _mm512_storeu_si512(folded, a), _mm512_storeu_si512(folded + 64, b);
    _mm512_storeu_si512(folded + 128, c), _mm512_storeu_si512(folded + 192, d);
    return by_table(by_products(load(folded), folded, 256), bytes + done, count - done);
}

bool has_products() {
    static const bool has = __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1");
    return has;
}

bool has_wide_products() {
    static const bool has = has_products() && __builtin_cpu_supports("vpclmulqdq") &&
                            __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl");
    return has;
}

#endif

uint32_t crc32(uint32_t state, const uint8_t* bytes, size_t count) {
#if defined(__x86_64__)
    if (has_wide_products() && count >= 256) return by_wide_products<DIGEST>(state, bytes, nullptr, count);
    if (has_products() && count >= 64)
        return by_products(_mm_xor_si128(load(bytes), _mm_cvtsi32_si128(int(state))), bytes, count);
#endif
    return by_table(state, bytes, count);
}

constexpr size_t PIECE = 4096;  // stays in the first-level cache between its copy and its digest

// CRC-32 of what was written to `copy`, whatever happens to `bytes` meanwhile.
uint32_t copy_with_crc32(const uint8_t* bytes, uint8_t* copy, size_t count) {
    uint32_t state = 0xFFFFFFFF;
#if defined(__x86_64__)
    if (has_wide_products() && count >= 256 && (uintptr_t)copy % 64 == 0)
        return ~by_wide_products<COPY_AND_DIGEST>(state, bytes, copy, count);
#endif
    for (size_t done = 0; done < count; done += PIECE) {
        const size_t piece = count - done < PIECE ? count - done : PIECE;
        std::memcpy(copy + done, bytes + done, piece);
        state = crc32(state, copy + done, piece);
    }
    return ~state;
}

void copy_only(const uint8_t* bytes, uint8_t* copy, size_t count) {
#if defined(__x86_64__)
    if (has_wide_products() && count >= 256 && (uintptr_t)copy % 64 == 0) {
        by_wide_products<COPY>(0, bytes, copy, count);
        return;
    }
#endif
    std::memcpy(copy, bytes, count);
}

}  // namespace

// zlib's crc32(0, bytes, count).
DUOPOOL_EXPORT uint32_t duopool_crc32(const void* bytes, int64_t count) {
    return ~crc32(0xFFFFFFFF, (const uint8_t*)bytes, size_t(count));
}

// Copies page sources[i] of one store over page targets[i] of another, both with pages of `page_bytes` side by side; the
// stores do not overlap. digests[i] becomes the CRC-32 of what was written; null: nobody asks for them.
DUOPOOL_EXPORT void duopool_copy_pages(const void* source_pages, void* target_pages, int64_t page_bytes,
                                       const int64_t* sources, const int64_t* targets, int64_t count,
                                       uint32_t* digests) {
    for (int64_t i = 0; i < count; ++i) {
        const auto* page = (const uint8_t*)source_pages + sources[i] * page_bytes;
        auto* copy = (uint8_t*)target_pages + targets[i] * page_bytes;
        if (digests)
            digests[i] = copy_with_crc32(page, copy, size_t(page_bytes));
        else
            copy_only(page, copy, size_t(page_bytes));
    }
#if defined(__x86_64__)
    _mm_sfence();  // copies that went past the caches are seen by whoever is told that this call has ended
#endif
}
