"""Adapters merged into their base's files, as tasks of Ray: `raypeft merge`."""
