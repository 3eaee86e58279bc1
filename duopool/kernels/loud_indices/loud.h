// The noise of sampling (engine/sampling_noise.py) as far as it decides who may win: its hash, for one instruction set.

// MurmurHash3's 32-bit finaliser.
DUOPOOL_INLINE Words mixed_bits(Words x) {
    x = (x ^ (x >> 16)) * 0x85ebca6bu;
    x = (x ^ (x >> 13)) * 0xc2b2ae35u;
    return x ^ (x >> 16);
}

DUOPOOL_INLINE Words noise_bits(Words indices, uint32_t first_key, uint32_t second_key) {
    return mixed_bits(mixed_bits(indices * 0x9e3779b1u + first_key) ^ second_key) >> 1;
}

DUOPOOL_INLINE uint32_t smallest(Words value) {
#pragma GCC unroll 4
    for (int half = WIDTH / 2; half > 0; half /= 2) {
        const Words other = (Words)swapped((Floats)value, half);
        value = value < other ? value : other;
    }
    return value[0];
}

// Indices below `size` whose 31 bits of noise are below `limit`: few bits are loud noise. Returns how many there are; those
// beyond `capacity` are not written.
DUOPOOL_TARGET static int64_t loud_indices(uint32_t first_key, uint32_t second_key, int64_t size, uint32_t limit,
                                           int64_t capacity, int64_t* indices) {
    Words lanes;
    for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] = lane;
    int64_t count = 0;
    for (int64_t start = 0; start < size; start += 4 * WIDTH) {
        Words bits[4], least = ~Words{};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            bits[i] = noise_bits(lanes + (uint32_t)(start + i * WIDTH), first_key, second_key);
            least = least < bits[i] ? least : bits[i];
        }
        if (smallest(least) >= limit) continue;
        for (int i = 0; i < 4; ++i)
            for (int lane = 0; lane < WIDTH; ++lane) {
                const int64_t index = start + i * WIDTH + lane;
                if (bits[i][lane] >= limit || index >= size) continue;
                if (count < capacity) indices[count] = index;
                ++count;
            }
    }
    return count;
}
