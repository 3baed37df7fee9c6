"""Everything that needs an NVIDIA GPU, in one command: `python -m loadtest.gpu`, or `make gpu`.

`parts` measures, `lines` says what is promised and what became of it, `models` makes what is measured upon. Imports
nothing that a machine with torch, transformers, bitsandbytes, PEFT and msgspec would lack.
"""
