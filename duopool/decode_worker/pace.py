"""How long a decode worker rests between two steps: a pure decision, for pools that share cores.

A step of few rows costs nearly as much as one of several, because either reads every weight. While most requests of a
burst are still being prefilled, steps for the first of them take the cores from the prompts of all others, and every
one of them ends later. So the worker rests the longer, the more requests are to join those that decode. A single one
is what a steady load looks like, and nobody waits for it.
"""

LONGEST_REST_S = 0.08
"""What a burst may add to the time between two tokens."""
RESTS_PER_STEP = 2.0
"""Steps' worth of rest while as many are to come as decode, not counting one. docs/benchmarks.md has other values."""


def rest_s(*, step_s: float, num_running: int, num_coming: int) -> float:
    """Seconds between the end of a step of `step_s` seconds with `num_running` requests and the next step's start."""
    if not num_running:
        return 0.0
    return min(LONGEST_REST_S, RESTS_PER_STEP * step_s * max(0, num_coming - 1) / num_running)
