"""What makes virtual tokens, standing on its own: HF PEFT's modules of the prompt methods.

Each is a shell: modules that hold a method's tensors under HF PEFT's names. What they mean is the method's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peft_dist.base_layer import door
from peft_dist.contract import Param, PromptMethod, Site
from peft_dist.errors import ConfigError
from peft_dist.loss import weighted_loss

_KEY = "prompt_encoder."


class BasePromptEncoder(nn.Module):
    """A prompt method's tensors and what they give: (batch, tokens) numbers of tokens -> (batch, tokens,
    width).

    Args:
        config: with `num_virtual_tokens` and `token_dim`.
        word_embeddings: of the base, where a start reads them.
    """

    def __init__(self, config: Any, word_embeddings: nn.Module | None = None) -> None:
        super().__init__()
        method = isinstance(config, PromptMethod)
        if not method or getattr(config, "token_dim", None) is None:
            raise ConfigError(
                f"{type(self).__name__}: needs the config of its prompt method, with token_dim; got {config!r}."
            )
        self.config: Any = config
        vocabulary = getattr(word_embeddings, "num_embeddings", 0)
        self._wanted = config.params(Site("prompt", int(config.token_dim), vocabulary, "embedding"))
        self._build(config)
        with torch.no_grad():
            p = self._tensors()
            for name, param in self._wanted.items():
                param.start(p[name])
            if word_embeddings is not None and not config.inference_mode:
                config.start_from_base(p, door(word_embeddings, "word embeddings"))

    def _build(self, config: Any) -> None:
        self.embedding = _table(self._shape("prompt_encoder.embedding.weight"))

    def _shape(self, key: str) -> tuple[int, ...]:
        return next(param.shape for param in self._wanted.values() if param.key == key)

    def _tensors(self) -> dict[str, Tensor]:
        """The method's tensors by its own names."""
        return {name: self.get_parameter(_path(param)) for name, param in self._wanted.items()}

    def forward(self, indices: Tensor) -> Tensor:
        return self.config.embeds(self._tensors(), self.training)[indices]


class PromptEmbedding(BasePromptEncoder):
    """PROMPT_TUNING's: its embeddings."""

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        super().__init__(config, word_embeddings)


class MultitaskPromptEmbedding(PromptEmbedding):
    """MULTITASK_PROMPT_TUNING's: its embeddings times each row's task's matrix."""

    def _build(self, config: Any) -> None:
        super()._build(config)
        self.num_tasks, self.num_ranks = config.num_tasks, config.num_ranks
        self.num_virtual_tokens, self.token_dim = config.num_virtual_tokens, config.token_dim
        self.num_transformer_submodules = config.num_transformer_submodules or 1
        for name in ("prefix_task_cols", "prefix_task_rows"):
            self.register_parameter(name, nn.Parameter(torch.empty(self._shape(_KEY + name))))

    def forward(self, indices: Tensor, task_ids: Tensor | None) -> Tensor:  # type: ignore[override]
        p = self._tensors()
        whole = self.config.embeds(p if task_ids is None else {**p, "task_ids": task_ids}, self.training)
        return whole.gather(1, indices[..., None].expand(*indices.shape, whole.shape[2]))


