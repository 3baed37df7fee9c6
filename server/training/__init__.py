"""QLoRA training on the resident base, in pieces between inference steps, in the engine process."""
