// Products with packed weights for one instruction set: see every_isa.h for how it is compiled, cpu_linear.cpp for the
// threads of a single product, decoder_stack/ for those of a whole model.
//
// A weight lies in panels of CHUNK output columns, float32 as [panels][depth][CHUNK], bfloat16 as words of two depths,
// [panels][ceil(depth / 2)][CHUNK]; what is behind the last column or depth is zero. A sum runs over the depths in their
// order whatever the number of rows, so a row's result does not depend on the rows beside it.

constexpr int64_t UNIT = 2;          // panels whose sums are finished together
constexpr int64_t BLOCK_ROWS = 96;   // most rows of one call
constexpr int64_t LINE = UNIT * CHUNK;

static inline int64_t panel_elements(float, int64_t depth) { return depth * CHUNK; }
static inline int64_t panel_elements(uint32_t, int64_t depth) { return (depth + 1) / 2 * CHUNK; }
template <int BITS>
static inline int64_t panel_elements(Packed<BITS>, int64_t depth) {
    return num_groups(depth) * Packed<BITS>::GROUP_BYTES;
}
static inline int64_t quantised_panel_bytes(int32_t bits, int64_t depth) {
    return bits == 8 ? panel_elements(Byte{}, depth) : panel_elements(Nibble{}, depth);
}

DUOPOOL_TARGET static inline void pack_panel(const float* weight, int64_t row_stride, int64_t columns, int64_t depth,
                                      float* panel) {
    for (int64_t column = 0; column < CHUNK; ++column)
        for (int64_t k = 0; k < depth; ++k)
            panel[k * CHUNK + column] = column < columns ? weight[column * row_stride + k] : 0;
}

DUOPOOL_TARGET static inline void pack_panel(const Bfloat16* weight, int64_t row_stride, int64_t columns, int64_t depth,
                                      uint32_t* panel) {
    const int64_t pairs = (depth + 1) / 2;
    for (int64_t column = 0; column < CHUNK; ++column) {
        const Bfloat16* from = weight + column * row_stride;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            uint32_t word = 0;
            if (column < columns) {
                word = from[2 * pair].bits;
                if (2 * pair + 1 < depth) word |= (uint32_t)from[2 * pair + 1].bits << 16;
            }
            panel[pair * CHUNK + column] = word;
        }
    }
}

DUOPOOL_TARGET static inline void expand(const Bfloat16* from, float* to, int64_t count) {
    for (int64_t i = 0; i < count; i += WIDTH) store_line(to + i, load_line(from + i, count - i), count - i);
}

DUOPOOL_INLINE float as_float(float value) { return value; }
DUOPOOL_INLINE float as_float(Bfloat16 value) {
    const uint32_t bits = (uint32_t)value.bits << 16;
    float result;
    __builtin_memcpy(&result, &bits, 4);
    return result;
}

// sums[rows][LINE] = x * `count` (1 or UNIT) panels.
template <class X>
DUOPOOL_TARGET void multiply_unit(const X* x, int64_t x_stride, int64_t rows, const uint32_t* panels, int64_t count,
                                  int64_t depth, float* sums) {
    const int64_t stride = (depth + 1) / 2 * CHUNK;
    if (rows <= 3 && count == UNIT)
        return WordProducts<X>::of_two[rows](x, x_stride, panels, stride, depth, sums, LINE, false);
    // Every tile of rows takes all depths at once: a panel comes from the second-level cache as fast as the multipliers
    // want it, and sums that are put down and taken up again cost more.
    const int64_t num_tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t panel = 0; panel < count; ++panel)
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t row = tile * rows / num_tiles, end = (tile + 1) * rows / num_tiles;
            WordProducts<X>::of[end - row](x + row * x_stride, x_stride, panels + panel * stride, stride, depth,
                                           sums + row * LINE + panel * CHUNK, LINE, false);
        }
}