class PromptEncoder(BasePromptEncoder):
    """P_TUNING's: its embeddings through its network.

    Attributes:
        embedding, mlp_head, lstm_head: what it is of; no heads with `inference_mode`.
        token_dim, input_size, output_size, hidden_size, total_virtual_tokens, encoder_type: its sizes and kind.
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)

    def _build(self, config: Any) -> None:
        super()._build(config)
        self.token_dim = self.input_size = self.output_size = config.token_dim
        self.hidden_size: int = config.encoder_hidden_size or config.token_dim
        self.total_virtual_tokens: int = config.total_tokens
        self.encoder_type = config.encoder_reparameterization_type
        if config.inference_mode:
            return
        d, h = self.token_dim, self.hidden_size
        if self.encoder_type == "LSTM":
            self.lstm_head = nn.LSTM(
                d,
                h,
                config.encoder_num_layers,
                dropout=config.encoder_dropout,
                bidirectional=True,
                batch_first=True,
            )
            self.mlp_head = nn.Sequential(nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, d))
        else:
            layers = (nn.Linear(d, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, d))
            self.mlp_head = nn.Sequential(*layers)

    def forward(self, indices: Tensor) -> Tensor:
        p = self._tensors()
        # The LSTM runs along the tokens that are asked for; mostly all rows ask for the same.
        asked = indices[:1] if (indices == indices[:1]).all() else indices
        rows = [
            self.config.embeds({**p, "embedding.weight": self.embedding.weight[row]}, self.training)
            for row in asked
        ]
        return torch.stack(rows).expand(len(indices), -1, -1)


class PrefixEncoder(BasePromptEncoder):
    """PREFIX_TUNING's: (batch, tokens) -> (batch, tokens, 2 x layers x width), the keys and values.

    Attributes:
        embedding, transform, prefix_projection: the MLP is there with a projection, but not with
            `inference_mode`.
    """

    def __init__(self, config: Any) -> None:
        if getattr(config, "num_layers", None) is None:
            raise ConfigError("PrefixEncoder: needs a config with num_layers.")
        super().__init__(config)

    def _build(self, config: Any) -> None:
        super()._build(config)
        self.prefix_projection: bool = config.prefix_projection
        if config.prefix_projection and not config.inference_mode:
            to, from_ = self._shape("prompt_encoder.transform.0.weight")
            self.transform = nn.Sequential(nn.Linear(from_, to), nn.Tanh(), nn.Linear(to, config.width))

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Takes keys and values (tokens, 2 x layers x width) as they are saved.

        Raises:
            ConfigError: it has an MLP, which they do not say; or they have another shape.
        """
        if hasattr(self, "transform"):
            raise ConfigError(
                "load_prompt_embeddings: keys and values do not say the MLP of prefix_projection."
            )
        own = self.embedding.weight
        if prompt_embeddings.shape != own.shape:
            raise ConfigError(
                f"load_prompt_embeddings: {tuple(prompt_embeddings.shape)}; this prefix has {tuple(own.shape)}."
            )
        with torch.no_grad():
            own.copy_(prompt_embeddings)


class CPTEmbedding(BasePromptEncoder):
    """CPT's: its context's embeddings, each moved within its ball."""

    def __init__(self, config: Any, word_embeddings: nn.Module) -> None:
        super().__init__(config, word_embeddings)

    def _build(self, config: Any) -> None:
        super()._build(config)
        if not config.inference_mode:
            self.embedding.requires_grad_(False)
            self.delta_embedding = _table(self._shape("prompt_encoder.delta_embedding.weight"))

    def get_projection(self) -> Tensor:
        """The delta within its balls (tokens, width), detached."""
        return self.config.projected(self.delta_embedding.weight.detach())

    @staticmethod
    def calculate_loss(base_model_output: Any, labels: Tensor, cpt_type_mask: Tensor, config: Any) -> Any:
        """`base_model_output` with the loss of `labels` (B, T), each answer weighed by its age, of the kinds
        `cpt_type_mask` (B, T) of all tokens."""
        weights = config.weights(cpt_type_mask)
        base_model_output.loss = weighted_loss(base_model_output.logits, labels, weights)
        return base_model_output


_CLASSES: dict[str, Any] = {
    "PROMPT_TUNING": PromptEmbedding,
    "MULTITASK_PROMPT_TUNING": MultitaskPromptEmbedding,
    "P_TUNING": PromptEncoder,
    "PREFIX_TUNING": PrefixEncoder,
    "CPT": CPTEmbedding,
}


def encoder_class(peft_type: str) -> type[BasePromptEncoder]:
    """The module of a prompt method; for one of a user's own, the plain shell."""
    return _CLASSES.get(str(peft_type).upper(), BasePromptEncoder)


def _table(shape: tuple[int, ...]) -> nn.Embedding:
    tokens, width = shape
    return nn.Embedding(tokens, width)


def _path(param: Param) -> str:
    return param.key.removeprefix(_KEY)
