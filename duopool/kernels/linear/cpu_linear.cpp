// Linear layers over packed weights on the CPU: packing, threads and the C face. The arithmetic is in panel_product.h.

#define DUOPOOL_KERNEL_BODY "linear/panel_product.h"
#include "every_isa.h"
#include "linear/row_blocks.h"

#include <algorithm>
#include <vector>

// Bytes of a panel of 8 or 4 bits.
DUOPOOL_EXPORT int64_t duopool_quantised_panel_bytes(int32_t isa, int32_t bits, int64_t depth) {
    return DUOPOOL_CALL(isa, quantised_panel_bytes(bits, depth));
}

namespace {

constexpr int64_t WORTH_A_THREAD = 100000;  // multiplications

template <class X, class W, class Y>
void run(int32_t isa, const X* x, int64_t x_stride, int64_t rows, const W* panels, int64_t depth, int64_t out_features,
         const Y* bias, Y* y, int64_t y_stride, int num_threads) {
    const int64_t unit = DUOPOOL_CONSTANT(isa, LINE);
    const RowBlocks blocks(rows, depth * sizeof(X), (out_features + unit - 1) / unit, num_threads);
    if (rows * depth * out_features < WORTH_A_THREAD) num_threads = 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(num_threads)
    for (int64_t item = 0; item < blocks.num_pieces(); ++item) {
        const RowBlocks::Piece piece = blocks.piece(item);
        DUOPOOL_CALL(isa, store_panels(x + piece.row * x_stride, x_stride, piece.num_rows, panels, piece.first_unit,
                                       piece.last_unit, depth, out_features, bias, y + piece.row * y_stride, y_stride));
    }
}

// As run, for activations that must be float32 first.
template <class W>
void run_expanded(int32_t isa, const Bfloat16* x, int64_t x_stride, int64_t rows, const W* panels, int64_t depth,
                  int64_t out_features, const Bfloat16* bias, Bfloat16* y, int64_t y_stride, int num_threads) {
    static thread_local std::vector<float> memory;
    if ((int64_t)memory.size() < rows * depth) memory.resize(rows * depth);
    float* const to = memory.data();
#pragma omp parallel for schedule(static) num_threads(rows * depth < WORTH_A_THREAD ? 1 : num_threads)
    for (int64_t row = 0; row < rows; ++row) DUOPOOL_CALL(isa, expand(x + row * x_stride, to + row * depth, depth));
    run(isa, to, depth, rows, panels, depth, out_features, bias, y, y_stride, num_threads);
}

template <class T, class W>
void pack(int32_t isa, const T* weight, int64_t row_stride, int64_t out_features, int64_t depth, W* panels) {
    const int64_t width = DUOPOOL_CONSTANT(isa, CHUNK), size = DUOPOOL_CALL(isa, panel_elements(W{}, depth));
    for (int64_t panel = 0; panel * width < out_features; ++panel)
        DUOPOOL_CALL(isa, pack_panel(weight + panel * width * row_stride, row_stride,
                                     std::min(width, out_features - panel * width), depth, panels + panel * size));
}

template <int BITS>
void pack_bits(int32_t isa, const float* weight, int64_t row_stride, int64_t out_features, int64_t depth, uint8_t* panels) {
    const int64_t width = DUOPOOL_CONSTANT(isa, CHUNK), size = duopool_quantised_panel_bytes(isa, BITS, depth);
#pragma omp parallel for schedule(static)
    for (int64_t panel = 0; panel < (out_features + width - 1) / width; ++panel)
        DUOPOOL_CALL(isa, pack_bits<BITS>(weight + panel * width * row_stride, row_stride,
                                          std::min(width, out_features - panel * width), depth, panels + panel * size));
}

}  // namespace

// Output columns of a panel.
DUOPOOL_EXPORT int64_t duopool_panel_width(int32_t isa) { return DUOPOOL_CONSTANT(isa, CHUNK); }

// weight[out_features][depth], float32, to panels of 8 or 4 bits (byte_products.h).
DUOPOOL_EXPORT void duopool_pack_quantised(int32_t isa, int32_t bits, const float* weight, int64_t row_stride,
                                           int64_t out_features, int64_t depth, void* panels) {
    if (bits == 8)
        pack_bits<8>(isa, weight, row_stride, out_features, depth, (uint8_t*)panels);
    else
        pack_bits<4>(isa, weight, row_stride, out_features, depth, (uint8_t*)panels);
}

// weight[out_features][depth] with `row_stride` elements between rows, float32 or bfloat16, to panels (panel_product.h).
DUOPOOL_EXPORT void duopool_pack_weight(int32_t isa, int32_t is_bfloat16, const void* weight, int64_t row_stride,
                                        int64_t out_features, int64_t depth, void* panels) {
    if (is_bfloat16)
        pack(isa, (const Bfloat16*)weight, row_stride, out_features, depth, (uint32_t*)panels);
    else
        pack(isa, (const float*)weight, row_stride, out_features, depth, (float*)panels);
}

// y[rows][out_features] = x[rows][depth] * panels + bias; x, bias and y share one type, the weight has its own.
DUOPOOL_EXPORT void duopool_linear(int32_t isa, int32_t x_is_bfloat16, int32_t weight_is_bfloat16, const void* x,
                                   int64_t x_stride, int64_t rows, const void* panels, int64_t depth,
                                   int64_t out_features, const void* bias, void* y, int64_t y_stride,
                                   int32_t num_threads) {
    if (x_is_bfloat16 && weight_is_bfloat16 && isa == AVX512_DOTS)
        run(isa, (const Bfloat16*)x, x_stride, rows, (const uint32_t*)panels, depth, out_features,
            (const Bfloat16*)bias, (Bfloat16*)y, y_stride, num_threads);
    else if (x_is_bfloat16 && weight_is_bfloat16)
        run_expanded(isa, (const Bfloat16*)x, x_stride, rows, (const uint32_t*)panels, depth, out_features,
                     (const Bfloat16*)bias, (Bfloat16*)y, y_stride, num_threads);
    else if (x_is_bfloat16)
        run_expanded(isa, (const Bfloat16*)x, x_stride, rows, (const float*)panels, depth, out_features,
                     (const Bfloat16*)bias, (Bfloat16*)y, y_stride, num_threads);
    else if (weight_is_bfloat16)
        run(isa, (const float*)x, x_stride, rows, (const uint32_t*)panels, depth, out_features, (const float*)bias,
            (float*)y, y_stride, num_threads);
    else
        run(isa, (const float*)x, x_stride, rows, (const float*)panels, depth, out_features, (const float*)bias,
            (float*)y, y_stride, num_threads);
}
