// Vectors of DUOPOOL_WIDTH floats for one instruction set, and the arithmetic on them that the kernels share.
//
// Included once per instruction set, inside that set's namespace (see every_isa.h): so no include guard, no
// standard headers, and every function carries DUOPOOL_TARGET. Plain vector types instead of intrinsics: one text is
// compiled for every width, and what is tested on one machine is the text that runs on another.
//
// bfloat16 is expanded by pairs: 2 * WIDTH consecutive values seen as WIDTH words give the even ones by a shift and the
// odd ones by a mask, with no shuffle. "Pair order" of a chunk of 2 * WIDTH values is therefore (even, odd) for bfloat16
// and (first half, second half) for float32; sums over a chunk do not care, and stores undo it.

constexpr int WIDTH = DUOPOOL_WIDTH;
constexpr int CHUNK = 2 * WIDTH;
constexpr int MAX_ROWS = DUOPOOL_MAX_ROWS;

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Halves __attribute__((vector_size(WIDTH * 2)));
typedef uint16_t LooseHalves __attribute__((vector_size(WIDTH * 2), aligned(2), may_alias));
typedef float LooseFloats __attribute__((vector_size(WIDTH * 4), aligned(4), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(WIDTH * 4), aligned(2), may_alias));

#define DUOPOOL_INLINE static inline __attribute__((always_inline)) DUOPOOL_TARGET

DUOPOOL_INLINE Floats load(const float* from) { return *(const LooseFloats*)from; }
DUOPOOL_INLINE void store(float* to, Floats value) { *(LooseFloats*)to = value; }
DUOPOOL_INLINE Floats fill(float value) { return value - Floats{}; }  // x - 0 folds to x; x + 0 does not
DUOPOOL_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

DUOPOOL_INLINE void load_pair(const float* from, Floats& a, Floats& b) {
    a = load(from);
    b = load(from + WIDTH);
}

DUOPOOL_INLINE void load_pair(const Bfloat16* from, Floats& a, Floats& b) {
    const Words words = *(const LooseWords*)from;
    a = (Floats)(words << 16);
    b = (Floats)(words & 0xffff0000u);
}

// bfloat16 pairs as words: whether this set multiplies them as they are. Without that, factors are expanded to float32.
#ifdef DUOPOOL_DOTS
constexpr bool HAS_DOTS = true;
#else
constexpr bool HAS_DOTS = false;
#endif

// sums[i] += a[2i] * b[2i] + a[2i + 1] * b[2i + 1] over the bfloat16 pairs in each word.
DUOPOOL_INLINE Floats add_pair_products(Floats sums, Words a, Words b) {
#ifdef DUOPOOL_DOTS
    return (Floats)_mm512_dpbf16_ps((__m512)sums, (__m512bh)a, (__m512bh)b);
#else
    sums += (Floats)(a << 16) * (Floats)(b << 16);
    return sums + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

// The chunk's first `count` values, zeros behind them; reads nothing past them.
template <class T>
DUOPOOL_INLINE void load_partial_pair(const T* from, int64_t count, Floats& a, Floats& b) {
    T whole[CHUNK] = {};
    __builtin_memcpy(whole, from, count * sizeof(T));
    load_pair(whole, a, b);
}

DUOPOOL_INLINE Words rounded_to_bfloat16(Floats value) {
    const Words bits = (Words)value;
    const Words nearest_even = bits + 0x7fffu + ((bits >> 16) & 1u);
    return value == value ? nearest_even : (Words{} + 0x7fc00000u);
}

DUOPOOL_INLINE void store_pair(float* to, Floats a, Floats b) {
    store(to, a);
    store(to + WIDTH, b);
}

DUOPOOL_INLINE void store_pair(Bfloat16* to, Floats a, Floats b) {
    *(LooseWords*)to = (rounded_to_bfloat16(a) >> 16) | (rounded_to_bfloat16(b) & 0xffff0000u);
}

template <class T>
DUOPOOL_INLINE void store_partial_pair(T* to, int64_t count, Floats a, Floats b) {
    T whole[CHUNK];
    store_pair(whole, a, b);
    __builtin_memcpy(to, whole, count * sizeof(T));
}

// WIDTH values in their natural order.
DUOPOOL_INLINE Floats load_line(const float* from) { return load(from); }
DUOPOOL_INLINE Floats load_line(const Bfloat16* from) {
    return (Floats)(__builtin_convertvector((Halves) * (const LooseHalves*)from, Words) << 16);
}
DUOPOOL_INLINE void store_line(float* to, Floats value) { store(to, value); }
DUOPOOL_INLINE void store_line(Bfloat16* to, Floats value) {
#ifdef DUOPOOL_DOTS
    *(LooseHalves*)to = (Halves)_mm512_cvtneps_pbh((__m512)value);
#else
    *(LooseHalves*)to = __builtin_convertvector(rounded_to_bfloat16(value) >> 16, Halves);
#endif
}

// The first `count` of WIDTH values; reads zeros and writes nothing behind them.
template <class T>
DUOPOOL_INLINE Floats load_line(const T* from, int64_t count) {
    if (count >= WIDTH) return load_line(from);
    T whole[WIDTH] = {};
    __builtin_memcpy(whole, from, count * sizeof(T));
    return load_line(whole);
}
template <class T>
DUOPOOL_INLINE void store_line(T* to, Floats value, int64_t count) {
    if (count >= WIDTH) return store_line(to, value);
    T whole[WIDTH];
    store_line(whole, value);
    __builtin_memcpy(to, whole, count * sizeof(T));
}

// The vector with its halves of every 2 * HALF lanes exchanged. HALF is a template's, here and below: an order of lanes that
// the compiler does not see as constant is put together anew each time, at ten times the cost of the exchange.
template <int HALF>
DUOPOOL_INLINE Floats swapped(Floats value) {
    Ints lanes;
    for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] = lane ^ HALF;
    return __builtin_shuffle(value, lanes);
}

