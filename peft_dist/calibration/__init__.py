"""Starts of LoRA that a program runs itself: from data, or from the weights before they were quantised."""
