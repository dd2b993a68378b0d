"""One cell of the matrix: the life of a method's adapters on one base, on this rank. On one rank it is the oracle.

Every step is one global batch: all rows by one adapter, then rows by turns, then, with another adapter that was
added meanwhile, each rank naming its own; then adapters are loaded and filled and one more step is made. What is
found is only reported here; `verdict` compares the ranks' reports with one process's.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from torch import Tensor

from peft_dist import (
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
    sharding,
)
from peft_dist.checkpoint import WEIGHTS_NAME
from peft_dist.errors import MergeError
from peft_dist.optim import AdapterOptimizer, Hyper
from peft_dist.pooled import PooledModule
from tests.distributed import one_process as run
from tests.matrix import at_rest, own_engine, storages
from tests.matrix.axes import OFFLOAD, Cell

ZERO3 = {"stage": 3, "stage3_param_persistence_threshold": 0}
# A step that moves a value by less than anything that a load puts there.
TINY = 1e-6
Report = dict[str, Any]


def live(cell: Cell, folder: str, oracle: bool = False) -> Report:
    """All that a cell asks, on this rank; saved adapters lie under `folder` afterwards. What raised is in the
    report, with the part of the life in which it did.

    Args:
        oracle: every module is in train mode, whatever the cell says.
    """
    report: Report = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Life(cell, folder, report, oracle).run()
    return report


class Life:
    """A model on its way through a cell."""

    def __init__(self, cell: Cell, folder: str, report: Report, oracle: bool) -> None:
        self.cell, self.folder, self.report = cell, f"{folder}/{cell.method}", report
        self.base, self.oracle = storages.base(cell.storage), oracle
        self.optimizer = AdapterOptimizer(stage=cell.zero_stage)  # type: ignore[arg-type]
        self.rank, self.world = run.rank_and_world()
        share = at_rest.share(self.base, self.world if cell.partitions else 1)
        report.update(losses=[], gradients={}, held=[], share=share)

    def run(self) -> None:
        for part in (self.injects, self.trains, self.mixed, self.saves, self.loads, self.merges, self.engine):
            try:
                part()
            except Exception as error:
                self.report["error"] = (part.__name__, f"{type(error).__name__}: {error}"[:300])
                return

    # The parts, in their order

    def injects(self) -> None:
        arrival = "adapters last" if self.oracle else self.cell.arrival
        if arrival == "adapters on meta":
            self.base = storages.on_meta(self.cell.storage)
        if arrival == "adapters last":
            self._partition(self.base)
        config = run.METHODS[self.cell.method]()
        torch.manual_seed(run.SEED)
        self.model = get_peft_model(self.base, config, low_cpu_mem_usage=arrival == "adapters on meta")
        if arrival == "adapters first":
            self._partition(self.model)
        if arrival == "adapters on meta":
            torch.manual_seed(run.SEED)
            storages.fill(self.model, self.cell.storage, self._deepspeed())
        self.report["start"] = {key: t.detach().clone() for key, t in self.model.adapter_tensors().items()}
        self.model.add_adapter("idle", run.METHODS[self.cell.method]())
        self.model.set_requires_grad(["default", "idle"], True)
        run.disturb(self.model)
        self.at_first = {key: p.detach().clone() for key, p in run.trained(self.model, "default").items()}
        self._leave_modes()
        for name in ("default", "idle"):
            self.optimizer.add(name, run.trained(self.model, name), run.HYPER)

    def trains(self) -> None:
        self._step(0)
        self._step(1, lambda place: "idle" if place % 2 else "default")
        self.report["truth"] = truth(self.model)

    def mixed(self) -> None:
        self.model.add_adapter("second", run.METHODS[self.cell.method]())
        self.model.set_requires_grad("second", True)
        # Gradients are compared from the same state: AdamW makes of rounding in the two steps before whole steps.
        with torch.no_grad():
            for key, parameter in run.trained(self.model, "default").items():
                parameter.copy_(self.at_first[key])
            for parameter in run.trained(self.model, "second").values():
                parameter.mul_(0.9).add_(0.02)
        self.optimizer.add("second", run.trained(self.model, "second"), run.HYPER)
        self._leave_modes()
        before = self._of_idle()
        self._step(2, lambda place: "default" if place < run.PER_MICRO_BATCH // 2 else "second")
        after = self._of_idle()
        self.report["untouched"] = before.keys() == after.keys() and all(
            torch.equal(before[key], after[key]) for key in before
        )
        self.report["idle has state"] = any("exp_avg" in key for key in before)

    def saves(self) -> None:
        self.report["logits"] = run.evaluate(self.model)
        with gathering() as sizes:
            run.saved(self.model, self.folder)
        self.report["gathered"] = sum(sizes)
        names = ["", "idle", "second"]
        self.report["files"] = {name: sizes_in(Path(self.folder) / name) for name in names}
        if self.rank == 0:
            alone = PeftModel.from_pretrained(storages.base(self.cell.storage), self.folder)
            self.report["loaded logits"] = run.evaluate(alone)

    def loads(self) -> None:
        self.model.load_adapter(f"{self.folder}/second", "third", is_trainable=True)
        self.model.set_requires_grad("third", True)
        self.optimizer.add("third", run.trained(self.model, "third"), Hyper(TINY))
        given = self._given()
        set_peft_model_state_dict(self.model, given)
        self._take_default_again()
        self._leave_modes()
        third = get_peft_model_state_dict(self.model, adapter_name="third")
        self._step(3, lambda place: "default" if place < run.PER_MICRO_BATCH // 2 else "third")
        self.report["moved"] = {
            "filled": own_engine.moved(given, get_peft_model_state_dict(self.model)),
            "loaded": own_engine.moved(third, get_peft_model_state_dict(self.model, adapter_name="third")),
        }

    def merges(self) -> None:
        self.report["before"] = run.evaluate(self.model)
        try:
            self.model.merge_adapter(["default"])
        except MergeError as error:
            self.report["merge refused"] = str(error)
            return
        self.report["merged"] = [run.evaluate(self.model), run.evaluate(self.model)]
        self.report["held"].append(at_rest.held(self.base))
        self.model.unmerge_adapter()
        self.report["after"] = run.evaluate(self.model)

    def engine(self) -> None:
        self.report["engine"] = own_engine.trained(self.cell)

    # What they share

    def _deepspeed(self) -> dict[str, Any] | None:
        """What partitions the base, where this cell does."""
        more = {"offload_param": {"device": "cpu"}} if self.cell.stage == OFFLOAD else {}
        return {"zero_optimization": {**ZERO3, **more}} if self.cell.partitions else None

    def _partition(self, model: Any) -> None:
        if config := self._deepspeed():
            sharding.partition_base(model, config)

    def _leave_modes(self) -> None:
        """The adapters train; the base's own modules are in the mode in which the caller left them."""
        self.model.train()
        if self.cell.eval_mode and not self.oracle:
            for module in self.base.modules():
                if not isinstance(module, PooledModule):
                    module.training = False

    def _step(self, step: int, choose: Callable[[int], str] | None = None) -> None:
        """One global batch; its loss, and the gradients of the first and of the last but one."""
        model, tuner = self.model, self.model.base_model
        self.optimizer.zero_grad()
        loss = run.backward(model, step, choose, micro_batches=1)
        # What an adapter adds to the loss as a whole, once over all ranks.
        extra = tuner.extra_loss() if choose is None else None
        if extra is not None:
            (extra / self.world).backward()
            loss += extra.detach() / self.world
        self.optimizer.reduce(keep_whole=bool(tuner.controllers))
        if step in (0, 2):
            found = run.gradients(model, self.optimizer.names)
            self.report["gradients"].update({f"{step}/{key}": value for key, value in found.items()})
        # What is loaded is found again where no budget is allocated.
        if step < 3:
            tuner.after_backward(step + 1)
        self.optimizer.step()
        if step < 3:
            tuner.after_step(step + 1)
        self.report["losses"].append(run.over_all_ranks(loss))
        self.report["held"].append(at_rest.held(self.base))

    def _of_idle(self) -> dict[str, Tensor]:
        """The values and the optimizer's state of the adapter that nobody names."""
        state = {key: t for key, t in self.optimizer.whole_state().items() if key.startswith("idle/")}
        return state | {key: t.detach().clone() for key, t in self.model.adapter_tensors("idle").items()}

    def _given(self) -> dict[str, Tensor]:
        """Values for the adapter that is trained: another's, as far as it is as large."""
        own, other = (
            get_peft_model_state_dict(self.model, adapter_name=name) for name in ("default", "idle")
        )
        return {key: other[key] if other[key].shape == t.shape else t * 0.5 for key, t in own.items()}

    def _take_default_again(self) -> None:
        """Its learning rate tiny; anew where its saved form is of other tensors (a prompt without its encoder)."""
        held = {id(p) for p in run.trained(self.model, "default").values()}
        before = {id(t.parameter) for t in self.optimizer._adapters["default"].tensors}
        if held != before:
            self.optimizer.remove("default")
            self.optimizer.add("default", run.trained(self.model, "default"), Hyper(TINY))
        self.optimizer.set_learning_rate("default", TINY)


