// A whole decoder of the Llama shape for one instruction set; every_isa.h compiles this file once per set.
//
// T is the type of the weights' panels, the embedding and the pages. The residual stream is float32; what a product
// takes is rounded to T. Every thread runs `run_stack`; team.h shares the pieces of each phase out.

#include "linear/panel_product.h"
#include "paged_attention/attention_piece.h"
#include "sample_tokens/row_draw.h"

// How a matrix lies in panels, and as what activations meet it.
template <class T>
struct Whole;
template <>
struct Whole<float> {
    typedef float Element;
    typedef float Factor;
};
template <>
struct Whole<Bfloat16> {
    typedef uint32_t Element;
#ifdef DUOPOOL_DOTS
    typedef Bfloat16 Factor;
#else
    typedef float Factor;
#endif
};
template <int BITS>
struct Quantised {
    typedef Packed<BITS> Element;
    typedef ByteRow Factor;
};

static inline int64_t factor_stride(const float*, int64_t depth) { return depth; }
static inline int64_t factor_stride(const Bfloat16*, int64_t depth) { return depth; }
static inline int64_t factor_stride(const ByteRow*, int64_t depth) { return byte_row_stride(depth); }

// out = weight * x / sqrt(mean(x^2) + eps)
template <class Y>
DUOPOOL_TARGET void normalise(const float* x, int64_t count, const float* weight, float eps, Y* out) {
    Floats squares = {};
    for (int64_t i = 0; i < count; i += WIDTH) {
        const Floats value = load_line(x + i, count - i);
        squares += value * value;
    }
    const float factor = 1.0f / __builtin_sqrtf(sum(squares) / count + eps);
    for (int64_t i = 0; i < count; i += WIDTH)
        store_line(out + i, load_line(x + i, count - i) * factor * load_line(weight + i, count - i), count - i);
}

// Where a product's activations come from: `rows(first, count, scratch, row)` gives `count` rows as factors, in scratch if
// they must be made first; `row` is room for one of them in float32.

// Rows of the residual stream, normalised; `picked` names them, or they are all in order.
struct NormalisedRows {
    const float* residual;
    const float* weight;
    int64_t hidden;
    float eps;
    const int64_t* picked;

    template <class Factor>
    DUOPOOL_TARGET const Factor* rows(int64_t first, int64_t count, Factor* scratch, float* row) const {
        const int64_t stride = factor_stride(scratch, hidden);
        for (int64_t i = 0; i < count; ++i) {
            const float* from = residual + (picked ? picked[first + i] : first + i) * hidden;
            write(from, scratch + i * stride, row);
        }
        return scratch;
    }

   private:
    template <class Factor>
    DUOPOOL_TARGET void write(const float* from, Factor* to, float*) const {
        normalise(from, hidden, weight, eps, to);
    }
    DUOPOOL_TARGET void write(const float* from, ByteRow* to, float* row) const {
        normalise(from, hidden, weight, eps, row);
        quantise_row(row, hidden, to);
    }
};

// Rows of a tensor of T.
template <class T>
struct StoredRows {
    const T* from;
    int64_t width;

    // As they are.
    const T* rows(int64_t first, int64_t, T*, float*) const { return from + first * width; }
    DUOPOOL_TARGET const ByteRow* rows(int64_t first, int64_t count, ByteRow* scratch, float* row) const {
        const int64_t stride = byte_row_stride(width);
        for (int64_t i = 0; i < count; ++i) {
            for (int64_t at = 0; at < width; at += WIDTH)
                store_line(row + at, load_line(from + (first + i) * width + at, width - at), width - at);
            quantise_row(row, width, scratch + i * stride);
        }
        return scratch;
    }
    template <class Factor>
    DUOPOOL_TARGET const Factor* rows(int64_t first, int64_t count, Factor* scratch, float*) const {
        expand(from + first * width, scratch, count * width);
        return scratch;
    }
};

// gated = silu(gate) * up; a unit is one panel of each.
template <class Y>
struct GateSums {
    Y* y;
    int64_t width;
    const float* bias;  // in the order of the panels

