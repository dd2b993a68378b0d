"""`python -m orchestrator` is `raypeft`."""

from .cli import main

main()
