"""All sides of comparisons, by name."""

from loadtest.peers import llama, peft, transformers_serve, vllm
from loadtest.peers.base import Side
from loadtest.peers.lorakeet import Lorakeet, LorakeetBare, LorakeetInt8, LorakeetKv16
from loadtest.peers.lorakeet_offline import LorakeetOffline

SIDES: dict[str, type[Side]] = {
    side.name: side
    for side in (
        Lorakeet,
        LorakeetBare,
        LorakeetInt8,
        LorakeetKv16,
        LorakeetOffline,
        llama.Llama,
        llama.LlamaStatic,
        llama.LlamaQ40,
        llama.LlamaQ40Static,
        vllm.Vllm,
        vllm.VllmBf16,
        peft.Peft,
        peft.PeftBf16,
        peft.PeftSwitching,
        transformers_serve.TransformersServe,
        transformers_serve.TransformersServeBf16,
    )
}

# Peers with environments of their own, and their installers.
RECIPES = {"llama": llama.install, "vllm": vllm.install, "transformers": transformers_serve.install}
