"""One figure that the library is held to, and what was measured of it."""

from __future__ import annotations

from dataclasses import dataclass

from bench.measure import WrongResult

AT_LEAST, AT_MOST = ">=", "<="


@dataclass(frozen=True)
class Target:
    """Measured is None where this machine or build cannot measure it; `detail` then says why."""

    name: str
    quantity: str
    relation: str
    goal: float
    measured: float | None
    detail: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        met = self.measured >= self.goal if self.relation == AT_LEAST else self.measured <= self.goal
        return "met" if met else "MISSED"


def wrong_target(name: str, wrong: WrongResult) -> Target:
    """Wrong numbers are not timed: whatever the goal was, it is missed."""
    return Target(name, "right numbers", AT_LEAST, 1, 0, str(wrong))
