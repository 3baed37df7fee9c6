"""transformers with bitsandbytes NF4 on a mixture of experts, in a process of its own: JSON lines in, JSON lines out.

transformers holds the experts of a layer in two parameters, which its bitsandbytes quantisation leaves as they are. So
there are three layouts, each the fastest in some case. Started by `loadtest.mixture`; bursts are `peft_worker`'s.
"""

import json
import sys
import warnings
from typing import Any

LAYOUTS = {
    "dense": "experts not quantised",  # the result of `load_in_4bit`
    "parameters": "experts as 4-bit parameters",  # bitsandbytes' own, decoded whole
    "linears": "experts as 4-bit linears",  # one module each, as in transformers before version 5
}


def quantize_experts(model: Any, layout: str) -> None:
    """Convert the experts of a loaded model to one of the layouts."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    for layer in model.model.layers:
        experts = layer.mlp.experts
        if layout == "parameters":
            for name in ("gate_up_proj", "down_proj"):
                replace_parameter_4bit(experts, name, compress_statistics=True, quant_type="nf4")
        elif layout == "linears":
            layer.mlp.experts = separate(experts)


def separate(experts: Any) -> Any:
    """Return transformers' experts with a `Linear4bit` in place of each weight."""
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit
    from torch import Tensor, nn

    def linear(weight: Tensor) -> Linear4bit:
        made = Linear4bit(weight.shape[1], weight.shape[0], bias=False, compute_dtype=weight.dtype, quant_type="nf4")
        made.weight = Params4bit(weight.detach().clone(), requires_grad=False, quant_type="nf4")
        return made.to(weight.device)  # this quantises it

    class Separate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up = nn.ModuleList(map(linear, experts.gate_up_proj))
            self.down = nn.ModuleList(map(linear, experts.down_proj))
            self.act_fn = experts.act_fn

        def forward(self, hidden: Tensor, index: Tensor, scores: Tensor) -> Tensor:
            out = torch.zeros_like(hidden)
            for expert in index.unique().tolist():
                rows, places = torch.where(index == expert)
                gate, up = self.gate_up[expert](hidden[rows]).chunk(2, dim=-1)
                found = self.down[expert](self.act_fn(gate) * up) * scores[rows, places, None]
                out.index_add_(0, rows, found.to(out.dtype))
            return out

    return Separate()


def main() -> None:
    """Serve bursts until standard input ends."""
    import torch

    from loadtest.peers.peft_worker import generate, load_base

    warnings.simplefilter("ignore")
    answers = sys.stdout
    sys.stdout = sys.stderr  # keeps libraries' prints out of the protocol
    settings = json.loads(sys.stdin.readline())
    model = load_base(settings, getattr(torch, settings["dtype"]))
    quantize_experts(model, settings["experts"])
    model.eval()
    model.generation_config.eos_token_id = None  # every sequence runs to its full length
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        burst = json.loads(line)
        times, rows = generate(model, burst["prompts"], burst["tokens"])
        print(json.dumps([{"times": times, "tokens": row} for row in rows]), file=answers, flush=True)


if __name__ == "__main__":
    main()
