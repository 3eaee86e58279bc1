// Copying whole pages on the CPU.

#include "library.h"

#include <cstring>

// Pages of `page_bytes`, `stride_bytes` apart. Returns 1, with nothing copied, when an index is not a page.
DUOPOOL_EXPORT int32_t duopool_copy_blocks(void* pages, int64_t num_pages, int64_t stride_bytes, int64_t page_bytes,
                                           const int64_t* sources, const int64_t* targets, int64_t count,
                                           int32_t num_threads) {
    for (int64_t i = 0; i < count; ++i)
        if (sources[i] < 0 || sources[i] >= num_pages || targets[i] < 0 || targets[i] >= num_pages) return 1;
#pragma omp parallel for schedule(static) num_threads(count == 1 ? 1 : num_threads)
    for (int64_t i = 0; i < count; ++i)
        std::memcpy((char*)pages + targets[i] * stride_bytes, (const char*)pages + sources[i] * stride_bytes, page_bytes);
    return 0;
}
