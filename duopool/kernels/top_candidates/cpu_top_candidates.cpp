// Which tokens of each row may be drawn, on the CPU: threads and the C face. The selection is in row_candidates.h.

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#define DUOPOOL_KERNEL_BODY "top_candidates/row_candidates.h"
#include "every_isa.h"

// Of scores[rows][size], at most 0, the candidates of each row: scores >= floors[row], of those the top_k[row] best, of
// those the smallest set with top_p[row] of their probability; equal scores stay or go together. Row r gets counts[r],
// bounds[r] (its lowest score) and, if they are at most `capacity`, their scores and indices in the order of the
// vocabulary, behind them -inf and 0.
DUOPOOL_EXPORT void duopool_top_candidates(int32_t isa, const float* scores, int64_t row_stride, int64_t rows, int64_t size,
                                           const float* floors, const int64_t* top_k, const double* top_p,
                                           int64_t capacity, float* best, int64_t* indices, int64_t* counts,
                                           float* bounds, int32_t num_threads) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(rows < num_threads ? (int32_t)rows : num_threads)
    for (int64_t row = 0; row < rows; ++row) {
        static thread_local std::vector<float> floats;
        static thread_local std::vector<int32_t> places;
        const int64_t room = size + 64;
        floats.resize(3 * room);
        places.resize(room);
        float* const values = floats.data();
        counts[row] = DUOPOOL_CALL(isa, candidates(scores + row * row_stride, size, floors[row], top_k[row], top_p[row],
                                                   {values, places.data(), values + room, values + 2 * room},
                                                   bounds[row]));
        if (counts[row] > capacity) continue;
        for (int64_t i = 0; i < capacity; ++i) {
            best[row * capacity + i] = i < counts[row] ? values[i] : -INFINITY;
            indices[row * capacity + i] = i < counts[row] ? places[i] : 0;
        }
    }
}
