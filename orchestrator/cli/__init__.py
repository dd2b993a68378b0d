"""The command `raypeft`: thin commands over `orchestrator.api`. Importing the modules adds their commands."""

from . import adapters, author, endpoints, runs
from .app import app, main, run_guarded

__all__ = ["adapters", "app", "author", "endpoints", "main", "run_guarded", "runs"]
