// The largest of a row and where it stands first, for one instruction set.

// `best` becomes the row's largest value, or NaN if it has one; returns the first index of the largest.
DUOPOOL_TARGET static int64_t row_best(const float* row, int64_t size, float& best) {
    Floats most = fill(-INFINITY);
    Ints place = {}, is_nan = {}, lanes;
    for (int lane = 0; lane < WIDTH; ++lane) lanes[lane] = lane;
    for (int64_t start = 0; start < size; start += WIDTH) {
        Floats value = load_line(row + start, size - start);
        if (size - start < WIDTH) value = lanes < (int32_t)(size - start) ? value : fill(-INFINITY);
        place = value > most ? lanes + (int32_t)start : place;
        most = value > most ? value : most;
        is_nan |= value != value;
    }
    best = -INFINITY;
    int64_t first = 0;
    for (int lane = 0; lane < WIDTH; ++lane) {
        if (most[lane] > best || (most[lane] == best && place[lane] < first)) {
            best = most[lane];
            first = place[lane];
        }
    }
    for (int lane = 0; lane < WIDTH; ++lane)
        if (is_nan[lane]) best = NAN;
    return first;
}
