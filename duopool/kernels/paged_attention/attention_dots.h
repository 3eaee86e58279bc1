// Attention over bfloat16 pages where the processor multiplies bfloat16 pairs: queries, keys, values and, rounded once,
// the weights meet as they are. Included by attention_piece.h, whose plan of a piece this follows.

// The rows' queries as they are, [rows][padded D], zeros behind D.
DUOPOOL_INLINE void stage_query_pairs(const AttentionCall& call, const Piece& piece, Bfloat16* query) {
    const int64_t dim = call.key_dim, padded_dim = padded(dim);
    for (int64_t r = 0; r < piece.num_rows; ++r, query += padded_dim) {
        __builtin_memset(query, 0, padded_dim * sizeof(Bfloat16));
        __builtin_memcpy(query, query_of<Bfloat16>(call, piece, piece.first_row + r), dim * sizeof(Bfloat16));
    }
}

// CHUNK values at `chunk` of a row of `dim`, zeros behind its end.
DUOPOOL_INLINE Words load_pairs(const Bfloat16* row, int64_t dim, int64_t chunk) {
    if (chunk + CHUNK <= dim) return *(const LooseWords*)(row + chunk);
    Bfloat16 whole[CHUNK] = {};
    __builtin_memcpy(whole, row + chunk, (dim - chunk) * sizeof(Bfloat16));
    return *(const LooseWords*)whole;
}

// Two rows' values at CHUNK columns, as words of both: the even columns, then the odd ones (pair order).
DUOPOOL_INLINE void pair_rows(Words first, Words second, Words& even, Words& odd) {
    even = (first & 0xffffu) | (second << 16);
    odd = (first >> 16) | (second & 0xffff0000u);
}

// mixed[R] = mixed[R] * shrinks[R] + weights[R][count] * values[count] over C chunks of columns; rows of weights are 2 * KEY_TILE apart.
template <int R, int C>
DUOPOOL_INLINE void mix_pair_chunks(const Bfloat16* weights, Slots<Bfloat16> values, int64_t chunk,
                                    const float* shrinks, float* mixed, int64_t mixed_stride, Ahead<Bfloat16>* ahead) {
    Floats sums[R][2 * C];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
            load_pair(mixed + r * mixed_stride + chunk + c * CHUNK, sums[r][2 * c], sums[r][2 * c + 1]);
            sums[r][2 * c] *= shrinks[r];
            sums[r][2 * c + 1] *= shrinks[r];
        }
    for (int64_t key = 0; key < values.count; key += 2) {
        ask(ahead, 2 * lines_of<Bfloat16>(values.dim));
        const Bfloat16 *const one = values.rows[key] + values.offset, *const two = values.rows[key + 1] + values.offset;
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) {
            Words even, odd;
            pair_rows(load_pairs(one, values.dim, chunk + c * CHUNK), load_pairs(two, values.dim, chunk + c * CHUNK), even,
                      odd);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) {
                uint32_t pair;
                __builtin_memcpy(&pair, weights + r * 2 * KEY_TILE + key, 4);
                sums[r][2 * c] = add_pair_products(sums[r][2 * c], Words{} + pair, even);
                sums[r][2 * c + 1] = add_pair_products(sums[r][2 * c + 1], Words{} + pair, odd);
            }
        }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c)
            store_pair(mixed + r * mixed_stride + chunk + c * CHUNK, sums[r][2 * c], sums[r][2 * c + 1]);
}

template <int R>
DUOPOOL_TARGET __attribute__((noinline)) void mix_pairs(const Bfloat16* weights, Slots<Bfloat16> values,
                                                        const float* shrinks, float* mixed, int64_t mixed_stride,
                                                        Ahead<Bfloat16>* ahead) {
    for (int64_t chunk = 0, step; chunk < values.dim; chunk += step, ahead = nullptr) {
        step = chunk + 2 * CHUNK <= values.dim ? 2 * CHUNK : CHUNK;
        if (step == 2 * CHUNK)
            mix_pair_chunks<R, 2>(weights, values, chunk, shrinks, mixed, mixed_stride, ahead);
        else
            mix_pair_chunks<R, 1>(weights, values, chunk, shrinks, mixed, mixed_stride, ahead);
    }
}

// The way of attend_in_place over pairs.
struct Dots {
    typedef Bfloat16 Query;
    typedef Bfloat16 Weight;
    static float factor(const AttentionCall& call) { return call.scale; }
    template <int R>
    DUOPOOL_INLINE void add_products(const Bfloat16* query, int64_t query_stride, Slots<Bfloat16> keys,
                                     int64_t first, Floats (&sums)[R][4]) {
        for (int64_t chunk = 0; chunk < keys.dim; chunk += CHUNK) {
#pragma GCC unroll 4
            for (int key = 0; key < 4; ++key) {
                const Words pairs = load_pairs(keys.rows[first + key] + keys.offset, keys.dim, chunk);
#pragma GCC unroll 4
                for (int r = 0; r < R; ++r)
                    sums[r][key] =
                        add_pair_products(sums[r][key], *(const LooseWords*)(query + r * query_stride + chunk), pairs);
            }
        }
    }
    template <int R>
    DUOPOOL_INLINE void mix(const Bfloat16* weights, Slots<Bfloat16> values, const float* shrinks, float* mixed,
                            int64_t mixed_stride, Ahead<Bfloat16>* ahead) {
        mix_pairs<R>(weights, values, shrinks, mixed, mixed_stride, ahead);
    }
};

