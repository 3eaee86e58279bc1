// The noise of sampling (sample_tokens/noise.py) as far as it decides who may win: its hash, for one instruction set.

// MurmurHash3's 32-bit finaliser, of one word or of a vector of them.
template <class Bits>
DUOPOOL_INLINE Bits mixed_bits(Bits x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

template <class Bits>
DUOPOOL_INLINE Bits noise_bits(Bits indices, uint32_t first_key, uint32_t second_key) {
    return mixed_bits(mixed_bits(indices * 0x9e3779b1u + first_key) ^ second_key) >> 1;
}

// Indices below `size` whose score plus noise may be above `mark`; returns how many there are. Those beyond `capacity` are
// not written.
//
// With u the hashed bits as a number in (0, 1), the noise is -log(-log(1 - u)), which is at most -log(u): so whoever is above
// the mark has u < e^(score - mark).
DUOPOOL_TARGET static int64_t contenders(const float* scores, int64_t size, uint32_t first_key, uint32_t second_key,
                                         float mark, int64_t capacity, int64_t* indices) {
    constexpr float ALL_BITS = 2147483648.0f;
    Words lanes;
    for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] = lane;
    int64_t count = 0;
    for (int64_t start = 0; start < size; start += 2 * WIDTH) {
        Floats lead[2], most = fill(-ALL_BITS);
#pragma GCC unroll 2
        for (int i = 0; i < 2; ++i) {
            const int64_t first = start + i * WIDTH;
            const Floats score = first < size ? load_line(scores + first, size - first) : Floats{};
            const Floats bound = exponential(-larger(mark - score, Floats{})) * ALL_BITS;
            const Ints bits = (Ints)noise_bits(lanes + (uint32_t)first, first_key, second_key);
            lead[i] = bound - __builtin_convertvector(bits, Floats);
            most = larger(most, lead[i]);
        }
        if (largest(most) <= 0) continue;
        for (int i = 0; i < 2; ++i)
            for (int lane = 0; lane < WIDTH; ++lane) {
                const int64_t index = start + i * WIDTH + lane;
                if (!(lead[i][lane] > 0) || index >= size) continue;
                if (count < capacity) indices[count] = index;
                ++count;
            }
    }
    return count;
}
