// Paged attention on the CPU: runs the pieces of attention_plan.h on threads and merges what was split.
//
// The arithmetic is in attention_piece.h. Memory is one buffer per thread, kept between calls.

#include "paged_attention/attention_call.h"

#define DUOPOOL_KERNEL_BODY "paged_attention/attention_piece.h"
#include "every_isa.h"
#include "paged_attention/attention_plan.h"

#include <vector>

namespace {

template <class T>
void run(const AttentionCall& call, const Plan& plan, float* partials, int num_threads) {
    const int64_t num_pieces = plan.pieces.size(), num_splits = plan.splits.size();
#pragma omp parallel num_threads(num_threads)
    {
        static thread_local std::vector<float> workspace;
        const size_t needed = DUOPOOL_CALL(call.isa, workspace_floats(call));
        if (workspace.size() < needed) workspace.resize(needed);
        float* const memory = workspace.data();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_pieces; ++i) {
            const Piece& piece = plan.pieces[i];
            float* const partial = piece.partial < 0 ? nullptr : partials + piece.partial;
            DUOPOOL_CALL(call.isa, attend<T>(call, piece, plan.after(i, num_threads), memory, partial));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < num_splits; ++i)
            DUOPOOL_CALL(call.isa, merge<T>(call, plan.splits[i], partials + plan.splits[i].first_partial));
    }
}

}  // namespace

// Fills call->out; returns a Status, and touches nothing unless that is DONE.
DUOPOOL_EXPORT int32_t duopool_paged_attention(const AttentionCall* call) {
    static thread_local Plan plan;
    static thread_local std::vector<float> partials;
    const Status status = check(*call);
    if (status != DONE) return status;
    const int64_t num_threads = cut_pieces(*call, DUOPOOL_CALL(call->isa, partial_floats(*call, 1)), plan);
    if ((int64_t)partials.size() < plan.partial_floats) partials.resize(plan.partial_floats);
    if (call->is_bfloat16)
        run<Bfloat16>(*call, plan, partials.data(), num_threads);
    else
        run<float>(*call, plan, partials.data(), num_threads);
    return DONE;
}
