"""Wrong words on the command line, over every command: one line on stderr, status 2, nothing written.

MODEL and TEXT stand for a tiny model and a text, LAYER for a layer problem; `run`, `compare` and so on begin as usual.
"""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.cli.outcome import Refused

RUN = "run --model MODEL --data TEXT --sparsity 0.5 --out out"
COMPARE = "compare --model MODEL --data TEXT --sparsity 0.5 --out out"
CAPTURE = "capture --model MODEL --data TEXT --weight model.layers.0.mlp.up_proj.weight --out captured.safetensors"

CASES = [
    # commands and their options
    ("rnu", "No such command 'rnu'"),
    ("prune", "No such command 'prune'"),
    ("--verson", "No such option: --verson"),
    ("--version=2", "'--version' does not take a value"),
    ("run --sparsty 0.5", "--sparsty (Possible options: --sparsity"),
    ("run --sparsity", "'--sparsity' requires an argument"),
    (f"{RUN} extra", "unexpected extra argument(s) (extra)"),
    (f"{RUN} --json true", "unexpected extra argument(s) (true)"),
    (f"{RUN} --json=true", "'--json' does not take a value"),
    (f"{RUN} -x", "No such option: -x"),
    ("recipe shw wanda", "No such command 'shw'. Did you mean 'show'?"),
    ("recipe show", "Missing argument 'name'"),
    ("bench memry", "No such command 'memry'. Did you mean 'memory'?"),
    ("compare --methods wanda --sparsity 0.5", "Missing option '--out'"),
    ("solve", "Missing argument 'file'"),
    ("pack MODEL", "Missing argument 'out'"),
    # names
    (f"{RUN} --method sparsgpt", "unknown method 'sparsgpt' (did you mean 'sparsegpt'?): choose one of magnitude"),
    (f"{RUN} --method ADMM-fast", "unknown method 'ADMM-fast' (did you mean 'admm-fast'?)"),
    (f"{RUN} --method ''", "unknown method ''"),
    (f"{RUN} --method my_parts:IHT", "'my_parts:IHT' is no name of a method: MODULE:ATTRIBUTE is for 'check-plugin'"),
    (f"{RUN} --problem my.parts:Loss", "'my.parts:Loss' is no name of a problem"),
    (f"{RUN} --problem layr", "unknown problem 'layr' (did you mean 'layer'?): choose one of layer"),
    (f"{RUN} --constraint rowwise", "unknown constraint 'rowwise' (did you mean 'row-wise'?)"),
    (f"{RUN} --packing document", "not 'document' (did you mean 'documents'?)"),
    (f"{RUN} --dtype float23", "not 'float23' (did you mean 'float32'?)"),
    (f"{RUN} --dtype fp16", "dtype must be float32, bfloat16 or float16, not 'fp16'"),
    (f"{RUN} --device cdua", "not 'cdua'"),
    (f"{RUN} --precision bf61", "precision must be auto, bf16 or float32, not 'bf61' (did you mean 'bf16'?)"),
    (f"{RUN} --unit byts", "not 'byts' (did you mean 'bytes'?)"),
    (f"{COMPARE} --methods wanda,sparsegtp", "unknown method 'sparsegtp' (did you mean 'sparsegpt'?)"),
    (f"{CAPTURE} --problem layre", "unknown problem 'layre' (did you mean 'layer'?)"),
    ("solve LAYER --sparsity 0.5 --solver amdm", "unknown method 'amdm' (did you mean 'admm'?)"),
    ("solve LAYER --sparsity 0.5 --solver brute-froce", "(did you mean 'brute-force'?)"),
    ("reproduce wnda --out out", "unknown recipe 'wnda' (did you mean 'wanda'?): choose one of admm-gradual"),
    ("recipe show sparsegtp", "unknown recipe 'sparsegtp' (did you mean 'sparsegpt'?)"),
    ("list metods", "unknown kind 'metods' (did you mean 'methods'?): choose one of methods, references"),
    ("list Solvers", "unknown kind 'Solvers' (did you mean 'solvers'?)"),
    ("list modules --why", "--why is for the solvers, not for modules"),
    ("list modules --model ./nowhere", "./nowhere: there is no such model folder"),
    ("list methods --model MODEL", "a model is for its modules: give 'list modules --model ...'"),
    ("list --trust-remote-code", "a model is for its modules"),
    # settings that no method of a comparison takes, and those that do not go together
    (f"{COMPARE} --methods wanda --steps 8", "no method of this comparison takes --steps: it is for elsa, elsa-l"),
    (f"{COMPARE} --methods wanda --compile", "no method of this comparison takes --compile: it is for elsa, elsa-l"),
    (f"{COMPARE} --methods wanda --unit bytes", "no method of this comparison takes --unit: it is for struprune"),
    (f"{COMPARE} --methods wanda --constraint rowwise", "unknown constraint 'rowwise' (did you mean 'row-wise'?)"),
    (f"{COMPARE} --pattern 2:4 --constraint row-wise", "the pattern 2:4 is a sparse set of its own"),
    (f"{COMPARE} --methods wanda,struprune --constraint row-wise", "struprune takes no constraint"),
    (f"{COMPARE} --methods wanda,struprune --bounds", "has no layer problems to bound: leave --bounds out"),
    ("plan --model MODEL --pattern 2:4 --constraint row-wise", "the pattern 2:4 is a sparse set of its own"),
    ("plan --model MODEL --sparsity 0.5 --memory inf", "'--memory'"),
    ("run --dry-run --method wanda --steps 8 --sparsity 0.5", "wanda does not train: --steps is for"),
    ("run --dry-run --sparsity 0.5 --device gpu", "device"),
    ("run --dry-run --sparsity 0.5 --shots 3", "shots is of tasks: name them with tasks"),
    ("run --dry-run --sparsity 0.5 --activation-memory -1", "'--activation-memory'"),
    ("run --dry-run --constraint row-wise --pattern 2:4", "the pattern 2:4 is a sparse set of its own"),
    # patterns for modules
    (f"{RUN} --targets q_prj", "matches 'q_prj' (did you mean 'q_proj'?): 'admm-prune list modules --model MODEL'"),
    (f"{RUN} --targets lm_head", "no module in LlamaForCausalLM's blocks matches 'lm_head'"),
    (f"{RUN} --targets q_proj,k_proj", "matches 'q_proj,k_proj'"),
    (f"{RUN} --targets '*q_proj'", "matches '*q_proj' (did you mean 'q_proj'?)"),
    (f"{RUN} --targets ''", "an empty pattern"),
    (f"{RUN} --targets 're:('", "'re:(' is no regular expression"),
    (f"{RUN} --ignore Lamamlp", "matches 'Lamamlp' (did you mean 'LlamaMLP'?)"),
    (f"{RUN} --ignore Linear", "nothing is left to prune"),
    (f"{RUN} --override up_proj", "an override is PATTERN=TARGET"),
    (f"{RUN} --override =0.5", "an override is PATTERN=TARGET"),
    (f"{RUN} --override up_porj=0.5", "matches 'up_porj' (did you mean 'up_proj'?)"),
    (f"{RUN} --override up_proj=half", "sparsity must be a number from 0 to 1, not 'half'"),
    (f"{RUN} --override up_proj=5:4", "pattern 5:4 must keep from 1 to 4 of every 4"),
    # numbers
    ("run --model MODEL --data TEXT --sparsity 50% --out out", "sparsity must be a number from 0 to 1, not '50%'"),
    ("run --model MODEL --data TEXT --sparsity 50 --out out", "must lie between 0 and 1, not 50 (did you mean 0.5?)"),
    ("run --model MODEL --data TEXT --pattern 2:4:8 --out out", "pattern must be N:M"),
    ("run --model MODEL --data TEXT --out out", "give either a sparsity such as 0.7 or a pattern such as 2:4"),
    (f"{RUN} --samples many", "'--samples': Input should be a valid integer"),
    (f"{RUN} --samples 1.5", "'--samples': Input should be a valid integer"),
    (f"{RUN} --steps 0", "'--steps'"),
    (f"{RUN} --steps 8", "admm does not train: --steps is for"),
    (f"{RUN} --activation-memory much", "'--activation-memory': Input should be a valid number"),
    (f"{RUN} --log tensorbord:logs", "tensorbord"),
    ("plan --sparsity 0.5 --gpu h900", "h900"),
    ("plan --sparsity 0.5 --gpus none", "'--gpus': Input should be a valid integer"),
    ("bench memory --out out --sparsity 2", "'--sparsity'"),
    # tasks
    (f"{RUN} --tasks ''", "name at least one task"),
    (f"{RUN} --tasks ' , '", "name at least one task"),
    (f"{RUN} --taks piqa", "--taks (Possible options: "),
    (f"{RUN} --shots 3", "shots is of tasks: name them with tasks"),
    (f"{RUN} --task-folder folder", "task_folder is of tasks: name them with tasks"),
    (f"{RUN} --tasks piqa --shots -1", "'--shots'"),
    (f"{RUN} --tasks piqa --task-limit 0", "'--task-limit'"),
    (f"{RUN} --tasks piqa --task-folder nowhere", "nowhere: there is no such folder of tasks"),
    ("eval MODEL --tasks ''", "name at least one task"),
    ("eval MODEL --tasks piqa --data TEXT", "--data is of the text for the perplexity, which --tasks replaces"),
    ("eval MODEL --tasks piqa --length 64", "--length is of the text for the perplexity, which --tasks replaces"),
    ("eval MODEL --data TEXT --shots 3", "--shots is of tasks: name them with --tasks"),
    (f"{RUN} --coordinate ''", "coordinate names no part: choose attention"),
    (f"{RUN} --coordinate attn", "coordinate must be attention, not 'attn' (did you mean 'attention'?)"),
    (f"{RUN} --refit blocks", "refit must be block, not 'blocks' (did you mean 'block'?)"),
    ("eval MODEL --tasks piqa --task-folder TEXT", "there is no such folder of tasks"),
    ("eval MODEL --tasks piqa --task-limit none", "'--task-limit': Input should be a valid integer"),
    # sharing
    ("push", "Missing argument 'folder'"),
    ("push MODEL", "Missing argument 'repo_id'"),
    ("push nowhere org/tiny", "nowhere: there is no such folder"),
    ("push TEXT org/tiny", "there is no such folder"),
    ("push MODEL org/tiny", "was written neither by 'admm-prune run' nor by 'admm-prune pack'"),
    ("push MODEL org/tiny main", "unexpected extra argument(s) (main)"),
    ("push MODEL org/tiny --revison main", "--revison (Possible options: "),
    ("push MODEL org/tiny --private=yes", "'--private' does not take a value"),
    ("push MODEL org/tiny -v -q", "--verbose and --quiet exclude each other"),
    # plug-ins
    ("check-plugin", "Missing argument 'name'"),
    ("check-plugin nonesuch", "there is no plug-in 'nonesuch'"),
    ("check-plugin nowhere:Solver", "nowhere:Solver cannot be imported: ModuleNotFoundError"),
    ("check-plugin :Solver", ":Solver cannot be imported: ValueError"),
    ("check-plugin json:", "json: cannot be imported: AttributeError"),
    ("check-plugin json:loads.x", "json:loads.x cannot be imported: AttributeError"),
    ("check-plugin json:loads", "say which it is to be with --kind"),
    ("check-plugin json:JSONDecoder --kind problem", "not a subclass of admm_prune.LayerReconstruction"),
    ("check-plugin json:loads --kind constraint", "is not made from a sparsity alone"),
    ("check-plugin json:loads --kind objective", "kind must be solver, problem or constraint, not 'objective'"),
    ("check-plugin json:loads --examples 0", "'--examples'"),
    ("check-plugin json:loads --sparsity 2", "'--sparsity'"),
    ("plan --sparsity 0.5 --problem layr", "unknown problem 'layr' (did you mean 'layer'?)"),
    ("plan --sparsity 0.5 --method sparsellm --problem layer", "sparsellm takes no problem"),
    ("list methods problems", "unexpected extra argument(s) (problems)"),
    ("list modules --model TEXT", "a file, not a model folder"),
    ("list problems --why", "--why is for the solvers, not for problems"),
    # files
    ("run --recipe nowhere.yaml --out out", "nowhere.yaml: cannot be read"),
    ("recipe check TEXT", "a recipe is a mapping"),
    ("run --data TEXT --sparsity 0.5", "name the folder to write with --out"),
    ("verify nowhere", "nowhere"),
    ("report nowhere", "nowhere"),
    ("pack nowhere archive", "nowhere: there is no such folder"),
    ("solve nowhere.safetensors --sparsity 0.5", "nowhere.safetensors"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "reason"), CASES, ids=[words for words, _ in CASES])
def test_wrong_words_are_one_line(
    refused: Refused, model_folder: Path, text_file: Path, layer_file: Path, words: str, reason: str
) -> None:
    stand_for = {"MODEL": str(model_folder), "TEXT": str(text_file), "LAYER": str(layer_file)}
    refused(reason, *(stand_for.get(word, word) for word in shlex.split(words)))


def test_there_are_sixty_cases() -> None:
    assert len({words for words, _ in CASES}) >= 60
