// Attention of one piece (attention_call.h) for one instruction set; every_isa.h compiles this file once per set.
//
// Both paths keep running sums per row (the online softmax of Milakov and Gimelshein, 2018; tiled as in FlashAttention-2,
// Dao, 2023): the largest score so far, the sum of exponentials, and the weighted sum of values in pair order (vectors.h).
// Few rows read keys and values straight from the pages; many rows first turn a tile of keys around, so that scores too
// come from multiply_rows.

constexpr float NO_SCORE = -1e30f;  // below every score, yet finite: its difference to itself is 0, not NaN

DUOPOOL_INLINE int64_t padded(int64_t dim) { return (dim + CHUNK - 1) / CHUNK * CHUNK; }

// One thread's memory, cut from a single buffer.
struct Sums {
    float *largest, *total, *mixed;  // [rows], [rows], [rows][padded E]
};
struct Workspace {
    Sums sums;
    float *query, *scores, *turned_keys, *values;
};

DUOPOOL_TARGET static int64_t workspace_floats(const AttentionCall& call) {
    const int64_t key_dim = padded(call.key_dim), value_dim = padded(call.value_dim);
    return ROW_TILE * (2 + key_dim + value_dim) + FEW_ROWS * KEY_TILE + KEY_TILE * (key_dim + value_dim);
}

DUOPOOL_INLINE Workspace cut(const AttentionCall& call, float* memory) {
    const int64_t key_dim = padded(call.key_dim), value_dim = padded(call.value_dim);
    Workspace work;
    work.sums.largest = memory;
    work.sums.total = memory += ROW_TILE;
    work.sums.mixed = memory += ROW_TILE;
    work.query = memory += ROW_TILE * value_dim;
    work.scores = memory += ROW_TILE * key_dim;
    work.turned_keys = memory += FEW_ROWS * KEY_TILE;
    work.values = memory + KEY_TILE * key_dim;
    return work;
}

DUOPOOL_TARGET static int64_t partial_floats(const AttentionCall& call, int64_t rows) { return rows * (2 + padded(call.value_dim)); }

DUOPOOL_INLINE Sums partial_sums(float* memory, int64_t rows) { return {memory, memory + rows, memory + 2 * rows}; }

template <class T>
DUOPOOL_INLINE void load_chunk(const T* row, int64_t dim, int64_t chunk, Floats& a, Floats& b) {
    if (chunk + CHUNK <= dim)
        load_pair(row + chunk, a, b);
    else
        load_partial_pair(row + chunk, dim - chunk, a, b);
}

// One row's query.
template <class T>
DUOPOOL_INLINE const T* query_of(const AttentionCall& call, const Piece& piece, int64_t row) {
    const int64_t group = call.num_heads / call.num_kv_heads;
    return (const T*)call.query + (call.query_starts[piece.request] + row / group) * call.query_token_stride +
           (piece.kv_head * group + row % group) * call.query_head_stride;
}

// The rows' queries times the scale, [rows][padded D] in pair order.
template <class T>
DUOPOOL_INLINE void stage_query(const AttentionCall& call, const Piece& piece, float* query) {
    const int64_t dim = call.key_dim;
    for (int64_t r = 0; r < piece.num_rows; ++r) {
        const T* from = query_of<T>(call, piece, piece.first_row + r);
        for (int64_t chunk = 0; chunk < dim; chunk += CHUNK) {
            Floats a, b;
            load_chunk(from, dim, chunk, a, b);
            store(query, a * call.scale);
            store(query + WIDTH, b * call.scale);
            query += CHUNK;
        }
    }
}

// Pointers to the keys and values at positions [first, first + count).
template <class T>
DUOPOOL_INLINE void find_slots(const AttentionCall& call, const Piece& piece, int64_t first, int64_t count,
                               const T** keys, const T** values) {
    const int32_t* table = call.block_tables + piece.request * call.block_table_stride;
    int64_t page = first / call.block_size, offset = first % call.block_size;
    for (int64_t i = 0; i < count; ++page, offset = 0) {
        const int64_t block = table[page];
        const T* key = (const T*)call.keys + block * call.key_block_stride + piece.kv_head * call.key_head_stride;
        const T* value = (const T*)call.values + block * call.value_block_stride + piece.kv_head * call.value_head_stride;
        for (; offset < call.block_size && i < count; ++offset, ++i) {
            keys[i] = key + offset * call.key_slot_stride;
            values[i] = value + offset * call.value_slot_stride;
        }
    }
}

