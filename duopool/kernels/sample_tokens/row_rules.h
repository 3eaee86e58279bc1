// One row's logits as its rules have them, for one instruction set.

// Changes the row in place. `counts` holds a 0 for each token, before and after.
DUOPOOL_TARGET static void apply_rules(float* row, int64_t size, const Rules& rules, int32_t* counts) {
    const auto is_known = [size](int64_t token) { return 0 <= token && token < size; };
    for (int64_t i = 0; i < rules.num_forbidden; ++i)
        if (is_known(rules.forbidden[i])) row[rules.forbidden[i]] = -INFINITY;
    for (int64_t i = 0; i < rules.num_bias; ++i)
        if (is_known(rules.bias_tokens[i])) row[rules.bias_tokens[i]] += rules.bias[i];
    const float repetition = (float)rules.repetition_penalty;
    if (repetition != 1) {
        for (int64_t i = 0; i < rules.num_seen; ++i) {
            const int64_t token = rules.seen[i];
            if (!is_known(token) || counts[token]++) continue;
            row[token] = row[token] > 0 ? row[token] / repetition : row[token] * repetition;
        }
        for (int64_t i = 0; i < rules.num_seen; ++i)
            if (is_known(rules.seen[i])) counts[rules.seen[i]] = 0;
    }
    for (int64_t i = 0; i < rules.num_output; ++i)
        if (is_known(rules.output[i])) ++counts[rules.output[i]];
    for (int64_t i = 0; i < rules.num_output; ++i) {
        const int64_t token = rules.output[i];
        if (!is_known(token) || !counts[token]) continue;
        row[token] -= (float)(rules.presence_penalty + rules.frequency_penalty * counts[token]);
        counts[token] = 0;
    }
    if (!rules.allowed) return;
    bool is_any_left = false;
    for (int64_t i = 0; i < size; ++i) {
        row[i] = rules.allowed[i] ? row[i] : -INFINITY;
        is_any_left |= row[i] > -INFINITY;
    }
    for (int64_t i = 0; !is_any_left && i < size; ++i) row[i] = rules.allowed[i] ? 0 : -INFINITY;
}