// Which way lanes are brought together.
enum Merge { ADD, LARGEST };
template <Merge HOW>
DUOPOOL_INLINE Floats merged(Floats a, Floats b) {
    if constexpr (HOW == ADD) return a + b;
    else return larger(a, b);
}

// Brings all lanes together, by halves, until LEAST are left: the lowest ones.
template <Merge HOW, int LEAST, int HALF = WIDTH / 2>
DUOPOOL_INLINE Floats merged_lanes(Floats value) {
    if constexpr (HALF < LEAST) return value;
    else return merged_lanes<HOW, LEAST, HALF / 2>(merged<HOW>(value, swapped<HALF>(value)));
}

DUOPOOL_INLINE float largest(Floats value) { return merged_lanes<LARGEST, 1>(value)[0]; }

DUOPOOL_INLINE float sum(Floats value) { return merged_lanes<ADD, 1>(value)[0]; }

// Asks for the line that a stream of weights comes to after some time, into the second cache: the hardware looks ahead no
// further than a page of 4 KB, and memory answers later than that.
DUOPOOL_INLINE void prefetch_stream(const void* line) { __builtin_prefetch((const char*)line + 8192, 0, 2); }

// e^x to 2 units in the last place for x <= 88; exactly 0 below -87.
DUOPOOL_INLINE Floats exponential(Floats x) {
    const Floats bounded = larger(x, fill(-87.0f));
    const Floats magic = fill(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
    const Floats shifted = bounded * 1.44269504f + magic;
    const Floats whole = shifted - magic;
    Floats rest = bounded - whole * 0.693359375f;
    rest = rest + whole * 2.12194440e-4f;
    Floats power = fill(1.9875691500e-4f);
    power = power * rest + 1.3981999507e-3f;
    power = power * rest + 8.3334519073e-3f;
    power = power * rest + 4.1665795894e-2f;
    power = power * rest + 1.6666665459e-1f;
    power = power * rest + 5.0000001201e-1f;
    power = power * rest * rest + rest + 1.0f;
    const Words exponent = ((Words)shifted - 0x4b400000u) << 23;
    const Floats scaled = (Floats)((Words)power + exponent);
    return x < -87.0f ? Floats{} : scaled;
}

DUOPOOL_INLINE Floats hyperbolic_tangent(Floats x) {
    const Floats bounded = larger(fill(-40.0f), x > 40.0f ? fill(40.0f) : x);
    return 1.0f - 2.0f / (exponential(2.0f * bounded) + 1.0f);
}

// Turn WIDTH rows of WIDTH values around in place, by exchanging ever smaller quadrants.
template <int HALF = WIDTH / 2>
DUOPOOL_INLINE void transpose(Floats (&rows)[WIDTH]) {
    Ints upper, lower;
    for (int lane = 0; lane < WIDTH; ++lane) {
        upper[lane] = lane & HALF ? WIDTH + lane - HALF : lane;
        lower[lane] = lane & HALF ? WIDTH + lane : lane + HALF;
    }
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; ++i) {
        if (i & HALF) continue;
        const Floats a = rows[i], b = rows[i + HALF];
        rows[i] = __builtin_shuffle(a, b, upper);
        rows[i + HALF] = __builtin_shuffle(a, b, lower);
    }
    if constexpr (HALF > 1) transpose<HALF / 2>(rows);
}

