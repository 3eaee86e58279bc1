// What a piece reads: its queries, and where in the pages its keys and values lie, now and soon. Included by
// attention_piece.h, once per instruction set.

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
