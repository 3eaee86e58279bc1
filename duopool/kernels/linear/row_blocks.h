// How a product of many rows with many panels is cut into pieces: blocks of rows, and within each some units of panels.

#pragma once

#include <algorithm>
#include <cstdint>

constexpr int64_t MOST_ROWS_OF_BLOCK = 96;

struct RowBlocks {
    struct Piece {
        int64_t row, num_rows, first_unit, last_unit;
    };

    int64_t rows, rows_per_block, num_blocks, num_units, pieces_per_block;

    // A block's activations stay in the second-level cache while the panels pass by; there are enough pieces that a
    // late thread loses little, each long enough for the memory to stream.
    RowBlocks(int64_t rows, int64_t bytes_per_row, int64_t num_units, int64_t num_threads)
        : rows(rows), num_units(num_units) {
        const int64_t fitting = std::clamp<int64_t>((256 << 10) / bytes_per_row, 24, MOST_ROWS_OF_BLOCK);
        num_blocks = (rows + fitting - 1) / fitting;
        rows_per_block = num_blocks ? (rows + num_blocks - 1) / num_blocks : 0;
        pieces_per_block = num_blocks ? std::clamp<int64_t>(8 * num_threads / num_blocks, 1, num_units) : 0;
    }

    int64_t num_pieces() const { return num_blocks * pieces_per_block; }

    Piece piece(int64_t item) const {
        const int64_t row = item / pieces_per_block * rows_per_block, part = item % pieces_per_block;
        return {row, std::max<int64_t>(0, std::min(rows_per_block, rows - row)), part * num_units / pieces_per_block,
                (part + 1) * num_units / pieces_per_block};
    }
};
