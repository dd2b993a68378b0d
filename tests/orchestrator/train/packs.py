"""Runs in a pack in this process, and the same runs alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from orchestrator.runner import TrainRequest
from orchestrator.train.group import Group
from orchestrator.train.packing import Packing
from orchestrator.train.worker.ground import Ground
from orchestrator.train.worker.pack import Pack
from orchestrator.train.worker.run import train


@dataclass
class Heard:
    """Keeps the events of one run; asks it to leave after `stop_after` steps."""

    stop_after: int | None = None
    saves: bool = True
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def stop_requested(self) -> bool:
        return self.stop_after is not None and len(self.of("progress")) >= self.stop_after

    def emit(self, kind: str, /, **fields: Any) -> None:
        self.events.append({"event": kind, **fields})

    def of(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.events if event["event"] == kind]

    @property
    def steps(self) -> list[tuple[int, float, float]]:
        return [(each["step"], each["loss"], each["grad_norm"]) for each in self.of("progress")]


def packed(
    requests: Mapping[str, TrainRequest],
    way: Any = "turns",
    tell: Any = None,
    most_joined: int | None = None,
) -> dict[str, Heard]:
    """Runs all of them to their ends on one base; what was heard of each."""
    first = next(iter(requests.values()))
    ground = Ground(first, Group(), "fp32", lambda kind, **fields: None)
    pack = Pack(ground, Packing(way, joined=most_joined), tell or (lambda kind, **fields: None))
    heard = {name: Heard() for name in requests}
    for name, request in requests.items():
        pack.enter(name, request, heard[name])
    while pack.trials:
        pack.round()
    return heard


def alone(request: TrainRequest) -> Heard:
    """The run as `run.train` does it."""
    heard = Heard()
    end = train(request, reporter=heard)
    heard.emit("finished", end=end.__dict__)
    return heard


def tensors_of(heard: Heard) -> dict[str, torch.Tensor]:
    """The final adapter."""
    assert heard.of("finished"), [each for each in heard.events if each["event"] != "progress"]
    return load_file(Path(heard.of("finished")[0]["end"]["adapter_dir"]) / "adapter_model.safetensors")


def apart(one: Heard, other: Heard) -> float:
    """The largest difference of two final adapters, relative to the largest entry of each tensor, or to 0.01, as far as
    ten steps of AdamW move a number: it makes as much of the last bits of a gradient near zero as of a large one."""
    a, b = tensors_of(one), tensors_of(other)
    assert a.keys() == b.keys()
    return max(float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=0.01)) for n in a if a[n].numel())
