// How one token is drawn, and a thread's memory to draw it in. Owns no arithmetic.

#pragma once

#include <cstdint>
#include <vector>

// Field for field as draw.py has it.
struct Draw {
    double temperature, top_p, min_p;
    int64_t top_k, seed, position;
};

// Room for a row of logits several times over; kept by the thread, and used again for its next row.
struct DrawMemory {
    float *scaled, *values, *weights, *some;
    int32_t* indices;
    int64_t* named;
};

inline DrawMemory draw_memory(int64_t vocab_size) {
    static thread_local std::vector<float> floats;
    static thread_local std::vector<int32_t> indices;
    static thread_local std::vector<int64_t> named;
    const int64_t room = vocab_size + 64;
    if ((int64_t)indices.size() < room) {
        floats.resize(4 * room);
        indices.resize(room);
        named.resize(room);
    }
    float* const first = floats.data();
    return {first, first + room, first + 2 * room, first + 3 * room, indices.data(), named.data()};
}
