// Products with weights of 8 or 4 bits for one instruction set: each group of GROUP depths of a column has a scale, and the
// activations of a group are bytes with a scale of their own, so that a group's sum is one of whole numbers.
//
// Included by every_isa.h behind word_products.h. Weights are unsigned with a zero point (128 or 8), activations signed:
// sum(scale_w * (q - zero) * scale_x * x) = scale_w * (scale_x * sum(q * x) - zero * scale_x * sum(x)), summed over the
// groups in float32. A panel holds, group by group, words of four depths for its CHUNK columns (8 depths for 4 bits: the
// low halves are the first four), then the CHUNK bfloat16 scales.

constexpr int64_t GROUP = 32;

template <int BITS>
struct Packed {
    uint8_t byte;
    static constexpr int32_t ZERO = BITS == 8 ? 128 : 8;
    static constexpr int64_t WORDS = GROUP * BITS / 32 * CHUNK;  // of one group
    static constexpr int64_t GROUP_BYTES = WORDS * 4 + CHUNK * 2;
};
typedef Packed<8> Byte;
typedef Packed<4> Nibble;

// A row of activations: [groups * GROUP] bytes, then per group the scale and the scale times the sum.
struct ByteRow {
    int8_t byte;
};

static inline int64_t num_groups(int64_t depth) { return (depth + GROUP - 1) / GROUP; }
static inline int64_t byte_row_stride(int64_t depth) { return (depth + GROUP - 1) / GROUP * (GROUP + 8); }

static inline int32_t rounded(float value) { return (int32_t)__builtin_rintf(value); }

DUOPOOL_TARGET static inline void quantise_row(const float* x, int64_t depth, ByteRow* row) {
    const int64_t groups = num_groups(depth);
    float* const scales = (float*)(row + groups * GROUP);
    for (int64_t group = 0; group < groups; ++group) {
        const int64_t first = group * GROUP, count = depth - first < GROUP ? depth - first : GROUP;
        Floats most = {}, sums = {};
        float values[GROUP];
        for (int64_t i = 0; i < GROUP; i += WIDTH) {
            const Floats value = i < count ? load_line(x + first + i, count - i) : Floats{};
            store(values + i, value);
            most = larger(most, larger(value, -value));
        }
        const float peak = largest(most), factor = peak > 0 ? 127.0f / peak : 0.0f;
        for (int64_t i = 0; i < GROUP; i += WIDTH) {
            const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
            const Floats whole = load(values + i) * factor + magic - magic;
            sums += whole;
            const Ints bytes = __builtin_convertvector(whole, Ints);
            typedef int8_t Bytes __attribute__((vector_size(WIDTH)));
            const Bytes narrow = __builtin_convertvector(bytes, Bytes);
            __builtin_memcpy(row + first + i, &narrow, WIDTH);
        }
        scales[2 * group] = peak / 127.0f;
        scales[2 * group + 1] = peak / 127.0f * sum(sums);
        // Not-a-number and infinity have no scale; they must not get lost.
        float total = 0;
        for (int64_t i = 0; i < GROUP; ++i) total += values[i] * 0.0f;
        if (total != 0.0f) scales[2 * group] = scales[2 * group + 1] = __builtin_nanf("");
    }
}

// sums[i] += the four unsigned bytes of a[i] times the four signed ones of b[i].
DUOPOOL_INLINE Ints add_byte_products(Ints sums, Words a, Words b) {
#ifdef DUOPOOL_DOTS
    return (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b);
#else
    for (int byte = 0; byte < 32; byte += 8)
        sums += (Ints)(a >> byte & 255u) * ((Ints)(b << (24 - byte)) >> 24);
    return sums;
#endif
}

