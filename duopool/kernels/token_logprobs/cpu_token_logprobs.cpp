// Log-probabilities of chosen tokens, on the CPU: threads and the C face.

#include <cmath>

#define DUOPOOL_KERNEL_BODY "token_logprobs/row_logprobs.h"
#include "every_isa.h"

// Token tokens[i] of row rows[i] of `logits` (`row_stride` apart) gets logprobs[i] and ranks[i]; that row's likeliest tokens
// stand from top_tokens[i * num_top] on. Every token is below `size`, and num_top at most that.
DUOPOOL_EXPORT void duopool_token_logprobs(int32_t isa, const float* logits, int64_t row_stride, int64_t size, int64_t count,
                                           const int64_t* rows, const int64_t* tokens, int64_t num_top, float* logprobs,
                                           int64_t* ranks, int64_t* top_tokens, float* top_logprobs, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(count < num_threads ? (int32_t)count : num_threads)
    for (int64_t i = 0; i < count; ++i)
        DUOPOOL_CALL(isa, row_logprobs(logits + rows[i] * row_stride, size, tokens[i], num_top, logprobs[i], ranks[i],
                                       top_tokens + i * num_top, top_logprobs + i * num_top));
}
