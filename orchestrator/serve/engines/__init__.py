"""What answers: a base with adapters, whole texts or task heads, one at a time or many at once."""
