// Products of float32 or bfloat16 rows with words that hold the bfloat16 values of two depths, for one instruction set.
//
// Included by every_isa.h behind vectors.h. A sum runs over the depths in their order whatever the number of rows.

// Where R rows of x are, a pair of depths at a time. Every third row has its address: these stay in registers beside the
// panel's, and the two behind it are reached from there.
template <int R, class X>
struct Rows {
    const X* third[(R + 2) / 3];
    int64_t stride;
};

template <int R, class X>
DUOPOOL_INLINE Rows<R, X> rows_at(const X* x, int64_t stride) {
    Rows<R, X> rows;
    rows.stride = stride;
#pragma GCC unroll 4
    for (int i = 0; i < (R + 2) / 3; ++i) rows.third[i] = x + 3 * i * stride;
    return rows;
}

template <int R, class X>
DUOPOOL_INLINE const X* row(const Rows<R, X>& rows, int r) {
    return rows.third[r / 3] + r % 3 * rows.stride;
}

template <int R, class X>
DUOPOOL_INLINE void next_pair(Rows<R, X>& rows) {
#pragma GCC unroll 4
    for (const X*& address : rows.third) {
        address += 2;
        asm("" : "+r"(address));  // else GCC keeps an address for each row, most of them in memory
    }
}

// One pair of depths: sums[R][V] += x's pair * words[V].
template <int R, int V>
DUOPOOL_INLINE void add_pair(const Rows<R, Bfloat16>& x, const Words (&words)[V], Floats (&sums)[R][V]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        uint32_t pair;
        __builtin_memcpy(&pair, row(x, r), 4);
        const Words factors = Words{} + pair;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = add_pair_products(sums[r][v], factors, words[v]);
    }
}
template <int R, int V>
DUOPOOL_INLINE void add_pair(const Rows<R, float>& x, const Words (&words)[V], Floats (&sums)[R][V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
        const Floats first = (Floats)(words[v] << 16), second = (Floats)(words[v] & 0xffff0000u);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            sums[r][v] += fill(row(x, r)[0]) * first;
            sums[r][v] += fill(row(x, r)[1]) * second;
        }
    }
}
// The last depth of an odd number of them.
template <int R, int V>
DUOPOOL_INLINE void add_single(const Rows<R, Bfloat16>& x, const Words (&words)[V], Floats (&sums)[R][V]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = add_pair_products(sums[r][v], Words{} + row(x, r)->bits, words[v]);
}
template <int R, int V>
DUOPOOL_INLINE void add_single(const Rows<R, float>& x, const Words (&words)[V], Floats (&sums)[R][V]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] += fill(row(x, r)[0]) * (Floats)(words[v] << 16);
}

// c[R][P * CHUNK] (+)= x[R][depth] * P panels of [ceil(depth / 2)][CHUNK] words.
template <int R, int P, class X>
DUOPOOL_TARGET __attribute__((noinline)) void multiply_words(const X* x, int64_t x_stride, const uint32_t* panel,
                                                             int64_t panel_stride, int64_t depth, float* c,
                                                             int64_t c_stride, bool accumulate) {
    // Loops over sums are unrolled wherever they are: one that is not puts them all into memory.
    Floats sums[R][2 * P] = {};
    if (accumulate) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
            for (int v = 0; v < 2 * P; ++v) sums[r][v] = load(c + r * c_stride + v * WIDTH);
    }
    Rows<R, X> rows = rows_at<R>(x, x_stride);
    Words words[2 * P];
    for (int64_t pairs = depth / 2; pairs > 0; --pairs, panel += CHUNK, next_pair(rows)) {
#pragma GCC unroll 8
        for (int v = 0; v < 2 * P; ++v) {
            const uint32_t* const from = panel + v / 2 * panel_stride + v % 2 * WIDTH;
            words[v] = *(const LooseWords*)from;
            prefetch_stream(from);
        }
        add_pair<R, 2 * P>(rows, words, sums);
    }
    if (depth % 2) {
#pragma GCC unroll 8
        for (int v = 0; v < 2 * P; ++v)
            words[v] = *(const LooseWords*)(panel + v / 2 * panel_stride + v % 2 * WIDTH);
        add_single<R, 2 * P>(rows, words, sums);
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
        for (int v = 0; v < 2 * P; ++v) store(c + r * c_stride + v * WIDTH, sums[r][v]);
}

template <class X>
using MultiplyWords = void (*)(const X*, int64_t, const uint32_t*, int64_t, int64_t, float*, int64_t, bool);

template <class X>
struct WordProducts {
    static constexpr MultiplyWords<X> of[MAX_ROWS + 1] = {
        nullptr,
        multiply_words<1, 1, X>,
        multiply_words<2, 1, X>,
        multiply_words<3, 1, X>,
        multiply_words<4, 1, X>,
        multiply_words<5, 1, X>,
        multiply_words<6, 1, X>,
#if DUOPOOL_MAX_ROWS > 6
        multiply_words<7, 1, X>,
        multiply_words<8, 1, X>,
        multiply_words<9, 1, X>,
        multiply_words<10, 1, X>,
        multiply_words<11, 1, X>,
        multiply_words<12, 1, X>,
#endif
    };
    // Few rows take two panels at once: else the multipliers wait for their own sums.
    static constexpr MultiplyWords<X> of_two[4] = {nullptr, multiply_words<1, 2, X>, multiply_words<2, 2, X>,
                                                    multiply_words<3, 2, X>};
};
