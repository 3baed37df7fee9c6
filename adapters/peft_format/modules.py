"""Parts of an adapter: pairs of A and B, and its effects beyond those. Names and numbers only."""

from collections.abc import Collection
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoraModule:
    """One adapted module: delta(x) = scaling * B (A x).

    Attributes:
        a: name in the file of A [rank, in].
        b: name in the file of B [out, rank].
    """

    rank: int
    scaling: float
    a: str
    b: str

    @property
    def tensors(self) -> list[str]:
        """Names of the tensors in the file."""
        return [self.a, self.b]


@dataclass(frozen=True)
class ExpertsModule(LoraModule):
    """Adapters of one linear of every expert of a layer, all of one rank and scaling.

    A and B are those of all experts in PEFT's layout, A [experts * rank, in] expert by expert and B [out, rank *
    experts] rank by rank; or each expert's own, with a * for the expert in their names.

    Attributes:
        parameter: full name of the base's parameter that holds these linears.
        part: the adapted one of the `parts` equal parts of that parameter's outputs.
    """

    experts: int
    parameter: str
    part: int = 0
    parts: int = 1

    @property
    def tensors(self) -> list[str]:
        if "*" not in self.a:
            return [self.a, self.b]
        return [name.replace("*", str(expert)) for name in (self.a, self.b) for expert in range(self.experts)]


def peft_module_of(parameter: str, adapted: Collection[str]) -> str:
    """The module of A and B of a parameter in PEFT's files: PEFT wraps a module once for each adapted parameter, the
    last one outermost.

    Args:
        adapted: all adapted parameters, those of one module in its order.
    """
    module = parameter.rpartition(".")[0]
    siblings = [other for other in adapted if other.rpartition(".")[0] == module]
    return module + ".base_layer" * (len(siblings) - 1 - siblings.index(parameter))


@dataclass(frozen=True)
class Variants:
    """The effects of an adapter besides adding B A x to linears of the decoder; all names are full names of the base's.

    Attributes:
        tables: the embedding and the head, where adapted.
        experts: experts' linears, by the name of the parameter that holds them, or by their own with a * in it.
        routers: routers' weights, by the name of the parameter.
        magnitudes: module -> tensor [out], DoRA's m.
        delta_biases: linear -> tensor [out] added by lora_B.
        parameters: parameter of the base -> tensor in its place (a bias, a norm's weight, a whole embedding or head).
        tokens: embedding or head -> tensor of trained rows [n, width].
        token_ids: embedding or head -> the ids of these rows.
        new_tokens: rows of the adapter's embedding and head beyond the base's; negative: as many fewer.
        grown: embedding, head or the head's bias -> tensor of the larger vocabulary's size, the new rows last.
        invocation: token ids; the adapter is in force from their last occurrence in the prompt on; empty: everywhere.
        classifier: "weight" [num_labels, hidden], perhaps "bias" -> tensor, of a head in place of the output head.
        device_bytes: an upper bound of the device memory for all these.
    """

    tables: dict[str, LoraModule] = field(default_factory=dict)
    experts: dict[str, ExpertsModule] = field(default_factory=dict)
    routers: dict[str, LoraModule] = field(default_factory=dict)
    magnitudes: dict[str, str] = field(default_factory=dict)
    delta_biases: dict[str, str] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    token_ids: dict[str, list[int]] = field(default_factory=dict)
    new_tokens: int = 0
    grown: dict[str, str] = field(default_factory=dict)
    invocation: list[int] = field(default_factory=list)
    classifier: dict[str, str] = field(default_factory=dict)
    num_labels: int = 0
    device_bytes: int = 0

    @property
    def names(self) -> list[str]:
        """Names of the variants in use, for receipts."""
        whole = [name for name in self.parameters if not name.endswith(".bias")]
        return [
            name
            for name, used in {
                "dora": self.magnitudes,
                "lora_bias": self.delta_biases,
                "bias": len(whole) < len(self.parameters),
                "adapted_embeddings": self.tables,
                "experts": self.experts,
                "routers": self.routers,
                "saved_modules": whole,
                "trained_tokens": self.tokens,
                "new_tokens": self.new_tokens > 0,
                "fewer_tokens": self.new_tokens < 0,
                "alora": self.invocation,
                "classifier": self.classifier,
            }.items()
            if used
        ]
