"""lm-eval's completions model: log-likelihoods and generations, with a local tokenizer and with the server's."""

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI


@pytest.mark.parametrize("backend", ["huggingface", "remote"])
def test_scores_and_answers(api: str, model: str, model_dir: str, backend: str) -> None:
    lm = LocalCompletionsAPI(
        base_url=f"{api}/completions",
        model=model,
        tokenizer=model_dir if backend == "huggingface" else None,
        tokenizer_backend=backend,
        max_length=512,
        num_concurrent=1,
    )
    ask = Instance("loglikelihood", {}, ("A parrot is a", " bird"), 0)
    [(score, greedy)] = lm.loglikelihood([ask])
    assert score < 0
    assert greedy in (True, False)
    told = Instance("generate_until", {}, ("Once upon a time", {"until": ["."], "max_gen_toks": 8}), 0)
    [text] = lm.generate_until([told])
    assert isinstance(text, str)
