// One row's candidates for one instruction set: see every_isa.h for how it is compiled, cpu_top_candidates.cpp for the
// threads and the C face.
//
// Only values near the top matter, so they are gathered first and everything else looks at those alone. Where that was
// too narrow (a flat row, or a large k) more is gathered, and in the end the whole row.

constexpr float FIRST_CUT = -12.0f;  // e^-12 of the best one's probability
constexpr float LAST_CUT = -3e38f;   // everything but what is ruled out by -inf
constexpr int BUCKETS = 512;

// Memory for the values of one row.
struct RowMemory {
    float* values;
    int32_t* indices;
    float* weights;  // e^value
    float* some;     // values that are put in order
};

// Gathers values >= cut in the order of their indices; returns how many. `mass` is the sum of e^value of all values >= floor.
DUOPOOL_TARGET static int64_t gather(const float* row, int64_t size, float cut, float floor, const RowMemory& memory,
                                     double& mass) {
    int64_t count = 0;
    mass = 0;
    constexpr int64_t STRETCH = 4 * WIDTH;  // summed in float32, then added in double
    for (int64_t start = 0; start < size; start += STRETCH) {
        const int64_t end = size - start < STRETCH ? size : start + STRETCH;
        Floats sums = {}, most = fill(-INFINITY);
        int64_t i = start;
        for (; i + WIDTH <= end; i += WIDTH) {
            const Floats value = load(row + i);
            sums += value >= floor ? exponential(value) : Floats{};
            most = larger(most, value);
        }
        float rest = 0, most_of_rest = -INFINITY;
        for (int64_t j = i; j < end; ++j) {
            if (row[j] >= floor) rest += exponential(fill(row[j]))[0];
            most_of_rest = row[j] > most_of_rest ? row[j] : most_of_rest;
        }
        mass += (double)sum(sums) + (double)rest;
        if (largest(most) < cut && most_of_rest < cut) continue;
        for (int64_t j = start; j < end; ++j) {
            memory.values[count] = row[j];
            memory.indices[count] = (int32_t)j;
            count += row[j] >= cut;
        }
    }
    return count;
}

// Keeps the gathered values >= bound; returns how many.
DUOPOOL_TARGET static int64_t keep(int64_t count, float bound, const RowMemory& memory) {
    int64_t kept = 0;
    for (int64_t i = 0; i < count; ++i) {
        memory.values[kept] = memory.values[i];
        memory.indices[kept] = memory.indices[i];
        kept += memory.values[i] >= bound;
    }
    return kept;
}

// Fills `weights` and returns their sum.
DUOPOOL_TARGET static double weigh(int64_t count, const RowMemory& memory) {
    double mass = 0;
    for (int64_t i = 0; i < count; i += WIDTH) {
        store(memory.weights + i, exponential(load(memory.values + i)));  // the memory is longer than a row by a vector
        for (int64_t j = i; j < i + WIDTH && j < count; ++j) mass += memory.weights[j];
    }
    return mass;
}

// The last of the gathered values, in falling order, before which less than `wanted` of the mass has been passed.
DUOPOOL_TARGET static float nucleus_bound(int64_t count, double wanted, const RowMemory& memory) {
    double masses[BUCKETS] = {};
    float lowest = 0;
    for (int64_t i = 0; i < count; ++i) lowest = memory.values[i] < lowest ? memory.values[i] : lowest;
    const float per_value = lowest < 0 ? (BUCKETS - 1) / lowest : 0;
    for (int64_t i = 0; i < count; ++i) masses[(int)(memory.values[i] * per_value)] += memory.weights[i];
    double before = 0;
    int bucket = 0;
    while (bucket < BUCKETS - 1 && before + masses[bucket] < wanted) before += masses[bucket++];
    int64_t num_some = 0;
    for (int64_t i = 0; i < count; ++i)
        if ((int)(memory.values[i] * per_value) == bucket) memory.some[num_some++] = memory.values[i];
    // Rounding may leave the last buckets empty: then everything is in the nucleus.
    if (!num_some) return lowest;
    std::sort(memory.some, memory.some + num_some, std::greater<float>());
    float bound = memory.some[0];
    for (int64_t i = 0; i < num_some && before < wanted; ++i) {
        bound = memory.some[i];
        before += (double)exponential(fill(bound))[0];
    }
    return bound;
}

// The row's candidates into memory.values and memory.indices; returns how many, and the lowest value among them in `bound`.
DUOPOOL_TARGET static int64_t candidates(const float* row, int64_t size, float floor, int64_t top_k, double top_p,
                                         const RowMemory& memory, float& bound) {
    if (floor < LAST_CUT) floor = LAST_CUT;
    for (float cut = FIRST_CUT;; cut = cut > 4 * FIRST_CUT ? 2 * cut : LAST_CUT) {
        const bool is_all = cut <= floor;
        double mass;
        int64_t count = gather(row, size, is_all ? floor : cut, floor, memory, mass);
        bound = floor;
        if (top_k < size) {
            if (count < top_k && !is_all) continue;
            if (count >= top_k) {
                for (int64_t i = 0; i < count; ++i) memory.some[i] = memory.values[i];
                std::nth_element(memory.some, memory.some + top_k - 1, memory.some + count, std::greater<float>());
                bound = memory.some[top_k - 1];
                count = keep(count, bound, memory);
            }
        }
        if (top_p >= 1) {
            if (is_all || top_k < size) return count;
            continue;
        }
        const double gathered = weigh(count, memory);
        const bool is_whole = is_all || top_k < size;
        const double wanted = top_p * (is_whole ? gathered : mass);
        if (gathered < wanted) continue;
        const float last = nucleus_bound(count, wanted, memory);
        bound = last > bound ? last : bound;
        return keep(count, bound, memory);
    }
}
