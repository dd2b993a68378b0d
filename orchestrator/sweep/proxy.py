"""What Ray Tune holds in a trial's place: an actor that waits for reports of a trial which trains elsewhere."""

from __future__ import annotations

import queue
from typing import Any

from ray.tune import Trainable

TRIAL = "trial"
"""The key of a trial's number in what Tune calls its config."""


class TrialProxy(Trainable):
    """Takes no processor and no memory to speak of, and is given to the next trial when its own has ended. It needs two
    threads: `tell` while `step` waits."""

    def setup(self, config: dict[str, Any]) -> None:
        """Waits for the reports of another trial."""
        self._number = config[TRIAL]
        self._reports: queue.SimpleQueue[tuple[int, dict[str, Any]]] = queue.SimpleQueue()

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Becomes the proxy of another trial."""
        self._number = new_config[TRIAL]
        return True

    def tell(self, number: int, report: dict[str, Any]) -> None:
        """A report of a trial, from the driver."""
        self._reports.put((number, report))

    def step(self) -> dict[str, Any]:
        """The trial's next report; those of the trial before that came too late are passed over."""
        while True:
            number, report = self._reports.get()
            if number == self._number:
                return report

    def save_checkpoint(self, checkpoint_dir: str) -> dict[str, Any]:
        """Nothing: a trial's checkpoints are in its folder."""
        return {}

    def load_checkpoint(self, checkpoint: dict[str, Any] | None) -> None:
        """Nothing, likewise."""
