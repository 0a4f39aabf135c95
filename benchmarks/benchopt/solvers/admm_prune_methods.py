"""Every layer method of admm-prune by its name, plug-ins too."""

from __future__ import annotations

from benchopt import BaseSolver


class Solver(BaseSolver):
    name = "admm-prune"
    parameters = {"method": ["magnitude", "wanda", "sparsegpt", "admm"]}
    requirements = ["pip::admm-prune"]
    sampling_strategy = "run_once"

    def set_objective(self, weight, gram, target):
        import torch

        from admm_prune.methods.local import method_named
        from admm_prune.methods.target import target_named

        method = method_named(self.method)
        self.solver = method.make()
        constraint = method.constraint(target_named(target))
        tensors = torch.from_numpy(weight.copy()), torch.from_numpy(gram.copy())
        self.problem = method.problem.build(*tensors, constraint, ridge=method.ridge, damping=method.damping)

    def run(self, _):
        self.solution = self.solver.solve(self.problem).solution["weight"]

    def get_result(self):
        return {"weight": self.solution.double().numpy()}
