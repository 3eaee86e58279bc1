// Which tokens of each row may win with their noise, on the CPU: threads and the C face.

#define DUOPOOL_KERNEL_BODY "contenders/row_contenders.h"
#include "every_isa.h"

// Row r of `scores` (`row_stride` apart), with keys[r][2] and the mark marks[r], gets counts[r] and its first `capacity`
// indices in the order of the vocabulary.
DUOPOOL_EXPORT void duopool_contenders(int32_t isa, const float* scores, int64_t row_stride, int64_t rows, int64_t size,
                                       const int32_t* keys, const float* marks, int64_t capacity, int64_t* indices,
                                       int64_t* counts, int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(rows < num_threads ? (int32_t)rows : num_threads)
    for (int64_t row = 0; row < rows; ++row)
        counts[row] = DUOPOOL_CALL(isa, contenders(scores + row * row_stride, size, (uint32_t)keys[2 * row],
                                                   (uint32_t)keys[2 * row + 1], marks[row], capacity,
                                                   indices + row * capacity));
}
