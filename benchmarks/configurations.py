"""The solvers of the leaderboard by name: all of the catalogue, and configurations beside them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace

from admm_prune.data.layer_file import LayerFile
from admm_prune.methods.local import LOCAL_METHODS, Method
from admm_prune.methods.target import Target
from admm_prune.problems.layer import LayerReconstruction
from admm_prune.solvers.obs import SparseGPT
from admm_prune.solvers.one_shot import Wanda
from admm_prune.solvers.refit import Refit

YARDSTICK = "alps"  # whose errors the ratios are relative to

_WANDA, _SPARSEGPT = (LOCAL_METHODS[name] for name in ("wanda", "sparsegpt"))

CONFIGURATIONS: Mapping[str, Method] = {
    **LOCAL_METHODS,
    **{
        method.name: method
        for method in (
            replace(_SPARSEGPT, name="sparsegpt-layer", make=lambda: SparseGPT(mask_scope="layer")),
            replace(_SPARSEGPT, name="sparsegpt-polished", make=lambda: Refit(SparseGPT())),
            replace(_SPARSEGPT, name="sparsegpt-layer-polished", make=lambda: Refit(SparseGPT(mask_scope="layer"))),
            replace(_WANDA, name="wanda-polished", make=lambda: Refit(Wanda())),
        )
    },
}


def settings(method: Method) -> str:
    """Everything that determines what a method does, except its code."""
    return f"{method.make()!r}, ridge={method.ridge:g}, damping={method.damping:g}, row_wise={method.row_wise}"


def settings_key(method: Method) -> str:
    """Eight hexadecimal digits that identify `settings`, so that rows measured with other settings are not reused."""
    return hashlib.sha256(settings(method).encode()).hexdigest()[:8]


def problem_for(
    layer: LayerFile, method: Method, target: Target, kind: type[LayerReconstruction] = LayerReconstruction
) -> LayerReconstruction:
    """The problem that a method is given. It sees the calibration and validation Grams, never the held-out one."""
    return kind(
        layer.weight,
        layer.gram,
        method.constraint(target),
        ridge=method.ridge,
        damping=method.damping,
        cross_gram=layer.cross_gram,
        target_energy=layer.target_energy,
    )
