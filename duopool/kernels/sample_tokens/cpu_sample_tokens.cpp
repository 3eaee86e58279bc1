// The next token of each row of logits, on the CPU: threads and the C face.

#include "sample_tokens/draw.h"

#include <algorithm>
#include <cmath>
#include <functional>

#define DUOPOOL_KERNEL_BODY "sample_tokens/row_draw.h"
#include "every_isa.h"

// Row r of `logits` (`row_stride` apart), drawn as draws[r] says, gets tokens[r]; best[r] is its largest logit, or NaN.
// Without rules for any row `rules` is null.
DUOPOOL_EXPORT void duopool_sample_tokens(int32_t isa, const float* logits, int64_t row_stride, int64_t rows, int64_t size,
                                          const Draw* draws, const Rules* rules, int64_t* tokens, float* best,
                                          int32_t num_threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(rows < num_threads ? (int32_t)rows : num_threads)
    for (int64_t row = 0; row < rows; ++row)
        tokens[row] = DUOPOOL_CALL(
            isa, draw_token(logits + row * row_stride, size, draws[row], rules ? rules + row : nullptr,
                            draw_memory(size), best[row]));
}
