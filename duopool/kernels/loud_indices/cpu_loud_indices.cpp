// Which tokens of each row have noise above a bound, on the CPU: threads and the C face. The hash is in loud.h.

#define DUOPOOL_KERNEL_BODY "loud_indices/loud.h"
#include "every_isa.h"

// Row r, with keys[r][2] and the bound limits[r], gets counts[r] and its first `capacity` indices in the order of the
// vocabulary.
DUOPOOL_EXPORT void duopool_loud_indices(int32_t isa, const int32_t* keys, int64_t rows, int64_t size,
                                         const int64_t* limits, int64_t capacity, int64_t* indices, int64_t* counts,
                                         int32_t num_threads) {
#pragma omp parallel for schedule(static) num_threads(rows < num_threads ? (int32_t)rows : num_threads)
    for (int64_t row = 0; row < rows; ++row)
        counts[row] = DUOPOOL_CALL(isa, loud_indices((uint32_t)keys[2 * row], (uint32_t)keys[2 * row + 1], size,
                                                     (uint32_t)limits[row], capacity, indices + row * capacity));
}