// Brings the lanes of each quad of four vectors together: quad q has those of a, b, c and d in its lanes 0 to 3.
template <Merge HOW>
DUOPOOL_INLINE Floats merged_quads(Floats a, Floats b, Floats c, Floats d) {
    Ints even, odd;
    for (int lane = 0; lane < WIDTH; ++lane) {
        const int quad = lane & ~3, side = lane & 2 ? WIDTH : 0;
        even[lane] = quad + side + (lane & 1 ? 2 : 0);
        odd[lane] = even[lane] + 1;
    }
    const Floats ab = merged<HOW>(__builtin_shuffle(a, b, even), __builtin_shuffle(a, b, odd));
    const Floats cd = merged<HOW>(__builtin_shuffle(c, d, even), __builtin_shuffle(c, d, odd));
    return merged<HOW>(__builtin_shuffle(ab, cd, even), __builtin_shuffle(ab, cd, odd));
}

// Adds up the quads of each of WIDTH / 4 vectors: their sums, one vector's behind the other's.
template <int HALF = WIDTH / 2, int N>
DUOPOOL_INLINE Floats joined_sums(const Floats (&quads)[N]) {
    if constexpr (N == 1) {
        return quads[0];
    } else {
        Ints lower, upper;
        for (int i = 0; i < WIDTH; ++i) {
            const int place = i % (WIDTH / 2);
            lower[i] = (i < WIDTH / 2 ? 0 : WIDTH) + place / HALF * 2 * HALF + place % HALF;
            upper[i] = lower[i] + HALF;
        }
        Floats half[N / 2];
#pragma GCC unroll 4
        for (int i = 0; i < N / 2; ++i)
            half[i] = __builtin_shuffle(quads[2 * i], quads[2 * i + 1], lower) +
                      __builtin_shuffle(quads[2 * i], quads[2 * i + 1], upper);
        return joined_sums<HALF / 2>(half);
    }
}

// c[R][CHUNK] (+)= a[R][depth] * b[depth][CHUNK]: the inner loop of every product of matrices here. The R x 2 sums stay
// in registers; b comes in pair order, so for bfloat16 the columns of c do too.
template <int R, class T>
DUOPOOL_TARGET __attribute__((noinline)) void multiply_rows(const float* a, int64_t a_stride, const T* b, int64_t b_stride,
                                                            int64_t depth, float* c, int64_t c_stride,
                                                            bool accumulate) {
    // Few rows leave the multipliers waiting for their own sums: then several depths are summed apart.
    constexpr int LANES = R == 1 ? 4 : R <= 3 ? 2 : 1;
    Floats sums[LANES][R][2] = {};
    if (accumulate) {
        for (int r = 0; r < R; ++r) load_pair(c + r * c_stride, sums[0][r][0], sums[0][r][1]);
    }
    int64_t k = 0;
    for (; k + LANES <= depth; k += LANES) {
#pragma GCC unroll 4
        for (int lane = 0; lane < LANES; ++lane) {
            Floats low, high;
            load_pair(b + (k + lane) * b_stride, low, high);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) {
                const Floats factor = fill(a[r * a_stride + k + lane]);
                sums[lane][r][0] += factor * low;
                sums[lane][r][1] += factor * high;
            }
        }
    }
    for (; k < depth; ++k) {
        Floats low, high;
        load_pair(b + k * b_stride, low, high);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const Floats factor = fill(a[r * a_stride + k]);
            sums[0][r][0] += factor * low;
            sums[0][r][1] += factor * high;
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        for (int lane = 1; lane < LANES; ++lane) {
            sums[0][r][0] += sums[lane][r][0];
            sums[0][r][1] += sums[lane][r][1];
        }
        store(c + r * c_stride, sums[0][r][0]);
        store(c + r * c_stride + WIDTH, sums[0][r][1]);
    }
}

template <class T>
using MultiplyRows = void (*)(const float*, int64_t, const T*, int64_t, int64_t, float*, int64_t, bool);

// multiply_rows by its number of rows, 1 to MAX_ROWS.
template <class T>
struct RowProducts {
    static constexpr MultiplyRows<T> of[MAX_ROWS + 1] = {
        nullptr,
        multiply_rows<1, T>,
        multiply_rows<2, T>,
        multiply_rows<3, T>,
        multiply_rows<4, T>,
        multiply_rows<5, T>,
        multiply_rows<6, T>,
#if DUOPOOL_MAX_ROWS > 6
        multiply_rows<7, T>,
        multiply_rows<8, T>,
        multiply_rows<9, T>,
        multiply_rows<10, T>,
        multiply_rows<11, T>,
        multiply_rows<12, T>,
#endif
    };
};