// The same for the tile of a piece that begins at `first`; returns how many keys it has.
template <class T>
DUOPOOL_INLINE int64_t find_tile(const AttentionCall& call, const Piece& piece, int64_t first, const T** keys,
                                 const T** values) {
    const int64_t count = piece.last_key - first < KEY_TILE ? piece.last_key - first : KEY_TILE;
    find_slots(call, piece, first, count, keys, values);
    return count;
}

// Positions [*first, *last) that a row sees within the tile of `count` keys at `tile`, relative to the tile.
DUOPOOL_INLINE void visible(const AttentionCall& call, int64_t position, int64_t tile, int64_t count, int64_t* first,
                            int64_t* last) {
    const int64_t end = position + 1 - tile;
    *last = end < 0 ? 0 : end < count ? end : count;
    const int64_t begin = call.window ? position + 1 - call.window - tile : 0;
    *first = begin < 0 ? 0 : begin < *last ? begin : *last;
}

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
    const Floats largest_now = merged_lanes<LARGEST>(merged_quads<LARGEST>(most[0], most[SECOND], most[THIRD], most[LAST]));
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
    total = total * shrink + merged_lanes<ADD>(merged_quads<ADD>(sums[0], sums[SECOND], sums[THIRD], sums[LAST]));
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

// Asks for rows that are needed soon: pages are too short and too scattered for the hardware to guess the next one. Spread
// over the arithmetic, a few lines at a time; more at once would only wait for each other. Into the second cache: the
// first one can wait for too few lines at once to keep up with the memory.
template <class T>
DUOPOOL_INLINE void prefetch(const T* const* rows, int64_t count, int64_t dim) {
    for (int64_t i = 0; i < count; ++i)
        for (int64_t at = 0; at < dim; at += 64 / (int64_t)sizeof(T)) __builtin_prefetch(rows[i] + at, 0, 2);
}

// scores[R][count] of R rows, times `factor`; `keys` is filled up to a multiple of WIDTH. Several keys' sums are added up
// over their lanes at once.
template <int R, class Way, class T>
DUOPOOL_TARGET __attribute__((noinline)) void score_tile(const typename Way::Query* query, int64_t query_stride,
                                                         const T* const* keys, int64_t count, int64_t dim, float factor,
                                                         float* scores, const T* const* soon, int64_t soon_dim) {
    for (int64_t first = 0; first < count; first += WIDTH) {
        Floats quads[R][WIDTH / 4];
#pragma GCC unroll 1
        for (int quad = 0; quad < WIDTH / 4; ++quad) {
            const int64_t key = first + 4 * quad;
            if (soon) prefetch(soon + key, 4, soon_dim);
            Floats sums[R][4] = {};
            Way::template add_products<R>(query, query_stride, keys + key, dim, sums);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) quads[r][quad] = merged_quads<ADD>(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) store(scores + r * KEY_TILE + first, joined_sums(quads[r]) * factor);
    }
}

// mixed[R] = mixed[R] * shrinks[R] + weights[R][count] * values[count], PAIRS chunks of columns at once.
template <int R, int PAIRS, bool WHOLE, class T>
DUOPOOL_INLINE void mix_chunks(const float* weights, const T* const* values, int64_t count, int64_t dim, int64_t chunk,
                               const float* shrinks, float* mixed, int64_t mixed_stride) {
    Floats sums[R][2 * PAIRS];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int p = 0; p < PAIRS; ++p) {
            load_pair(mixed + r * mixed_stride + chunk + p * CHUNK, sums[r][2 * p], sums[r][2 * p + 1]);
            sums[r][2 * p] *= shrinks[r];
            sums[r][2 * p + 1] *= shrinks[r];
        }
    }
    for (int64_t key = 0; key < count; ++key) {
#pragma GCC unroll 2
        for (int p = 0; p < PAIRS; ++p) {
            Floats a, b;
            if (WHOLE)
                load_pair(values[key] + chunk + p * CHUNK, a, b);
            else
                load_partial_pair(values[key] + chunk, dim - chunk, a, b);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                const Floats weight = fill(weights[r * KEY_TILE + key]);
                sums[r][2 * p] += weight * a;
                sums[r][2 * p + 1] += weight * b;
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
        for (int p = 0; p < PAIRS; ++p)
            store_pair(mixed + r * mixed_stride + chunk + p * CHUNK, sums[r][2 * p], sums[r][2 * p + 1]);
    }
}