// Keys become panels of CHUNK keys over pairs of dimensions, values panels of CHUNK columns over pairs of keys.
DUOPOOL_INLINE void stage_pairs(const AttentionCall& call, const Bfloat16* const* keys, const Bfloat16* const* values,
                                int64_t count, uint32_t* turned_keys, uint32_t* paired_values) {
    const int64_t panel = padded(call.key_dim) / 2 * CHUNK;
    for (int64_t key = 0; key < count; key += WIDTH) {
        uint32_t* const to = turned_keys + key / CHUNK * panel + key % CHUNK;
        for (int64_t chunk = 0; chunk < call.key_dim; chunk += CHUNK) {
            Floats words[WIDTH] = {};
            for (int i = 0; i < WIDTH && key + i < count; ++i)
                words[i] = (Floats)load_pairs(keys[key + i], call.key_dim, chunk);
            transpose(words);
            for (int i = 0; i < WIDTH; ++i) *(LooseWords*)(to + (chunk / 2 + i) * CHUNK) = (Words)words[i];
        }
    }
    for (int64_t key = 0; key < count; key += 2) {
        for (int64_t chunk = 0; chunk < call.value_dim; chunk += CHUNK) {
            const Words first = load_pairs(values[key], call.value_dim, chunk);
            const Words second = key + 1 < count ? load_pairs(values[key + 1], call.value_dim, chunk) : Words{};
            Words even, odd;
            pair_rows(first, second, even, odd);
            uint32_t* const to = paired_values + chunk * (KEY_TILE / 2) + key / 2 * CHUNK;
            *(LooseWords*)to = even;
            *(LooseWords*)(to + WIDTH) = odd;
        }
    }
}

// Many rows: as attend_staged.
DUOPOOL_INLINE void attend_staged_dots(const AttentionCall& call, const Piece& piece, Workspace& work, Sums& sums) {
    const int64_t key_dim = padded(call.key_dim), value_dim = padded(call.value_dim), rows = piece.num_rows;
    const int64_t group = group_of(call);
    const int64_t num_queries = call.query_starts[piece.request + 1] - call.query_starts[piece.request];
    const int64_t first_position = call.kv_lengths[piece.request] - num_queries;
    const Bfloat16 *keys[KEY_TILE], *values[KEY_TILE], *query = (const Bfloat16*)work.query;
    uint32_t *turned_keys = (uint32_t*)work.turned_keys, *paired_values = (uint32_t*)work.values;
    for (int64_t tile = piece.first_key; tile < piece.last_key; tile += KEY_TILE) {
        const int64_t count = piece.last_key - tile < KEY_TILE ? piece.last_key - tile : KEY_TILE;
        find_slots(call, piece, tile, count, keys, values);
        stage_pairs(call, keys, values, count, turned_keys, paired_values);
        for (int64_t r = 0; r < rows; r += MAX_ROWS) {
            const int64_t some = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
            const auto multiply = WordProducts<Bfloat16>::of[some];
            int64_t firsts[MAX_ROWS], lasts[MAX_ROWS], first_seen = count, last_seen = 0;
            for (int64_t i = 0; i < some; ++i) {
                const int64_t position = first_position + (piece.first_row + r + i) / group;
                visible(call, position, tile, count, firsts + i, lasts + i);
                if (firsts[i] < first_seen) first_seen = firsts[i];
                if (lasts[i] > last_seen) last_seen = lasts[i];
            }
            if (first_seen >= last_seen) continue;
            for (int64_t key = 0; key < last_seen; key += CHUNK)
                multiply(query + r * key_dim, key_dim, turned_keys + key / 2 * key_dim, 0, key_dim, work.scores + key,
                         KEY_TILE, false);
            weigh_rows<Bfloat16>(call, call.scale, work.scores, firsts, lasts, last_seen, some,
                                 {sums.largest + r, sums.total + r, sums.mixed + r * value_dim}, value_dim);
            for (int64_t chunk = 0; chunk < value_dim; chunk += CHUNK)
                multiply((const Bfloat16*)work.scores, 2 * KEY_TILE, paired_values + chunk * (KEY_TILE / 2), 0, last_seen,
                         sums.mixed + r * value_dim + chunk, value_dim, true);
        }
    }
}
