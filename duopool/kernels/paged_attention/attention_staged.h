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