template <int R, class T>
DUOPOOL_TARGET __attribute__((noinline)) void mix_values(const float* weights, const T* const* values, int64_t count,
                                                         int64_t dim, const float* shrinks, float* mixed,
                                                         int64_t mixed_stride, const T* const* soon, int64_t soon_dim) {
    int64_t chunk = 0;
    if (soon) prefetch(soon, KEY_TILE, soon_dim);
    for (; chunk + 2 * CHUNK <= dim; chunk += 2 * CHUNK)
        mix_chunks<R, 2, true>(weights, values, count, dim, chunk, shrinks, mixed, mixed_stride);
    for (; chunk + CHUNK <= dim; chunk += CHUNK)
        mix_chunks<R, 1, true>(weights, values, count, dim, chunk, shrinks, mixed, mixed_stride);
    if (chunk < dim) mix_chunks<R, 1, false>(weights, values, count, dim, chunk, shrinks, mixed, mixed_stride);
}

// How few rows meet keys and values: expanded to float32, T being whatever it is. See attention_dots.h for the other way.
template <class T>
struct Expanded {
    typedef float Query;
    typedef float Weight;
    static float factor(const AttentionCall&) { return 1; }  // the queries have the scale in them
    template <int R>
    DUOPOOL_INLINE void add_products(const float* query, int64_t query_stride, const T* const* keys, int64_t dim,
                                     Floats (&sums)[R][4]) {
        for (int64_t chunk = 0; chunk < dim; chunk += CHUNK) {
#pragma GCC unroll 4
            for (int key = 0; key < 4; ++key) {
                Floats a, b;
                load_chunk(keys[key], dim, chunk, a, b);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    sums[r][key] += load(query + r * query_stride + chunk) * a;
                    sums[r][key] += load(query + r * query_stride + chunk + WIDTH) * b;
                }
            }
        }
    }
    template <int R>
    DUOPOOL_INLINE void mix(const float* weights, const T* const* values, int64_t count, int64_t dim,
                            const float* shrinks, float* mixed, int64_t mixed_stride, const T* const* soon,
                            int64_t soon_dim) {
        mix_values<R>(weights, values, count, dim, shrinks, mixed, mixed_stride, soon, soon_dim);
    }
};

// R rows of one token meet a tile. `soon_values` are this tile's if they are to be asked for, `soon_keys` those of the next one.
template <int R, class T, class Way>
DUOPOOL_INLINE void attend_tile(const AttentionCall& call, const float* queries, const T* const* keys,
                                const T* const* values, int64_t count, const int64_t* firsts, const int64_t* lasts,
                                float* scores, Sums sums, const T* const* soon_values, const T* const* soon_keys) {
    const int64_t key_dim = padded(call.key_dim), value_dim = padded(call.value_dim);
    float shrinks[R];
    score_tile<R, Way>((const typename Way::Query*)queries, key_dim, keys, count, call.key_dim, Way::factor(call), scores,
                       soon_values, call.value_dim);
    weigh<R, typename Way::Weight>(call, 1, scores, firsts, lasts, count, sums.largest, sums.total, shrinks);
    Way::template mix<R>((const typename Way::Weight*)scores, values, count, call.value_dim, shrinks, sums.mixed,
                         value_dim, soon_keys, call.key_dim);
}

// Rows that are taken at once, of those that are left.
DUOPOOL_INLINE int64_t rows_at_once(int64_t left) { return left == 4 ? 2 : left < 3 ? left : 3; }

