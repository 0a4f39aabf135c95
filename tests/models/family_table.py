"""The table of families and methods: what applies, what does not and why. `python -m tests.models.family_table` writes
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
    "stablelm-parallel": "StableLM 2: parallel, norms per head",
    "olmo2": "OLMo 2",
    "opt": "OPT",
    "opt-post-norm-untied": "OPT-350M: post-norm, projections",
    "gpt2": "GPT-2",
    "neox": "GPT-NeoX, parallel",
    "neox-sequential": "GPT-NeoX, sequential",
    "bloom": "Bloom",
    "falcon": "Falcon 7B: multi-query attention",
    "falcon-grouped": "Falcon 40B: grouped-query attention",
    "falcon-classic": "Falcon: multi-head attention",
    "falcon-alibi": "Falcon RW: ALiBi",
    "mixtral": "Mixtral",
    "qwen3-moe": "Qwen3-MoE",
}  # of tiny_models, and what they stand for

COLUMNS = {
    "layer-wise": (
        "magnitude", "wanda", "sparsegpt", "admm", "admm-fast", "admm-best", "alps", "admm-gradual",
    ),
    "networks": ("sparsellm", "sequential", "sparsellm-release"),
    "structured, per block": ("struprune", "structured-global", "structured-wanda"),
    "structured, uniform": ("struprune-uniform",),
    "structured, padded": ("struprune-padded",),
    "training": ("elsa", "elsa-l", "elsa-published", "staged", "admm-finetuned", "gradual", "tuned-dense"),
}  # fmt: skip

_UNITS = ("structured, per block", "structured, uniform", "structured, padded")
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
    "Only neurons are removed: queries, keys and values are one matrix whose shape does not show where a head is.",
)
_NORMS = Limit(
    "neurons",
    "has norms for single heads, or over all of them",
    "Only neurons are removed: attention has a norm over all heads, or one per head.",
)
_ALIBI = Limit(
    "neurons",
    "gives every head its own slope (ALiBi)",
    "Only neurons are removed: every head has its own slope (ALiBi), which depends on its index.",
)
_EXPERTS = Limit(
    "no",
    "is a mixture of experts, which has no structured groups",
    "Experts are not sliced: a router selects their tokens, which the loss curve of a single sublayer does not model.",
    refused=True,
)
_NETWORKS = Limit(
    "no",
    "is a mixture of experts, not one feed-forward network",
    "Every expert is a feed-forward network with its own tokens; experts are pruned by the layer-wise methods.",
    refused=True,
)
_FIXED = Limit(
    "no",
    "0% can go at most",
    "The standard class always has four times as many neurons as its hidden size.",
    refused=True,
)

_FOLLOWS = Limit(
    "neurons",
    "",
    "Only neurons are removed: the standard class derives the head size from the number of heads.",
)
_ONE_HEAD = Limit("neurons", "", "Only neurons are removed: all query heads share one key head.")

_STAY = {"phi3": _ONE_MATRIX, "gpt2": _ONE_MATRIX, "bloom": _ONE_MATRIX, "olmo2": _NORMS, "falcon-alibi": _ALIBI}
_STAY |= {"stablelm-parallel": _NORMS, "falcon": _ONE_HEAD}

LIMITS: dict[tuple[str, str], Limit] = {
    **{(family, column): limit for family, limit in _STAY.items() for column in _UNITS},
    **{(family, column): _EXPERTS for family in _MIXTURES for column in _UNITS},
    **{(family, "networks"): _NETWORKS for family in _MIXTURES},
    **{(family, "structured, uniform"): _FOLLOWS for family in _BY_WIDTH},
    ("bloom", "structured, uniform"): _FIXED,
}

_OPENING = """# Model families

Every cell is tested by `tests/models/test_family_table.py` on a small model with random weights, built from the
config class of the family: it is pruned, saved and reloaded with standard `from_pretrained`, and the logits must be
bitwise equal. Where something does not apply, the test checks that it is refused, or skipped with a note.
Only "structured, per block" needs `trust_remote_code=True` to load. `make test` runs one method of
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
    return "\n".join([_OPENING, *lines, "", "The columns:", "", *columns, "", "Exceptions:", "", *notes, "", _CLOSING])


_CLOSING = """Blocks and weights are found by structure: the list of similar modules with the most parameters, every
`nn.Linear` and `Conv1D` in it, and every expert matrix, a slice of a three-dimensional parameter. Routers and
embeddings are not pruned, nor are the depthwise convolutions and the time-step projections of hybrid
models (Mamba, Qwen3-Next, Falcon-H1, Jamba, Granite 4): a note names them. An expert that received fewer
calibration tokens than one of its matrices has inputs is pruned on all tokens of its block, and
the report says so. Other decoders with this structure are supported too. Decoders that store their weights
differently, encoders, encoder-decoders and multimodal models are refused; the message names the class and
the first block that could not be read. Refused too are models that cannot be replayed block by block: those that
call a block several times, that hand more than hidden states from block to block (`glm_moe_dsa`: the tokens that an
indexer chose), or that change the hidden states between blocks (XLM).
"""

if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(), encoding="utf-8")
