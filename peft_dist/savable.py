"""How much of a VB-LoRA model its checkpoint takes."""

from __future__ import annotations

from typing import Any

from torch import nn


class CountsVectors:
    """Beside the tuner class of VB-LoRA."""

    model: nn.Module
    peft_config: dict[str, Any]

    def get_nb_savable_parameters(self, adapter: str = "default") -> tuple[int, int]:
        """(numbers in a checkpoint of the adapter, in units of fp32; numbers of what else is trained).

        With `save_only_topk_weights` a piece takes topk - 1 weights and topk indices, which are smaller than
        fp32 where the bank is small.
        """
        config = self.peft_config[adapter]
        logits = bank = others = 0
        for name, p in self.named_parameters():  # type: ignore[attr-defined]
            if "vblora_logits" in name:
                logits += p.numel()
            elif "vblora_vector_bank" in name:
                bank += p.numel()
            elif p.requires_grad:
                others += p.numel()
        if not config.save_only_topk_weights:
            return bank + logits, others
        per_index = config.smallest_int().itemsize / 4
        pieces = logits / config.num_vectors
        return int(bank + pieces * (config.topk - 1) + pieces * config.topk * per_index), others

    def print_savable_parameters(self) -> None:
        """Prints what `get_nb_savable_parameters` counts, in HF PEFT's words."""
        own, others = self.get_nb_savable_parameters()
        print(
            f"VB-LoRA params to-be-saved (float32-equivalent): {own:,d} "
            f"|| total params to-be-saved: {own + others:,d}"
        )