// One token's rows, if they are few: keys and values are read where they lie. `after` is what this thread is likely to do
// next, or null.
template <class T, class Way>
DUOPOOL_INLINE void attend_in_place(const AttentionCall& call, const Piece& piece, const Piece* after, Workspace& work,
                                    Sums& sums) {
    const int64_t key_floats = padded(call.key_dim) * sizeof(typename Way::Query) / sizeof(float);
    const int64_t value_dim = padded(call.value_dim), rows = piece.num_rows;
    const T *slots[2][2][KEY_TILE];  // this tile and the next one: keys, values
    int64_t next_count = find_tile(call, piece, piece.first_key, slots[0][0], slots[0][1]);
    int now = 1;
    for (int64_t tile = piece.first_key; tile < piece.last_key; tile += KEY_TILE) {
        now = 1 - now;
        const T **keys = slots[now][0], **values = slots[now][1], **next_keys = slots[1 - now][0];
        const int64_t count = next_count, next = tile + KEY_TILE;
        next_count = 0;
        if (next < piece.last_key)
            next_count = find_tile(call, piece, next, next_keys, slots[1 - now][1]);
        else if (after)
            next_count = find_tile(call, *after, after->first_key, next_keys, slots[1 - now][1]);
        for (int64_t i = count; i % WIDTH; ++i) {
            keys[i] = keys[count - 1];
            values[i] = values[count - 1];
        }
        // Filled up, so that asking for a whole tile of them is always right.
        for (int64_t i = next_count; next_count && i < KEY_TILE; ++i) next_keys[i] = next_keys[next_count - 1];
        int64_t firsts[4], lasts[4];
        visible(call, call.kv_lengths[piece.request] - 1, tile, count, firsts, lasts);
        for (int r = 1; r < 4; ++r) firsts[r] = firsts[0], lasts[r] = lasts[0];
        for (int64_t r = 0, some; r < rows; r += some) {
            const float* const queries = work.query + r * key_floats;
            const Sums some_sums = {sums.largest + r, sums.total + r, sums.mixed + r * value_dim};
            const T* const* const soon_values = r == 0 ? values : nullptr;
            const T* const* const soon_keys = r == 0 && next_count ? next_keys : nullptr;
            some = rows_at_once(rows - r);
            if (some == 3)
                attend_tile<3, T, Way>(call, queries, keys, values, count, firsts, lasts, work.scores, some_sums,
                                       soon_values, soon_keys);
            else if (some == 2)
                attend_tile<2, T, Way>(call, queries, keys, values, count, firsts, lasts, work.scores, some_sums,
                                       soon_values, soon_keys);
            else
                attend_tile<1, T, Way>(call, queries, keys, values, count, firsts, lasts, work.scores, some_sums,
                                       soon_values, soon_keys);
        }
    }
}

// Keys become turned[padded D][KEY_TILE], values [count][padded E], both float32 in pair order.
template <class T>
DUOPOOL_INLINE void stage_tile(const AttentionCall& call, const T* const* keys, const T* const* values, int64_t count,
                               Workspace& work) {
    for (int64_t key = 0; key < count; key += WIDTH) {
        for (int64_t chunk = 0; chunk < call.key_dim; chunk += CHUNK) {
            Floats low[WIDTH] = {}, high[WIDTH] = {};
            for (int i = 0; i < WIDTH && key + i < count; ++i)
                load_chunk(keys[key + i], call.key_dim, chunk, low[i], high[i]);
            transpose(low);
            transpose(high);
            for (int i = 0; i < WIDTH; ++i) {
                store(work.turned_keys + (chunk + i) * KEY_TILE + key, low[i]);
                store(work.turned_keys + (chunk + WIDTH + i) * KEY_TILE + key, high[i]);
            }
        }
    }
    float* to = work.values;
    for (int64_t key = 0; key < count; ++key) {
        for (int64_t chunk = 0; chunk < call.value_dim; chunk += CHUNK, to += CHUNK) {
            Floats a, b;
            load_chunk(values[key], call.value_dim, chunk, a, b);
            store_pair(to, a, b);
        }
    }
}

