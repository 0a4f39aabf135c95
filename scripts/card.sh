#!/usr/bin/env bash
# Everything that needs a GPU, in 12 minutes, in the order of its worth. Each stage has a limit of its own and leaves its
# file in OUT, whatever happens to it or to another one.
#
#     scripts/card.sh [--device cpu --small] [--dry-run] [--stages tests,bench,models,elsa]
#                     [--model DIR --data FILE --eval-data FILE] [OUT]
#
# tests.jsonl      a line for each test marked gpu, written when it ends      (tests/gpu_run.py)
# bench/           admm-prune bench gpu; bench.rows.jsonl if it was stopped
# models.jsonl     one-shot methods on a model                                (benchmarks/card_grid.py)
# elsa.jsonl       methods that train, on the same model
# stages.txt       a line for each stage: name, exit status (124: its limit was reached), seconds, limit
# NAME.log         what a stage printed
#
# Without --model it is the embedded model, with its text. With --stages some of the stages run, and files of others in
# OUT are kept. With --device cpu --small every stage runs at tiny shapes, to show that it works. PYTHON selects the
# interpreter; PROCESSES the number of test processes. Compiled kernels are kept in TRITON_CACHE_DIR, by default .triton
# in the checkout. pydantic, datasets and cvxpy are not needed.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

device=cuda small=0 dry=0 model=embedded data=embedded eval_data= out=card stages=tests,bench,models,elsa
while [ $# -gt 0 ]; do
    case $1 in
        --device) device=$2; shift 2 ;;
        --small) small=1; shift ;;
        --dry-run) dry=1; shift ;;
        --stages) stages=$2; shift 2 ;;
        --model) model=$2; shift 2 ;;
        --data) data=$2; shift 2 ;;
        --eval-data) eval_data=$2; shift 2 ;;
        -*) echo "card.sh: no option $1" >&2; exit 2 ;;
        *) out=$1; shift ;;
    esac
done

for name in ${stages//,/ }; do
    case $name in tests | bench | models | elsa) ;; *) echo "card.sh: no stage $name" >&2; exit 2 ;; esac
done

python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.triton}
[ $dry = 1 ] || mkdir -p "$out"

stage() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 began=$SECONDS status
    shift 2
    case ,$stages, in *,$name,*) ;; *) return ;; esac
    if [ $dry = 1 ]; then echo "$name $limit $*"; return; fi
    timeout --kill-after=10 "$limit" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name exit $status after $((SECONDS - began)) s of $limit" | tee -a "$out/stages.txt"
}

text=(--model "$model" --data "$data" ${eval_data:+--eval-data "$eval_data"} --device "$device")
if [ $small = 1 ]; then
    tests=(tests/runs/test_machine.py) bench=(--small --sections selection --budget 20)
    sizes=(--samples 2 --eval-samples 2 --length 32) oneshot=magnitude trained=gradual steps=2 few=0.5 patterns=
else
    tests=(tests) bench=(--budget 220)
    sizes=(--samples 128 --eval-samples 64 --length 1024)
    oneshot=sparsegpt,admm,admm-best trained=elsa,elsa-l,admm-finetuned steps=512 few=0.5,0.7 patterns=2:4
fi
processes=$("$python" -c 'import xdist' 2>/dev/null && echo "-n ${PROCESSES:-$([ $small = 1 ] && echo 0 || echo 8)}")

# shellcheck disable=SC2086  # $processes is no word or two
[ $dry = 1 ] || [ "$stages" != tests,bench,models,elsa ] || rm -f "$out/stages.txt"
stage tests 235 "$python" -m pytest -p tests.gpu_run -p no:cacheprovider --results "$out/tests.jsonl" --limit 60 \
    -m gpu -v $processes ${processes:+--dist worksteal} "${tests[@]}"
stage bench 240 "$python" -m admm_prune bench gpu --device "$device" "${bench[@]}" --out "$out/bench" --overwrite
stage models 100 "$python" -m benchmarks.card_grid "$out/models.jsonl" "${text[@]}" "${sizes[@]}" \
    --methods "$oneshot" --sparsity "$few" ${patterns:+--pattern "$patterns"}
stage elsa 125 "$python" -m benchmarks.card_grid "$out/elsa.jsonl" "${text[@]}" "${sizes[@]}" \
    --methods "$trained" --sparsity 0.9 --steps "$steps"
[ $dry = 1 ] || cat "$out/stages.txt"
