// The best token of each row of logits, on the CPU: threads and the C face.

#include <cmath>

#define DUOPOOL_KERNEL_BODY "best_tokens/row_best.h"
#include "every_isa.h"

// Row r of `scores` (`row_stride` apart) gets best[r] and indices[r].
DUOPOOL_EXPORT void duopool_best_tokens(int32_t isa, const float* scores, int64_t row_stride, int64_t rows, int64_t size,
                                        float* best, int64_t* indices, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(rows < num_threads ? (int32_t)rows : num_threads)
    for (int64_t row = 0; row < rows; ++row)
        indices[row] = DUOPOOL_CALL(isa, row_best(scores + row * row_stride, size, best[row]));
}
