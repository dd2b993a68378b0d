"""A base with adapters on its layers: what `PeftModel.base_model` is, and what stands on its own as `LoraModel`,
`IA3Model` and so on. `model` is the base itself.

The classes of the methods are made from the catalog when they are asked for.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peft_dist import checkpoint, gradients, hooks, inject, merge, recompute
from peft_dist.ahead import LookAhead
from peft_dist.catalog import METHODS, class_name, config_class, entry, prefix_of
from peft_dist.config import PeftConfig
from peft_dist.contract import Controller, Method, Params
from peft_dist.errors import AdapterError, ConfigError, MergeError, suggest
from peft_dist.gradients import Gradients
from peft_dist.idle import Idle
from peft_dist.joint import Joint, joined
from peft_dist.lazy import lazy
from peft_dist.made import Made
from peft_dist.pooled import PooledModule, outer_modules
from peft_dist.sharding import is_partitioned_base, reach, rests_in_pieces
from peft_dist.targets import usual_targets
from peft_dist.tuner_layer import hooked_layers, layer_class, merge_hooked, unmerge_hooked

prompt_encoders = lazy("peft_dist.prompt_encoders")


class BaseTuner(hooks.Hooks, PooledModule):
    """A base with wrapped layers. Tensors that all layers of an adapter share hang on it.

    Args:
        model: the base; its layers are wrapped in place.
        peft_config: of the adapter, or adapter -> config.
        adapter_name: of the adapter.
        low_cpu_mem_usage: makes the adapter's tensors on meta.
        state_dict: a saved adapter, whose names say which layers are wrapped.

    Attributes:
        targeted_module_names: the layers that the adapters' methods sit on.
    """

    # The method that it is for, or None for any.
    peft_type: ClassVar[str | None] = None
    unites: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str = "default",
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._check_arguments(model, peft_config, adapter_name)
        configs = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        self._open(model, configs, inject.beside_others(model))
        config = configs[adapter_name]
        inject.check_name(adapter_name, [name for name in configs if name != adapter_name])
        self._pre_injection_hook(model, config, adapter_name)
        self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        self._post_injection_hook(model, config, adapter_name)
        self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        model.peft_config = self.peft_config  # type: ignore[assignment]

    @classmethod
    def around(
        cls, model: nn.Module, peft_config: dict[str, PeftConfig], adapters: inject.Adapters
    ) -> BaseTuner:
        """One without adapters yet. `peft_config` and `adapters` are shared with whoever owns them."""
        tuner = cls.__new__(cls)
        tuner._open(model, peft_config, adapters)
        return tuner

    def _open(self, model: nn.Module, configs: dict[str, PeftConfig], adapters: inject.Adapters) -> None:
        PooledModule.__init__(self, adapters.pool, "")
        adapters.common = self
        self._run_again: tuple[tuple[str, ...], list[nn.Module]] = ((), [])
        self.model = model
        self.peft_config = configs
        self._adapters = adapters
        self._active: list[str] = []
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        self.controllers: dict[str, Controller] = {}
        self._gradients = Gradients()
        # Whose controller acted where the optimizer's step may have come after it.
        self._unsettled: set[str] = set()
        self.look_ahead = LookAhead(self)
        self._idle = Idle()

    @classmethod
    def _check_arguments(cls, model: Any, config: Any, adapter_name: Any) -> None:
        usage = f"{cls.__name__}(model, config, adapter_name)"
        if isinstance(model, PeftConfig):
            raise TypeError(f"{usage}: the config is given first, so the arguments are swapped.")
        if not isinstance(model, nn.Module) or not isinstance(config, (PeftConfig, dict)):
            raise TypeError(f"{usage}: got a {type(model).__name__} and a {type(config).__name__}.")
        if isinstance(config, dict) and adapter_name not in config:
            raise TypeError(f"{usage}: the configs are of {', '.join(config)}, not of {adapter_name!r}.")
        one = config[adapter_name] if isinstance(config, dict) else config
        if cls.peft_type is not None and one.peft_type != cls.peft_type:
            raise ConfigError(f"{usage}: {type(one).__name__} is a config of {one.peft_type}.")

    # --- adapters

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: Mapping[str, Tensor] | None = None,
        start: bool = True,
    ) -> None:
        """Puts the adapter whose config is in `peft_config` on the base's layers; not active yet.

        Args:
            state_dict: a saved adapter, whose names say which layers, in the place of the config.
            start: fills the tensors; False where a checkpoint will.

        Raises:
            TargetError: its targets do not fit; the base is then as it was.
        """
        config: Any = self.peft_config[adapter_name]
        if isinstance(config, Method):
            config.assemble(model, checkpoint.read)
        names = None
        if state_dict is not None:
            names = hooks.hooked_names(state_dict, self.prefix or prefix_of(config.peft_type))
        if self.has_hooks():
            targets = hooks.inject_by_hooks(
                self,
                adapter_name,
                self._adapters,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                names=names,
            )
        else:
            if names is not None:
                config = copy.copy(config)
                config.target_modules, config.exclude_modules = sorted(names), None
            targets = inject.inject(
                model,
                config,
                adapter_name,
                self._adapters,
                autocast_adapter_dtype=autocast_adapter_dtype,
                low_cpu_mem_usage=low_cpu_mem_usage,
                start=start,
            )
            self.add_controller(adapter_name)
        sites: dict[str, Any] = dict(self._adapters.sites.get(adapter_name, {}))
        for name in targets:
            site = sites[name].base.site if name in sites else None
            is_parameter = site is not None and site.kind == "experts"
            known = self.targeted_parameter_names if is_parameter else self.targeted_module_names
            # What is adapted together with the module around it goes by that one's name.
            if name not in known and (site is None or site.name == name):
                known.append(name)

    @property
    def active_adapters(self) -> list[str]:
        """The names that serve rows which name none, in the order in which they act."""
        return list(self._active)

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter's name; a list where it is not one."""
        return self._active[0] if len(self._active) == 1 else list(self._active)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Makes one adapter, or several, active; only active ones are trained, and none in
        `inference_mode`.

        Merged adapters are unmerged first, with a warning, as in HF PEFT.

        Raises:
            AdapterError: there is none of this name.
        """
        names = self.known(adapter_name)
        inject.check_together(self.model, names)
        if any(module.merged_adapters for _, module in inject.adapter_modules(self.model)):
            warnings.warn("Adapters are merged; they are unmerged before others become active.", stacklevel=2)
            self.unmerge_adapter()
        self._active = names
        inject.activate(self.model, names)
        for _, layer in hooked_layers(self.model):
            layer.set_adapter(list(names), inference_mode=inference_mode)
        self.set_requires_grad([name for name in self.peft_config if name not in names], False)
        self.set_requires_grad(names, not inference_mode)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Lets adapters be trained, or not, whether they are active or not."""
        names = self.known(adapter_names)
        inject.set_requires_grad(self.model, names, requires_grad)
        for _, layer in hooked_layers(self.model):
            layer.set_requires_grad(names, requires_grad)
        for name in names:
            self.let_train(name, requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter and its tensors; the first of the others becomes active where none is left so.

        Raises:
            AdapterError: there is none of this name, or it is merged.
        """
        self.known(adapter_name)
        hooks.delete_hooked(self.model, adapter_name)
        inject.delete(self.model, adapter_name)
        inject.forget(adapter_name, self._adapters)
        self.controllers.pop(adapter_name, None)
        self._unsettled.discard(adapter_name)
        del self.peft_config[adapter_name]
        if adapter_name in self._active:
            left = [name for name in self._active if name != adapter_name]
            self._active = left or list(self.peft_config)[:1]
            if self._active and not left:
                warnings.warn(
                    f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to "
                    f"{self._active[0]}.",
                    stacklevel=3,
                )
            inject.activate(self.model, self._active)
            for name in self._active:
                self.set_requires_grad(name, not self.peft_config[name].inference_mode)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` can say the adapter's changes by two factors a layer: all its layers are
        linear, and what it changes there does not depend on the input."""
        modules = list(self._adapters.sites.get(adapter_name, {}).values())
        return bool(modules) and all(
            module.methods[adapter_name].merges and module.base.site.kind == "linear" for module in modules
        )

    def known(self, names: str | Sequence[str]) -> list[str]:
        """The names, as a list.

        Raises:
            AdapterError: there is none of one of them; names the closest.
        """
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            if name not in self.peft_config:
                raise AdapterError(
                    f"adapter {name!r}: the model has none of this name."
                    f"{suggest(name, self.peft_config)} It has: {', '.join(self.peft_config) or 'none'}."
                )
        return wanted

    def adapter_tensors(self, adapter_name: str = "default") -> dict[str, Tensor]:
        """Every tensor of an adapter by its name in a checkpoint."""
        (name,) = self.known(adapter_name)
        return checkpoint.adapter_parameters(self, name)

    def __getattr__(self, attribute: str) -> Any:
        try:
            return super().__getattr__(attribute)
        except AttributeError:
            if attribute == "model":
                raise
            return getattr(self.model, attribute)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._pool.waiting:
            inject.check_started(self, [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)])
        with self.reading(kwargs):
            outputs = self.model(*args, **kwargs)
            if (joint := self._adapters.current.joint) is not None:
                outputs = joint.ends_in(outputs)
            loss: Any = getattr(outputs, "loss", None)
            extra = self.extra_loss() if isinstance(loss, Tensor) and torch.is_grad_enabled() else None
            if extra is not None:
                outputs.loss = loss + extra
        return outputs

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base's generate with its adapters."""
        with self.reading(kwargs):
            self.look_ahead.leave_cache(kwargs)
            return self.model.generate(*args, **kwargs)  # type: ignore[operator]

    @contextlib.contextmanager
    def reading(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Takes what adapters read of a batch out of a call's `kwargs`; their layers find it within the
        context."""
        names = {name for config in self.peft_config.values() for name in getattr(config, "reads", ())}
        self._attend()
        current = self._adapters.current
        before, made, joint = current.batch, current.made, current.joint
        current.batch = {**before, **{name: kwargs.pop(name) for name in names if name in kwargs}}
        current.made = Made(self.sites)
        if current.batch or current.rows or self.look_ahead.serving():
            recompute.remember(self._layers_run_again(), current)
        try:
            with contextlib.ExitStack() as stack:
                if joint is None and (begun := self._joined()) is not None:
                    current.joint = begun
                    stack.enter_context(begun.beginning_in(self.model))
                stack.enter_context(self.look_ahead.watching())
                yield
        finally:
            current.batch, current.made, current.joint = before, made, joint

    def _joined(self) -> Joint | None:
        """What adapters run with in this forward, where an engine of a user's own trains them, and ranks may use
        different ones or an adapter is looked at as a whole."""
        rows, serving = self._adapters.current.rows, set(self._serving())
        names_others = rows is not None and rows.adapters is not None
        if is_partitioned_base(self.model):
            return None
        all_serve = not names_others and serving >= set(self.peft_config)
        if all_serve and not self._idle.watches and not any(map(_adds_to_loss, self.peft_config.values())):
            return None
        prompts = self._adapters.prompts
        around = [self, self.model] if prompts is None else [prompts, self, self.model]
        holders = itertools.chain(around[:-2], (module for _, module in outer_modules(self)))
        tensors = (
            (name, tensor)
            for module in holders
            if isinstance(module, PooledModule)
            for name in module.adapters
            for tensor in module.tensors(name).values()
        )
        return joined(around, self._layers_run_again(), tensors, serving, self._idle)

    def _attend(self) -> None:
        """Before a run, what controllers need of it."""
        if self._unsettled:
            self.settle()
        for name in self.controllers if torch.is_grad_enabled() else ():
            self._gradients.watch(t for p in self.sites(name).values() for t in p.values())

    def _layers_run_again(self) -> list[nn.Module]:
        # Looked for once for each set of adapters: a base may get its layers when an adapter is added.
        names = tuple(self.peft_config)
        if self._run_again[0] != names:
            self._run_again = names, recompute.layers(self.model)
        return self._run_again[1]

    # --- what acts on an adapter as a whole

    def sites(self, adapter: str) -> dict[str, Params]:
        """The tensors of the adapter's method at each of its layers, by the layer's name in the bare base."""
        modules = self._adapters.sites.get(adapter, {})
        return {name: module.held(adapter) for name, module in modules.items()}

    def extra_loss(self) -> Tensor | None:
        """The sum of the terms that the adapters which serve now add to the loss, a scalar; None where there
        is none. A collective where their tensors rest in pieces."""
        terms, serving = [], self._serving()
        for name, config in self.peft_config.items():
            if not _adds_to_loss(config):
                continue
            sites = self.sites(name)
            # On every rank, whatever its rows name; until the end of the backward.
            reach(self, (t for p in sites.values() for t in p.values() if rests_in_pieces(t)))
            if name in serving:
                term = config.extra_loss(sites)  # type: ignore[attr-defined]
                terms += [] if term is None else [term]
        return torch.stack(terms).sum() if terms else None

    def after_backward(self, step: int) -> None:
        """To be called between the backward and the optimizer's step, where a method needs it (AdaLoRA); on every
        rank. Gradients come from wherever the optimizer or a user's own engine has them."""
        for name, controller in self._acting():
            self._show(name, functools.partial(controller.after_backward, step=step))

    def after_step(self, step: int) -> None:
        """To be called after the optimizer's step, where a method needs it (AdaLoRA); on every rank."""
        for name, controller in self._acting():
            self._show(name, functools.partial(controller.after_step, step=step), with_gradients=False)

    def update_and_allocate(self, global_step: int) -> None:
        """Both of the above at once, by AdaLoRA's name in HF PEFT: after the backward, before or after the
        optimizer's step. What is decided before the step holds after it too: it is seen to again before the
        adapter is next run or merged."""
        self.after_backward(global_step)
        self.after_step(global_step)
        self._unsettled |= {name for name, _ in self._acting()}

    def settle(self) -> None:
        """What controllers decided before an optimizer's step, which moved it, is so again."""
        names, self._unsettled = self._unsettled, set()
        for name in self.controllers:
            if name in names:
                self._show(name, self.controllers[name].settle, with_gradients=False)

    def _show(
        self, adapter: str, act: Callable[[dict[str, Params]], object], with_gradients: bool = True
    ) -> None:
        """Lets `act` see and change the tensors of an adapter's layers, whole, with their gradients."""
        sites = self.sites(adapter)
        tensors = list({id(t): t for p in sites.values() for t in p.values()}.values())
        found = self._gradients.taken(tensors) if with_gradients else {}
        with gradients.whole_view(tensors, found) as shown:
            act({name: {key: shown[id(t)] for key, t in p.items()} for name, p in sites.items()})

    def add_controller(self, adapter: str) -> None:
        """Makes what acts on the adapter as a whole, where its method has such a thing."""
        config: Any = self.peft_config[adapter]
        modules: Mapping[str, Any] = self._adapters.sites.get(adapter, {})
        sites = {name: module.base.site for name, module in modules.items()}
        made = config.controller(sites) if isinstance(config, Method) else None
        if made is None:
            return
        self.controllers[adapter] = made
        for p in self.sites(adapter).values():
            for tensor in p.values():
                gradients.keep_gradient_whole(tensor)

    def _acting(self) -> list[tuple[str, Controller]]:
        serving = self._serving()
        return [(name, each) for name, each in self.controllers.items() if name in serving]

    def _serving(self) -> list[str]:
        """The adapters that serve rows of the batch, or else the active ones."""
        rows = self._adapters.current.rows
        named = (
            [s.adapter for s in rows.segments] if rows is not None and rows.adapters is not None else [None]
        )
        active = self.active_adapters if None in named else []
        return [name for name in self.peft_config if name in named or name in active]

    # --- merged, disabled

    def merge_adapter(
        self,
        adapter_names: Sequence[str] | None = None,
        safe_merge: bool = False,
        *,
        dequantize: bool = False,
    ) -> None:
        """Adds the named adapters' changes to the base's weights in place; the active ones where none is
        named. With `dequantize` the quantised ones of those layers are ordinary ones until they are unmerged.

        Raises:
            MergeError: an adapter that cannot be merged; `dequantize` of a method that is given by hooks.
        """
        names = None if adapter_names is None else self.known(adapter_names)
        merge.refuse_unmergeable(self.peft_config, names)
        hooked = next(iter(hooked_layers(self.model)), None)
        if dequantize and hooked is not None:
            name, layer = hooked
            raise MergeError(
                f"{name}: a {type(layer).__name__} merges by a merge() of its own, which is not told to dequantize. "
                "Leave dequantize out, or call merge_and_unload(dequantize=True)."
            )
        self.settle()
        if not merge_hooked(self.model, names, safe_merge):
            merge.merge(self.model, names, safe_merge, dequantize=dequantize)

    def unmerge_adapter(self) -> None:
        """Takes merged adapters out of the base's weights again."""
        if not unmerge_hooked(self.model):
            merge.unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Sequence[str] | None = None,
        *,
        dequantize: bool = False,
    ) -> nn.Module:
        """The base with the named adapters merged for good and no wrappers; with `dequantize` an ordinary one,
        none of whose layers is quantised."""
        names = None if adapter_names is None else self.known(adapter_names)
        merge.refuse_unmergeable(self.peft_config, names)
        self.settle()
        if merge_hooked(self.model, names, safe_merge):
            hooks.remove_hooked(self.model)
            left = {name for _, module in inject.adapter_modules(self.model) for name in module.methods}
            names = None if names is None else [name for name in names if name in left]
        return self._bare(merge.merge_and_unload(self.model, names, safe_merge, dequantize=dequantize))

    def unload(self) -> nn.Module:
        """The bare base, its weights as they were, without adapters or wrappers.

        Raises:
            MergeError: layers of a method with hooks are merged.
        """
        for name, layer in hooked_layers(self.model):
            if layer.merged:
                raise MergeError(f"{name}: {layer.merged_adapters} are merged. Unmerge before unloading.")
        hooks.remove_hooked(self.model)
        return self._bare(merge.unload(self.model))

    def _bare(self, base: nn.Module) -> nn.Module:
        base.__dict__.pop("peft_config", None)
        return base

    def enable_adapter_layers(self) -> None:
        """Lets adapters serve; the active ones are trained."""
        self._enable(True)
        self.set_requires_grad(self.active_adapters, True)

    def disable_adapter_layers(self) -> None:
        """Lets the bare base serve; no adapter is trained."""
        self._enable(False)
        self.set_requires_grad(list(self.peft_config), False)

    def _enable(self, enabled: bool) -> None:
        for _, module in inject.adapter_modules(self.model):
            module.disabled = not enabled
        for _, layer in hooked_layers(self.model):
            layer.enable_adapters(enabled)


