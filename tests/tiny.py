"""Tiny models and adapters, made on the spot: real architectures, random weights, a real tokenizer.

    tiny_model(path)                 a Llama of about 100k parameters in Hugging Face layout
    tiny_adapter(path, model, ...)   a PEFT LoRA adapter for it, saved by PEFT itself

Random B has a standard deviation near 0.08, so that an adapter really changes what is generated.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB = 512
ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_TEXT = [
    "The quick brown fox jumps over the lazy dog. ",
    "Adapters share one resident base; each request names its own.",
    "Wörter mit Ümläuten, 漢字, emoji 🦜🦜 and\nnew lines\ttabs.",
    "def forward(self, x): return self.base(x) + self.scale * (x @ a.T) @ b",
    "0123456789 ten twenty thirty, (brackets) [and] {braces}; 'quotes' \"too\"!",
]


@cache
def _tokenizer() -> transformers.PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_TEXT * 4, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token="<|im_start|>"
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_model(path: Path, *, seed: int = 0, **overrides: Any) -> Path:
    """Write a tiny random Llama (or `config_class=`/`model_class=` of another family) with its tokenizer to `path`."""
    config_class = overrides.pop("config_class", transformers.LlamaConfig)
    model_class = overrides.pop("model_class", transformers.LlamaForCausalLM)
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    config = config_class(**(settings | overrides))
    torch.manual_seed(seed)
    model = model_class(config).float()
    with torch.no_grad():  # the default initialisation is so small that every logit is alike
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 1.0 if "embed" in name else 2.0 * parameter.shape[1] ** -0.5)
    model.save_pretrained(path)
    _tokenizer().save_pretrained(path)
    return path


def tiny_adapter(
    path: Path, model: Path, *, seed: int = 0, b_std: float = 0.08, dtype: torch.dtype = torch.float32, **config: Any
) -> Path:
    """Save a random PEFT adapter for the model at `model` to `path`; `config` goes to `peft.LoraConfig`."""
    import peft

    base = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"}
    wrapped = peft.get_peft_model(base, peft.LoraConfig(**(settings | config)))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, b_std)
            elif "lora_A" in name:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            elif "lora_embedding_A" in name:
                parameter.normal_(0.0, 0.5)
            elif "lora_embedding_B" in name:
                parameter.normal_(0.0, b_std)
            elif parameter.requires_grad:  # a magnitude, a bias, a module or a token that is trained as it is
                parameter.mul_(1 + 0.2 * torch.randn_like(parameter)).add_(0.02 * torch.randn_like(parameter))
            if "lora_" in name:
                parameter.data = parameter.data.to(dtype)
    wrapped.save_pretrained(path)
    return path
