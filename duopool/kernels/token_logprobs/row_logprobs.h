// How likely one token of a row of logits is, and which tokens are the likeliest, for one instruction set.

#include "row_best.h"

// The `count` largest values so far, largest first; of equals the first in the row comes first.
struct Likeliest {
    float* values;
    int64_t* tokens;
    int64_t room, count;

    // What a value must exceed to be taken in.
    float mark() const { return values[room - 1]; }

    DUOPOOL_TARGET void offer(float value, int64_t token) {
        if (count == room && !(value > mark())) return;
        int64_t place = count < room ? count++ : room - 1;
        for (; place > 0 && value > values[place - 1]; --place) {
            values[place] = values[place - 1];
            tokens[place] = tokens[place - 1];
        }
        values[place] = value;
        tokens[place] = token;
    }
};

// The row's `num_top` <= size largest logits and their tokens.
DUOPOOL_TARGET static void find_likeliest(const float* row, int64_t size, int64_t num_top, float* values, int64_t* tokens) {
    if (!num_top) return;
    Likeliest top = {values, tokens, num_top, 0};
    int64_t i = 0;
    for (; i < num_top; ++i) top.offer(row[i], i);
    for (; i + WIDTH <= size; i += WIDTH) {
        if (!(largest(load(row + i)) > top.mark())) continue;
        for (int64_t j = i; j < i + WIDTH; ++j) top.offer(row[j], j);
    }
    for (; i < size; ++i) top.offer(row[i], i);
}

// Log of the sum of e^logit.
DUOPOOL_TARGET static double log_sum(const float* row, int64_t size) {
    float best;
    row_best(row, size, best);
    constexpr int64_t STRETCH = 16 * WIDTH;  // summed in float32, then added in double
    double mass = 0;
    for (int64_t start = 0; start < size; start += STRETCH) {
        const int64_t end = size - start < STRETCH ? size : start + STRETCH;
        Floats sums = {};
        int64_t i = start;
        for (; i + WIDTH <= end; i += WIDTH) sums += exponential(load(row + i) - best);
        mass += sum(sums);
        for (; i < end; ++i) mass += exponential(fill(row[i] - best))[0];
    }
    return best + std::log(mass);
}

// How many logits of the row are larger than this.
DUOPOOL_TARGET static int64_t num_above(const float* row, int64_t size, float value) {
    Ints counts = {};
    int64_t i = 0;
    for (; i + WIDTH <= size; i += WIDTH) counts -= load(row + i) > value;
    int64_t above = 0;
    for (int lane = 0; lane < WIDTH; ++lane) above += counts[lane];
    for (; i < size; ++i) above += row[i] > value;
    return above;
}

// `token`'s log-probability and rank (1: the likeliest), and the `num_top` likeliest tokens with theirs.
DUOPOOL_TARGET static void row_logprobs(const float* row, int64_t size, int64_t token, int64_t num_top, float& logprob,
                                        int64_t& rank, int64_t* top_tokens, float* top_logprobs) {
    const double total = log_sum(row, size);
    logprob = (float)(row[token] - total);
    rank = 1 + num_above(row, size, row[token]);
    find_likeliest(row, size, num_top, top_logprobs, top_tokens);
    for (int64_t i = 0; i < num_top; ++i) top_logprobs[i] = (float)(top_logprobs[i] - total);
}
