"""The table of families and methods: what applies, what does not and why. `python tests/models/family_table.py` writes
docs/families.md; `test_family_table.py` runs every cell.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "families.md"

FAMILIES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3, text",
    "phi3": "Phi-3",
    "stablelm": "StableLM",
    "stablelm-parallel": "StableLM 2, parallel, a norm for every head",
    "olmo2": "OLMo 2",
    "opt": "OPT",
    "opt-post-norm-untied": "OPT-350M: norms after, projections",
    "gpt2": "GPT-2",
    "neox": "GPT-NeoX, parallel",
    "neox-sequential": "GPT-NeoX, sequential",
    "bloom": "Bloom",
    "falcon": "Falcon 7B: one key head",
    "falcon-grouped": "Falcon 40B: grouped key heads",
    "falcon-classic": "Falcon, a key for every head",
    "falcon-alibi": "Falcon RW: ALiBi",
    "mixtral": "Mixtral",
    "qwen3-moe": "Qwen3-MoE",
}  # of tiny_models, and what they stand for

COLUMNS = {
    "layer by layer": (
        "magnitude", "wanda", "sparsegpt", "admm", "admm-fast", "admm-best", "alps", "admm-gradual",
    ),
    "networks": ("sparsellm", "sequential", "sparsellm-release"),
    "units, blocks unlike": ("struprune", "structured-global", "structured-wanda"),
    "units, uniform": ("struprune-uniform",),
    "units, padded": ("struprune-padded",),
    "training": ("elsa", "elsa-l", "elsa-published", "admm-finetuned", "gradual", "tuned-dense"),
}  # fmt: skip

_UNITS = ("units, blocks unlike", "units, uniform", "units, padded")
_BY_WIDTH = ("opt", "opt-post-norm-untied", "neox", "neox-sequential", "stablelm", "falcon-grouped", "falcon-classic")
_MIXTURES = ("mixtral", "qwen3-moe")


@dataclass(frozen=True)
class Limit:
    """What does not apply.

    Attributes:
        mark: in the table.
        says: a part of the error where `refused`, of the note otherwise; no note where it is empty.
        why: for the reader.
    """

    mark: str
    says: str
    why: str
    refused: bool = False


_ONE_MATRIX = Limit(
    "neurons",
    "keeps queries, keys and values in one matrix",
    "Neurons alone go: queries, keys and values are one matrix, of which shapes do not tell where a head lies.",
)
_NORMS = Limit(
    "neurons",
    "has norms of its own for heads, or over all of them",
    "Neurons alone go: attention has a norm over all heads, or one for every head.",
)
_ALIBI = Limit(
    "neurons",
    "gives every head a slope of its own (ALiBi)",
    "Neurons alone go: every head has a slope of its own (ALiBi), which its number tells.",
)
_EXPERTS = Limit(
    "no",
    "is a mixture of experts, which loses no units",
    "The units of experts are not cut: tokens reach them by a router, and no curve of one branch says what that loses.",
    refused=True,
)
_NETWORKS = Limit(
    "no",
    "is a mixture of experts, not one feed-forward network",
    "A block has as many networks as experts, each with its own tokens; they are pruned layer by layer.",
    refused=True,
)
_FIXED = Limit(
    "no",
    "0% can go at most",
    "The stock class has four times as many neurons as its width, always.",
    refused=True,
)

_FOLLOWS = Limit(
    "neurons",
    "",
    "Neurons alone go: the stock class makes heads larger where there are fewer, so that their number stays.",
)
_ONE_HEAD = Limit("neurons", "", "Neurons alone go: all queries read one key head.")

_STAY = {"phi3": _ONE_MATRIX, "gpt2": _ONE_MATRIX, "bloom": _ONE_MATRIX, "olmo2": _NORMS, "falcon-alibi": _ALIBI}
_STAY |= {"stablelm-parallel": _NORMS, "falcon": _ONE_HEAD}

LIMITS: dict[tuple[str, str], Limit] = {
    **{(family, column): limit for family, limit in _STAY.items() for column in _UNITS},
    **{(family, column): _EXPERTS for family in _MIXTURES for column in _UNITS},
    **{(family, "networks"): _NETWORKS for family in _MIXTURES},
    **{(family, "units, uniform"): _FOLLOWS for family in _BY_WIDTH},
    ("bloom", "units, uniform"): _FIXED,
}

_OPENING = """# Families and methods

Every cell is run by `tests/models/test_family_table.py` on a tiny model of random weights, built from the
family's own config: pruned, saved, loaded again by stock `from_pretrained`, the same logits to the bit. Where
a cell says that something does not apply, the test checks that it is refused, or left alone with a note.
"blocks unlike" needs `trust_remote_code=True`; all other cells load without. `make test` runs one method of
most columns for every family, `make test-all` all of them.
"""


def render() -> str:
    """The page."""
    reasons: dict[str, int] = {}
    lines = ["| family | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for family, label in FAMILIES.items():
        cells = []
        for column in COLUMNS:
            limit = LIMITS.get((family, column))
            cells.append(
                "yes" if limit is None else f"{limit.mark} ({reasons.setdefault(limit.why, len(reasons) + 1)})"
            )
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    columns = [f"- **{column}**: " + ", ".join(f"`{name}`" for name in names) for column, names in COLUMNS.items()]
    notes = [f"{number}. {why}" for why, number in reasons.items()]
    return "\n".join(
        [_OPENING, *lines, "", "The columns:", "", *columns, "", "What does not apply:", "", *notes, "", _CLOSING]
    )


_CLOSING = """Blocks and weights are found by structure: the longest list of alike modules by parameters, every
`nn.Linear` and `Conv1D` in it, and every matrix of experts, a slice of one parameter. Routers and
embeddings are not pruned, nor are the depthwise convolutions and the projections of time steps of hybrid
models (Mamba, Qwen3-Next, Falcon-H1, Jamba, Granite 4): a note names them. An expert
to which the router sent fewer calibration tokens than a matrix of its has inputs is
pruned on all tokens of its block, and its report says so. Any other decoder
that keeps its weights so is pruned too; one that keeps them otherwise, an encoder (with a decoder or alone),
and a model that reads more than text are refused in a line that names the class and the first block
that could not be read.
"""

if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
