"""`make sweep`: judges every type that transformers registers; the table is docs/reference/models.md.

    python -m tests.sweep [TYPE ...]      types instead of all: their verdicts are printed, the table stays

Exits with 1 if any is wrong or unclear, and then leaves the table unchanged.
"""

import os
import sys
from pathlib import Path

from tests.sweep.running import sweep

TABLE = Path(__file__).parent.parent.parent / "docs" / "reference" / "models.md"
ABOUT = """\
For every causal and image-text model type that transformers registers, a tiny random model with its makers' settings is
loaded as it is and quantised to nf4. A type is served when two requests of one batch, one of them through an adapter on
every linear, in chunks and ten decoded tokens, and the losses of two training steps equal those of eager transformers
with PEFT within 1e-3, or its jobs are refused by name. Every other type is refused before it serves, in one line that
names the reason."""


def table(verdicts: dict[str, tuple[str, str]], versions: str) -> str:
    """The text of docs/reference/models.md."""
    served = [f"| `{name}` | {reason} |" for name, (word, reason) in sorted(verdicts.items()) if word == "served"]
    refused = [
        f"| `{name}` | {reason.replace('|', '/')} |"
        for name, (word, reason) in sorted(verdicts.items())
        if word != "served"
    ]
    return "\n".join(
        [
            "# Model types",
            "",
            f"Written by `make sweep` with {versions}; not edited by hand.",
            "",
            *ABOUT.splitlines(),
            "",
            f"## Served ({len(served)})",
            "",
            "| type | largest difference (log-probability, loss) |",
            "|---|---|",
            *served,
            "",
            f"## Refused ({len(refused)})",
            "",
            "| type | reason |",
            "|---|---|",
            *refused,
            "",
        ]
    )


def main() -> int:
    """Judge the types named on the command line, or judge all and write the table."""
    from tests.sweep.families import CAUSAL, VARIANTS, WRAPPERS  # imports torch; children set their own limits

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    named = sys.argv[1:]
    every = sorted({*CAUSAL, *WRAPPERS, *VARIANTS})
    verdicts = sweep(named or every, workers=os.cpu_count() or 1)
    bad = {name for name, (word, _) in verdicts.items() if word in {"wrong", "unclear"}}
    counts = {word: sum(w == word for w, _ in verdicts.values()) for word in ("served", "refused", "wrong", "unclear")}
    print(", ".join(f"{word} {count}" for word, count in counts.items()))
    if not named and not bad:
        import peft
        import transformers

        TABLE.parent.mkdir(parents=True, exist_ok=True)
        TABLE.write_text(table(verdicts, f"transformers {transformers.__version__} and PEFT {peft.__version__}"))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
