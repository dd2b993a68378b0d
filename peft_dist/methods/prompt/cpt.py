"""Context-aware prompt tuning: the tokens of a context, each moved by a learned delta within a ball.

token_i = E[id_i] + Proj_i(delta_i): Proj_i keeps delta_i within the radius of the kind of its token; tokens of
other kinds (a context's answers) stay as they are. The loss counts the context's answers too, and weighs older
ones less.

`cpt_tokens_type_mask` and a batch's `input_type_mask` say what each token is: modulo 4, 1 is the input's template,
2 the input, 3 the output's template, 0 the answer, and 0 itself nothing; each example of the context counts on by
4, the batch's own text on from there.

Blau et al. 2024, arXiv:2410.17222. Where HF PEFT projects by giving the parameter other memory within each
forward, and adds to the batch's `input_type_mask` in place, here a forward in evaluation changes nothing; while
training the delta is brought back into its ball before a forward, in its own memory. HF PEFT counts the batch's
text on from the context's largest kind, which makes answers of a context that does not end in one something else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from peft_dist import starts
from peft_dist.config import PromptLearningConfig
from peft_dist.contract import BaseLayer, Param, Params, PromptMethod, Site
from peft_dist.errors import ConfigError
from peft_dist.lazy import lazy
from peft_dist.methods.prompt.prompt_tuning import of_vocabulary

if TYPE_CHECKING:
    from torch import Tensor

torch = lazy("torch")


@dataclass
class CPTConfig(PromptLearningConfig, PromptMethod):
    """HF PEFT's CPTConfig. CAUSAL_LM only.

    Args:
        cpt_token_ids: the context; [0] where it is not given. cpt_mask: as many ones.
        cpt_tokens_type_mask: the kind of each of its tokens.
        opt_weighted_loss_type: "decay" weighs the loss of older answers less; "none" all alike.
        opt_loss_decay_factor: by which each older answer's weight is multiplied.
        opt_projection_epsilon, opt_projection_format_epsilon: radius of input tokens and of template tokens, times
            sqrt(width / 2048).
        tokenizer_name_or_path: of the context; for the record.
    """

    cpt_token_ids: list[int] | None = None
    cpt_mask: list[int] | None = None
    cpt_tokens_type_mask: list[int] | None = None
    opt_weighted_loss_type: Literal["none", "decay"] | None = "none"
    opt_loss_decay_factor: float | None = 1.0
    opt_projection_epsilon: float | None = 0.1
    opt_projection_format_epsilon: float | None = 0.1
    tokenizer_name_or_path: str | None = None

    prefix: ClassVar[str] = "prompt_"
    reads: ClassVar[tuple[str, ...]] = ("input_type_mask",)

    def __post_init__(self) -> None:
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1
        if self.cpt_token_ids is None:
            self.cpt_token_ids = [0]
        self.num_virtual_tokens = len(self.cpt_token_ids)
        super().__post_init__()
        self.peft_type = "CPT"
        if self.task_type != "CAUSAL_LM":
            raise ConfigError(f"CPTConfig.task_type: {self.task_type}; only CAUSAL_LM is supported.")
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * self.num_virtual_tokens)
            if len(getattr(self, name)) != self.num_virtual_tokens:
                raise ConfigError(
                    f"CPTConfig.{name}: {len(getattr(self, name))} entries for {self.num_virtual_tokens} "
                    "cpt_token_ids; there is one for each."
                )
        if self.opt_weighted_loss_type not in ("none", "decay"):
            raise ConfigError(
                f"CPTConfig.opt_weighted_loss_type: {self.opt_weighted_loss_type!r}; it is 'none' or 'decay'."
            )

    def params(self, site: Site) -> dict[str, Param]:
        shape, dims = (self.num_tokens, site.out), ("tokens", "out")
        if self.inference_mode:
            key = "prompt_encoder.embedding.weight"
            return {"embeddings": Param(key, dims, shape, starts.zeros, saved="prompt_embeddings")}
        key, delta = "prompt_encoder.embedding.weight", "prompt_encoder.delta_embedding.weight"
        return {
            "context": Param(key, dims, shape, starts.zeros, trainable=False, saved="context", counted=True),
            "delta": Param(delta, dims, shape, starts.zeros, saved="prompt_embeddings"),
        }

    def start_from_base(self, p: Params, base: BaseLayer) -> None:
        if "context" in p:
            p["context"].copy_(of_vocabulary(base, torch.tensor(self.cpt_token_ids)))

    def embeds(self, p: Params, training: bool = False) -> Tensor:
        if "delta" not in p:
            return p["embeddings"]
        delta = p["delta"] * self._moves(p["delta"])
        # The gradient passes the projection as it is, as of a projected step.
        return p["context"] + self.projected(delta).detach() + (delta - delta.detach())

    def constrain(self, p: Params) -> None:
        if "delta" in p:
            p["delta"].copy_(self.projected(p["delta"]))

    def _kinds(self, like: Tensor) -> Tensor:
        return torch.tensor(self.cpt_tokens_type_mask, device=like.device)

    def _moves(self, like: Tensor) -> Tensor:
        """(tokens, 1), 1 where a token moves."""
        return (self._kinds(like) % 4 != 0).to(like.dtype)[:, None]

    def projected(self, delta: Tensor) -> Tensor:
        """The delta (tokens, width), each within its ball."""
        kinds = self._kinds(delta)
        radius = torch.full(kinds.shape, 1e-10, device=delta.device, dtype=delta.dtype)
        unit = (delta.shape[1] / 2048) ** 0.5
        radius[(kinds > 0) & (kinds % 4 == 2)] = self.opt_projection_epsilon * unit  # type: ignore[operator]
        radius[(kinds > 0) & (kinds % 2 == 1)] = self.opt_projection_format_epsilon * unit  # type: ignore[operator]
        norm = delta.detach().norm(dim=1).clamp(min=radius)
        return delta * (radius / norm)[:, None]

    def targets(self, labels: Tensor, p: Params) -> tuple[Tensor, Tensor]:
        own = self._kinds(labels)
        types = p.get("input_type_mask", torch.full_like(labels, 4)).to(labels)
        # The batch's own text is an example more than the context has.
        before = -(-int(own.max()) // 4) * 4
        kinds = torch.cat([own.expand(len(labels), -1), types + before * (types > 0)], dim=1)
        context = torch.tensor(self.cpt_token_ids, device=labels.device).expand(len(labels), -1)
        return torch.cat([context, labels], dim=1).masked_fill(~_is_answer(kinds), -100), self.weights(kinds)

    def weights(self, kinds: Tensor) -> Tensor:
        """How much each token's loss counts, of the kinds of all tokens (rows, T): (rows, T)."""
        is_answer = _is_answer(kinds)
        weights = torch.ones(kinds.shape, device=kinds.device)
        if self.opt_weighted_loss_type == "decay":
            for row, each in enumerate(kinds):
                answers = each[is_answer[row]].unique()
                # How many of the row's answers are younger.
                age = len(answers) - 1 - torch.searchsorted(answers, each[is_answer[row]])
                weights[row, is_answer[row]] = self.opt_loss_decay_factor ** age.to(weights.dtype)  # type: ignore[operator]
        return weights

    def export(self, p: Params, site: Site) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.embeds(p)}

    def resume(self, p: Params) -> None:
        # A checkpoint holds the sum of both, and has filled the delta with it.
        if "delta" in p:
            p["delta"].sub_(p["context"])


def _is_answer(kinds: Tensor) -> Tensor:
    return (kinds > 0) & (kinds % 4 == 0)
