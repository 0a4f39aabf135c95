"""Normal equations swept on the supports of column groups: what dropping, adding or exchanging a group costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass
class Swept:
    """The normal equations of some strips of rows, swept on their supports S.

    All rows of a strip have the same support. V are its least-squares weights, R = (W - V) A is their residual, M =
    (A_SS)^-1, F are the pruned columns, and C = A_FF - A_FS M A_SF.

    Attributes:
        z: (strips, in, in): -M on S x S, M A_SF on S x F and its transpose on F x S, C on F x F.
        y: (strips, height, in): V on S, R on F.
        target: W (strips, height, in).
        support: the groups in S, boolean (strips, groups).
        width: columns of a group.
    """

    z: Tensor
    y: Tensor
    target: Tensor
    support: Tensor
    width: int

    @classmethod
    def at(cls, hessian: Tensor, target: Tensor, support: Tensor, width: int) -> Self:
        """The strips with targets W (strips, height, in) and supports (strips, groups).

        Raises:
            torch.linalg.LinAlgError: A_SS is not positive definite.
        """
        columns = support.repeat_interleave(width, 1)
        z = hessian.new_zeros(len(target), *hessian.shape)
        y = torch.empty_like(target)
        for strip, inside in enumerate(columns):
            s, f = inside.nonzero()[:, 0], (~inside).nonzero()[:, 0]
            across = hessian[s][:, f]
            inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian[s][:, s]))
            spread = inverse @ across
            z[strip, s[:, None], s] = -inverse
            z[strip, s[:, None], f] = spread
            z[strip, f[:, None], s] = spread.T
            z[strip, f[:, None], f] = torch.addmm(hessian[f][:, f], across.T, spread, alpha=-1)
            # V_S = W_S + W_F A_FS M and R_F = W_F C.
            y[strip] = target[strip].where(inside, 0).addmm_(target[strip][:, f], z[strip, f])
        return cls(z, y, target, support.clone(), width)

    def weights(self) -> Tensor:
        """V (strips, height, in)."""
        return self.y.where(self._inside(), 0)

    def values(self) -> Tensor:
        """f of each strip: <W_F, R_F>; (strips,)."""
        return (self.target * self.y.where(~self._inside(), 0)).sum((1, 2))

    def losses(self, strips: Tensor | slice = slice(None)) -> Tensor:
        """tr(V_g (M_gg)^-1 V_g^T), the rise of f where one kept group is dropped; infinite for the pruned groups.

        Args:
            strips: indices; by default all.

        Returns:
            (strips, groups).
        """
        inside = self.support[strips]
        return self._traces(-self._blocks()[strips], inside, strips).masked_fill_(~inside, torch.inf)

    def gains(self, strips: Tensor | slice = slice(None)) -> Tensor:
        """tr(R_g (C_gg)^-1 R_g^T), the fall of f where one pruned group is added; -inf for the kept groups."""
        pruned = ~self.support[strips]
        return self._traces(self._blocks()[strips], pruned, strips).masked_fill_(~pruned, -torch.inf)

    def best_swaps(
        self, strips: Tensor, candidates: int | None = None, span: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The exchange of one kept group for one pruned group that lowers f of each strip most.

        Args:
            candidates: kept groups, the cheapest to drop, that are tried against every pruned one; by default all.
            span: the two are among the same `span` consecutive groups; by default any of the strip.

        Returns:
            The gain, -inf where there is no exchange, the dropped and the added group; (strips,) each.
        """
        count = self.support.shape[1] if candidates is None else min(candidates, self.support.shape[1])
        loss, dropped = self.losses(strips).topk(count, 1, largest=False)
        gains = self._gains_after(strips, dropped)
        if span is not None:
            cell = torch.arange(gains.shape[2], device=gains.device) // span
            gains.masked_fill_(cell != cell[dropped][..., None], -torch.inf)
        gain, added = gains.max(2)
        gain = (gain - loss).masked_fill_(loss.isinf(), -torch.inf)  # fewer groups are kept than candidates
        best, place = gain.max(1)
        at = torch.arange(len(best), device=best.device)
        return best, dropped[at, place], added[at, place]

    def sweep(self, strips: Tensor, group: Tensor) -> None:
        """Moves a group of each of some strips into the support, or out of it, in O(in^2) operations:

            D = Z_aa,    Z <- Z - Z_:a D^-1 Z_a:,    Y <- Y - Y_a D^-1 Z_a:,    Z_aa <- -D^-1,

        and Z_a: <- s D^-1 Z_a:, Y_a <- s Y_a D^-1 with s = 1 for a group that moves in, -1 for one that moves out.
        """
        for strip, index in zip(strips.tolist(), group.tolist(), strict=True):
            sign = -1.0 if self.support[strip, index] else 1.0
            a = slice(index * self.width, (index + 1) * self.width)
            z, y = self.z[strip], self.y[strip]
            inverse = torch.linalg.inv(z[a, a])
            spread = inverse @ z[a]
            sides = y[:, a] @ inverse
            y.addmm_(y[:, a].clone(), spread, alpha=-1)
            z.addmm_(z[a].T.clone(), spread, alpha=-1)
            y[:, a] = sign * sides
            z[a] = sign * spread
            z[:, a] = sign * spread.T
            z[a, a] = -inverse
        self.support[strips, group] = ~self.support[strips, group]

    def _inside(self) -> Tensor:
        return self.support.repeat_interleave(self.width, 1)[:, None, :]

    def _blocks(self) -> Tensor:
        """The diagonal blocks of z, (strips, groups, width, width)."""
        strips, groups = self.support.shape
        tiles = self.z.view(strips, groups, self.width, groups, self.width)
        return tiles.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)

    def _sides(self) -> Tensor:
        """Y^T in groups, (strips, groups, width, height)."""
        strips, groups = self.support.shape
        return self.y.mT.view(strips, groups, self.width, -1)

    def _traces(self, blocks: Tensor, chosen: Tensor, strips: Tensor | slice) -> Tensor:
        """tr(Y_g D_g^-1 Y_g^T) with positive definite blocks D, of the chosen groups; (strips, groups)."""
        sides = self._sides()[strips]
        if self.width == 1:
            return sides.pow(2).sum((2, 3)).div_(blocks[..., 0, 0])
        identity = torch.eye(self.width, dtype=blocks.dtype, device=blocks.device)
        factor = torch.linalg.cholesky(torch.where(chosen[..., None, None], blocks, identity))
        solved: Tensor = torch.linalg.solve_triangular(factor, sides, upper=False)
        return solved.pow(2).sum((2, 3))

    def _gains_after(self, strips: Tensor, dropped: Tensor) -> Tensor:
        """The fall of f by adding each group after one is dropped; -inf for the kept groups.

        With P = (M_aa)^-1 M_aS A_Sb, the residual of b is R'_b = R_b + V_a P then, and its Schur complement is
        C'_bb = C_bb + (M_aS A_Sb)^T P; the fall is tr(R'_b (C'_bb)^-1 R'_b^T).

        Args:
            dropped: (strips, count).

        Returns:
            (strips, count, groups).
        """
        count, (groups, width) = dropped.shape[1], (self.support.shape[1], self.width)
        at = torch.arange(len(strips), device=dropped.device)[:, None]
        blocks, sides, inside = self._blocks()[strips], self._sides()[strips], self.support[strips]
        identity = torch.eye(width, dtype=self.z.dtype, device=self.z.device)
        m = torch.where(inside[at, dropped][..., None, None], -blocks[at, dropped], identity)
        u = self.z.unflatten(1, (groups, width))[strips[:, None], dropped]  # (strips, count, width, in)
        p = torch.cholesky_solve(u, torch.linalg.cholesky(m))
        v = sides[at, dropped]  # (strips, count, width, height): V_a^T
        cross = (v.flatten(1, 2) @ self.y[strips]).unflatten(1, (count, width))  # V_a^T R
        # By pairs of groups: (strips, count, groups, width, width).
        u, p, cross = (x.unflatten(3, (groups, width)).transpose(2, 3) for x in (u, p, cross))
        mixed = p.mT @ cross
        products = (sides @ sides.mT)[:, None] + mixed + mixed.mT + p.mT @ (v @ v.mT)[:, :, None] @ p
        schur = blocks[:, None] + u.mT @ p
        free = ~inside[:, None, :].expand(-1, count, -1)
        schur = torch.where(free[..., None, None], schur, identity)
        solved = products / schur if width == 1 else torch.cholesky_solve(products, torch.linalg.cholesky(schur))
        return solved.diagonal(dim1=-2, dim2=-1).sum(-1).masked_fill_(~free, -torch.inf)