def truth(model: PeftModel) -> dict[str, str]:
    """What the model says of itself."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        model.print_trainable_parameters()
    told = {"printed": printed.getvalue(), "counted": str(model.get_nb_trainable_parameters())}
    asks: dict[str, Callable[[], Any]] = {
        "layers": lambda: [dataclasses.asdict(each) for each in model.get_layer_status()],
        "model": lambda: dataclasses.asdict(model.get_model_status()),
    }
    for what, ask in asks.items():
        try:
            told[what] = str(ask())
        except TypeError as error:  # a prompt method sits on no layers
            told[what] = str(error)
    return told


@contextlib.contextmanager
def gathering() -> Any:
    """Collects the sizes of the partitioned parameters that are gathered meanwhile."""
    sizes: list[int] = []
    real = sharding.deepspeed.zero.GatheredParameters

    def watched(parameters: Any, *args: Any, **kwargs: Any) -> Any:
        parameters = list(parameters)
        sizes.extend(p.ds_numel for p in parameters if kwargs.get("enabled", True))
        return real(parameters, *args, **kwargs)

    with mock.patch.object(sharding.deepspeed.zero, "GatheredParameters", watched):
        yield sizes


def sizes_in(folder: Path) -> dict[str, int]:
    """How many elements each tensor of a saved adapter has."""
    with safe_open(folder / WEIGHTS_NAME, "pt") as file:
        return {key: file.get_tensor(key).numel() for key in file.keys()}  # noqa: SIM118
