"""The HTTP side of a replica: who asks, for what, and what answers look like."""
