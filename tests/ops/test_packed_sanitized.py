"""The C++ library under the address and undefined behaviour sanitizers, on matrices without a byte to spare."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from admm_prune.ops import packed

SOURCE = Path(packed.__file__).parents[1] / "csrc/sanitize.cpp"
SANITIZERS = "-fsanitize=address,undefined", "-fno-sanitize-recover=all"


@pytest.mark.slow
def test_no_access_beyond_the_arrays(tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    if compiler is None or not SOURCE.is_file():
        pytest.skip("no g++, or no sources of the library")
    empty = tmp_path / "empty.cpp"
    empty.write_text("int main() {}\n")
    if subprocess.run(
        [compiler, *SANITIZERS, empty, "-o", tmp_path / "empty"], capture_output=True, check=False
    ).returncode:
        pytest.skip("g++ has no sanitizers")
    program = tmp_path / "sanitize"
    subprocess.run([compiler, "-std=c++17", "-O1", "-g", "-w", *SANITIZERS, SOURCE, "-o", program], check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[0]) > 5000
