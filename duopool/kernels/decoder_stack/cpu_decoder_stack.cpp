// A whole decoder in one call: checks, memory, threads and the C face. What a thread does is in stack_step.h.

#include "decoder_stack/stack_call.h"
#include "decoder_stack/stack_memory.h"
#include "linear/row_blocks.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#define DUOPOOL_KERNEL_BODY "decoder_stack/stack_step.h"
#include "every_isa.h"

namespace {

constexpr Status BAD_TOKEN = (Status)4, BAD_POSITION = (Status)5, BAD_SLOT = (Status)6, BAD_ROW = (Status)7;

// One calling thread's memory, kept between calls.
struct Scratch {
    std::vector<float> residual, last_residual, qkv, partials;
    std::vector<char> query, mixed, gated, factors;
    std::vector<int64_t> row_of_token;
    std::vector<int32_t> last_starts;
    std::vector<Plan> plans;
    std::vector<const Plan*> plan_of_layer;
    Plan last_plan;
    Team team;
};

template <class V>
auto* at_least(V& memory, int64_t size) {
    if ((int64_t)memory.size() < size) memory.resize(size);
    return memory.data();
}

AttentionCall attention_of(const StackModel& model, const StackCall& call, const StackMemory& memory) {
    AttentionCall attention = {};
    attention.query = memory.query;
    attention.out = memory.mixed;
    attention.query_token_stride = attention.out_token_stride = model.num_heads * model.head_dim;
    attention.query_head_stride = attention.out_head_stride = model.head_dim;
    attention.key_block_stride = attention.value_block_stride = call.block_stride;
    attention.key_head_stride = attention.value_head_stride = call.head_stride;
    attention.key_slot_stride = attention.value_slot_stride = call.slot_stride;
    attention.block_tables = call.block_tables;
    attention.block_table_stride = attention.blocks_per_request = call.blocks_per_request;
    attention.query_starts = call.query_starts;
    attention.kv_lengths = call.kv_lengths;
    attention.num_tokens = call.num_tokens;
    attention.num_requests = call.num_requests;
    attention.num_heads = model.num_heads;
    attention.num_kv_heads = model.num_kv_heads;
    attention.key_dim = attention.value_dim = model.head_dim;
    attention.block_size = call.block_size;
    attention.num_blocks = call.num_blocks;
    attention.scale = model.scale;
    attention.isa = model.isa;
    attention.is_bfloat16 = model.is_bfloat16;
    attention.num_threads = call.num_threads;
    return attention;
}

// Nothing outside the pages and the tensors is touched once this has returned DONE.
int32_t check(const StackModel& model, const StackCall& call, const AttentionCall& attention) {
    for (int64_t i = 0; i < call.num_tokens; ++i) {
        if (call.token_ids[i] < 0 || call.token_ids[i] >= model.vocab_size) return BAD_TOKEN;
        if (call.positions[i] < 0 || call.positions[i] >= model.num_positions) return BAD_POSITION;
        if (call.slots[i] >= call.num_blocks * call.block_size) return BAD_SLOT;
    }
    for (int64_t i = 0; i < call.num_rows; ++i)
        if (call.logits_rows[i] < 0 || call.logits_rows[i] >= call.num_tokens) return BAD_ROW;
    return check(attention);
}

// Fills row_of_token and last_starts; false unless every request wants the logits of its last tokens (or of none) and the
// rows are in order: what is not so goes through the last layer whole.
bool narrow(const StackCall& call, Scratch& scratch) {
    if (call.num_rows == call.num_tokens) return false;
    scratch.row_of_token.assign(call.num_tokens, -1);
    scratch.last_starts.assign(call.num_requests + 1, 0);
    int64_t row = 0;
    for (int64_t request = 0; request < call.num_requests; ++request) {
        const int64_t first = call.query_starts[request], end = call.query_starts[request + 1], first_row = row;
        while (row < call.num_rows && call.logits_rows[row] >= first && call.logits_rows[row] < end) ++row;
        for (int64_t i = first_row; i < row; ++i) {
            if (call.logits_rows[i] != end - (row - i)) return false;
            scratch.row_of_token[call.logits_rows[i]] = i;
        }
        scratch.last_starts[request + 1] = (int32_t)row;
    }
    return row == call.num_rows;
}

// Layers with the same window as the one before share its plan. Returns the size of the largest one's partial sums.
int64_t cut_layers(const StackModel& model, AttentionCall& attention, int64_t floats_per_row, Scratch& scratch) {
    int64_t most_partials = 0;
    scratch.plans.resize(model.num_layers);
    scratch.plan_of_layer.resize(model.num_layers);
    for (int64_t layer = 0; layer < model.num_layers; ++layer) {
        const int64_t window = model.layers[layer].window;
        Plan& plan = scratch.plans[layer];
        if (layer && window == attention.window) {
            scratch.plan_of_layer[layer] = scratch.plan_of_layer[layer - 1];
            continue;
        }
        attention.window = window;
        cut_pieces(attention, floats_per_row, plan);
        scratch.plan_of_layer[layer] = &plan;
        most_partials = std::max(most_partials, plan.partial_floats);
    }
    return most_partials;
}

}  // namespace

