// The running sums of rows, from the first tile of keys to the output: the online softmax of Milakov and Gimelshein (2018),
// tiled as in FlashAttention-2 (Dao, 2023). Included by attention_piece.h, once per instruction set.

constexpr float NO_SCORE = -1e30f;  // below every score, yet finite: its difference to itself is 0, not NaN

DUOPOOL_INLINE int64_t padded(int64_t dim) { return (dim + CHUNK - 1) / CHUNK * CHUNK; }

// Of some rows: the largest score so far, the sum of exponentials, and the weighted sum of values.
struct Sums {
    float *largest, *total, *mixed;  // [rows], [rows], [rows][padded E] in pair order (vectors.h)
};

DUOPOOL_TARGET static int64_t partial_floats(const AttentionCall& call, int64_t rows) { return rows * (2 + padded(call.value_dim)); }

DUOPOOL_INLINE Sums partial_sums(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

DUOPOOL_INLINE void shrink_row(float* mixed, int64_t dim, float by) {
    for (int64_t i = 0; i < dim; i += WIDTH) store(mixed + i, load(mixed + i) * by);
}

// Scores of R rows, times `factor`, become weights in the same place, zeros behind them; the running sums follow. `shrinks`:
// by how much each row's earlier sums shrink. The rows' lanes are brought together at once: one after the other, each
// would wait for its own.
template <int R, class Weight>
DUOPOOL_INLINE void weigh(const AttentionCall& call, float factor, float* scores, const int64_t* firsts,
                          const int64_t* lasts, int64_t count, float* largest_so_far, float* totals, float* shrinks) {
    const int64_t end = (count + WIDTH - 1) / WIDTH * WIDTH;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        float* const row = scores + r * KEY_TILE;
        if (factor != 1) {
            for (int64_t i = 0; i < end; i += WIDTH) store(row + i, load(row + i) * factor);
        }
        if (call.soft_cap != 0) {
            for (int64_t i = 0; i < end; i += WIDTH)
                store(row + i, call.soft_cap * hyperbolic_tangent(load(row + i) / call.soft_cap));
        }
        for (int64_t i = 0; i < firsts[r]; ++i) row[i] = -__builtin_inff();
        for (int64_t i = lasts[r]; i < end; ++i) row[i] = -__builtin_inff();
    }
    Floats most[R], before = {}, total = {}, sums[R] = {};
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        most[r] = fill(NO_SCORE);
        before[r] = largest_so_far[r];
        total[r] = totals[r];
    }
    for (int64_t i = 0; i < end; i += WIDTH) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) most[r] = larger(load(scores + r * KEY_TILE + i), most[r]);
    }
    constexpr int LAST = R - 1, SECOND = LAST < 1 ? LAST : 1, THIRD = LAST < 2 ? LAST : 2;
    const Floats largest_now =
        merged_lanes<LARGEST, 4>(merged_quads<LARGEST>(most[0], most[SECOND], most[THIRD], most[LAST]));
    const Floats after = larger(before, largest_now), shrink = exponential(before - after);
    for (int64_t i = 0; i < end; i += WIDTH) {
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) {
            float* const row = scores + r * KEY_TILE;
            const Floats weight = exponential(load(row + i) - after[r]);
            store_line((Weight*)row + i, weight);
            sums[r] += weight;
        }
    }
    total = total * shrink + merged_lanes<ADD, 4>(merged_quads<ADD>(sums[0], sums[SECOND], sums[THIRD], sums[LAST]));
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
        largest_so_far[r] = after[r];
        totals[r] = total[r];
        shrinks[r] = shrink[r];
    }
}

// The same for any number of rows; their earlier sums shrink at once.
template <class Weight>
DUOPOOL_INLINE void weigh_rows(const AttentionCall& call, float factor, float* scores, const int64_t* firsts,
                               const int64_t* lasts, int64_t count, int64_t rows, Sums sums, int64_t value_dim) {
    float shrinks[MAX_ROWS];
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4)
        weigh<4, Weight>(call, factor, scores + r * KEY_TILE, firsts + r, lasts + r, count, sums.largest + r,
                         sums.total + r, shrinks + r);
    for (; r < rows; ++r)
        weigh<1, Weight>(call, factor, scores + r * KEY_TILE, firsts + r, lasts + r, count, sums.largest + r,
                         sums.total + r, shrinks + r);
    for (r = 0; r < rows; ++r)
        if (shrinks[r] != 1) shrink_row(sums.mixed + r * value_dim, value_dim, shrinks[r]);
}

DUOPOOL_INLINE void clear(Sums& sums, int64_t rows, int64_t dim) {
    for (int64_t r = 0; r < rows; ++r) {
        sums.largest[r] = NO_SCORE;
        sums.total[r] = 0;
    }
    __builtin_memset(sums.mixed, 0, rows * dim * sizeof(float));
}

// Divide by the sum of exponentials, the sink's included, and write the rows out.
template <class T>
DUOPOOL_INLINE void write_rows(const AttentionCall& call, const Piece& piece, Sums& sums) {
    const int64_t heads = group_of(call) * piece.num_kv_heads, dim = padded(call.value_dim);
    for (int64_t r = 0; r < piece.num_rows; ++r) {
        const int64_t row = piece.first_row + r, head = piece.kv_head * group_of(call) + row % heads;
        float total = sums.total[r], factor = 1;
        if (call.sinks) {
            const float most = sums.largest[r] > call.sinks[head] ? sums.largest[r] : call.sinks[head];
            factor = exponential(fill(sums.largest[r] - most))[0];
            total = total * factor + exponential(fill(call.sinks[head] - most))[0];
        }
        factor = total == 0 ? 0 : factor / total;
        T* to = (T*)call.out + (call.query_starts[piece.request] + row / heads) * call.out_token_stride +
                head * call.out_head_stride;
        const float* mixed = sums.mixed + r * dim;
        for (int64_t chunk = 0; chunk < call.value_dim; chunk += CHUNK) {
            const Floats a = load(mixed + chunk) * factor, b = load(mixed + chunk + WIDTH) * factor;
            if (chunk + CHUNK <= call.value_dim)
                store_pair(to + chunk, a, b);
            else
                store_partial_pair(to + chunk, call.value_dim - chunk, a, b);
        }
    }
}

// Merge the sums of pieces over the same rows into the first one's and write the rows out.
template <class T>
DUOPOOL_TARGET void merge(const AttentionCall& call, const Split& split, float* partials) {
    const int64_t rows = split.whole.num_rows, dim = padded(call.value_dim), size = partial_floats(call, rows);
    Sums sums = partial_sums(partials, rows);
    for (int64_t i = 1; i < split.num_partials; ++i) {
        const Sums other = partial_sums(partials + i * size, rows);
        for (int64_t r = 0; r < rows; ++r) {
            const float most = sums.largest[r] > other.largest[r] ? sums.largest[r] : other.largest[r];
            const float keep = exponential(fill(sums.largest[r] - most))[0];
            const float add = exponential(fill(other.largest[r] - most))[0];
            sums.largest[r] = most;
            sums.total[r] = sums.total[r] * keep + other.total[r] * add;
            float *mixed = sums.mixed + r * dim, *more = other.mixed + r * dim;
            for (int64_t i = 0; i < dim; i += WIDTH) store(mixed + i, load(mixed + i) * keep + load(more + i) * add);
        }
    }
    write_rows<T>(call, split.whole, sums);
}
