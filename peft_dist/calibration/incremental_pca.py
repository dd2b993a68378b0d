"""Principal components of rows that come batch by batch (Ross et al. 2008), by HF PEFT's names, which are
scikit-learn's. Each step decomposes the components so far, the new rows, and how their mean has moved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from peft_dist.errors import ConfigError


class IncrementalPCA:
    """Principal components.

    Args:
        n_components: how many; as many as the first batch has where None. copy: leave the rows as they are.
        batch_size: rows that `fit` takes at once; five times the features where None.
        svd_driver: of `torch.linalg.svd`.
        lowrank: decompose in a random subspace of `lowrank_q` directions (twice the components where None), found by
            `lowrank_niter` iterations from `lowrank_seed`.

    Attributes:
        components_: (k, features), the strongest first. singular_values_: (k,).
        mean_, var_: (features,) of all rows so far. n_samples_seen_: their number.
        explained_variance_, explained_variance_ratio_: (k,). noise_variance_: the mean of the others.
    """

    def __init__(
        self,
        n_components: int | None = None,
        copy: bool | None = True,
        batch_size: int | None = None,
        svd_driver: str | None = None,
        lowrank: bool = False,
        lowrank_q: int | None = None,
        lowrank_niter: int = 4,
        lowrank_seed: int | None = None,
    ) -> None:
        self.n_components, self.copy, self.batch_size, self.svd_driver = (
            n_components,
            copy,
            batch_size,
            svd_driver,
        )
        self.lowrank, self.lowrank_niter, self.lowrank_seed = lowrank, lowrank_niter, lowrank_seed
        if lowrank and n_components is None and lowrank_q is None:
            raise ConfigError("IncrementalPCA: lowrank needs n_components, or lowrank_q.")
        if lowrank and lowrank_q is not None and lowrank_q < (n_components or 0):
            raise ConfigError(f"IncrementalPCA: lowrank_q {lowrank_q} is below n_components {n_components}.")
        self.lowrank_q = lowrank_q or (2 * n_components if n_components else None)
        self.n_features_: int | None = None
        self.n_samples_seen_ = 0
        self._squares = self.mean_ = self.var_ = self.components_ = self.singular_values_ = torch.zeros(())

    def fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Takes the rows of X (rows, features) into account, batch by batch."""
        X = self._checked(X) if check_input else X
        size = self.batch_size = self.batch_size or 5 * X.shape[1]
        for batch in self.gen_batches(len(X), size, self.n_components or 0):
            self.partial_fit(X[batch], check_input=False)
        return self

    def partial_fit(self, X: Any, check_input: bool = True) -> IncrementalPCA:
        """Takes one batch X (rows, features) into account.

        Raises:
            ConfigError: more components than rows or features, or another number of features than before.
        """
        X = self._checked(X) if check_input else X
        first, (count, features) = self.n_features_ is None, X.shape
        if not first and features != self.n_features_:
            raise ConfigError(f"IncrementalPCA: {features} features, where there were {self.n_features_}.")
        self.n_features_ = features
        self.n_components = self.n_components or min(count, features)
        before, mean = self.n_samples_seen_, X.double().mean(0)
        rows = [X - mean.to(X.dtype)]
        squares = rows[0].double().square().sum(0)
        if not first:
            weight = before * count / (before + count)
            shift = self.mean_ - mean
            rows = [
                self.singular_values_[:, None] * self.components_,
                rows[0],
                math.sqrt(weight) * shift.to(X.dtype)[None],
            ]
            squares = squares + self._squares + weight * shift.square()
            mean = (before * self.mean_ + count * mean) / (before + count)
        S, Vh = self._decomposed(torch.cat(rows))
        # A direction and its opposite are one: the largest entry is made positive.
        Vh = Vh * Vh.gather(1, Vh.abs().argmax(1, keepdim=True)).sign()
        k = self.n_components
        self.mean_, self._squares, self.n_samples_seen_ = mean, squares, before + count
        self.var_ = squares / self.n_samples_seen_
        self.components_, self.singular_values_ = Vh[:k], S[:k]
        variance = S**2 / max(self.n_samples_seen_ - 1, 1)
        self.explained_variance_, self.explained_variance_ratio_ = variance[:k], S[:k] ** 2 / squares.sum()
        rest = variance[k:]
        self.noise_variance_ = rest.mean() if len(rest) and k not in (count, features) else S.new_zeros(())
        return self

    def transform(self, X: Tensor) -> Tensor:
        """X (rows, features) in the components' directions: (rows, k)."""
        return ((X - self.mean_).double() @ self.components_.double().T).to(X.dtype)

    @staticmethod
    def gen_batches(n: int, batch_size: int, min_batch_size: int = 0) -> Iterator[slice]:
        """Slices of `batch_size` that cover n; the last is never below `min_batch_size`."""
        start = 0
        while start < n:
            stop = start + batch_size
            stop = n if stop + min_batch_size > n else stop
            yield slice(start, stop)
            start = stop

    def _decomposed(self, X: Tensor) -> tuple[Tensor, Tensor]:
        if not self.lowrank:
            _, S, Vh = torch.linalg.svd(X, full_matrices=False, driver=self.svd_driver)
            return S, Vh
        with torch.random.fork_rng(enabled=self.lowrank_seed is not None):
            if self.lowrank_seed is not None:
                torch.manual_seed(self.lowrank_seed)
            q = min(self.lowrank_q or 6, *X.shape)
            _, S, V = torch.svd_lowrank(X, q=q, niter=self.lowrank_niter)
        return S, V.mH

    def _checked(self, X: Any) -> Tensor:
        X = X.clone() if isinstance(X, Tensor) and self.copy else torch.as_tensor(X)
        count, features = X.shape
        if self.n_components is not None and self.n_components > min(count, features):
            raise ConfigError(
                f"IncrementalPCA: n_components is {self.n_components}; {count} rows of {features} features have fewer."
            )
        return X if X.dtype in (torch.float32, torch.float64) else X.float()
