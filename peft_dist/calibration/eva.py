"""EVA's start: A from the principal directions of what each layer takes in, ranks shared out over the layers by
the variance that the directions explain; B zero.

Paischer et al. 2024, arXiv:2410.07170. The directions are found batch after batch, each step decomposing the
directions so far, the new inputs and the shift of their mean (Ross et al. 2008), until they stop turning. HF
PEFT decomposes by a random subspace; here the decomposition is exact.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peft_dist.adapted import Adapted
from peft_dist.base_layer import door
from peft_dist.calibration.filled import check_filled
from peft_dist.calibration.incremental_pca import IncrementalPCA
from peft_dist.errors import ConfigError
from peft_dist.inject import adapter_modules, facts_of, places
from peft_dist.methods.weight.lora import LoraConfig
from peft_dist.sharding import is_partitioned
from peft_dist.targets import by_pattern, resolve

_IN_PEFT_MODEL = "base_model.model."


class Directions:
    """The principal directions of what a layer takes in.

    Attributes:
        turned: (k,) cosine of each with what it was one batch ago.
    """

    def __init__(self, k: int) -> None:
        self.k = k
        self.pca = IncrementalPCA(n_components=k)
        self.turned = torch.zeros(k)

    @property
    def components(self) -> Tensor | None:
        """(k, in), orthonormal, the strongest first; None before the first batch."""
        return self.pca.components_ if self.pca.n_samples_seen_ else None

    def see(self, x: Tensor) -> None:
        """Takes a batch x (rows, in) into account; one with fewer rows than directions is left out."""
        if len(x) < self.k:
            return
        old = self.components
        self.pca.partial_fit(x.float())
        if old is not None:
            self.turned = torch.nn.functional.cosine_similarity(self.pca.components_, old).cpu()


def prepare_model_inputs_fn_language_modeling(model_input: Any, peft_config: LoraConfig) -> Tensor:
    """(positions, 2) the row and column of each token that counts: shown, and with a label where the config
    says so."""
    if not isinstance(model_input, Mapping):
        raise ConfigError("prepare_model_inputs_fn_language_modeling: the model's inputs are a dictionary.")
    mask = model_input.get("attention_mask", torch.ones_like(model_input["input_ids"])).bool()
    settings = peft_config.eva_config
    if settings is not None and settings.use_label_mask and "labels" in model_input:
        mask = mask & (model_input["labels"] != settings.label_mask_value)
    return mask.nonzero()


def prepare_layer_inputs_fn_language_modeling(
    layer_input: Any, model_input: Tensor, layer_name: str
) -> Tensor:
    """(rows, in) what a layer takes in at the positions that count."""
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    return x[tuple(model_input.T)]


def _flattened(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    x = layer_input[0] if isinstance(layer_input, (tuple, list)) else layer_input
    return x.flatten(0, -2)


def forward_fn_dict(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """Runs the model on a batch that is a dictionary."""
    return model(**inputs)


@torch.no_grad()
def get_eva_state_dict(
    model: Any,
    dataloader: Iterable,
    peft_config: LoraConfig | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable
    | dict[str, Callable]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> dict[str, Tensor]:
    """A (rank, in) of each linear layer that the config targets, by the layer's name in `model`.

    Args:
        model: a PeftModel, or a base, which needs `peft_config`.
        dataloader: batches; gone through again and again until the directions have converged.
        forward_fn: (model, batch) -> anything.
        prepare_model_inputs_fn: (batch, config) -> what the next one is given; the batch itself where None.
        prepare_layer_inputs_fn: (the layer's input, that, the layer's name) -> (rows, in); one for all layers,
            or by name.
        gather_distributed_inputs: put the rows of all ranks together; on a partitioned base that is always done,
            since ranks that converged apart would run it unlike often.
        show_progress_bar: print how many layers have converged.

    Raises:
        ConfigError: a base without a config, an empty dataloader, or a name that no layer has.
    """
    is_peft = hasattr(model, "peft_config")
    if peft_config is None:
        if not is_peft:
            raise ConfigError("get_eva_state_dict: peft_config must be given where the model is a bare base.")
        peft_config = model.peft_config[adapter_name]
    check_filled(model, "get_eva_state_dict")
    layers = _layers(model, peft_config, adapter_name)
    if isinstance(prepare_layer_inputs_fn, Mapping):
        unknown = set(prepare_layer_inputs_fn) - set(layers)
        if unknown:
            raise ConfigError(
                f"prepare_layer_inputs_fn: {', '.join(sorted(unknown))} are no layers that EVA starts."
            )
    batches = itertools.cycle(dataloader)
    training = model.training
    model.eval()
    with model.disable_adapter() if is_peft else contextlib.nullcontext():
        search = _Search(
            model, layers, peft_config, forward_fn, prepare_model_inputs_fn, prepare_layer_inputs_fn
        )
        joint = gather_distributed_inputs or any(is_partitioned(p) for p in model.parameters())
        search.gathers = joint and dist.is_initialized()
        ranks = search.run(batches, show_progress_bar)
    model.train(training)
    found = {}
    for name, rank in ranks.items():
        directions = search.of(name)
        assert directions.components is not None
        A = directions.components[:rank].clone()
        if peft_config.eva_config is not None and peft_config.eva_config.whiten:
            A /= directions.pca.singular_values_[:rank, None].sqrt()
        found[name] = A
    return found


class _Search:
    """Runs a model over batches until the directions of its layers' inputs have converged."""

    gathers = False

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, nn.Module],
        config: LoraConfig,
        forward: Callable,
        prepare_model: Callable | None,
        prepare_layer: Callable | Mapping[str, Callable] | None,
    ) -> None:
        assert config.eva_config is not None
        self.model, self.layers, self.config, self.settings = model, layers, config, config.eva_config
        self.forward, self.prepare_model, self.prepare_layer = forward, prepare_model, prepare_layer
        # Layers that take in the same tensor share one search, kept by the first of them.
        self.leader: dict[str, str] = {}
        self.directions: dict[str, Directions] = {}
        self.given: Any = None

    def of(self, name: str) -> Directions:
        """The directions of a layer's inputs."""
        return self.directions[self.leader[name]]

    def run(self, batches: Iterator, show: bool) -> dict[str, int]:
        """The rank of each layer."""
        first = next(batches, None)
        if first is None:
            raise ConfigError("get_eva_state_dict: the dataloader is empty.")
        self._find_leaders(first)
        wanted = {
            name: by_pattern(self.config.rank_pattern or {}, name, self.config.r) for name in self.layers
        }
        widest = {name: round(rank * self.settings.rho) for name, rank in wanted.items()}
        for leader in set(self.leader.values()):
            most = max(widest[name] for name, its in self.leader.items() if its == leader)
            layer: Any = self.layers[leader]
            site = layer.base.site if isinstance(layer, Adapted) else door(layer, leader).site
            # An input has no more directions than entries.
            self.directions[leader] = Directions(min(most, site.in_))
        ranks = {name: self.of(name).k for name in self.layers}
        for batch in itertools.chain([first], batches):
            open_ = {leader for leader in self.directions if not self._converged(leader, ranks)}
            if show and (not dist.is_initialized() or dist.get_rank() == 0):
                print(f"EVA: {len(self.directions) - len(open_)} of {len(self.directions)} have converged.")
            if not open_:
                break
            self._see(batch, open_)
            if all(d.components is not None for d in self.directions.values()):
                ranks = self._shared_out(sum(wanted.values()))
        return ranks

    def _converged(self, leader: str, ranks: dict[str, int]) -> bool:
        rank = max(ranks[name] for name, its in self.leader.items() if its == leader)
        directions = self.directions[leader]
        return directions.components is not None and bool(
            (directions.turned[:rank] >= self.settings.tau).all()
        )

    def _shared_out(self, budget: int) -> dict[str, int]:
        """Ranks by the strongest directions of all layers together."""
        every = sorted(
            (
                (-float(share), order, name)
                for order, name in enumerate(self.layers)
                for share in self.of(name).pca.explained_variance_ratio_
            ),
        )
        counts = Counter(name for _, _, name in every[:budget])
        return {name: counts[name] for name in self.layers}

    def _find_leaders(self, batch: Any) -> None:
        seen: dict[int, str] = {}
        alive = []

        def note(name: str) -> Callable:
            def hook(module: nn.Module, args: tuple) -> None:
                alive.append(args[0])
                self.leader.setdefault(name, seen.setdefault(id(args[0]), name))

            return hook

        with self._hooked({name: note(name) for name in self.layers}):
            self.forward(self.model, _moved(batch, self.model))
        self.layers = {name: layer for name, layer in self.layers.items() if name in self.leader}

    def _see(self, batch: Any, names: set[str]) -> None:
        batch = _moved(batch, self.model)
        given = batch if self.prepare_model is None else self.prepare_model(batch, self.config)

        def take(name: str) -> Callable:
            prepare = self.prepare_layer
            if isinstance(prepare, Mapping):
                prepare = prepare.get(name)

            def hook(module: nn.Module, args: tuple) -> None:
                rows = (prepare or _flattened)(args, given, name)
                self.directions[name].see(self._gathered(rows))

            return hook

        with self._hooked({name: take(name) for name in names}):
            self.forward(self.model, batch)

    def _gathered(self, rows: Tensor) -> Tensor:
        if not self.gathers:
            return rows
        every: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(every, rows.cpu())
        return torch.cat(every).to(rows.device)

    @contextlib.contextmanager
    def _hooked(self, hooks: dict[str, Callable]) -> Iterator[None]:
        handles = [self.layers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _layers(model: Any, config: LoraConfig, adapter_name: str) -> dict[str, nn.Module]:
    """The linear layers that the config targets, by their names in `model`."""
    if hasattr(model, "peft_config"):
        return {
            f"{_IN_PEFT_MODEL}{name}": module
            for name, module in adapter_modules(model.get_base_model())
            if isinstance(module, Adapted)
            and adapter_name in module.adapters
            and module.base.site.kind == "linear"
            and "A" in module.wanted(adapter_name)
        }
    found = places(model)
    facts = facts_of(model, found)
    return {name: found[name].layer for name in resolve(config, facts) if facts.layers[name] == "linear"}


def _moved(batch: Any, model: nn.Module) -> Any:
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if isinstance(batch, Mapping):
        return {key: _moved(value, model) for key, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(_moved(value, model) for value in batch)
    return batch.to(device) if isinstance(batch, Tensor) else batch


@torch.no_grad()
def initialize_lora_eva_weights(
    model: Any,
    dataloader: Iterable | None = None,
    eva_state_dict: dict[str, Tensor] | None = None,
    forward_fn: Callable = forward_fn_dict,
    prepare_model_inputs_fn: Callable | None = prepare_model_inputs_fn_language_modeling,
    prepare_layer_inputs_fn: Callable
    | dict[str, Callable]
    | None = prepare_layer_inputs_fn_language_modeling,
    adapter_name: str = "default",
    gather_distributed_inputs: bool = True,
    show_progress_bar: bool = True,
) -> None:
    """Starts an adapter by EVA: gives its layers their ranks and their A. Layers left without any rank are no
    targets any more; the config's patterns and targets say so.

    Args:
        eva_state_dict: what `get_eva_state_dict` gave; found from the `dataloader` where None. The others are
            its arguments.

    Raises:
        ConfigError: no PeftModel, several active adapters, another start than "eva", or nothing to learn from.
    """
    where = "initialize_lora_eva_weights"
    if not hasattr(model, "peft_config"):
        raise ConfigError(f"{where}: the model must be a PeftModel. Call get_peft_model first.")
    if len(model.active_adapters) > 1:
        raise ConfigError(f"{where}: works with a single active adapter; {model.active_adapters} are.")
    config = model.peft_config[adapter_name]
    if getattr(config, "init_lora_weights", None) != "eva":
        raise ConfigError(f"{where}: adapter {adapter_name!r} needs init_lora_weights 'eva'.")
    if eva_state_dict is None:
        if dataloader is None:
            raise ConfigError(f"{where}: give a dataloader, or an eva_state_dict.")
        eva_state_dict = get_eva_state_dict(
            model,
            dataloader,
            config,
            forward_fn,
            prepare_model_inputs_fn,
            prepare_layer_inputs_fn,
            adapter_name,
            gather_distributed_inputs,
            show_progress_bar,
        )
    started = {name.removeprefix(_IN_PEFT_MODEL): A for name, A in eva_state_dict.items()}
    _give_ranks(model, adapter_name, _allotted(model, config, adapter_name, started))
    for name, module in adapter_modules(model.get_base_model()):
        if adapter_name in module.adapters and name in started and "A" in module.tensors(adapter_name):
            module.tensors(adapter_name)["A"].copy_(started[name])


def _allotted(model: Any, config: LoraConfig, adapter_name: str, started: dict[str, Tensor]) -> LoraConfig:
    """The config with the ranks of `started`."""
    names, ranks, alphas = [], {}, {}
    assert config.eva_config is not None
    for name, module in adapter_modules(model.get_base_model()):
        if adapter_name not in module.adapters or "A" not in module.wanted(adapter_name):
            continue
        r = by_pattern(config.rank_pattern or {}, name, config.r)
        alpha = by_pattern(config.alpha_pattern or {}, name, config.lora_alpha)
        rank = len(started[name]) if name in started else r
        if not rank:
            continue
        names.append(name)
        if config.eva_config.adjust_scaling_factors:
            alpha *= rank / r
        if rank != config.r:
            ranks[name] = rank
        if alpha != config.lora_alpha:
            alphas[name] = alpha
    allotted = copy.copy(config)
    allotted.target_modules, allotted.rank_pattern, allotted.alpha_pattern = names, ranks, alphas
    # They name layers themselves now.
    allotted.layers_to_transform = allotted.layers_pattern = None
    return allotted


def _give_ranks(model: Any, adapter_name: str, allotted: LoraConfig) -> None:
    """Puts the adapter on its layers anew, with other ranks."""
    active = list(model.active_adapters)
    model.delete_adapter(adapter_name)
    model.add_adapter(adapter_name, allotted)
    model.set_adapter(active)
