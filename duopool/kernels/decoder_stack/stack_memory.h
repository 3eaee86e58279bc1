// The memory of one step of a decoder: what its threads share, and what each has for itself. Owns neither.

#pragma once

#include "decoder_stack/team.h"
#include "paged_attention/attention_plan.h"

// Made by cpu_decoder_stack.cpp. Legend as in stack_call.h; void is the type of the weights.
struct StackMemory {
    float* residual;  // [T, hidden]
    float* qkv;       // [T, (H + 2G) * D]
    void* query;      // [T, H, D]
    void* mixed;      // [T, H, D]
    void* gated;      // [T, intermediate]
    float* partials;
    const Plan* const* plans;  // per layer
    // Behind the keys and values of the last layer only tokens go on whose logits are wanted. Null: all go on.
    const int64_t* row_of_token;  // [T]: their place among the rows of logits, or -1
    float* last_residual;         // [R, hidden]
    const int32_t* last_starts;   // [B + 1]: query_starts of those rows
};

struct StackThread {
    Member member;
    float* attention;  // attention_piece.h's workspace
    float* row;        // [widest input]
    void* factors;     // [MOST_ROWS_OF_BLOCK, widest input]: a block of activations as the products take them
};
