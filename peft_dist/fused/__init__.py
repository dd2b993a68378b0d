"""Layers with an adapter as one node of the autograd graph: cheaper paths to what methods define.

One node keeps only what its backward reads, adds in place, and knows that the weight is frozen. `plain` says
where that may be done; everywhere else a method runs the layer itself, so that hooks see it. Differentiating
twice is refused by torch.
"""

from peft_dist.fused.changed import by_delta, changed, changed_by_kronecker, hadamard
from peft_dist.fused.low_rank import low_rank, pooled, projected, reflected, stretched
from peft_dist.fused.plain import exactly, foldable, plain
from peft_dist.fused.scaled import scaled_input, scaled_outputs
from peft_dist.fused.turned import rotations, skew, turned
from peft_dist.fused.wavelet import synthesis

__all__ = [
    "by_delta",
    "changed",
    "changed_by_kronecker",
    "exactly",
    "foldable",
    "hadamard",
    "low_rank",
    "plain",
    "pooled",
    "projected",
    "reflected",
    "rotations",
    "scaled_input",
    "scaled_outputs",
    "skew",
    "stretched",
    "synthesis",
    "turned",
]