    DUOPOOL_TARGET void operator()(const float* sums, int64_t rows, int64_t column, int64_t) const {
        const int64_t first = column / UNIT, columns = width - first < CHUNK ? width - first : CHUNK;
        for (int64_t row = 0; row < rows; ++row)
            for (int64_t i = 0; i < columns; i += WIDTH) {
                Floats gate = load(sums + row * LINE + i), up = load(sums + row * LINE + CHUNK + i);
                if (bias) {
                    gate += load(bias + column + i);
                    up += load(bias + column + CHUNK + i);
                }
                // Past 88 e^-gate would overflow; the quotient is 0 in float32 long before.
                const Floats power = exponential(gate < -88.0f ? fill(88.0f) : -gate);
                store_line(y + row * width + first + i, gate / (1.0f + power) * up, columns - i);
            }
    }
};

template <class Panels, class Rows, class Finish>
DUOPOOL_TARGET void product_of(StackThread& thread, const StackMatrix& matrix, const Rows& source, int64_t num_rows,
                               int64_t num_threads, const Finish& finish_at) {
    typedef typename Panels::Factor Factor;
    const int64_t num_units = (matrix.out_features + LINE - 1) / LINE, depth = matrix.in_features;
    const RowBlocks blocks(num_rows, depth * sizeof(Factor), num_units, num_threads);
    const Factor* rows = nullptr;
    int64_t row_of_factors = -1;
    for (int64_t item; thread.member.next(blocks.num_pieces(), item);) {
        const RowBlocks::Piece piece = blocks.piece(item);
        if (row_of_factors != piece.row) {
            rows = source.rows(piece.row, piece.num_rows, (Factor*)thread.factors, thread.row);
            row_of_factors = piece.row;
        }
        auto finish = finish_at;
        finish.y += piece.row * finish.width;
        multiply_panels(rows, factor_stride(rows, depth), piece.num_rows,
                        (const typename Panels::Element*)matrix.panels, piece.first_unit, piece.last_unit, depth,
                        matrix.out_features, finish);
    }
}

// One phase: finish(rows * matrix).
template <class T, class Rows, class Finish>
DUOPOOL_TARGET void product(StackThread& thread, const StackMatrix& matrix, const Rows& source, int64_t num_rows,
                            int64_t num_threads, const Finish& finish) {
    if (matrix.bits == 8)
        product_of<Quantised<8>>(thread, matrix, source, num_rows, num_threads, finish);
    else if (matrix.bits == 4)
        product_of<Quantised<4>>(thread, matrix, source, num_rows, num_threads, finish);
    else
        product_of<Whole<T>>(thread, matrix, source, num_rows, num_threads, finish);
}

// Rotary position embedding in the half-split order of transformers' `rotate_half`.
template <class Y>
DUOPOOL_INLINE void rotate(const float* x, const float* cos, const float* sin, int64_t half, Y* out) {
    for (int64_t i = 0; i < half; i += WIDTH) {
        const int64_t rest = half - i;
        const Floats low = load_line(x + i, rest), high = load_line(x + half + i, rest);
        const Floats c = load_line(cos + i, rest), s = load_line(sin + i, rest);
        store_line(out + i, low * c - high * s, rest);
        store_line(out + half + i, high * c + low * s, rest);
    }
}

// Rotates the token's keys and, for the query of `row` unless that is -1, its queries; writes its key and value into
// their slot.
template <class T>
DUOPOOL_TARGET void rotate_and_write(const StackModel& model, const StackCall& call, const StackMemory& memory,
                                     int64_t layer, int64_t token, int64_t row) {
    const int64_t dim = model.head_dim, half = dim / 2, num_heads = model.num_heads, num_kv_heads = model.num_kv_heads;
    const float* x = memory.qkv + token * (num_heads + 2 * num_kv_heads) * dim;
    const float *cos = model.cos + call.positions[token] * half, *sin = model.sin + call.positions[token] * half;
    for (int64_t head = 0; head < num_heads && row >= 0; ++head)
        rotate(x + head * dim, cos, sin, half, (T*)memory.query + (row * num_heads + head) * dim);
    const int64_t slot = call.slots[token];
    if (slot < 0) return;
    const int64_t place = slot / call.block_size * call.block_stride + slot % call.block_size * call.slot_stride;
    x += num_heads * dim;
    for (int64_t head = 0; head < num_kv_heads; ++head) {
        rotate(x + head * dim, cos, sin, half, (T*)call.keys[layer] + place + head * call.head_stride);
        const float* value = x + (num_kv_heads + head) * dim;
        T* to = (T*)call.values[layer] + place + head * call.head_stride;
        for (int64_t i = 0; i < dim; i += WIDTH) store_line(to + i, load_line(value + i, dim - i), dim - i);
    }
}

