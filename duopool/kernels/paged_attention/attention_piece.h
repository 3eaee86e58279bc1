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
    const int64_t heads = group_of(call) * piece.num_kv_heads;
    return (const T*)call.query + (call.query_starts[piece.request] + row / heads) * call.query_token_stride +
           (piece.kv_head * group_of(call) + row % heads) * call.query_head_stride;
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

// Pointers to the keys and values at positions [first, first + count), of the piece's first KV head.
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

// Asks for a tile that is needed soon, in the order in which memory holds it: pages are too short and too scattered for the
// hardware to guess the next one. Spread over the arithmetic, a few lines at a time; more at once would only wait for each
// other. Into the second cache: the first one can wait for too few lines at once to keep up with the memory.
template <class T>
struct Ahead {
    const AttentionCall& call;
    const Piece& piece;
    int64_t page, last_key;
    int64_t run = 0;  // of those of the page: each head's keys, then each head's values
    const char *line = nullptr, *end = nullptr;
};

template <class T>
DUOPOOL_INLINE bool find_run(Ahead<T>& ahead) {
    const AttentionCall& call = ahead.call;
    const int64_t heads = ahead.piece.num_kv_heads;
    if (ahead.run == 2 * heads) ++ahead.page, ahead.run = 0;
    const int64_t first = ahead.page * call.block_size, left = ahead.last_key - first;
    if (left <= 0) return false;
    const int64_t block = call.block_tables[ahead.piece.request * call.block_table_stride + ahead.page];
    const int64_t head = ahead.piece.kv_head + ahead.run % heads, slots = left < call.block_size ? left : call.block_size;
    const T *from, *to;
    if (ahead.run < heads) {
        from = (const T*)call.keys + block * call.key_block_stride + head * call.key_head_stride;
        to = from + slots * call.key_slot_stride;
    } else {
        from = (const T*)call.values + block * call.value_block_stride + head * call.value_head_stride;
        to = from + slots * call.value_slot_stride;
    }
    ahead.line = (const char*)from;
    ahead.end = (const char*)to;
    ++ahead.run;
    return true;
}

// The next lines, each of 64 bytes; `ahead` may be null.
template <class T>
DUOPOOL_INLINE void ask(Ahead<T>* ahead, int64_t lines) {
    for (; ahead && lines > 0; --lines, ahead->line += 64) {
        if (ahead->line >= ahead->end && !find_run(*ahead)) return;
        __builtin_prefetch(ahead->line, 0, 2);
    }
}

// `count` keys or values of `dim`, each `offset` behind its pointer.
template <class T>
struct Slots {
    const T* const* rows;
    int64_t offset, count, dim;
};

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
    const int64_t group = group_of(call);
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

#ifdef DUOPOOL_DOTS
#include "paged_attention/attention_dots.h"
#endif

template <class T>
DUOPOOL_INLINE void attend_rows(T, const AttentionCall& call, const Piece& piece, const Piece* after, Workspace& work,
                                Sums& sums) {
    stage_query<T>(call, piece, work.query);
    if (is_in_place(call, piece.request))
        attend_in_place<T, Expanded<T>>(call, piece, after, work, sums);
    else
        attend_staged<T>(call, piece, work, sums);
}
#ifdef DUOPOOL_DOTS
DUOPOOL_INLINE void attend_rows(Bfloat16, const AttentionCall& call, const Piece& piece, const Piece* after,
                                Workspace& work, Sums& sums) {
    stage_query_pairs(call, piece, (Bfloat16*)work.query);
    if (is_in_place(call, piece.request))
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
