"""A worker's side of training: the base, the adapters on it, their steps."""
