// Few rows: keys and values are read where they lie in the pages. Included by attention_piece.h, once per instruction set.

template <class T>
DUOPOOL_INLINE int64_t lines_of(int64_t dim) { return (dim * (int64_t)sizeof(T) + 63) / 64; }

// scores[R][count] of R rows, times `factor`; the keys' pointers are filled up to a multiple of WIDTH. Several keys' sums are
// added up over their lanes at once.
template <int R, class Way, class T>
DUOPOOL_TARGET __attribute__((noinline)) void score_tile(const typename Way::Query* query, int64_t query_stride,
                                                         Slots<T> keys, float factor, float* scores,
                                                         Ahead<T>* ahead) {
    for (int64_t first = 0; first < keys.count; first += WIDTH) {
        Floats quads[R][WIDTH / 4];
#pragma GCC unroll 1
        for (int quad = 0; quad < WIDTH / 4; ++quad) {
            ask(ahead, 4 * lines_of<T>(keys.dim));
            Floats sums[R][4] = {};
            Way::template add_products<R>(query, query_stride, keys, first + 4 * quad, sums);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r)
                quads[r][quad] = merged_quads<ADD>(sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
        }
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) store(scores + r * KEY_TILE + first, joined_sums(quads[r]) * factor);
    }
}

// mixed[R] = mixed[R] * shrinks[R] + weights[R][count] * values[count], PAIRS chunks of columns at once.
template <int R, int PAIRS, bool WHOLE, class T>
DUOPOOL_INLINE void mix_chunks(const float* weights, Slots<T> values, int64_t chunk, const float* shrinks,
                               float* mixed, int64_t mixed_stride, Ahead<T>* ahead) {
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
    for (int64_t key = 0; key < values.count; ++key) {
        ask(ahead, lines_of<T>(values.dim));
        const T* const row = values.rows[key] + values.offset + chunk;
#pragma GCC unroll 2
        for (int p = 0; p < PAIRS; ++p) {
            Floats a, b;
            if (WHOLE)
                load_pair(row + p * CHUNK, a, b);
            else
                load_partial_pair(row, values.dim - chunk, a, b);
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
DUOPOOL_TARGET __attribute__((noinline)) void mix_values(const float* weights, Slots<T> values,
                                                         const float* shrinks, float* mixed, int64_t mixed_stride,
                                                         Ahead<T>* ahead) {
    for (int64_t chunk = 0, step; chunk < values.dim; chunk += step, ahead = nullptr) {
        const int64_t left = values.dim - chunk;
        step = left >= 2 * CHUNK ? 2 * CHUNK : CHUNK;
        if (left >= 2 * CHUNK)
            mix_chunks<R, 2, true>(weights, values, chunk, shrinks, mixed, mixed_stride, ahead);
        else if (left >= CHUNK)
            mix_chunks<R, 1, true>(weights, values, chunk, shrinks, mixed, mixed_stride, ahead);
        else
            mix_chunks<R, 1, false>(weights, values, chunk, shrinks, mixed, mixed_stride, ahead);
    }
}

// How few rows meet keys and values: expanded to float32, T being whatever it is. See attention_dots.h for the other way.
template <class T>
struct Expanded {
    typedef float Query;
    typedef float Weight;
    static float factor(const AttentionCall&) { return 1; }  // the queries have the scale in them
    template <int R>
    DUOPOOL_INLINE void add_products(const float* query, int64_t query_stride, Slots<T> keys, int64_t first,
                                     Floats (&sums)[R][4]) {
        for (int64_t chunk = 0; chunk < keys.dim; chunk += CHUNK) {
#pragma GCC unroll 4
            for (int key = 0; key < 4; ++key) {
                Floats a, b;
                load_chunk(keys.rows[first + key] + keys.offset, keys.dim, chunk, a, b);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r) {
                    sums[r][key] += load(query + r * query_stride + chunk) * a;
                    sums[r][key] += load(query + r * query_stride + chunk + WIDTH) * b;
                }
            }
        }
    }
    template <int R>
    DUOPOOL_INLINE void mix(const float* weights, Slots<T> values, const float* shrinks, float* mixed,
                            int64_t mixed_stride, Ahead<T>* ahead) {
        mix_values<R>(weights, values, shrinks, mixed, mixed_stride, ahead);
    }
};

// What one token meets in a tile: pointers to the keys and values of the piece's first KV head, and those that it sees.
template <class T>
struct Tile {
    const T *keys[KEY_TILE], *values[KEY_TILE];
    int64_t count, firsts[4], lasts[4];  // the same for all rows
};

template <class T>
DUOPOOL_INLINE void find_tile(const AttentionCall& call, const Piece& piece, int64_t first, Tile<T>& tile) {
    tile.count = piece.last_key - first < KEY_TILE ? piece.last_key - first : KEY_TILE;
    find_slots(call, piece, first, tile.count, tile.keys, tile.values);
    for (int64_t i = tile.count; i % WIDTH; ++i) {
        tile.keys[i] = tile.keys[tile.count - 1];
        tile.values[i] = tile.values[tile.count - 1];
    }
    for (int r = 0; r < 4; ++r)
        visible(call, call.kv_lengths[piece.request] - 1, first, tile.count, tile.firsts + r, tile.lasts + r);
}

// Rows that are taken at once, of those that are left.
DUOPOOL_INLINE int64_t rows_at_once(int64_t left) { return left == 4 ? 2 : left < 3 ? left : 3; }

// R rows of the piece's KV head `head`.
template <int R, class T, class Way>
DUOPOOL_INLINE void attend_tile(const AttentionCall& call, const float* queries, const Tile<T>& tile, int64_t head,
                                float* scores, Sums sums, Ahead<T>* ahead) {
    const int64_t value_dim = padded(call.value_dim);
    const Slots<T> keys = {tile.keys, head * call.key_head_stride, tile.count, call.key_dim};
    const Slots<T> values = {tile.values, head * call.value_head_stride, tile.count, call.value_dim};
    float shrinks[R];
    score_tile<R, Way>((const typename Way::Query*)queries, padded(call.key_dim), keys, Way::factor(call), scores, ahead);
    weigh<R, typename Way::Weight>(call, 1, scores, tile.firsts, tile.lasts, tile.count, sums.largest, sums.total, shrinks);
    Way::template mix<R>((const typename Way::Weight*)scores, values, shrinks, sums.mixed, value_dim, ahead);
}

// One token's rows, a few for each KV head: keys and values are read where they lie. `after` is what this thread is likely
// to do next, or null.
template <class T, class Way>
DUOPOOL_INLINE void attend_in_place(const AttentionCall& call, const Piece& piece, const Piece* after, Workspace& work,
                                    Sums& sums) {
    const int64_t key_floats = padded(call.key_dim) * sizeof(typename Way::Query) / sizeof(float);
    const int64_t value_dim = padded(call.value_dim), group = group_of(call);
    Tile<T> tile;
    for (int64_t first = piece.first_key; first < piece.last_key; first += KEY_TILE) {
        find_tile(call, piece, first, tile);
        const bool is_last = first + KEY_TILE >= piece.last_key;
        const Piece& next = is_last && after ? *after : piece;
        const int64_t soon = is_last && after ? after->first_key : first + KEY_TILE;
        const int64_t last_soon = next.last_key < soon + KEY_TILE ? next.last_key : soon + KEY_TILE;
        Ahead<T> ahead = {call, next, soon / call.block_size, last_soon};
        for (int64_t head = 0, r = 0, some; head < piece.num_kv_heads; ++head) {
            for (int64_t end = r + group; r < end; r += some) {
                const float* const queries = work.query + r * key_floats;
                const Sums some_sums = {sums.largest + r, sums.total + r, sums.mixed + r * value_dim};
                Ahead<T>* const asked = r == head * group ? &ahead : nullptr;
                some = rows_at_once(end - r);
                if (some == 3)
                    attend_tile<3, T, Way>(call, queries, tile, head, work.scores, some_sums, asked);
                else if (some == 2)
                    attend_tile<2, T, Way>(call, queries, tile, head, work.scores, some_sums, asked);
                else
                    attend_tile<1, T, Way>(call, queries, tile, head, work.scores, some_sums, asked);
            }
        }
    }
}
