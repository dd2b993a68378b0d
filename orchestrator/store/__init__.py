"""Runs as they are stored: one folder each, readable with no cluster up, written by one driver at a time.

    ROOT/ID/run.json                what the run is, its state, and who writes it; changed by replace_if alone
    ROOT/ID/spec.yaml               the resolved job
    ROOT/ID/events.jsonl            every change of state, checkpoint, warning and failure
    ROOT/ID/metrics.jsonl           progress and evaluations
    ROOT/ID/logs/worker-RANK.log    what each worker printed
    ROOT/ID/checkpoints/, final.F/  the trainer's

run.json also carries the lease (`lease.py`): a driver that took the run over has changed the document, so that every
later write of the one before fails: that is the fence.
"""

from .held import Run
from .record import RunRecord, run_identity
from .runs import RunStore

__all__ = ["Run", "RunRecord", "RunStore", "run_identity"]
