"""Every layer method of admm-prune by its name, plug-ins too."""

from __future__ import annotations

from benchopt import BaseSolver


class Solver(BaseSolver):
    name = "admm-prune"
    parameters = {"method": ["magnitude", "wanda", "sparsegpt", "alps", "admm", "admm-best"]}
    requirements = ["pip::admm-prune"]
    sampling_strategy = "run_once"

    def set_objective(self, weight, hessian, given):
        import torch
        from benchmark_utils.sets import constraint_of

        from admm_prune.methods.local import method_named
        from admm_prune.problems.layer import LayerReconstruction

        matrices = (torch.from_numpy(x).float() for x in (weight, hessian))
        self.solver = method_named(self.method).make()
        self.problem = LayerReconstruction(*matrices, constraint_of(given, weight.shape), ridge=0.0)

    def run(self, _):
        self.solution = self.solver.solve(self.problem).solution["weight"]

    def get_result(self):
        return {"weight": self.solution.double().numpy()}
