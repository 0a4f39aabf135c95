"""Compiles every Triton kernel, as it is launched, for an sm_90 GPU that need not be there.

    python tests/ops/compile_kernels.py
    python tests/ops/compile_kernels.py --ones

Kernels are not run: their launchers are called on CPU tensors with a driver that only knows what to compile for. Prints
each kernel with the shared memory it takes, and fails where a kernel of the package was never launched.

With --ones: at sizes and counts of one, of which Triton makes constants, without the methods of a tensor, unlike its
interpreter. The kernels are then translated to Triton's first representation alone, in milliseconds each.
"""

from __future__ import annotations

import os

os.environ.pop("TRITON_INTERPRET", None)

import sys
from types import SimpleNamespace
from typing import Any

import torch
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit

from admm_prune.ops.packed import Packed
from admm_prune.ops.quantization import Stored
from admm_prune.ops.triton import adam, digits, integers, marking, packed, selection, splitting, supports, sweep

# Called by kernels, like everything whose name starts with an underscore.
HELPERS = {
    *("bit_of", "descend", "keeps_ties_of_part", "key_of", "largest_of_run"),
    *("ones_of", "part_of_row", "root_of", "runs_of_row"),
}
compiled: dict[str, int] = {}


class NoGPU:
    """A driver without a device."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def compile_instead(run: Any) -> Any:
    def launch(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *arguments, grid=grid, warmup=True, **options)
        compiled[self.__name__] = max(compiled.get(self.__name__, 0), kernel.metadata.shared)
        return kernel

    return launch


def translate_instead(
    self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attributes: Any, warmup: bool
) -> Any:
    """In place of `JITFunction._do_compile`."""
    known, _, target, backend, _ = self.device_caches[device]
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions = backend.get_codegen_implementation(options)
    source = self.ASTSource(self, signature, constants, attributes)
    source.make_ir(target, options, functions, backend.get_module_map(), context)
    compiled[self.__name__] = 0
    known[key] = SimpleNamespace(metadata=SimpleNamespace(shared=0))
    return known[key]


def launch_ones() -> None:
    for entries in (1, 2):
        selection.threshold(torch.ones(entries), 1)
    for direct in (0, 1 << 20):
        selection.largest(torch.ones(40_000), 1, direct=direct)
        selection.largest_of_each(torch.ones(1, 2), 1, direct=direct)
    marking.largest_per_row(torch.ones(1, 2), 1)
    marking.largest_per_group(torch.ones(1, 2), 1, 1)
    z, mask, both = torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), torch.ones(2, 1)
    for root in (None, torch.ones(1), z):
        splitting.to_target_(z, z, z, 1.0, 1.0, "bfloat16x3")
        splitting.relax_(z, z, z, root, z, 1.0)
        splitting.settle(z, mask, mask, z, z, root)
        splitting.choose_(both, both, both, root, both > 0, both, (1, 2), 1.0)
    splitting.choose_(both.T.contiguous(), both, both, torch.ones(2), both > 0, both, (1, 2), 1.0)
    for stacked in (False, True):
        splitting.split(z, stacked=stacked)
    factor = torch.eye(2)
    for start in (0, 1):
        sweep.scores(both, factor, start, start + 1)
        sweep.eliminate_(both, factor, start, start + 1, mask, (1, 1))
        sweep.eliminate_(both, factor, start, start + 1, None, (1, 1))
    packed_bits = supports.pack(mask, 1)
    supports.unpack(packed_bits, 1)
    supports.restrict_(z, packed_bits)
    supports.scores(z, None, packed_bits, None, lag=1.0, bonus=1.0, least=1.0)
    settings = {"lr": 1.0, "betas": (0.0, 0.0), "eps": 1.0, "weight_decay": 0.0}
    update = adam.Update(z, z, Stored(z), Stored(z), support=packed_bits, seed=1)
    adam.step_([update], factor=1.0, settings=settings)
    adam.norms([update])
    for offsets in (None, torch.zeros(2, dtype=torch.int32)):
        for tokens in (1, 2):
            matrix = Packed(packed_bits, torch.ones(1), offsets, None, 1, 1)
            packed.linear(torch.ones(tokens, 1), matrix)


def launch_all() -> None:
    for dtype in digits.DTYPES:
        x = torch.randn(70_000).to(dtype)
        selection.threshold(x, 100)
        selection.largest(x, 100, direct=0)
    selection.largest(torch.randn(3 << 20), 1000)
    selection.largest(torch.randn(1 << 19), 1000)
    selection.threshold(torch.randn(3 << 20), 1000)
    for width in (512, 4096, 11008, 28672):
        marking.largest_per_row(torch.randn(2, width), 100)
    for group in (2, 4, 8, 12, 32):
        marking.largest_per_group(torch.randn(4, 10 * group), 1, group)
    launch_training()
    launch_packed()
    z, root = torch.randn(4, 1100), torch.ones(1100)
    for given in (None, z):
        for form in ("exact", "bfloat16", "bfloat16x3"):
            for tau in (0.7, torch.tensor(0.7)):
                splitting.to_target_(z, z, given, tau, 1.3, form)
        for runs in ((2, 4), (5, 11), (300, 1100), (1000, 4400)):
            splitting.choose_(z, z, given, root if given is None else None, z > 0, z, runs, 1.3)
        splitting.relax_(z, z, given, root if given is None else None, z, 1.3)
        splitting.settle(z, z > 0, None if given is None else z > 0, z, z, root if given is None else None)
    for given, reverse in ((None, True), (z, False)):
        into = torch.empty(32, 5 * 1120, dtype=torch.int8)
        integers.digits(z, torch.ones(4).double(), root.double(), given, into, padded=1120, reverse=reverse)
    splitting.split(z)
    splitting.split(z, second=True, stacked=True)
    columns, factor = torch.randn(512, 100), torch.eye(512)
    for keep, stop, pattern in (
        (columns > 0, 128, (1, 1)),
        (None, 128, (2, 4)),
        (None, 100, (4, 8)),
        (None, 256, (3, 12)),
    ):
        sweep.eliminate_(columns, factor, 0, stop, None if keep is None else keep[:stop], pattern)
    sweep.scores(columns, factor, 0, 128)


def launch_packed() -> None:
    mask, offsets, scales = (
        torch.zeros(40, 130, dtype=torch.uint8),
        torch.zeros(41, dtype=torch.int32),
        torch.ones(40, 1),
    )
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8):
        for even in (False, True):
            factors = scales if dtype == torch.int8 else None
            values = torch.zeros(mask.numel() * 2, dtype=dtype)
            matrix = Packed(mask, values, None if even else offsets, factors, 1040, 1040)
            inputs = torch.bfloat16 if dtype == torch.int8 else dtype
            for tokens in (1, 5):
                packed.linear(torch.zeros(tokens, 1040, dtype=inputs), matrix)


def launch_training() -> None:
    shape, runs = (4, 1100), (4, 5)
    floats = Stored(torch.zeros(shape))
    codes = Stored(torch.zeros(shape, dtype=torch.int8), torch.zeros(runs))
    unsigned = Stored(torch.zeros(shape, dtype=torch.uint8), torch.zeros(runs))
    settings = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
    packed = supports.pack(torch.zeros(shape, dtype=torch.bool), 138)
    supports.unpack(packed, 1100)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(shape).to(dtype)
        supports.restrict_(x, packed)
        for first, second in ((floats, floats), (codes, unsigned)):
            for anchor in (None, Stored(torch.zeros(shape, dtype=torch.bfloat16)), codes, floats):
                for support in (None, packed):
                    update = adam.Update(x, x, first, second, 3, 0.1, anchor, support, seed=1 << 50)
                    adam.step_([update], factor=0.5, settings=settings)
                    adam.norms([update])
                for fisher in (None, second):
                    supports.scores(x, anchor, packed, fisher, lag=1.0, bonus=1.0, least=1e-30)


def main() -> None:
    driver.set_active(NoGPU())
    jit.JITFunction.run = compile_instead(jit.JITFunction.run)
    if "--ones" in sys.argv:
        jit.JITFunction._do_compile = translate_instead
        launch_ones()
    else:
        launch_all()
    for name, shared in sorted(compiled.items()):
        print(f"{name:12} {shared:6} bytes of shared memory")
    modules = (adam, digits, marking, packed, selection, splitting, supports, sweep)
    kernels = {name for module in modules for name, x in vars(module).items() if isinstance(x, jit.JITFunction)}
    missing = {name for name in kernels if not name.startswith("_")} - HELPERS - compiled.keys()
    if missing:
        sys.exit(f"never launched: {', '.join(sorted(missing))}")


if __name__ == "__main__":
    main()
