"""Guards of the protocol, in which system their absence shows, and how.

With one request in the system all that others can do is taken as done: blocks that it does not hold are overwritten.
What two requests do to each other shows with two: blocks stay what they are until one takes what the other gave back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from model_pair import whole_pair
from model_search import Result, search
from model_setting import Guards, Setting
from model_world import World


@dataclass(frozen=True, slots=True)
class Absence:
    """Guards that are taken away together."""

    names: str
    setting: Setting
    wrong: str
    """Part of what the search then says."""
    num_requests: int = 1

    @property
    def setting_without(self) -> Setting:
        return replace(self.setting, guards=without(self.names))

    def search(self) -> Result:
        """Look for a counterexample."""
        setting = self.setting_without
        return search(World(setting) if self.num_requests == 1 else whole_pair(setting))


def without(names: str) -> Guards:
    return Guards(**dict.fromkeys(names.split(), False))


_TWO = Setting(num_prefill=1, num_decode=1, num_faults=0, room=1, pages_stay=True)

ABSENCES = (
    Absence("attempt_fence", Setting(faults=frozenset({"busy"}), cancels=False), "joins on blocks that hold other"),
    Absence("index_fence", Setting(faults=frozenset({"double"}), cancels=False), "is shown token 1 as token 2"),
    Absence("end_is_final", Setting(num_faults=0), "is shown a token after the end"),
    Absence("validate_after_read", Setting(num_faults=0), "joins on blocks that hold other"),
    Absence("lease_ttl", Setting(faults=frozenset({"break"})), "never given back at P0"),
    Absence("lease_fence", Setting(faults=frozenset({"busy", "break"}), cancels=False), "gives attempt 1 the blocks"),
    Absence("tombstones", Setting(faults=frozenset({"double"})), "D0 never forgets the request"),
    Absence("quarantine", Setting(num_faults=0), "writes into blocks that D0 has given back"),
    Absence(
        "reader_count", Setting(faults=frozenset({"ttl"}), one_sided=False), "serves blocks that it has given away"
    ),
    Absence("incarnation_check", Setting(faults=frozenset({"crash"})), "joins on blocks that hold other"),
    Absence("orphan_ttl", Setting(faults=frozenset({"break"})), "never given back at P0"),
    Absence("digest", Setting(faults=frozenset({"read"}), cancels=False), "joins on blocks that hold other"),
    Absence("lease_pins generation_check", Setting(num_faults=0), "joins on blocks that hold other"),
    # Only two requests show these.
    Absence("listed_first", replace(_TWO, cancels=False), "A: the request hangs", 2),
    Absence("validate_after_read", _TWO, "A: D0 joins on blocks that hold other", 2),
    Absence("lease_pins generation_check", _TWO, "joins on blocks that hold other", 2),
)
