// A call of paged attention cut into pieces of like cost. Owns the checks too; no arithmetic.

#pragma once

#include "paged_attention/attention_call.h"

#include <algorithm>
#include <vector>

// Below this many (row, key) pairs a second thread costs more than it brings.
constexpr int64_t PAIRS_PER_THREAD = 4096;
// Sums over keys begin anew at every multiple of this, and are merged at the end: parts that threads can share out, at places
// that depend on nothing but a row's own position. So its bits are the same in any batch and on any number of threads.
constexpr int64_t KEYS_PER_PART = 1024;

// Fewer of them, and a thread may wait for the other's last one.
constexpr int64_t PIECES_PER_THREAD = 4;

enum Status : int32_t { DONE = 0, BAD_STARTS = 1, BAD_LENGTH = 2, BAD_BLOCK = 3 };

struct Plan {
    std::vector<Piece> pieces;
    std::vector<Split> splits;
    int64_t partial_floats = 0, cost = 0;

    // What the thread that does piece `index` is likely to do next when threads take pieces in turn, or null.
    const Piece* after(int64_t index, int64_t num_threads) const {
        return index + num_threads < (int64_t)pieces.size() ? &pieces[index + num_threads] : nullptr;
    }
};

inline int64_t first_seen_key(const AttentionCall& call, int64_t position) {
    return call.window ? std::max<int64_t>(0, position + 1 - call.window) : 0;
}

// Nothing outside the pages and the tensors is touched once this has returned DONE.
inline Status check(const AttentionCall& call) {
    if (call.query_starts[0] != 0 || call.query_starts[call.num_requests] != call.num_tokens) return BAD_STARTS;
    for (int64_t request = 0; request < call.num_requests; ++request) {
        const int64_t rows = call.query_starts[request + 1] - call.query_starts[request];
        const int64_t length = call.kv_lengths[request];
        if (rows < 0) return BAD_STARTS;
        if (rows == 0) continue;
        const int64_t last_page = (length - 1) / call.block_size;
        if (length < rows || last_page >= call.blocks_per_request) return BAD_LENGTH;
        const int32_t* table = call.block_tables + request * call.block_table_stride;
        for (int64_t page = first_seen_key(call, length - rows) / call.block_size; page <= last_page; ++page)
            if (table[page] < 0 || table[page] >= call.num_blocks) return BAD_BLOCK;
    }
    return DONE;
}

// Whole row tiles of every request and KV head, in `plan.pieces`.
inline void cut_rows(const AttentionCall& call, Plan& plan) {
    const int64_t group = call.num_heads / call.num_kv_heads;
    for (int64_t request = 0; request < call.num_requests; ++request) {
        const int64_t queries = call.query_starts[request + 1] - call.query_starts[request];
        const int64_t rows = queries * group, length = call.kv_lengths[request];
        const int64_t tiles = (rows + ROW_TILE - 1) / ROW_TILE;
        for (int64_t tile = 0; tile < tiles; ++tile) {
            // Tiles of whole queries, as even as they come.
            const int64_t first = tile * queries / tiles * group, last = (tile + 1) * queries / tiles * group;
            const int64_t step = std::min(last - first, ROW_TILE);
            for (int64_t row = first; row < last; row += step) {
                const int64_t end = std::min(row + step, last);
                const int64_t first_key = first_seen_key(call, length - queries + row / group);
                const int64_t last_key = length - queries + (end - 1) / group + 1;
                const int64_t cost = (end - row) * (last_key - first_key);
                for (int64_t kv_head = 0; kv_head < call.num_kv_heads; ++kv_head) {
                    plan.pieces.push_back({(int32_t)request, (int32_t)kv_head, 1, (int32_t)row, (int32_t)(end - row),
                                           (int32_t)first_key, (int32_t)last_key, -1, cost});
                    plan.cost += cost;
                }
            }
        }
    }
}

// All heads of a token into one piece, if enough pieces are left to share out: it reads its pages whole, in the order of
// memory, which brings a tenth more of them in the same time.
inline void join_heads(const AttentionCall& call, Plan& plan) {
    if (call.num_heads > ROW_TILE) return;
    size_t num_kept = 0;
    for (size_t i = 0; i < plan.pieces.size(); ++i) {
        Piece piece = plan.pieces[i];
        const int64_t keys = std::min<int64_t>(piece.last_key - piece.first_key, KEYS_PER_PART);
        if (is_in_place(call, piece.request) && PIECES_PER_THREAD * call.num_threads * call.num_heads * keys <= plan.cost) {
            piece.num_kv_heads = (int32_t)call.num_kv_heads;
            piece.num_rows = (int32_t)call.num_heads;
            piece.cost *= call.num_kv_heads;
            i += call.num_kv_heads - 1;
        }
        plan.pieces[num_kept++] = piece;
    }
    plan.pieces.resize(num_kept);
}

// Pieces of many keys into parts.
inline void cut_keys(int64_t floats_per_row, Plan& plan) {
    const int64_t num_whole = plan.pieces.size();
    for (int64_t i = 0; i < num_whole; ++i) {
        const Piece piece = plan.pieces[i];
        const int64_t first_part = piece.first_key / KEYS_PER_PART;
        const int64_t parts = (piece.last_key - 1) / KEYS_PER_PART + 1 - first_part;
        if (parts < 2) continue;
        const int64_t size = piece.num_rows * floats_per_row;
        plan.splits.push_back({piece, plan.partial_floats, parts});
        for (int64_t part = 0; part < parts; ++part) {
            Piece some = piece;
            const int64_t start = (first_part + part) * KEYS_PER_PART;
            some.first_key = (int32_t)std::max<int64_t>(piece.first_key, start);
            some.last_key = (int32_t)std::min<int64_t>(piece.last_key, start + KEYS_PER_PART);
            some.cost = piece.num_rows * (some.last_key - some.first_key);
            some.partial = plan.partial_floats + part * size;
            if (part == 0)
                plan.pieces[i] = some;
            else
                plan.pieces.push_back(some);
        }
        plan.partial_floats += parts * size;
    }
}

// Fills `plan`; returns how many threads are worth it. `floats_per_row`: size of a row's unmerged sums.
inline int64_t cut_pieces(const AttentionCall& call, int64_t floats_per_row, Plan& plan) {
    plan.pieces.clear();
    plan.splits.clear();
    plan.partial_floats = plan.cost = 0;
    cut_rows(call, plan);
    join_heads(call, plan);
    cut_keys(floats_per_row, plan);
    const int64_t num_threads = std::clamp<int64_t>(plan.cost / PAIRS_PER_THREAD, 1, call.num_threads);
    if (num_threads > 1)
        std::stable_sort(plan.pieces.begin(), plan.pieces.end(),
                         [](const Piece& a, const Piece& b) { return a.cost > b.cost; });
    return num_threads;
}
