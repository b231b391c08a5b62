"""LoRA files, what they add to a weight, and PEFT's adapters."""
