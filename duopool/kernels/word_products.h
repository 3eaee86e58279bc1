// Products of float32 or bfloat16 rows with words that hold the bfloat16 values of two depths, for one instruction set.
//
// Included by every_isa.h behind vectors.h. A sum runs over the depths in their order whatever the number of rows.

// One pair of depths: sums[R][V] += x's pair * words[V].
template <int R, int V>
DUOPOOL_INLINE void add_pair(const Bfloat16* x, int64_t x_stride, const Words (&words)[V], Floats (&sums)[R][V]) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        uint32_t pair;
        __builtin_memcpy(&pair, x + r * x_stride, 4);
        const Words factors = Words{} + pair;
#pragma GCC unroll 8
        for (int v = 0; v < V; ++v) sums[r][v] = add_pair_products(sums[r][v], factors, words[v]);
    }
}
template <int R, int V>
DUOPOOL_INLINE void add_pair(const float* x, int64_t x_stride, const Words (&words)[V], Floats (&sums)[R][V]) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
        const Floats first = (Floats)(words[v] << 16), second = (Floats)(words[v] & 0xffff0000u);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            sums[r][v] += fill(x[r * x_stride]) * first;
            sums[r][v] += fill(x[r * x_stride + 1]) * second;
        }
    }
}
// The last depth of an odd number of them.
template <int R, int V>
DUOPOOL_INLINE void add_single(const Bfloat16* x, int64_t x_stride, const Words (&words)[V], Floats (&sums)[R][V]) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v)
            sums[r][v] = add_pair_products(sums[r][v], Words{} + x[r * x_stride].bits, words[v]);
}
template <int R, int V>
DUOPOOL_INLINE void add_single(const float* x, int64_t x_stride, const Words (&words)[V], Floats (&sums)[R][V]) {
    for (int r = 0; r < R; ++r)
        for (int v = 0; v < V; ++v) sums[r][v] += fill(x[r * x_stride]) * (Floats)(words[v] << 16);
}

// c[R][P * CHUNK] (+)= x[R][depth] * P panels of [ceil(depth / 2)][CHUNK] words.
template <int R, int P, class X>
DUOPOOL_TARGET __attribute__((noinline)) void multiply_words(const X* x, int64_t x_stride, const uint32_t* panel,
                                                             int64_t panel_stride, int64_t depth, float* c,
                                                             int64_t c_stride, bool accumulate) {
    Floats sums[R][2 * P] = {};
    if (accumulate) {
        for (int r = 0; r < R; ++r)
            for (int v = 0; v < 2 * P; ++v) sums[r][v] = load(c + r * c_stride + v * WIDTH);
    }
    Words words[2 * P];
    for (int64_t k = 0; k + 2 <= depth; k += 2) {
#pragma GCC unroll 8
        for (int v = 0; v < 2 * P; ++v) {
            const uint32_t* const from = panel + v / 2 * panel_stride + k / 2 * CHUNK + v % 2 * WIDTH;
            words[v] = *(const LooseWords*)from;
            prefetch_stream(from);
        }
        add_pair<R, 2 * P>(x + k, x_stride, words, sums);
    }
    if (depth % 2) {
        for (int v = 0; v < 2 * P; ++v)
            words[v] = *(const LooseWords*)(panel + v / 2 * panel_stride + depth / 2 * CHUNK + v % 2 * WIDTH);
        add_single<R, 2 * P>(x + depth - 1, x_stride, words, sums);
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