// Many rows: a tile of keys is turned around once, then all rows pass over it.
template <class T>
DUOPOOL_INLINE void attend_staged(const AttentionCall& call, const Piece& piece, Workspace& work, Sums& sums) {
    const int64_t key_dim = padded(call.key_dim), value_dim = padded(call.value_dim), rows = piece.num_rows;
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int64_t num_queries = call.query_starts[piece.request + 1] - call.query_starts[piece.request];
    const int64_t first_position = call.kv_lengths[piece.request] - num_queries;
    const T *keys[KEY_TILE], *values[KEY_TILE];
    for (int64_t tile = piece.first_key; tile < piece.last_key; tile += KEY_TILE) {
        const int64_t count = piece.last_key - tile < KEY_TILE ? piece.last_key - tile : KEY_TILE;
        find_slots(call, piece, tile, count, keys, values);
        stage_tile(call, keys, values, count, work);
        for (int64_t r = 0; r < rows; r += MAX_ROWS) {
            const int64_t some = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
            const auto multiply = RowProducts<float>::of[some];
            int64_t firsts[MAX_ROWS], lasts[MAX_ROWS], first_seen = count, last_seen = 0;
            for (int64_t i = 0; i < some; ++i) {
                const int64_t position = first_position + (piece.first_row + r + i) / group;
                visible(call, position, tile, count, firsts + i, lasts + i);
                if (firsts[i] < first_seen) first_seen = firsts[i];
                if (lasts[i] > last_seen) last_seen = lasts[i];
            }
            if (first_seen >= last_seen) continue;
            for (int64_t key = 0; key < last_seen; key += CHUNK)
                multiply(work.query + r * key_dim, key_dim, work.turned_keys + key, KEY_TILE, key_dim, work.scores + key,
                         KEY_TILE, false);
            weigh_rows<float>(call, 1, work.scores, firsts, lasts, last_seen, some,
                              {sums.largest + r, sums.total + r, sums.mixed + r * value_dim}, value_dim);
            for (int64_t chunk = 0; chunk < value_dim; chunk += CHUNK)
                multiply(work.scores, KEY_TILE, work.values + chunk, value_dim, last_seen,
                         sums.mixed + r * value_dim + chunk, value_dim, true);
        }
    }
}

// Divide by the sum of exponentials, the sink's included, and write the rows out.
template <class T>
DUOPOOL_INLINE void write_rows(const AttentionCall& call, const Piece& piece, Sums& sums) {
    const int64_t group = call.num_heads / call.num_kv_heads, dim = padded(call.value_dim);
    for (int64_t r = 0; r < piece.num_rows; ++r) {
        const int64_t row = piece.first_row + r, head = piece.kv_head * group + row % group;
        float total = sums.total[r], factor = 1;
        if (call.sinks) {
            const float most = sums.largest[r] > call.sinks[head] ? sums.largest[r] : call.sinks[head];
            factor = exponential(fill(sums.largest[r] - most))[0];
            total = total * factor + exponential(fill(call.sinks[head] - most))[0];
        }
        factor = total == 0 ? 0 : factor / total;
        T* to = (T*)call.out + (call.query_starts[piece.request] + row / group) * call.out_token_stride +
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

#ifdef DUOPOOL_DOTS
#include "paged_attention/attention_dots.h"
#endif

// One token's rows read keys where they lie, if they are few. The tokens of a chunk all go the other way, however short the
// chunk is: a prompt's bits are the same wherever it is cut.
DUOPOOL_INLINE bool is_in_place(const AttentionCall& call, const Piece& piece) {
    return piece.num_rows <= FEW_ROWS && call.query_starts[piece.request + 1] - call.query_starts[piece.request] == 1;
}

template <class T>
DUOPOOL_INLINE void attend_rows(T, const AttentionCall& call, const Piece& piece, const Piece* after, Workspace& work,
                                Sums& sums) {
    stage_query<T>(call, piece, work.query);
    if (is_in_place(call, piece))
        attend_in_place<T, Expanded<T>>(call, piece, after, work, sums);
    else
        attend_staged<T>(call, piece, work, sums);
}
#ifdef DUOPOOL_DOTS
DUOPOOL_INLINE void attend_rows(Bfloat16, const AttentionCall& call, const Piece& piece, const Piece* after,
                                Workspace& work, Sums& sums) {
    stage_query_pairs(call, piece, (Bfloat16*)work.query);
    if (is_in_place(call, piece))
        attend_in_place<Bfloat16, Dots>(call, piece, after, work, sums);
    else
        attend_staged_dots(call, piece, work, sums);
}
#endif

template <class T>
DUOPOOL_TARGET void attend(const AttentionCall& call, const Piece& piece, const Piece* after, float* memory,
                           float* partial) {
    Workspace work = cut(call, memory);
    Sums sums = partial ? partial_sums(partial, piece.num_rows) : work.sums;
    clear(sums, piece.num_rows, padded(call.value_dim));
    attend_rows(T{}, call, piece, after, work, sums);
    if (!partial) write_rows<T>(call, piece, sums);
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
