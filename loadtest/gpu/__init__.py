"""All measurements that need an NVIDIA GPU, in one command: `python -m loadtest.gpu`, or `make gpu`.

`parts` measures, `lines` compares figures with promises, `models` makes the models. Imports only torch, transformers,
bitsandbytes, PEFT and msgspec.
"""
