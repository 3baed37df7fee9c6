"""PEFT adapter directories: config, tensor layout, safetensors header, packed rows. No torch at import."""
