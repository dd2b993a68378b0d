"""Experiment tracking: what the driver of a run or a sweep tells MLflow, TensorBoard and W&B.

`session.py` is all that a driver imports: it hands lines to a process of its own (`process.py`), which alone imports
the trackers' libraries, so that neither their imports nor their waiting costs a run anything.
"""
