"""One step of the demo: what it does, whether it is done, and what it makes."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

Tick = Callable[[int], None]


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes:
        title: what it does.
        done: whether its outputs are whole.
        work: does it; given a function to call with the number of ticks reached.
        ticks: how many it has.
        voids: folders and files that it makes, and those made from them.
    """

    title: str
    done: Callable[[], bool]
    work: Callable[[Tick], None]
    ticks: int
    voids: tuple[Path, ...]

    def run(self, tick: Tick) -> None:
        """Remove what an earlier, unfinished run left, then do the step.

        Raises:
            InputError: it failed.
        """
        for path in self.voids:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        self.work(tick)
