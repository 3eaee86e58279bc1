// Threads that walk through the same phases together. Within a phase pieces are claimed, not assigned, and the phase is
// over when its pieces are done, not when every thread has come by: a thread that the system has put aside holds up no
// more than the piece it has in hand. Waiting first spins, because the next phase is mostly microseconds away, then
// sleeps, because another process may need the core.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>

#include "library.h"

struct alignas(64) PhaseState {
    std::atomic<int32_t> claimed{0};
    alignas(64) std::atomic<int32_t> done{0};
};

class Team {
   public:
    // Memory for the phases of one call; kept and used again by the next.
    PhaseState* begin(int64_t num_phases) {
        if (num_phases > capacity_) {
            states_ = std::make_unique<PhaseState[]>(num_phases);
            capacity_ = num_phases;
        }
        for (int64_t i = 0; i < num_phases; ++i) {
            states_[i].claimed.store(0, std::memory_order_relaxed);
            states_[i].done.store(0, std::memory_order_relaxed);
        }
        return states_.get();
    }

   private:
    std::unique_ptr<PhaseState[]> states_;
    int64_t capacity_ = 0;
};

// One thread's way through the phases.
class Member {
   public:
    explicit Member(PhaseState* first) : state_(first) {}

    // Claims a piece of the `num_pieces` of this phase. False when all are done, by whomever: then the next call
    // belongs to the next phase.
    bool next(int64_t num_pieces, int64_t& piece) {
        piece = state_->claimed.fetch_add(1, std::memory_order_relaxed);
        if (piece < num_pieces) {
            ++num_mine_;
            return true;
        }
        finish((int32_t)num_pieces);
        return false;
    }

   private:
    static constexpr int SPINS = 2000;

    void finish(int32_t num_pieces) {
        std::atomic<int32_t>& done = state_->done;
        int32_t now = done.load(std::memory_order_acquire);
        if (num_mine_) {
            now = done.fetch_add(num_mine_, std::memory_order_acq_rel) + num_mine_;
            if (now == num_pieces) done.notify_all();
        }
        for (int spin = 0; now < num_pieces && spin < SPINS; ++spin) {
            relax();
            now = done.load(std::memory_order_acquire);
        }
        while (now < num_pieces) {
            done.wait(now, std::memory_order_acquire);
            now = done.load(std::memory_order_acquire);
        }
        num_mine_ = 0;
        ++state_;
    }

    static void relax() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    PhaseState* state_;
    int32_t num_mine_ = 0;
};
