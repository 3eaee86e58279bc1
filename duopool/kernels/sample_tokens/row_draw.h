// One row's token for one instruction set. Looks at few tokens of the row: those that top-k, top-p and min-p keep, or, where
// they keep nearly everything, those whose noise could still carry them past a mark that some tokens set.

#include "row_best.h"
#include "contenders/row_contenders.h"
#include "sample_tokens/row_rules.h"
#include "top_candidates/row_candidates.h"

constexpr double GREEDY_BELOW = 1e-5;
constexpr int64_t MOST_LISTED = 4096;  // rows that keep more are drawn over the whole vocabulary
constexpr int64_t NUM_PROBES = 512;    // tokens that set the mark, besides the likeliest one
constexpr float ROUNDING = 1e-3f;      // more than float32 can be off by in a score with noise

// Standard Gumbel noise as noise.py defines it, for one seed and position.
class Noise {
   public:
    Noise(uint64_t seed, uint64_t position) {
        const uint64_t key = split_mix(split_mix(seed) ^ position);
        first_key = (uint32_t)key;
        second_key = (uint32_t)(key >> 32);
    }

    DUOPOOL_TARGET float operator()(int64_t index) const {
        const double uniform = (noise_bits((uint32_t)index, first_key, second_key) + 0.5) / 2147483648.0;
        return (float)-std::log(-std::log1p(-uniform));
    }

    uint32_t first_key, second_key;

   private:
    static uint64_t split_mix(uint64_t x) {
        x += 0x9e3779b97f4a7c15u;
        x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
        x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
        return x ^ (x >> 31);
    }
};

// out = (logits - best) / temperature. Where rules made the best infinite, what is as good as it stands at 0 too.
DUOPOOL_TARGET static void scale(const float* logits, int64_t size, float best, float temperature, float* out) {
    for (int64_t i = 0; i < size; i += WIDTH) {
        const Floats scaled = (load_line(logits + i, size - i) - best) / temperature;
        store_line(out + i, scaled == scaled ? scaled : Floats{}, size - i);
    }
}

// The token with the largest score plus noise among `count` tokens, the first of equals. `places` names them in rising order.
template <class Place>
DUOPOOL_TARGET static int64_t loudest(const float* scores, const Place* places, int64_t count, const Noise& noise) {
    float most = -INFINITY;
    int64_t winner = places[0];
    for (int64_t i = 0; i < count; ++i) {
        const float heard = scores[i] + noise(places[i]);
        if (heard > most) {
            most = heard;
            winner = places[i];
        }
    }
    return winner;
}

// The same among all tokens of a row above -inf.
DUOPOOL_TARGET static int64_t loudest_of_all(const float* scaled, int64_t size, int64_t likeliest, const Noise& noise,
                                             int64_t* named, float* scores) {
    float mark = scaled[likeliest] + noise(likeliest);
    for (int64_t i = 0, step = (size + NUM_PROBES - 1) / NUM_PROBES; i < size; i += step)
        if (scaled[i] > -INFINITY) mark = std::max(mark, scaled[i] + noise(i));
    const int64_t count =
        contenders(scaled, size, noise.first_key, noise.second_key, mark - ROUNDING, size, named);
    for (int64_t i = 0; i < count; ++i) scores[i] = scaled[named[i]];
    return count ? loudest(scores, named, count, noise) : likeliest;
}

// The row's token by its logits alone; the largest of them, or NaN, into `best`.
DUOPOOL_TARGET static int64_t draw_plainly(const float* logits, int64_t size, const Draw& how, const DrawMemory& memory,
                                           float& best) {
    const int64_t likeliest = row_best(logits, size, best);
    if (how.temperature < GREEDY_BELOW || best != best) return likeliest;
    const RowMemory row = {memory.values, memory.indices, memory.weights, memory.some};
    float* const scaled = memory.scaled;
    scale(logits, size, best, (float)how.temperature, scaled);
    const Noise noise(how.seed, how.position);
    const int64_t top_k = 0 < how.top_k && how.top_k < size ? how.top_k : size;
    if (top_k < size || how.top_p < 1 || how.min_p > 0) {
        // The best score is 0, so a probability of min_p times the best stands at log(min_p).
        const float floor = how.min_p > 0 ? (float)(std::log(how.min_p) - 1e-6) : -INFINITY;
        float bound;
        const int64_t count = candidates(scaled, size, floor, top_k, how.top_p, row, bound);
        if (count <= MOST_LISTED) return loudest(row.values, row.indices, count, noise);
        for (int64_t i = 0; i < size; ++i) scaled[i] = scaled[i] < bound ? -INFINITY : scaled[i];
    }
    return loudest_of_all(scaled, size, likeliest, noise, memory.named, row.values);
}

// The row's token; the largest logit that the model gave, or NaN, into `best`. Rules see a copy of the row.
DUOPOOL_TARGET static int64_t draw_token(const float* logits, int64_t size, const Draw& how, const Rules* rules,
                                         const DrawMemory& memory, float& best) {
    if (!rules || !rules->change_anything()) return draw_plainly(logits, size, how, memory, best);
    const int64_t likeliest = row_best(logits, size, best);
    if (!std::isfinite(best)) return likeliest;
    std::copy(logits, logits + size, memory.ruled);
    apply_rules(memory.ruled, size, *rules, memory.counts);
    float ruled_best;
    return draw_plainly(memory.ruled, size, how, memory, ruled_best);
}