# Methods whose class does more than sit on layers: what it is derived from beside `BaseTuner`.
_MORE: dict[str, str] = {
    "LORA": "peft_dist.arithmetic.weighted:WeightedLora",
    "IA3": "peft_dist.arithmetic.weighted:WeightedIA3",
    "ADALORA": "peft_dist.arithmetic.weighted:NoWeighted",
    "XLORA": "peft_dist.xlora:MixtureOfLora",
    "VBLORA": "peft_dist.savable:CountsVectors",
}
_made: dict[str, Any] = {}


def tuner_class(peft_type: str) -> Any:
    """The class that stands on a base for a method: `LoraModel` for LORA. A prompt method's is what holds its
    tokens: `PromptEmbedding`."""
    name = str(peft_type).upper()
    row = entry(name)
    if row.tuner is not None:
        return row.tuner
    if name not in _made:
        config = config_class(name)
        if config.is_prompt_learning:
            _made[name] = prompt_encoders.encoder_class(name)
        else:
            module, _, mixin = _MORE.get(name, "").partition(":")
            more = (getattr(importlib.import_module(module), mixin),) if module else ()
            title = class_name(name)
            _made[name] = type(
                title,
                (*more, BaseTuner),
                {
                    "__doc__": f"A base with adapters of {name}.",
                    "__module__": __name__,
                    "peft_type": name,
                    "prefix": prefix_of(name),
                    "tuner_layer_cls": layer_class(name),
                    "target_module_mapping": usual_targets(name),
                },
            )
    return _made[name]


def __getattr__(name: str) -> Any:
    for peft_type in METHODS:
        if name.endswith("Model") and class_name(peft_type) == name:
            return tuner_class(peft_type)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _adds_to_loss(config: Any) -> bool:
    return isinstance(config, Method) and type(config).extra_loss is not Method.extra_loss