DUOPOOL_TARGET static inline void multiply_unit(const float* x, int64_t x_stride, int64_t rows, const float* panels,
                                         int64_t count, int64_t depth, float* sums) {
    // A slice of a panel stays in the first-level cache while all rows pass over it.
    const int64_t slice = rows > MAX_ROWS ? 4096 / WIDTH : depth;
    const int64_t num_tiles = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t panel = 0; panel < count; ++panel)
        for (int64_t k = 0; k < depth; k += slice)
            for (int64_t tile = 0; tile < num_tiles; ++tile) {
                const int64_t row = tile * rows / num_tiles, end = (tile + 1) * rows / num_tiles;
                RowProducts<float>::of[end - row](x + row * x_stride + k, x_stride, panels + (panel * depth + k) * CHUNK,
                                                  CHUNK, depth - k < slice ? depth - k : slice,
                                                  sums + row * LINE + panel * CHUNK, LINE, k > 0);
            }
}

template <int BITS>
DUOPOOL_TARGET void multiply_unit(const ByteRow* x, int64_t x_stride, int64_t rows, const Packed<BITS>* panels,
                                  int64_t count, int64_t depth, float* sums) {
    const int64_t size = panel_elements(Packed<BITS>{}, depth), num_tiles = (rows + BYTE_ROWS - 1) / BYTE_ROWS;
    for (int64_t panel = 0; panel < count; ++panel)
        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t row = tile * rows / num_tiles, end = (tile + 1) * rows / num_tiles;
            ByteProducts<BITS>::of[end - row](x + row * x_stride, x_stride, panels + panel * size, depth,
                                              sums + row * LINE + panel * CHUNK, LINE);
        }
}

// What becomes of a unit's sums: `finish(sums, rows, column, columns)`, with columns at most LINE.

// y = sums + bias, rounded once.
template <class Y, class B>
struct StoreSums {
    Y* y;
    int64_t width;
    const B* bias;  // null: none

    DUOPOOL_TARGET void operator()(const float* sums, int64_t rows, int64_t column, int64_t columns) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < columns; i += WIDTH) {
                Floats value = load(sums + row * LINE + i);
                if (bias) value += load_line(bias + column + i, columns - i);
                store_line(y + row * width + column + i, value, columns - i);
            }
    }
};

// y += sums + bias.
struct AddSums {
    float* y;
    int64_t width;
    const float* bias;

    DUOPOOL_TARGET void operator()(const float* sums, int64_t rows, int64_t column, int64_t columns) const {
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < columns; i += WIDTH) {
                float* to = y + row * width + column + i;
                Floats value = load_line(to, columns - i) + load(sums + row * LINE + i);
                if (bias) value += load_line(bias + column + i, columns - i);
                store_line(to, value, columns - i);
            }
    }
};

// Products of `rows` (at most BLOCK_ROWS) rows of x with units [first_unit, last_unit).
template <class W, class X, class Finish>
DUOPOOL_TARGET void multiply_panels(const X* x, int64_t x_stride, int64_t rows, const W* panels, int64_t first_unit,
                                    int64_t last_unit, int64_t depth, int64_t out_features, const Finish& finish) {
    float sums[BLOCK_ROWS * LINE];
    const int64_t size = panel_elements(W{}, depth), num_panels = (out_features + CHUNK - 1) / CHUNK;
    for (int64_t unit = first_unit; unit < last_unit; ++unit) {
        const int64_t panel = unit * UNIT, count = num_panels - panel < UNIT ? num_panels - panel : UNIT;
        const int64_t column = panel * CHUNK, rest = out_features - column;
        multiply_unit(x, x_stride, rows, panels + panel * size, count, depth, sums);
        finish(sums, rows, column, rest < LINE ? rest : LINE);
    }
}

// y = x * panels + bias.
template <class X, class W, class Y>
DUOPOOL_TARGET void store_panels(const X* x, int64_t x_stride, int64_t rows, const W* panels, int64_t first_unit,
                                 int64_t last_unit, int64_t depth, int64_t out_features, const Y* bias, Y* y,
                                 int64_t y_stride) {
    multiply_panels(x, x_stride, rows, panels, first_unit, last_unit, depth, out_features,
                    StoreSums<Y, Y>{y, y_stride, bias});
}
