// One step of a whole decoder as plain values: token ids in, logits and tokens out. Owns no arithmetic.
//
// Legend: T query tokens, B requests, R rows of logits, H query heads, G kv heads, D head dim, S block size, N blocks,
// V vocabulary, P positions.

#pragma once

#include <cstdint>

#include "sample_tokens/draw.h"

// Field for field the structures in cpu.py.
struct StackMatrix {
    const void* panels;  // linear/panel_product.h
    const float* bias;   // [out_features] or null
    int64_t in_features, out_features;
    int64_t bits;  // 8 or 4: byte_products.h; 0: as the model's type
};

struct StackLayer {
    StackMatrix qkv, out, gate_up, down;  // gate and up take turns by panels, gate first
    const float *attention_norm, *mlp_norm;  // [hidden]
    int64_t window;                          // 0: none
};

struct StackModel {
    const StackLayer* layers;
    StackMatrix head;
    const void* embedding;    // [V, hidden]
    const float* final_norm;  // [hidden]
    const float *cos, *sin;   // [P, D / 2]
    int64_t num_layers, hidden, intermediate, num_heads, num_kv_heads, head_dim, vocab_size, num_positions;
    float eps, scale;
    int32_t isa, is_bfloat16;
};

// Strides count elements; keys and values of all layers share them.
struct StackCall {
    void *const *keys, *const *values;  // per layer [N, G, S, D]
    int64_t block_stride, head_stride, slot_stride;
    int64_t num_blocks, block_size;
    const int64_t *token_ids, *positions, *slots;  // [T]
    const int32_t* block_tables;                   // [B, M]
    int64_t blocks_per_request;                    // M
    const int32_t* query_starts;  // [B + 1]
    const int32_t* kv_lengths;    // [B]
    const int64_t* logits_rows;   // [R], tokens
    float* logits;                // [R, V]
    const Draw* draws;            // [R], or null: no token is drawn
    const Rules* rules;           // [R], or null: no row has any
    int64_t* tokens;              // [R]
    float* best;                  // [R]: the largest logit, or NaN
    int64_t num_tokens, num_requests, num_rows;
    int32_t num_threads;
};
