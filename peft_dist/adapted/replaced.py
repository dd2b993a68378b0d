"""A module in whose place adapters put tensors of their own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from peft_dist.adapted.around import Around
from peft_dist.adapted.module import AdapterModule, bare
from peft_dist.adapted.packed import chosen
from peft_dist.beside import Beside
from peft_dist.contract import Params
from peft_dist.errors import RowsError
from peft_dist.packed_rows import PackedRows
from peft_dist.pauses import pause
from peft_dist.rows import Rows
from peft_dist.sharding import is_partitioned, whole_shape


class Replaced(Around):
    """A module that adapters replace by tensors of their own: `modules_to_save`."""

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(module, *args, **kwargs)
        # A copy without memory and without an engine's hooks, into which an adapter's tensors are put to run
        # it.
        self.__dict__["_shell"] = _shell(module)

    @property
    def active_adapter(self) -> Any:
        """The active adapter that has tensors here; without one, an empty list."""
        return next((name for name in self.active_adapters if name in self.methods), [])

    def named(self, choice: str | None) -> tuple[str, ...]:
        """As every layer's; a merged adapter stands in the module's place whichever is active."""
        if self.merged_adapters and choice is None:
            return tuple(name for name in self.merged_adapters if name in self.methods)
        return super().named(choice)

    def __getattr__(self, attribute: str) -> Any:
        # Who reads a weight without calling its module gets that of the adapter that runs.
        here = self.__dict__
        names = here.get("merged_adapters") or here.get("_told_active", ())
        name = next((name for name in names if name in here["methods"]), None)
        if name is not None and not self.disabled:
            holder = self._lenders.get(name, self)
            own = holder.tensors(name) if holder.has(name) else {}
            if attribute in own:
                return own[attribute]
        return super().__getattr__(attribute)

    def train(self, mode: bool = True) -> Replaced:
        self._shell.train(mode)
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        rows = self._current.rows
        if self.disabled:
            return self.original_module(*args, **kwargs)
        if rows is None or rows.adapters is None:
            return self._run(self.serving(None), args, kwargs)
        self.refuse_rows_while_merged()
        if isinstance(rows, PackedRows):
            return self._packed(rows, args, kwargs)
        choices = [(self.serving(s.adapter), s.start, s.stop) for s in rows.segments]
        if len(choices) == 1:
            y = self._run(choices[0][0], args, kwargs)
            if choices[0][0] and self._is_apart() and isinstance(y, Tensor):
                y = Beside.apply(y, self.original_module(*args, **kwargs))
            return y
        return self._mixed(rows, choices, args, kwargs)

    def _is_apart(self) -> bool:
        """Whether the frozen module is partitioned. Then each rank runs it, forward and backward, whether or
        not its rows use it: ranks that name different adapters must gather its weight equally often."""
        return any(is_partitioned(t) for t in self.original_module.parameters())

    def _run(self, names: tuple[str, ...], args: tuple, kwargs: dict[str, Any]) -> Any:
        if not names:
            return self.original_module(*args, **kwargs)
        p = self.held(names[-1])
        own, floats = next(iter(p.values())).dtype, filter(_is_float, (*args, *kwargs.values()))
        # What takes tokens gives what its own weight is of.
        given = next((a.dtype for a in floats), self.base.dtype)
        if own == given:
            return self._called(p, args, kwargs)
        return _cast(self._called(p, *_cast((args, kwargs), own)), given)

    def _called(self, p: Params, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What the module gives with the tensors p in the place of its own."""
        shell: Any = self._shell
        own = shell._parameters
        if (
            shell._modules
            or shell._buffers
            or any(own[name] is None for name in p)
            or torch.compiler.is_compiling()
        ):
            own_buffers = {name for name, _ in shell.named_buffers()}
            buffers = {n: b for n, b in self.base.layer.named_buffers() if n in own_buffers}
            return functional_call(shell, {**buffers, **p}, args, kwargs)
        # A norm, most often: nothing to look for below it.
        empty = dict(own)
        own.update(p)
        try:
            return shell(*args, **kwargs)
        finally:
            own.update(empty)

    def _packed(self, rows: PackedRows, args: tuple, kwargs: dict[str, Any]) -> Any:
        pause()
        run = rows.run_of(self._site_name, args[0])
        blends = [chosen(self, stretch.choice) for stretch in run.stretches]
        served = [tuple(name for name, _ in blend) for blend in blends]
        if not served:  # a base's head, in a step in which nobody's prompt ends
            return self.original_module(*args, **kwargs)
        if all(names == served[0] for names in served) and not (rows.alone and served[0]):
            return self._run(served[0], args, kwargs)
        # Adapters beneath know the whole row.
        whole = None if all(served) else self.original_module(*args, **kwargs)
        pieces = []
        for names, stretch in zip(served, run.stretches, strict=True):
            if not names:
                pieces.append(run.cut(whole, stretch))
                continue
            own_args, own_kwargs = run.cut((args, kwargs), stretch)
            pieces.append(self._run(names, own_args, own_kwargs))
        dim = run.dim(args[0])
        assert dim is not None
        return run.joined(pieces, dim)

    def _mixed(self, rows: Rows, choices: list, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        if len(args) != 1 or kwargs:
            raise RowsError(
                f"{self._site_name}: rows can name different adapters only where a module takes one input."
            )
        split = rows.of(self.base.site, args[0], self._current.length)
        xs = split.sorted(split.x)
        apart = self._is_apart()
        bare = (
            split.sorted(self.original_module(split.x))
            if apart or any(not n for n, _, _ in choices)
            else None
        )
        pieces = [
            self._run(names, (xs[start:stop],), {}) if names else bare[start:stop]  # type: ignore[index]
            for names, start, stop in choices
        ]
        given = torch.cat(pieces)
        if apart:
            given = Beside.apply(given, bare)
        return split.restored(split.unsorted(given))


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` with its floating tensors in `dtype`, also those in tuples, lists and dictionaries."""
    if type(value) in (tuple, list):
        return type(value)(_cast(each, dtype) for each in value)
    if type(value) is dict:
        return {key: _cast(each, dtype) for key, each in value.items()}
    return value.to(dtype) if _is_float(value) else value


def _shell(module: nn.Module) -> nn.Module:
    empty = {
        id(p): nn.Parameter(torch.empty(whole_shape(p), dtype=p.dtype, device="meta"), requires_grad=False)
        for p in module.parameters()
    }
    memo: dict[int, Any] = dict(empty)
    # Adapters that others have within it are not its own: a copy holds what is beneath them.
    for part in module.modules():
        if isinstance(part, AdapterModule):
            memo[id(part)] = copy.deepcopy(bare(part), memo)
    shell = copy.deepcopy(module, memo)
    for part in shell.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
        part._backward_hooks.clear()
        part._backward_pre_hooks.clear()
    return shell