// Fills call->logits, with draws the tokens too, and the slots of the pages; returns a Status, and touches nothing unless that is DONE.
DUOPOOL_EXPORT int32_t duopool_decoder_stack(const StackModel* model_of_call, const StackCall* call_of_step) {
    static thread_local Scratch scratch;
    const StackModel& model = *model_of_call;
    const StackCall& call = *call_of_step;
    const int64_t bytes = model.is_bfloat16 ? 2 : 4, tokens = call.num_tokens;
    const int64_t heads = model.num_heads * model.head_dim;
    StackMemory memory = {};
    memory.residual = at_least(scratch.residual, tokens * model.hidden);
    memory.qkv = at_least(scratch.qkv, tokens * (heads + 2 * model.num_kv_heads * model.head_dim));
    memory.query = at_least(scratch.query, tokens * heads * bytes);
    memory.mixed = at_least(scratch.mixed, tokens * heads * bytes);
    memory.gated = at_least(scratch.gated, tokens * model.intermediate * bytes);
    AttentionCall attention = attention_of(model, call, memory);
    const int32_t status = check(model, call, attention);
    if (status != DONE) return status;
    const int64_t floats_per_row = DUOPOOL_CALL(model.isa, partial_floats(attention, 1));
    int64_t most_partials = cut_layers(model, attention, floats_per_row, scratch);
    if (model.num_layers && narrow(call, scratch)) {
        memory.row_of_token = scratch.row_of_token.data();
        memory.last_starts = scratch.last_starts.data();
        memory.last_residual = at_least(scratch.last_residual, call.num_rows * model.hidden);
        AttentionCall last = attention;
        last.window = model.layers[model.num_layers - 1].window;
        last.query_starts = memory.last_starts;
        last.num_tokens = call.num_rows;
        cut_pieces(last, floats_per_row, scratch.last_plan);
        scratch.plan_of_layer.back() = &scratch.last_plan;
        most_partials = std::max(most_partials, scratch.last_plan.partial_floats);
    }
    memory.partials = at_least(scratch.partials, most_partials);
    memory.plans = scratch.plan_of_layer.data();
    PhaseState* const phases = scratch.team.begin(3 + 7 * model.num_layers);
    // Factors take at most a float each, or a byte and a share of their group's scale.
    const int64_t widest = std::max({model.hidden, heads, model.intermediate}) + 64;
#pragma omp parallel num_threads(call.num_threads)
    {
        static thread_local std::vector<float> workspace, row, factors;
        StackThread thread{Member(phases),
                           at_least(workspace, DUOPOOL_CALL(model.isa, workspace_floats(attention))),
                           at_least(row, widest), at_least(factors, MOST_ROWS_OF_BLOCK * widest)};
        if (model.is_bfloat16)
            DUOPOOL_CALL(model.isa, run_stack<Bfloat16>(model, call, attention, memory, thread));
        else
            DUOPOOL_CALL(model.isa, run_stack<float>(model, call, attention, memory, thread));
    }
    return DONE;
}
