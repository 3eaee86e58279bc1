// Writing keys and values into their pages on the CPU: plain copies, shared out over threads only when they are many.

#include "library.h"

#include <cstring>

// Field for field the structure in cpu.py. Strides count elements.
struct WriteCall {
    const void* source[2];  // keys [T, G, D], values [T, G, E]
    int64_t source_token_stride[2], source_head_stride[2];
    void* cache[2];  // [N, G, S, D], [N, G, S, E]
    int64_t block_stride[2], head_stride[2], slot_stride[2];
    int64_t dim[2];
    const int64_t* slots;  // [T]
    int64_t num_tokens, num_kv_heads, block_size, num_blocks;
    int32_t element_bytes, num_threads;
};

namespace {

constexpr int64_t BYTES_PER_THREAD = 1 << 16;

void write_token(const WriteCall& call, int64_t token) {
    const int64_t slot = call.slots[token];
    if (slot < 0) return;
    const int64_t block = slot / call.block_size, offset = slot % call.block_size, bytes = call.element_bytes;
    for (int side = 0; side < 2; ++side) {
        const char* from = (const char*)call.source[side] + token * call.source_token_stride[side] * bytes;
        char* to = (char*)call.cache[side] +
                   (block * call.block_stride[side] + offset * call.slot_stride[side]) * bytes;
        for (int64_t head = 0; head < call.num_kv_heads; ++head)
            std::memcpy(to + head * call.head_stride[side] * bytes,
                        from + head * call.source_head_stride[side] * bytes, call.dim[side] * bytes);
    }
}

}  // namespace

// Returns 1, with nothing written, when a slot lies behind the last page.
DUOPOOL_EXPORT int32_t duopool_write_kv(const WriteCall* call) {
    for (int64_t token = 0; token < call->num_tokens; ++token)
        if (call->slots[token] >= call->num_blocks * call->block_size) return 1;
    const int64_t bytes = call->num_tokens * call->num_kv_heads * (call->dim[0] + call->dim[1]) * call->element_bytes;
    const bool alone = bytes < 2 * BYTES_PER_THREAD;
#pragma omp parallel for schedule(static) num_threads(alone ? 1 : call->num_threads)
    for (int64_t token = 0; token < call->num_tokens; ++token) write_token(*call, token);
    return 0;
}
