// How one token is drawn, and a thread's memory to draw it in. Owns no arithmetic.

#pragma once

#include <cstdint>
#include <vector>

// Field for field as draw.py has it.
struct Draw {
    double temperature, top_p, min_p;
    int64_t top_k, seed, position;
};

// What changes a row's logits before its token is drawn; rules.py says how.
struct Rules {
    const int64_t *forbidden, *bias_tokens, *seen, *output;
    const float* bias;
    const uint8_t* allowed;  // [V], or null: all
    int64_t num_forbidden, num_bias, num_seen, num_output;
    double repetition_penalty, presence_penalty, frequency_penalty;

    bool change_anything() const {
        return num_forbidden || num_bias || repetition_penalty != 1 || num_output || allowed;
    }
};

// Room for a row of logits several times over; kept by the thread, and used again for its next row.
struct DrawMemory {
    float *scaled, *values, *weights, *some, *ruled;
    int32_t *indices, *counts;  // the counts are 0 between draws
    int64_t* named;
};

inline DrawMemory draw_memory(int64_t vocab_size) {
    static thread_local std::vector<float> floats;
    static thread_local std::vector<int32_t> indices, counts;
    static thread_local std::vector<int64_t> named;
    const int64_t room = vocab_size + 64;
    if ((int64_t)indices.size() < room) {
        floats.resize(5 * room);
        indices.resize(room);
        counts.resize(room);
        named.resize(room);
    }
    float* const first = floats.data();
    return {first, first + room, first + 2 * room, first + 3 * room, first + 4 * room, indices.data(), counts.data(),
            named.data()};
}
