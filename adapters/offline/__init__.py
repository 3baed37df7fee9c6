"""Work on adapters outside the engine: checking, mixing, merging to a checkpoint, PEFT as oracle."""
