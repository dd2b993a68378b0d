"""What an endpoint shall serve, as it is kept in the registry's storage. Replicas follow it; whoever deploys
changes it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from ..identity import BaseIdentity
from ..spec.job import EngineSpec, ModelSpec
from ..stored import known
from .rollout import Rollout, Step

_TRAIL = 20
"""Earlier versions of an alias that are remembered."""


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
class EngineOptions:
    """What a replica's engine is told; None leaves it to the engine."""

    max_context: int | None = None
    """Tokens of prompt and answer together."""
    max_batch_tokens: int | None = None
    """Tokens of one forward over all requests."""
    max_adapters: int | None = None
    """Adapters loaded at once; the others wait on disk."""
    deterministic: bool = False
    """The same log-probabilities to the bit, alone or in any batch."""
    quantization: Literal["none", "int8", "nf4"] | None = None
    """How the base's linear layers are kept."""

    @classmethod
    def of(cls, spec: EngineSpec) -> EngineOptions:
        """What a job's `deploy.engine` says."""
        said: dict[str, Any] = {
            name: None if value == "auto" else value for name, value in spec.model_dump().items()
        }
        return cls(**said)


@dataclass(frozen=True)
class Desired:
    """One endpoint: its base, the versions that it serves, and those on their way to an alias."""

    endpoint: str
    base: BaseIdentity
    threads: int = 1
    """CPU threads of each replica."""
    trust_remote_code: bool = False
    """Whether a job that trained one of its adapters said so of the base."""
    adapters: tuple[Served, ...] = field(default=())
    engine: EngineOptions = EngineOptions()
    code: str = ""
    """The version of code and settings with which Serve was last told to run it."""
    task: str = "CAUSAL_LM"
    """PEFT's name of what the base is loaded for: one on an endpoint, since it decides the base's head."""
    rollouts: tuple[Rollout, ...] = ()
    """At most one an alias."""
    earlier: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """`name@alias` -> the versions that it named before, oldest first."""

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
        """No longer serving that version, nor rolling it out."""
        kept = tuple(entry for entry in self.adapters if entry.ref != ref)
        return replace(self, adapters=kept, rollouts=tuple(each for each in self.rollouts if each.ref != ref))

    def set_up_as(self, other: Desired) -> Desired:
        """With what another one tells its replicas when they start."""
        return replace(
            self, engine=other.engine, threads=other.threads, trust_remote_code=other.trust_remote_code
        )

    def without_promise(self, name: str, alias: str) -> Desired:
        """No version of `name` is on its way to that alias, nor takes it when it becomes live: another one does."""
        kept = tuple(
            replace(entry, alias_when_live=None)
            if (entry.name, entry.alias_when_live) == (name, alias)
            else entry
            for entry in self.adapters
        )
        others = tuple(each for each in self.rollouts if (each.name, each.alias) != (name, alias))
        return replace(self, adapters=kept, rollouts=others)

    # rollouts

    def rollout(self, name: str, alias: str) -> Rollout | None:
        """The one that is on its way to an alias."""
        return next((each for each in self.rollouts if (each.name, each.alias) == (name, alias)), None)

    def with_rollout(self, rollout: Rollout) -> Desired:
        """Rolling that out, in place of what was on its way to the same alias."""
        others = tuple(each for each in self.rollouts if each.takes != rollout.takes)
        return replace(self, rollouts=(*others, rollout))

    def watching(self, rollout: Rollout) -> Desired:
        """Rolling that out from now on. Where the same version was baking on its way there, it is from now on by other
        terms: those who have it keep it."""
        there = self.rollout(rollout.name, rollout.alias)
        if there is not None and (there.ref, there.state) == (rollout.ref, "baking"):
            rollout = replace(rollout, state="baking", began=rollout.created)
        return self.with_rollout(rollout)

    def after(self, id: str, step: Step, now: float, before: int | None = None) -> Desired:
        """With a rollout's next state; as it is where another has decided it meanwhile.

        Args:
            before: what the alias names, where the candidate is to take it.
        """
        found = next((each for each in self.rollouts if each.id == id), None)
        if found is None or found.state not in ("starting", "baking"):
            return self
        if step.kind == "begin":
            return self.with_rollout(replace(found, state="baking", began=now))
        state: Any = "promoting" if step.kind == "promote" else "withdrawing"
        return self.with_rollout(replace(found, state=state, reasons=step.reasons, before=before))

    def finished(self, id: str) -> Desired:
        """Without a rollout whose alias was set, or which is withdrawn: then without its version, too."""
        found = next((each for each in self.rollouts if each.id == id), None)
        if found is None:
            return self
        if found.state == "withdrawing":
            return self.without(found.ref)
        left = replace(self, rollouts=tuple(each for each in self.rollouts if each.id != id))
        return left.passed(found.name, found.alias, found.before, found.candidate)

    def passed(self, name: str, alias: str, before: int | None, now: int) -> Desired:
        """Remembers which version an alias named before it was given to another."""
        if before is None or before == now:
            return self
        key = f"{name}@{alias}"
        trail = (*self.earlier.get(key, ()), before)[-_TRAIL:]
        return replace(self, earlier={**self.earlier, key: trail})

    def stepped_back(self, name: str, alias: str) -> Desired:
        """Without the last of the earlier versions: the alias names it again."""
        key = f"{name}@{alias}"
        return replace(self, earlier={**self.earlier, key: self.earlier.get(key, ())[:-1]})

    # stored

    def to_dict(self) -> dict[str, Any]:
        """As it is stored."""
        stored = asdict(self)
        stored["rollouts"] = [each.to_dict() for each in self.rollouts]
        stored["earlier"] = {key: list(versions) for key, versions in self.earlier.items()}
        return stored

    @classmethod
    def from_dict(cls, stored: dict[str, Any]) -> Desired:
        """Reads what `to_dict` wrote, also by another version: unknown keys are passed over."""
        return cls(
            endpoint=stored["endpoint"],
            base=BaseIdentity(**known(BaseIdentity, stored["base"])),
            threads=stored.get("threads", 1),
            trust_remote_code=stored.get("trust_remote_code", False),
            adapters=tuple(Served(**known(Served, entry)) for entry in stored.get("adapters", ())),
            engine=EngineOptions(**known(EngineOptions, stored.get("engine", {}))),
            code=stored.get("code", ""),
            task=stored.get("task", "CAUSAL_LM"),
            rollouts=tuple(Rollout.from_dict(each) for each in stored.get("rollouts", ())),
            earlier={key: tuple(versions) for key, versions in stored.get("earlier", {}).items()},
        )
