"""What is made of adapters: weighted combinations, plain LoRA, LoRA without intruders."""
