"""QLoRA training on the resident base, in pieces between inference steps. Engine process."""
