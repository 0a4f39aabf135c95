"""Peak memory and time of one random feed-forward network under `sparsellm`'s solver.

    python -m benchmarks.network_memory [--width 2048] [--hidden 8192] [--tokens 131072] [--rounds 2] [--descent 100]

Inputs and targets exist before the measurement begins, and are reported separately: 2 x width x 2 bytes per token, in
bfloat16. Everything else is part of the peak: weights in float32, statistics, the solver, and pieces of the tokens.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from admm_prune.methods.local import LOCAL_METHODS
from admm_prune.methods.sparsellm import SparseLLM
from admm_prune.methods.target import Target
from admm_prune.ops.activations import ACTIVATIONS
from admm_prune.point import Point
from admm_prune.problems.feed_forward import Network
from admm_prune.problems.network_output import NetworkOutput
from admm_prune.runs.machine import PeakMemory
from admm_prune.solvers.alternating import Alternating
from admm_prune.solvers.support_descent import SupportDescent
from benchmarks.machine import machine


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, help="4 x width by default")
    parser.add_argument("--tokens", type=int, default=64 * 2048)
    parser.add_argument("--rounds", type=int, default=SparseLLM.rounds)
    parser.add_argument("--descent", type=int, default=SparseLLM.descent, help="steps in every round")
    parser.add_argument("--inner", default="sparsegpt", choices=list(LOCAL_METHODS))
    parser.add_argument("--date")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    width, hidden = chosen.width, chosen.hidden or 4 * chosen.width
    weights = Point(up=torch.randn(hidden, width) / width**0.5, down=torch.randn(width, hidden) / hidden**0.5)
    network = Network(ACTIVATIONS["relu"], weights, {"up": torch.zeros(hidden), "down": torch.zeros(width)})
    inputs = torch.empty(chosen.tokens, width, dtype=torch.bfloat16)
    targets = torch.empty(chosen.tokens, width, dtype=torch.bfloat16)
    for x, y in zip(inputs.split(1024), targets.split(1024), strict=True):
        x.normal_()
        y.copy_(network.linear("down", weights, network.hidden(weights, x.float())))
    method = LOCAL_METHODS[chosen.inner]
    began = time.process_time()
    with PeakMemory() as memory:
        problem = NetworkOutput(
            network,
            (inputs, targets),
            dict.fromkeys(weights, method.constraint(Target(0.7))),
            validation=(inputs[:2048], targets[:2048]),
            damped=dict.fromkeys(weights, (method.ridge, method.damping)),
        )
        solver = Alternating(
            inner=method.make(),
            max_iterations=chosen.rounds,
            together=SupportDescent.of(chosen.descent) if chosen.descent else None,
        )
        validation_loss = problem.validation_loss(solver.solve(problem).solution)
    held = 2 * inputs.numel() * inputs.element_size() / 2**20
    figures = {
        "width": width,
        "hidden": hidden,
        "tokens": chosen.tokens,
        "inner": chosen.inner,
        "rounds": chosen.rounds,
        "descent": chosen.descent,
        "inputs_and_targets_mib": round(held, 1),
        "peak_beyond_mib": memory.extra_mib,
        "peak_mib": round(held + memory.extra_mib, 1),
        "released_mib": round(62 * width * chosen.tokens / 2**20, 1),
        "cpu_seconds": round(time.process_time() - began, 1),
        "relative_error": validation_loss,
        "machine": machine(chosen.date),
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
