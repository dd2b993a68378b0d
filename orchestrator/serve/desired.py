"""What an endpoint shall serve, as it is kept in the registry's storage. Replicas follow it; whoever deploys
changes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from ..identity import BaseIdentity
from ..spec.job import ModelSpec


@dataclass(frozen=True)
class Served:
    """One adapter version on an endpoint."""

    name: str
    version: int
    forced: bool = False
    """Deployed although its gate had refused it."""
    alias_when_live: str | None = None
    """The alias that the replica sets as soon as it serves the version; None where the deployer does."""

    @property
    def ref(self) -> str:
        """`name@version`."""
        return f"{self.name}@{self.version}"


@dataclass(frozen=True)
class Desired:
    """One endpoint: its base, and the versions that it serves."""

    endpoint: str
    base: BaseIdentity
    threads: int = 1
    """CPU threads of each replica."""
    trust_remote_code: bool = False
    """Whether a job that trained one of its adapters said so of the base."""
    adapters: tuple[Served, ...] = field(default=())

    @property
    def model(self) -> ModelSpec:
        """The base as a job names it."""
        revision = self.base.revision or "main"
        return ModelSpec(
            base_model=self.base.source, revision=revision, trust_remote_code=self.trust_remote_code
        )

    def served(self, ref: str) -> Served | None:
        """The entry of a version, None where it is not served."""
        return next((entry for entry in self.adapters if entry.ref == ref), None)

    def with_adapter(self, entry: Served) -> Desired:
        """Also serving `entry`, in place of an older entry of the same version."""
        if self.served(entry.ref) is None:
            return replace(self, adapters=(*self.adapters, entry))
        kept = tuple(entry if other.ref == entry.ref else other for other in self.adapters)
        return replace(self, adapters=kept)

    def without(self, ref: str) -> Desired:
        """No longer serving that version."""
        return replace(self, adapters=tuple(entry for entry in self.adapters if entry.ref != ref))

    def without_promise(self, name: str, alias: str) -> Desired:
        """No version of `name` takes that alias when it becomes live: another one has it now."""
        kept = tuple(
            replace(entry, alias_when_live=None)
            if (entry.name, entry.alias_when_live) == (name, alias)
            else entry
            for entry in self.adapters
        )
        return replace(self, adapters=kept)

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        return asdict(self)

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Desired:
        """Reads what `to_dict` wrote, also by another version: unknown keys are passed over."""
        return cls(
            endpoint=stored["endpoint"],
            base=BaseIdentity(**_known(BaseIdentity, stored["base"])),
            threads=stored.get("threads", 1),
            trust_remote_code=stored.get("trust_remote_code", False),
            adapters=tuple(Served(**_known(Served, entry)) for entry in stored.get("adapters", ())),
        )


def _known(kind: Any, stored: dict[str, Any]) -> dict[str, Any]:
    names = {entry.name for entry in fields(kind)}
    return {name: value for name, value in stored.items() if name in names}
