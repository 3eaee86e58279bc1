// Attention of one piece (attention_call.h) for one instruction set; every_isa.h compiles this file once per set.
//
// Few rows read keys and values straight from the pages, many rows first turn a tile of keys around; where the processor
// multiplies bfloat16 pairs, both have a way of their own. All keep their sums in the same form.

#include "paged_attention/attention_sums.h"
#include "paged_attention/attention_pages.h"

// One thread's memory, cut from a single buffer.
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

#include "paged_attention/attention_in_place.h"
#include "paged_attention/attention_staged.h"
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
