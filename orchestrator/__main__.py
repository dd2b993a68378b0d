"""`python -m orchestrator` is `raypeft`."""

from .processes import hear_interrupts

hear_interrupts()  # first of all: the command line takes a moment to import

from .cli import main  # noqa: E402

main()
