// One call of paged attention as plain values, and the pieces it is cut into. Owns no arithmetic.
//
// Legend: T query tokens, B requests, H query heads, G kv heads, D key head dim, E value head dim, S block size,
// N blocks. A "row" is one (query token, query head) of a KV head: row r of a request is query r / group, head r % group
// of that KV head, so that all rows of a group read the same keys.

#pragma once

#include <cstdint>

// Field for field the structure in cpu.py. Strides count elements.
struct AttentionCall {
    const void* query;  // [T, H, D]
    int64_t query_token_stride, query_head_stride;
    const void* keys;  // [N, G, S, D]
    int64_t key_block_stride, key_head_stride, key_slot_stride;
    const void* values;  // [N, G, S, E]
    int64_t value_block_stride, value_head_stride, value_slot_stride;
    const int32_t* block_tables;  // [B, M]
    int64_t block_table_stride;
    const int32_t* query_starts;  // [B + 1]
    const int32_t* kv_lengths;    // [B]
    const float* sinks;           // [H] or null
    void* out;                    // [T, H, E]
    int64_t out_token_stride, out_head_stride;
    int64_t num_tokens, num_requests, num_heads, num_kv_heads, key_dim, value_dim, block_size, num_blocks;
    int64_t blocks_per_request;
    int64_t window;  // 0: none
    float scale;
    float soft_cap;  // 0: none
    int32_t isa, is_bfloat16, num_threads;
};

// Rows [first_row, first_row + num_rows) of one request against keys [first_key, last_key). Several KV heads, which are then
// all of them, only for one token: their rows follow each other.
struct Piece {
    int32_t request, kv_head, num_kv_heads;
    int32_t first_row, num_rows;
    int32_t first_key, last_key;
    int64_t partial;  // place of its sums when the keys were split over several pieces, else -1
    int64_t cost;
};

// Pieces over the same rows, whose sums are merged at the end.
struct Split {
    Piece whole;
    int64_t first_partial, num_partials;
};

constexpr int64_t KEY_TILE = 64;   // keys whose scores are held at once
constexpr int64_t ROW_TILE = 192;  // rows that share one turning-around of a key tile
constexpr int64_t FEW_ROWS = 16;   // up to here a single token's keys are read straight from their pages

inline int64_t group_of(const AttentionCall& call) { return call.num_heads / call.num_kv_heads; }

// One token's rows read keys where they lie, if they are few. The tokens of a chunk all go the other way, however short the
// chunk is: a prompt's bits are the same wherever it is cut.
inline bool is_in_place(const AttentionCall& call, int64_t request) {
    return group_of(call) <= FEW_ROWS && call.query_starts[request + 1] - call.query_starts[request] == 1;
}
