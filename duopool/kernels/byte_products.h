// Products with weights of 8 or 4 bits for one instruction set: each group of GROUP depths of a column has a scale, and the
// activations of a group are bytes with a scale of their own, so that a group's sum is one of whole numbers.
//
// Included by every_isa.h behind word_products.h. Weights are unsigned, activations signed. With 8 bits codes count from
// 128: sum(scale_w * (q - 128) * scale_x * x) = scale_w * (scale_x * sum(q * x) - 128 * scale_x * sum(x)). With 4 bits they
// count from the group's least value: sum((scale_w * q + least) * scale_x * x) = scale_w * scale_x * sum(q * x) + least *
// scale_x * sum(x). Groups are summed in float32. A panel holds, group by group, words of four depths for its CHUNK columns
// (8 depths for 4 bits: the low halves are the first four), then for each column the bfloat16 scale, for 4 bits as the
// lower half of a word with the least value, bfloat16 too.

constexpr int64_t GROUP = 32;

template <int BITS>
struct Packed {
    uint8_t byte;
    static constexpr int64_t WORDS = GROUP * BITS / 32 * CHUNK;  // of one group
    static constexpr int64_t GROUP_BYTES = WORDS * 4 + CHUNK * (BITS == 8 ? 2 : 4);
};
constexpr int32_t BYTE_ZERO = 128;
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
    // Of few rows, upper halves stay where they are, sixteen times their value, and are summed apart: shifting the sums is
    // less than shifting the weights.
    constexpr bool IS_APART = BITS == 4 && R <= 2;
    Floats sums[R][2] = {};
    for (int64_t group = 0; group < groups; ++group, panel += Packed<BITS>::GROUP_BYTES) {
        Ints parts[IS_APART ? 2 : 1][R][2] = {};
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
                    weights[v] = IS_APART && quad % 2 ? both & 0xf0f0f0f0u : (quad % 2 ? both >> 4 : both) & 0x0f0f0f0fu;
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < R; ++r) {
                uint32_t four;
                __builtin_memcpy(&four, x + r * x_stride + group * GROUP + quad * 4, 4);
                Ints* const whole = parts[IS_APART ? quad % 2 : 0][r];
                whole[0] = add_byte_products(whole[0], weights[0], Words{} + four);
                whole[1] = add_byte_products(whole[1], weights[1], Words{} + four);
            }
        }
        Floats scales[2], leasts[2];
        const uint32_t* const behind = words + Packed<BITS>::WORDS;
#pragma GCC unroll 2
        for (int v = 0; v < 2; ++v) {
            if (BITS == 8) {
                if (v == 0) prefetch_stream(behind);
                scales[v] = load_line((const Bfloat16*)behind + v * WIDTH);
            } else {
                prefetch_stream(behind + v * WIDTH);
                const Words both = *(const LooseWords*)(behind + v * WIDTH);
                scales[v] = (Floats)(both << 16);
                leasts[v] = (Floats)(both & 0xffff0000u);
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const float* of_row = (const float*)(x + r * x_stride + groups * GROUP) + 2 * group;
            const Floats scale = fill(of_row[0]), offset = fill(BITS == 8 ? of_row[1] * -BYTE_ZERO : of_row[1]);
#pragma GCC unroll 2
            for (int v = 0; v < 2; ++v) {
                const Ints whole = IS_APART ? parts[0][r][v] + (parts[IS_APART][r][v] >> 4) : parts[0][r][v];
                const Floats products = __builtin_convertvector(whole, Floats) * scale;
                if (BITS == 8)
                    sums[r][v] += scales[v] * (products + offset);
                else
                    sums[r][v] += scales[v] * products + leasts[v] * offset;
            }
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

static inline float as_bfloat16(float value, Bfloat16* to) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, 4);
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
    to->bits = (uint16_t)(bits >> 16);
    __builtin_memcpy(&value, &bits, 4);
    return value;
}

// A group of one column: a value is scale * (code - 128) or, of 4 bits, scale * code + least.
template <int BITS>
struct Codes {
    Bfloat16 scale, least;  // the latter of 4 bits only
    uint8_t code[GROUP];
};

// One scale, about the middle.
static inline void round_group(const float* values, int64_t count, Codes<8>* codes) {
    float peak = 0;
    for (int64_t i = 0; i < count; ++i) peak = __builtin_fmaxf(peak, __builtin_fabsf(values[i]));
    const float scale = as_bfloat16(peak / 127, &codes->scale);
    for (int64_t i = 0; i < GROUP; ++i) {
        const int32_t q = i < count && scale != 0 ? rounded(values[i] / scale) : 0;
        codes->code[i] = (uint8_t)((q < -128 ? -128 : q > 127 ? 127 : q) + BYTE_ZERO);
    }
}

// Least squares over the numbers of steps that the group's values may span: weights that come from 4 bits find the steps
// that they were made of, whether their group uses all of its codes or not.
static inline void round_group(const float* values, int64_t count, Codes<4>* codes) {
    constexpr int32_t MOST = 15, FEWEST = 8;
    float lowest = count ? values[0] : 0, highest = lowest;
    for (int64_t i = 0; i < count; ++i) {
        lowest = __builtin_fminf(lowest, values[i]);
        highest = __builtin_fmaxf(highest, values[i]);
    }
    Codes<4> tried = {};
    const float least = as_bfloat16(lowest, &tried.least);
    double smallest_error = __builtin_inf();
    for (int32_t steps = MOST; steps >= FEWEST && smallest_error > 0; --steps) {
        const float scale = as_bfloat16((highest - lowest) / steps, &tried.scale);
        double error = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int32_t q = scale != 0 ? rounded((values[i] - least) / scale) : 0;
            tried.code[i] = (uint8_t)(q < 0 ? 0 : q > MOST ? MOST : q);
            const double missed = (double)scale * tried.code[i] + least - values[i];
            error += missed * missed;
        }
        if (error < smallest_error) {
            smallest_error = error;
            *codes = tried;
        }
    }
}

// weight[columns][depth] to a panel: round to nearest, the scale being rounded first.
template <int BITS>
DUOPOOL_TARGET void pack_bits(const float* weight, int64_t row_stride, int64_t columns, int64_t depth, uint8_t* panel) {
    for (int64_t group = 0; group < num_groups(depth); ++group, panel += Packed<BITS>::GROUP_BYTES) {
        uint32_t* const words = (uint32_t*)panel;
        uint32_t* const behind = words + Packed<BITS>::WORDS;
        __builtin_memset(words, 0, Packed<BITS>::WORDS * 4);
        const int64_t first = group * GROUP, count = depth - first < GROUP ? depth - first : GROUP;
        for (int64_t column = 0; column < CHUNK; ++column) {
            Codes<BITS> codes = {};
            round_group(weight + column * row_stride + first, column < columns ? count : 0, &codes);
            if (BITS == 8)
                ((Bfloat16*)behind)[column] = codes.scale;
            else
                behind[column] = codes.scale.bits | (uint32_t)codes.least.bits << 16;
            for (int64_t i = 0; i < GROUP; ++i) {
                const uint32_t code = codes.code[i];
                const int64_t quad = i / 4;
                if (BITS == 8)
                    words[quad * CHUNK + column] |= code << (i % 4 * 8);
                else
                    words[quad / 2 * CHUNK + column] |= code << (i % 4 * 8 + quad % 2 * 4);
            }
        }
    }
}
