// Many rows: a tile of keys is turned around once, so that scores too come from multiply_rows. Included by
// attention_piece.h, once per instruction set.

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

// What some rows see of a tile of keys: each its positions [firsts, lasts), all together [first, last), within the tile.
struct Seen {
    int64_t firsts[MAX_ROWS], lasts[MAX_ROWS], first, last;
};

// Rows [row, row + some) of the piece, and the `count` keys from position `tile` on.
DUOPOOL_INLINE Seen seen_by(const AttentionCall& call, const Piece& piece, int64_t row, int64_t some, int64_t tile,
                            int64_t count) {
    const int64_t num_queries = call.query_starts[piece.request + 1] - call.query_starts[piece.request];
    const int64_t first_position = call.kv_lengths[piece.request] - num_queries;
    Seen seen;
    seen.first = count;
    seen.last = 0;
    for (int64_t i = 0; i < some; ++i) {
        const int64_t position = first_position + (piece.first_row + row + i) / group_of(call);
        visible(call, position, tile, count, seen.firsts + i, seen.lasts + i);
        if (seen.firsts[i] < seen.first) seen.first = seen.firsts[i];
        if (seen.lasts[i] > seen.last) seen.last = seen.lasts[i];
    }
    return seen;
}

// Many rows: a tile of keys is turned around once, then all rows pass over it.
template <class T>
DUOPOOL_INLINE void attend_staged(const AttentionCall& call, const Piece& piece, Workspace& work, Sums& sums) {
    const int64_t key_dim = padded(call.key_dim), value_dim = padded(call.value_dim), rows = piece.num_rows;
    const T *keys[KEY_TILE], *values[KEY_TILE];
    for (int64_t tile = piece.first_key; tile < piece.last_key; tile += KEY_TILE) {
        const int64_t count = piece.last_key - tile < KEY_TILE ? piece.last_key - tile : KEY_TILE;
        find_slots(call, piece, tile, count, keys, values);
        stage_tile(call, keys, values, count, work);
        for (int64_t r = 0; r < rows; r += MAX_ROWS) {
            const int64_t some = rows - r < MAX_ROWS ? rows - r : MAX_ROWS;
            const auto multiply = RowProducts<float>::of[some];
            const Seen seen = seen_by(call, piece, r, some, tile, count);
            if (seen.first >= seen.last) continue;
            for (int64_t key = 0; key < seen.last; key += CHUNK)
                multiply(work.query + r * key_dim, key_dim, work.turned_keys + key, KEY_TILE, key_dim, work.scores + key,
                         KEY_TILE, false);
            weigh_rows<float>(call, 1, work.scores, seen.firsts, seen.lasts, seen.last, some,
                              {sums.largest + r, sums.total + r, sums.mixed + r * value_dim}, value_dim);
            for (int64_t chunk = 0; chunk < value_dim; chunk += CHUNK)
                multiply(work.scores, KEY_TILE, work.values + chunk, value_dim, seen.last,
                         sums.mixed + r * value_dim + chunk, value_dim, true);
        }
    }
}
