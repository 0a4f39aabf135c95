"""SparseAdam: equal to the textbook iteration, exactly sparse at the end, and in all else an optimizer like torch's."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from admm_prune import SparseAdam
from admm_prune.errors import UserError
from admm_prune.problems.constraints import RowWise
from admm_prune.solvers import textbook
from admm_prune.solvers.elsa.settings import Penalty, Score

LR, BETAS, EPS = 0.02, (0.9, 0.999), 1e-8


class Bowl:
    """f(x) = sum h (x - b)^2 / 2 with noise in its gradient that depends on the step alone."""

    def __init__(self, shape: tuple[int, int], seed: int, noise: float = 0.3) -> None:
        self.random = torch.Generator().manual_seed(seed)
        self.h = torch.rand(shape, generator=self.random, dtype=torch.float64) + 0.1
        self.b = torch.randn(shape, generator=self.random, dtype=torch.float64)
        self.noise = noise

    def gradient(self, x: Tensor, step: int) -> Tensor:
        chance = torch.Generator().manual_seed(step)
        return self.h * (x - self.b) + self.noise * torch.randn(x.shape, generator=chance, dtype=x.dtype)

    def loss(self, x: Tensor) -> float:
        return float((self.h * (x - self.b).square()).sum() / 2)


def _top(score: Tensor, keep: int) -> Tensor:
    mask = torch.zeros_like(score, dtype=torch.bool)
    mask.view(-1)[score.reshape(-1).topk(keep).indices] = True
    return mask


@settings(max_examples=12)
@given(
    shape=st.tuples(st.integers(2, 9), st.integers(2, 9)),
    seed=st.integers(0, 1000),
    interval=st.integers(1, 40),
    first=st.integers(0, 20),
    shape_of_rho=st.sampled_from(["constant", "linear", "cosine", "exponential"]),
    rescale=st.sampled_from(["immediate", "lagged"]),
)
def test_the_compact_state_is_the_textbook_iteration(shape, seed, interval, first, shape_of_rho, rescale) -> None:
    steps, bowl = 400, Bowl(shape, seed)
    penalty = Penalty(value=0.8, shape=shape_of_rho, start=0.05, units="absolute", rescale=rescale)
    keep = max(1, round(0.4 * math.prod(shape)))
    x, mask = textbook.elsa(
        bowl.b, bowl.gradient, lambda score: _top(score, keep), penalty.at, steps=steps, interval=interval, lr=LR,
        betas=BETAS, eps=EPS, first=first, lagged=penalty.rescale == "lagged",
    )  # fmt: skip

    parameter = nn.Parameter(bowl.b.clone())
    optimizer = SparseAdam(
        [parameter], sparsity=0.6, lr=LR, betas=BETAS, eps=EPS, penalty=penalty, score=Score(fisher="adam", power=0.5),
        interval=interval, first_update=first, total_steps=steps, freeze=0.0, anchor="full",
    )  # fmt: skip
    for t in range(steps):
        parameter.grad = bowl.gradient(parameter.detach(), t)
        optimizer.step()
    assert torch.equal(next(iter(optimizer.masks().values())), mask)
    assert float((parameter.detach() - x).abs().max() / x.abs().max()) <= 1e-12


@settings(max_examples=8)
@given(seed=st.integers(0, 1000), interval=st.integers(1, 9), restart=st.integers(1, 60))
def test_restarts_and_a_decoupled_penalty_are_those_of_explicit_z_and_u(seed: int, interval: int, restart: int) -> None:
    """x <- Adam(x) - lr rho (x - z + u), rho in units of 1 / rms(x); at a restart z <- a given point and u <- 0."""
    steps, value, bowl = 80, 0.5, Bowl((6, 5), seed)
    solution = torch.where(_top(torch.rand((6, 5), generator=bowl.random, dtype=torch.float64), 15), bowl.b + 1.0, 0)
    x, keep = bowl.b.clone(), 6
    z, u = x * _top(x.abs(), keep), torch.zeros_like(x)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    rms = unit = x.square().mean().sqrt()
    for t in range(steps):
        if t == restart:
            z, u, keep = solution, torch.zeros_like(x), 15
        g = bowl.gradient(x, t)
        g = g * min(1.0, 1.0 / (float(g.norm()) + 1e-6))
        m, v = BETAS[0] * m + (1 - BETAS[0]) * g, BETAS[1] * v + (1 - BETAS[1]) * g.square()
        x = x - LR / (1 - BETAS[0] ** (t + 1)) * m / ((v / (1 - BETAS[1] ** (t + 1))).sqrt() + EPS)
        x = x - LR * value / rms * (x - z + u)
        if t >= interval and (t - interval) % interval == 0:
            a = x + u
            mask = _top(a.abs() * v**0.25, keep)
            # rho is in units of x at the update before this one; rho u does not change.
            z, u = a * mask, a * ~mask * (unit / rms)
            rms, unit = unit, x.square().mean().sqrt()

    parameter = nn.Parameter(bowl.b.clone())
    optimizer = SparseAdam(
        [parameter], sparsity=0.8, lr=LR, betas=BETAS, eps=EPS, penalty=Penalty(value=value, decoupled=True),
        score=Score(power=0.25), interval=interval, freeze=0.0, anchor="full",
    )  # fmt: skip
    for t in range(steps):
        if t == restart:
            before = parameter.detach().clone()
            optimizer.restart(dict.fromkeys(optimizer.masks(), solution), 0.5 / 0.8)
            assert torch.equal(parameter, before)
        parameter.grad = bowl.gradient(parameter.detach(), t)
        optimizer.step()
    assert float((parameter.detach() - x).abs().max() / x.abs().max()) <= 1e-12


def test_a_restart_needs_a_whole_solution_and_x_and_z_apart() -> None:
    net = Net()
    optimizer = SparseAdam(net, sparsity=0.5)
    with pytest.raises(UserError, match=r"no mask is given for first\.weight"):
        optimizer.restart({"second.weight": torch.zeros(16, 32)})
    optimizer.freeze()
    masks = optimizer.masks()
    with pytest.raises(UserError, match="needs x and z apart"):
        optimizer.restart({name: mask.float() for name, mask in masks.items()})


@pytest.mark.bitwise
def test_without_a_penalty_it_is_adam_bit_for_bit() -> None:
    bowl = Bowl((16, 8), 0)
    ours, theirs = (nn.Parameter(bowl.b.float().clone()) for _ in range(2))
    a = SparseAdam([ours], sparsity=0.5, lr=LR, penalty=0.0, clip=None)
    b = torch.optim.Adam([theirs], lr=LR)
    for t in range(50):
        for x in (ours, theirs):
            x.grad = bowl.gradient(x.detach().double(), t).float()
        a.step()
        b.step()
    assert torch.equal(ours, theirs)


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 16)
        self.first, self.norm, self.second = nn.Linear(16, 32), nn.LayerNorm(32), nn.Linear(32, 16, bias=False)
        self.lm_head = nn.Linear(16, 11, bias=False)
        self.lm_head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.embedding(tokens)
        return self.lm_head(hidden + self.second(self.norm(self.first(hidden)).relu()))


def trained(net: Net, optimizer: SparseAdam, steps: int, start: int = 0) -> None:
    for t in range(start, start + steps):
        tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(t))
        loss = nn.functional.cross_entropy(net(tokens)[:, :-1].flatten(0, 1), (tokens[:, 1:] * 3 % 11).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "target",
    [
        {"sparsity": 0.7}, {"sparsity": 0.9, "scope": "model"}, {"pattern": (2, 4)}, {"pattern": (1, 8)},
        {"constraint": RowWise(0.75)},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("preset", ["default", "faithful"])
def test_the_end_is_exactly_sparse_and_the_rest_is_trained(target, preset) -> None:
    net = Net()
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    make = SparseAdam if preset == "default" else SparseAdam.faithful
    optimizer = make(net, total_steps=60, lr=0.01, **{"interval": 8, **target})
    trained(net, optimizer, 60)
    masks = optimizer.finalize()
    pruned = {name: p for name, p in net.named_parameters() if name in masks}
    assert set(pruned) == {"first.weight", "second.weight"}  # not the embedding that the head shares
    if "pattern" in target:
        n, m = target["pattern"]
        counts = [p.unflatten(-1, (-1, m)).count_nonzero(-1) for p in pruned.values()]
        assert all(bool((count == n).all()) for count in counts)
    else:
        keep = 1 - target.get("sparsity", 0.75)
        kept = [int(p.count_nonzero()) for p in pruned.values()]
        budgets = [round(keep * p.numel()) for p in pruned.values()]
        assert sum(kept) == round(keep * 1024) if target.get("scope") == "model" else kept == budgets
    for name, p in net.named_parameters():
        assert torch.isfinite(p).all()
        assert not torch.equal(p, before[name])
        assert name not in masks or bool((p[~masks[name]] == 0).all())


@pytest.mark.bitwise
@pytest.mark.parametrize(
    "storage",
    [{"anchor": "full"}, {"anchor": "bfloat16", "rounding": "stochastic"}, {"anchor": "int8", "rounding": "stochastic"},
     {"anchor": "int8", "moments": "int8"}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("cut", [13, 40])  # within an interval; in the frozen end
def test_a_saved_run_goes_on_as_if_it_had_not_stopped(storage, cut) -> None:
    settings_ = {"sparsity": 0.6, "lr": 0.01, "total_steps": 48, "interval": 8, **storage}
    whole = Net()
    optimizer = SparseAdam(whole, **settings_)
    trained(whole, optimizer, 48)

    part = Net()
    optimizer = SparseAdam(part, **settings_)
    trained(part, optimizer, cut)
    saved = optimizer.state_dict()
    again = Net(seed=1)
    again.load_state_dict(part.state_dict())
    optimizer = SparseAdam(again, **settings_)
    optimizer.load_state_dict(saved)
    trained(again, optimizer, 48 - cut, start=cut)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_a_gradient_that_is_not_finite_skips_the_step_and_says_so() -> None:
    net = Net()
    optimizer = SparseAdam(net, sparsity=0.5, lr=0.01)
    trained(net, optimizer, 3)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, math.nan)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    assert (optimizer.skipped, optimizer.steps_done) == (1, 3)
    assert optimizer.notes == ("1 steps skipped: a gradient was not finite",)


@pytest.mark.parametrize(
    ("storage", "bytes_a_weight"),
    [
        ({"anchor": "full"}, 8 + 4.125),
        ({"anchor": "bfloat16"}, 8 + 2.125),
        ({"anchor": "int8"}, 8 + 1.125 + 4 / 256),
        ({"anchor": "int8", "moments": "int8"}, 2 + 8 / 256 + 1.125 + 4 / 256),
        ({"freeze": 1.0}, 8 + 0.125),
        ({"penalty": math.inf}, 8 + 0.125),
        ({"freeze": 1.0, "moments": "int8"}, 2 + 8 / 256 + 0.125),
        ({"freeze": 1.0, "moments": "bitsandbytes"}, 2 + 8 / 256 + 0.125),
    ],
    ids=str,
)
def test_the_state_takes_the_bytes_that_are_promised(storage, bytes_a_weight) -> None:
    parameter = nn.Parameter(torch.randn(256, 512))
    optimizer = SparseAdam([parameter], sparsity=0.9, lr=0.01, score=Score(fisher="adam"), **storage)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    held = sum(x.numel() * x.element_size() for x in optimizer.state[parameter].values() if isinstance(x, Tensor))
    assert held / parameter.numel() == pytest.approx(bytes_a_weight, rel=0.01)


@pytest.mark.parametrize("anchor", ["full", "bfloat16", "int8"])
def test_on_a_convex_problem_it_comes_close_to_the_exact_optimum(anchor) -> None:
    """f splits over entries: the optimum keeps the largest h b^2. What magnitudes alone would keep is worse."""
    bowl = Bowl((24, 32), 3, noise=0.0)
    bowl.h.pow_(6)
    keep = round(0.3 * bowl.b.numel())
    exact = bowl.loss(bowl.b * _top(bowl.h * bowl.b.square(), keep))
    start = bowl.loss(bowl.b * _top(bowl.b.abs(), keep))
    parameter = nn.Parameter(bowl.b.float())
    optimizer = SparseAdam(
        [parameter], sparsity=0.7, lr=0.02, interval=8, total_steps=800, clip=None, anchor=anchor,
        penalty=Penalty(value=0.3, units="absolute"), score=Score(fisher="none"),
    )  # fmt: skip
    for t in range(800):
        parameter.grad = bowl.gradient(parameter.detach().double(), t).float()
        optimizer.step()
    optimizer.finalize()
    reached = bowl.loss(parameter.detach().double())
    assert exact <= reached <= exact + 0.5 * (start - exact)
    updates = optimizer.history
    assert updates[-1].primal_residual < updates[0].primal_residual
    limit = {"full": 0.0, "bfloat16": 2**-8, "int8": 0.02}[anchor]
    assert max(update.quantization_error for update in updates) <= limit


@pytest.mark.parametrize(
    "target", [{"sparsity": 0.8}, {"sparsity": 0.8, "scope": "model"}, {"pattern": (1, 4)}], ids=str
)
def test_an_infinite_penalty_is_gradual_pruning(target) -> None:
    """Weights that went stay away, the sparsity follows the cubic ramp, and all that is kept beyond Adam is a bit."""
    net = Net()
    optimizer = SparseAdam(
        net, lr=0.01, penalty=math.inf, score=Score(fisher="none"), interval=4, total_steps=60, freeze=0.25, ramp=1.0,
        **target,
    )  # fmt: skip
    gone = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in net.named_parameters()}
    for step in range(60):
        trained(net, optimizer, 1, start=step)
        for name, p in net.named_parameters():
            if name in optimizer.masks():
                zero = p.detach() == 0
                assert not bool((gone[name] & ~zero).any())
                gone[name] = zero
                assert optimizer.state[p]["kept"] == int(optimizer.masks()[name].sum())
        if step == 24 and "pattern" not in target:  # the update after step 24, of 45 before the freeze
            ramp = 0.8 * (1 - (1 - 24 / 45) ** 3)
            pruned = [gone[name] for name in optimizer.masks()]
            assert sum(int(zero.sum()) for zero in pruned) / 1024 == pytest.approx(ramp, abs=2e-3)
    masks = optimizer.finalize()
    kept = sum(int(mask.sum()) for mask in masks.values())
    assert kept == (
        256 if "pattern" in target else round(0.2 * 512) * 2 if "scope" not in target else round(0.2 * 1024)
    )
    assert not any("anchor" in optimizer.state[p] for p in net.parameters())


def test_a_support_chosen_elsewhere_is_trained_on_and_can_be_changed() -> None:
    """Masked fine-tuning: Adam on the support, exactly, and zeros off it."""
    first = {"first.weight": torch.arange(512).reshape(32, 16) % 2 == 0, "second.weight": torch.ones(16, 32).bool()}
    then = {"first.weight": torch.arange(512).reshape(32, 16) % 4 == 0, "second.weight": torch.eye(16, 32).bool()}
    net, reference = Net(), Net()
    optimizer = SparseAdam(net, sparsity=0.75, lr=0.01, masks=first, freeze=1.0, clip=None)
    with pytest.raises(UserError, match=r"no mask is given for second\.weight"):
        optimizer.change_support({"first.weight": first["first.weight"]})
    adam = torch.optim.Adam(reference.parameters(), lr=0.01)
    held = {id(reference.get_parameter(name)): mask for name, mask in first.items()}
    optimizer.change_support(first)
    for step in range(30):
        if step == 10:
            optimizer.change_support(then)
            held = {id(reference.get_parameter(name)): mask for name, mask in then.items()}
            for p in reference.parameters():
                if id(p) in held:
                    adam.state[p]["exp_avg"].mul_(held[id(p)])
        for p in reference.parameters():
            if id(p) in held:
                p.data.mul_(held[id(p)])
        trained(net, optimizer, 1, start=step)
        tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(step))
        labels = (tokens[:, 1:] * 3 % 11).flatten()
        nn.functional.cross_entropy(reference(tokens)[:, :-1].flatten(0, 1), labels).backward()
        for p in reference.parameters():
            if id(p) in held:
                p.grad.mul_(held[id(p)])
        adam.step()
        adam.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(net.parameters(), reference.parameters(), strict=True))
    assert all(bool((net.get_parameter(name)[~mask] == 0).all()) for name, mask in optimizer.finalize().items())


@pytest.mark.parametrize("how", [{}, {"penalty": math.inf, "ramp": 1.0}], ids=["admm", "gradual"])
def test_accumulated_gradients_and_a_gradient_scaler_change_nothing(how) -> None:
    """The penalty is added once a step, never once a part of a batch; a power of two scales without rounding."""
    plain, scaled = Net(), Net()
    settings_ = {"sparsity": 0.7, "lr": 0.01, "total_steps": 24, "interval": 4, "anchor": "full", **how}
    trained(plain, SparseAdam(plain, **settings_), 24)
    optimizer = SparseAdam(scaled, **settings_)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    for t in range(24):
        tokens = torch.randint(11, (4, 9), generator=torch.Generator().manual_seed(t))
        labels = tokens[:, 1:] * 3 % 11
        for part in (slice(0, 2), slice(2, 4)):
            logits = scaled(tokens[part])[:, :-1].flatten(0, 1)
            scaler.scale(nn.functional.cross_entropy(logits, labels[part].flatten()) / 2).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert all(torch.allclose(a, b, atol=2e-5) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    assert torch.equal(plain.first.weight == 0, scaled.first.weight == 0)


def test_masks_to_begin_with_are_kept_until_the_first_update() -> None:
    net = Net()
    chosen = {"first.weight": torch.arange(512).reshape(32, 16) % 2 == 0}
    optimizer = SparseAdam(net, sparsity=0.5, lr=0.01, masks=chosen, interval=5)
    trained(net, optimizer, 4)
    assert torch.equal(optimizer.masks()["first.weight"], chosen["first.weight"])
    with optimizer.projected():
        assert bool((net.first.weight[~chosen["first.weight"]] == 0).all())
    assert bool((net.first.weight[~chosen["first.weight"]] != 0).any())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({}, "nothing to prune"),
        ({"sparsity": 1.5}, "between 0 and 1"),
        ({"sparsity": 0.5, "pattern": (2, 4)}, "one target"),
        ({"pattern": (5, 4)}, "pattern 5:4"),
        ({"sparsity": 0.5, "lr": -1.0}, "lr"),
        ({"sparsity": 0.5, "freeze": 0.5}, "total_steps"),
        ({"sparsity": 0.5, "interval": 0}, "interval"),
        ({"sparsity": 0.5, "penalty": math.nan}, "value of Penalty must be a number"),
        ({"sparsity": 0.5, "eps": 0.0}, "eps is above it"),
        ({"sparsity": 0.5, "clip": 0.0}, "clip is a norm above 0"),
        ({"sparsity": 0.5, "clip": -1.0}, "clip is a norm above 0"),
        ({"sparsity": 0.5, "final": "x"}, "unknown final support 'x'"),
        ({"sparsity": 0.5, "anchor": "int4"}, "unknown format of anchors 'int4'"),
        ({"sparsity": 0.5, "rounding": "up"}, "unknown rounding of anchors 'up'"),
        ({"sparsity": 0.5, "moments": "int4"}, "unknown format of moments 'int4'"),
        ({"sparsity": 0.5, "scope": "layer"}, "unknown scope of a sparsity 'layer'"),
        ({"sparsity": 0.5, "targets": ("*.attention.*",)}, "attention"),
        ({"sparsity": 0.5, "masks": {"nowhere": torch.ones(1, dtype=torch.bool)}}, "nowhere"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_settings_are_refused_in_a_line(wrong, words) -> None:
    with pytest.raises(UserError, match=words) as caught:
        SparseAdam(Net(), **wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings_", "wrong", "words"),
    [
        (Penalty, {"shape": "cosin"}, "unknown shape of a penalty 'cosin' (did you mean 'cosine'?)"),
        (Penalty, {"units": "rms"}, "unknown unit of a penalty 'rms'"),
        (Penalty, {"rescale": "late"}, "unknown rescaling of u 'late'"),
        (Score, {"fisher": "adamw"}, "unknown Fisher diagonal 'adamw' (did you mean 'adam'?)"),
    ],
    ids=str,
)
def test_a_name_that_stands_for_nothing_is_refused_where_it_would_be_taken_for_another(settings_, wrong, words) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        settings_(**wrong)
