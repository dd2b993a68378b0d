"""One file a method: the configs that the laws and the comparison with HF PEFT run on."""
