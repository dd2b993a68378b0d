"""Optimizers for LoRA."""
