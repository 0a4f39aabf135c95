"""What the command line refuses before it imports torch, which takes seconds."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
from admm_prune.cli import main
sys.argv = ["admm-prune", *sys.argv[1:]]
try: main()
except SystemExit as end: print(end.code, "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    "words",
    [
        "run --method sparsgpt --sparsity 0.5 --out out",
        "compare --methods wanda,sparsgpt --sparsity 0.5 --out out",
        "plan --problem layr --sparsity 0.5",
        "solve layer.safetensors --constraint rowwise --sparsity 0.5",
    ],
)
def test_a_misspelt_name_is_refused_without_torch(words: str) -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT, *words.split()], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert "(did you mean '" in done.stderr
    assert done.stderr.count("\n") == 1