template <int R, int BITS>
DUOPOOL_TARGET __attribute__((noinline)) void multiply_bytes(const ByteRow* x, int64_t x_stride,
                                                             const Packed<BITS>* panel, int64_t depth, float* c,
                                                             int64_t c_stride) {
    const int64_t groups = num_groups(depth);
    Floats sums[R][2] = {};
    for (int64_t group = 0; group < groups; ++group, panel += Packed<BITS>::GROUP_BYTES) {
        Ints whole[R][2] = {};
        const uint32_t* words = (const uint32_t*)panel;
#pragma GCC unroll 8
        for (int64_t quad = 0; quad < GROUP / 4; ++quad) {
            Words weights[2];
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const uint32_t* const from = words + (BITS == 8 ? quad : quad / 2) * CHUNK + v * WIDTH;
                if (BITS == 8 || quad % 2 == 0) prefetch_stream(from);
                if (BITS == 8) {
                    weights[v] = *(const LooseWords*)from;
                } else {
                    const Words both = *(const LooseWords*)from;
                    weights[v] = (quad % 2 ? both >> 4 : both) & 0x0f0f0f0fu;
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                uint32_t four;
                __builtin_memcpy(&four, x + r * x_stride + group * GROUP + quad * 4, 4);
                whole[r][0] = add_byte_products(whole[r][0], weights[0], Words{} + four);
                whole[r][1] = add_byte_products(whole[r][1], weights[1], Words{} + four);
            }
        }
        const Bfloat16* scales = (const Bfloat16*)(words + Packed<BITS>::WORDS);
        prefetch_stream(scales);
        const Floats low = load_line(scales), high = load_line(scales + WIDTH);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const float* of_row = (const float*)(x + r * x_stride + groups * GROUP) + 2 * group;
            const Floats scale = fill(of_row[0]), offset = fill(of_row[1] * -(float)Packed<BITS>::ZERO);
            sums[r][0] += low * (__builtin_convertvector(whole[r][0], Floats) * scale + offset);
            sums[r][1] += high * (__builtin_convertvector(whole[r][1], Floats) * scale + offset);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
        store(c + r * c_stride, sums[r][0]);
        store(c + r * c_stride + WIDTH, sums[r][1]);
    }
}

constexpr int64_t BYTE_ROWS = 6;

template <int BITS>
struct ByteProducts {
    static constexpr void (*of[BYTE_ROWS + 1])(const ByteRow*, int64_t, const Packed<BITS>*, int64_t, float*, int64_t) = {
        nullptr,
        multiply_bytes<1, BITS>,
        multiply_bytes<2, BITS>,
        multiply_bytes<3, BITS>,
        multiply_bytes<4, BITS>,
        multiply_bytes<5, BITS>,
        multiply_bytes<6, BITS>,
    };
};

// weight[columns][depth] to a panel: round to nearest, the scale being rounded first.
template <int BITS>
DUOPOOL_TARGET void pack_bits(const float* weight, int64_t row_stride, int64_t columns, int64_t depth, uint8_t* panel) {
    constexpr int32_t MOST = (1 << (BITS - 1)) - 1;
    for (int64_t group = 0; group < num_groups(depth); ++group, panel += Packed<BITS>::GROUP_BYTES) {
        uint32_t* const words = (uint32_t*)panel;
        Bfloat16* const scales = (Bfloat16*)(words + Packed<BITS>::WORDS);
        __builtin_memset(words, 0, Packed<BITS>::WORDS * 4);
        const int64_t first = group * GROUP, count = depth - first < GROUP ? depth - first : GROUP;
        for (int64_t column = 0; column < CHUNK; ++column) {
            const float* from = weight + column * row_stride + first;
            // The value of largest size gets the longer, negative end of the range, so that no code is wasted.
            float peak = 0;
            for (int64_t i = 0; column < columns && i < count; ++i)
                if (__builtin_fabsf(from[i]) > __builtin_fabsf(peak)) peak = from[i];
            const float exact = BITS == 8 ? __builtin_fabsf(peak) / MOST : -peak / (MOST + 1);
            uint32_t bits;
            __builtin_memcpy(&bits, &exact, 4);
            bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
            float scale;
            __builtin_memcpy(&scale, &bits, 4);
            scales[column].bits = (uint16_t)(bits >> 16);
            for (int64_t i = 0; i < GROUP; ++i) {
                const bool is_there = column < columns && i < count && scale != 0;
                int32_t q = is_there ? rounded(from[i] / scale) : 0;
                q = q < -MOST - 1 ? -MOST - 1 : q > MOST ? MOST : q;
                const uint32_t code = (uint32_t)(q + Packed<BITS>::ZERO);
                const int64_t quad = i / 4;
                if (BITS == 8)
                    words[quad * CHUNK + column] |= code << (i % 4 * 8);
                else
                    words[quad / 2 * CHUNK + column] |= code << (i % 4 * 8 + quad % 2 * 4);
            }
        }
    }
}