template <class T>
DUOPOOL_TARGET void embed(const StackModel& model, const StackCall& call, const StackMemory& memory, int64_t token) {
    const T* from = (const T*)model.embedding + call.token_ids[token] * model.hidden;
    float* to = memory.residual + token * model.hidden;
    for (int64_t i = 0; i < model.hidden; i += WIDTH)
        store_line(to + i, load_line(from + i, model.hidden - i), model.hidden - i);
}

constexpr int64_t TOKENS_PER_PIECE = 8;

template <class T>
DUOPOOL_TARGET void run_stack(const StackModel& model, const StackCall& call, const AttentionCall& attention,
                              const StackMemory& memory, StackThread& thread) {
    const int64_t num_tokens = call.num_tokens, threads = call.num_threads, dim = model.head_dim;
    const int64_t num_groups = (num_tokens + TOKENS_PER_PIECE - 1) / TOKENS_PER_PIECE;
    Member& member = thread.member;
    for (int64_t group; member.next(num_groups, group);)
        for (int64_t i = group * TOKENS_PER_PIECE; i < num_tokens && i < (group + 1) * TOKENS_PER_PIECE; ++i)
            embed<T>(model, call, memory, i);
    int64_t num_rows = num_tokens;
    float* residual = memory.residual;
    for (int64_t index = 0; index < model.num_layers; ++index) {
        const StackLayer& layer = model.layers[index];
        const bool is_narrow = memory.row_of_token && index + 1 == model.num_layers;
        const int64_t qkv_width = layer.qkv.out_features, mixed_width = model.num_heads * dim;
        product<T>(thread, layer.qkv, NormalisedRows{residual, layer.attention_norm, model.hidden, model.eps, nullptr},
                   num_tokens, threads, StoreSums<float, float>{memory.qkv, qkv_width, layer.qkv.bias});
        for (int64_t group; member.next(num_groups, group);)
            for (int64_t i = group * TOKENS_PER_PIECE; i < num_tokens && i < (group + 1) * TOKENS_PER_PIECE; ++i) {
                const int64_t row = is_narrow ? memory.row_of_token[i] : i;
                rotate_and_write<T>(model, call, memory, index, i, row);
                if (is_narrow && row >= 0)
                    __builtin_memcpy(memory.last_residual + row * model.hidden, residual + i * model.hidden,
                                     model.hidden * sizeof(float));
            }
        AttentionCall here = attention;
        here.keys = call.keys[index];
        here.values = call.values[index];
        here.window = layer.window;
        if (is_narrow) {
            here.query_starts = memory.last_starts;
            here.num_tokens = num_rows = call.num_rows;
            residual = memory.last_residual;
        }
        const Plan& plan = *memory.plans[index];
        for (int64_t i; member.next(plan.pieces.size(), i);) {
            const Piece& piece = plan.pieces[i];
            attend<T>(here, piece, plan.after(i, threads), thread.attention,
                      piece.partial < 0 ? nullptr : memory.partials + piece.partial);
        }
        if (!plan.splits.empty()) {
            for (int64_t i; member.next(plan.splits.size(), i);)
                merge<T>(here, plan.splits[i], memory.partials + plan.splits[i].first_partial);
        }
        product<T>(thread, layer.out, StoredRows<T>{(const T*)memory.mixed, mixed_width}, num_rows, threads,
                   AddSums{residual, model.hidden, layer.out.bias});
        product<T>(thread, layer.gate_up,
                   NormalisedRows{residual, layer.mlp_norm, model.hidden, model.eps, nullptr}, num_rows, threads,
                   GateSums<T>{(T*)memory.gated, model.intermediate, layer.gate_up.bias});
        product<T>(thread, layer.down, StoredRows<T>{(const T*)memory.gated, model.intermediate}, num_rows, threads,
                   AddSums{residual, model.hidden, layer.down.bias});
    }
    const int64_t* const picked = memory.row_of_token ? nullptr : call.logits_rows;
    product<T>(thread, model.head, NormalisedRows{residual, model.final_norm, model.hidden, model.eps, picked},
               call.num_rows, threads, StoreSums<float, float>{call.logits, model.vocab_size, model.head.bias});
    if (!call.draws) return;
    for (int64_t row; member.next(call.num_rows, row);)
        call.tokens[row] = draw_token(call.logits + row * model.vocab_size, model.vocab_size, call.draws[row],
                                      call.rules ? call.rules + row : nullptr, draw_memory(model.vocab_size),
                                      call.best[row]);
}
