// Linear layers over packed weights on the CPU: packing, threads and the C face. The arithmetic is in panel_product.h.

#define DUOPOOL_KERNEL_BODY "linear/panel_product.h"
#include "every_isa.h"

#include <algorithm>
#include <vector>

namespace {

// Rows whose activations together stay in the second-level cache while the panels pass by; at most panel_product's BLOCK.
int64_t rows_per_block(int64_t rows, int64_t depth) {
    const int64_t fitting = std::clamp<int64_t>((256 << 10) / (4 * depth), 24, 96);
    const int64_t blocks = (rows + fitting - 1) / fitting;
    return (rows + blocks - 1) / blocks;
}

template <class W, class Y>
void run(int32_t isa, const Y* x, int64_t x_stride, int64_t rows, const W* panels, int64_t depth, int64_t out_features,
         const Y* bias, Y* y, int64_t y_stride, int num_threads) {
    static thread_local std::vector<float> expanded;
    const float* activations = reinterpret_cast<const float*>(x);
    int64_t stride = x_stride;
    if constexpr (sizeof(Y) == 2) {
        if ((int64_t)expanded.size() < rows * depth) expanded.resize(rows * depth);
        activations = expanded.data();
        stride = depth;
    }
    float* const scratch = expanded.data();
    const int64_t width = DUOPOOL_CONSTANT(isa, CHUNK);
    const int64_t num_panels = (out_features + width - 1) / width;
    const int64_t block = rows_per_block(rows, depth);
    const int64_t num_blocks = (rows + block - 1) / block;
    // Enough pieces that a late thread loses little, each long enough for the memory to stream.
    const int64_t pieces = std::clamp<int64_t>(8 * num_threads / num_blocks, 1, num_panels);
    if (rows * depth * out_features < 100000) num_threads = 1;
#pragma omp parallel num_threads(num_threads)
    {
        if constexpr (sizeof(Y) == 2) {
#pragma omp for schedule(static)
            for (int64_t row = 0; row < rows; ++row)
                DUOPOOL_CALL(isa, expand(x + row * x_stride, scratch + row * depth, depth));
        }
#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < num_blocks * pieces; ++item) {
            const int64_t row = item / pieces * block, piece = item % pieces;
            DUOPOOL_CALL(isa, multiply_panels(activations + row * stride, stride, std::min(block, rows - row), panels,
                                              piece * num_panels / pieces, (piece + 1) * num_panels / pieces, depth,
                                              out_features, bias, y + row * y_stride, y_stride));
        }
    }
}

template <class T>
void pack(int32_t isa, const T* weight, int64_t row_stride, int64_t out_features, int64_t depth, T* panels) {
    const int64_t width = DUOPOOL_CONSTANT(isa, CHUNK);
    for (int64_t column = 0; column < out_features; column += width)
        DUOPOOL_CALL(isa, pack_panel(weight + column * row_stride, row_stride, std::min(width, out_features - column),
                                     depth, panels + column * depth));
}

}  // namespace

// Output columns of a panel.
DUOPOOL_EXPORT int64_t duopool_panel_width(int32_t isa) { return DUOPOOL_CONSTANT(isa, CHUNK); }

// weight[out_features][depth] with `row_stride` elements between rows -> panels[ceil(out_features / width)][depth][width].
DUOPOOL_EXPORT void duopool_pack_weight(int32_t isa, int32_t is_bfloat16, const void* weight, int64_t row_stride,
                                        int64_t out_features, int64_t depth, void* panels) {
    if (is_bfloat16)
        pack(isa, (const Bfloat16*)weight, row_stride, out_features, depth, (Bfloat16*)panels);
    else
        pack(isa, (const float*)weight, row_stride, out_features, depth, (float*)panels);
}

// y[rows][out_features] = x[rows][depth] * panels + bias; x, bias and y share one type, the weight has its own.
DUOPOOL_EXPORT void duopool_linear(int32_t isa, int32_t x_is_bfloat16, int32_t weight_is_bfloat16, const void* x,
                                   int64_t x_stride, int64_t rows, const void* panels, int64_t depth,
                                   int64_t out_features, const void* bias, void* y, int64_t y_stride,
                                   int32_t num_threads) {
    if (x_is_bfloat16 && weight_is_bfloat16)
        run(isa, (const Bfloat16*)x, x_stride, rows, (const Bfloat16*)panels, depth, out_features,
            (const Bfloat16*)bias, (Bfloat16*)y, y_stride, num_threads);
    else if (x_is_bfloat16)
        run(isa, (const Bfloat16*)x, x_stride, rows, (const float*)panels, depth, out_features, (const Bfloat16*)bias,
            (Bfloat16*)y, y_stride, num_threads);
    else if (weight_is_bfloat16)
        run(isa, (const float*)x, x_stride, rows, (const Bfloat16*)panels, depth, out_features, (const float*)bias,
            (float*)y, y_stride, num_threads);
    else
        run(isa, (const float*)x, x_stride, rows, (const float*)panels, depth, out_features, (const float*)bias,
            (float*)y, y_stride, num_threads);
}
