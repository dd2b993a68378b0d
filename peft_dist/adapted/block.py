"""A whole block of the base to whose output adapters add."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from peft_dist.adapted.around import Around
from peft_dist.adapted.packed import chosen
from peft_dist.beside import beside
from peft_dist.contract import BlockMethod
from peft_dist.packed_rows import PackedRows
from peft_dist.rows import Cut, Rows, Segment
from peft_dist.sharding import is_partitioned


class AdaptedBlock(Around):
    """A whole block of the base to whose output adapters add: an attention module, a decoder layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original_module(*args, **kwargs)
        rows = self._current.rows
        if self.disabled:
            return output
        if isinstance(rows, PackedRows):
            return self._packed(rows, output, args, kwargs)
        choices = [] if rows is None else [(self.serving(s.adapter), s) for s in rows.segments]
        used = {name for names, _ in choices for name in names}
        if all(names == choices[0][0] for names, _ in choices):
            names = choices[0][0] if choices else self.serving(None)
            given = self._around(names, output, args, kwargs)
        else:
            assert rows is not None
            cut = Cut(rows, self.base.site, self._current.length)
            pieces = []
            for names, s in choices:
                given, its_args, its_kwargs = cut.of((output, args, kwargs), s)
                pieces.append(self._around(names, given, its_args, its_kwargs, rows, s))
            given = cut.joined(pieces)
        if choices and any(is_partitioned(t) for t in self.original_module.parameters()):
            # A method may run parts of the block: ranks that name different adapters must gather their weights
            # equally often.
            for name in self.adapters:
                if name not in used:
                    method: BlockMethod = self.methods[name]
                    # Without a gradient, not with one of zero: the optimizer leaves what no rank used alone.
                    p = {key: _apart(t) for key, t in self.given(name).items()}
                    given = beside(given, method.around(p, self.original_module, output, args, kwargs))
        return given

    def _packed(self, rows: PackedRows, output: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
        run = rows.tokens
        blends = [chosen(self, stretch.choice) for stretch in run.stretches]
        if not any(blends):
            return output
        pieces = []
        for blend, stretch in zip(blends, run.stretches, strict=True):
            given, its_args, its_kwargs = run.cut((output, args, dict(kwargs)), stretch)
            reads = stretch.given(self.base.device) if stretch.reads else None
            for name, _ in blend:
                p = self.given(name, reads=reads)
                given = self.methods[name].around(p, self.original_module, given, its_args, its_kwargs)
            pieces.append(given)
        return run.joined(pieces, 1)

    def _around(
        self,
        names: Sequence[str],
        output: Any,
        args: tuple,
        kwargs: Mapping[str, Any],
        rows: Rows | None = None,
        segment: Segment | None = None,
    ) -> Any:
        for name in names:
            method: BlockMethod = self.methods[name]
            where = (segment.start, segment.stop) if segment is not None else (0, None)
            output = method.around(self.given(name, rows, *where), self.original_module, output, args, kwargs)
        return output


def _apart(value: Any) -> Any:
    """The same values, whose gradient goes nowhere else."""
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value
