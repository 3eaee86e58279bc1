// The linear kernel for one instruction set: see every_isa.h for how it is compiled, cpu_linear.cpp for the threads.
//
// A weight lies in panels of CHUNK output columns: [panels][in_features][CHUNK]. In bfloat16 each line is stored so that
// pair order (vectors.h) gives the columns in their natural order.

// Where column c of a panel is stored within a line.
DUOPOOL_INLINE int64_t column_place(float, int64_t column) { return column; }
DUOPOOL_INLINE int64_t column_place(Bfloat16, int64_t column) {
    return column < WIDTH ? 2 * column : 2 * (column - WIDTH) + 1;
}

template <class T>
DUOPOOL_TARGET void pack_panel(const T* weight, int64_t row_stride, int64_t columns, int64_t depth, T* panel) {
    for (int64_t column = 0; column < CHUNK; ++column) {
        T* to = panel + column_place(T{}, column);
        if (column < columns) {
            const T* from = weight + column * row_stride;
            for (int64_t k = 0; k < depth; ++k) to[k * CHUNK] = from[k];
        } else {
            for (int64_t k = 0; k < depth; ++k) to[k * CHUNK] = T{};
        }
    }
}

DUOPOOL_TARGET static void expand(const Bfloat16* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t bits = (uint32_t)from[i].bits << 16;
        __builtin_memcpy(to + i, &bits, 4);
    }
}

DUOPOOL_INLINE float as_float(float value) { return value; }
DUOPOOL_INLINE float as_float(Bfloat16 value) {
    const uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

DUOPOOL_INLINE void write_line(const float* line, int64_t columns, float* to) {
    __builtin_memcpy(to, line, columns * sizeof(float));
}
DUOPOOL_INLINE void write_line(const float* line, int64_t columns, Bfloat16* to) {
    uint32_t rounded[CHUNK];
    *(LooseWords*)rounded = rounded_to_bfloat16(load(line)) >> 16;
    *(LooseWords*)(rounded + WIDTH) = rounded_to_bfloat16(load(line + WIDTH)) >> 16;
    for (int64_t column = 0; column < columns; ++column) to[column].bits = (uint16_t)rounded[column];
}

// Products of `rows` rows of x with panels [first_panel, last_panel), bias added, rounded once into y.
template <class W, class Y>
DUOPOOL_TARGET void multiply_panels(const float* x, int64_t x_stride, int64_t rows, const W* panels, int64_t first_panel,
                                    int64_t last_panel, int64_t depth, int64_t out_features, const Y* bias, Y* y,
                                    int64_t y_stride) {
    // A slice of a panel stays in the first-level cache while all rows pass over it.
    constexpr int64_t SLICE = 65536 / (CHUNK * sizeof(W));
    constexpr int64_t BLOCK = 96;
    float sums[BLOCK * CHUNK];
    const int64_t num_tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t panel = first_panel; panel < last_panel; ++panel) {
        const W* weights = panels + panel * depth * CHUNK;
        for (int64_t k = 0; k < depth; k += SLICE) {
            const int64_t slice = depth - k < SLICE ? depth - k : SLICE;
            for (int64_t tile = 0; tile < num_tiles; ++tile) {
                const int64_t row = tile * rows / num_tiles, end = (tile + 1) * rows / num_tiles;
                RowProducts<W>::of[end - row](x + row * x_stride + k, x_stride, weights + k * CHUNK, CHUNK, slice,
                                              sums + row * CHUNK, CHUNK, k > 0);
            }
        }
        const int64_t column = panel * CHUNK;
        const int64_t columns = out_features - column < CHUNK ? out_features - column : CHUNK;
        for (int64_t row = 0; row < rows; ++row) {
            float* line = sums + row * CHUNK;
            if (bias) {
                for (int64_t i = 0; i < columns; ++i) line[i] += as_float(bias[column + i]);
            }
            write_line(line, columns, y + row * y_stride + column);
        }
    }
}
