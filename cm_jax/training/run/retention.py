"""Which checkpoints of a run are kept."""

import dataclasses

from cm_jax.errors import InputError, check_int


@dataclasses.dataclass(frozen=True)
class Retention:
    """Checkpoints to keep when a new one is saved, besides the new one and the best one."""

    keep_last: int = 3
    """Number of latest checkpoints."""
    keep_every: int = 0
    """All checkpoints at multiples of this number of batches. 0: none."""
    keep_hours: float = 0.0
    """One checkpoint per this number of hours. 0: none."""

    def __post_init__(self) -> None:
        check_int("keep_last", self.keep_last, 1, 10**6)
        check_int("keep_every", self.keep_every, 0, 10**12)
        if not 0 <= self.keep_hours < 10**6:
            raise InputError(f"Expected keep_hours in [0, 1e6), got {self.keep_hours}.")

    def to_remove(self, saved: dict[int, float], newest: int, best: int | None) -> list[int]:
        """Checkpoints to remove after saving `newest`, of those in `saved` {batches: time of writing in seconds}.

        Those after `newest` stay: the run was resumed from an earlier checkpoint and will replace them.
        """
        older = sorted(batches for batches in saved if batches <= newest)
        kept = {newest, best, *older[-self.keep_last :]}
        last = float("-inf")
        for batches in older:
            if self.keep_every and batches % self.keep_every == 0:
                kept.add(batches)
            if self.keep_hours and saved[batches] - last >= self.keep_hours * 3600:
                kept.add(batches)
                last = saved[batches]
        return [batches for batches in older if batches not in kept]
