"""The command `raypeft`: thin commands over `orchestrator.api`. Importing the modules adds their commands."""

from . import adapters, author, endpoints, keys, rollouts, runs, sweeps
from .app import app, main, run_guarded

__all__ = [
    "adapters",
    "app",
    "author",
    "endpoints",
    "keys",
    "main",
    "rollouts",
    "run_guarded",
    "runs",
    "sweeps",
]
