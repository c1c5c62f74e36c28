"""Add the products of low-rank adapters to a chunk's logits and gradients (lora.py).

With u = scaling * h A^T, (C, r), for the rows of a chunk and the gradient G of its logits:

    logits += u B^T,    dB += G^T u,    dh += scaling * (G B) A,    dA += scaling * (G B)^T h.

Where the extension's GEMMs serve, the logits are one product [h | u] [W | B]^T, which reads W and B where
they lie. Elsewhere u B^T is added to slices of the logits. Sums are in fp32 for 16-bit inputs. Where the
teacher's buffer holds a difference of logits under one head, it gets the difference of the adapters' parts:
for one adapter, and for 16-bit buffers (`Problem.of`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._rows import extension
from .accumulate import accumulate_weight_grad
from .centre import Centre
from .loop import project
from .lora import Lora, joins, row_slices
from .planner import ChunkPlan
from .problem import Outputs, Problem, Side, same_adapter
from .sizes import ADAPTED_BYTES


class Term(NamedTuple):
    """Hold a product u B^T of a side's rows.

    The matrix is B in fp32 or fp64, B of 16 bits, or the two 16-bit addends of a wider B. Beside 16 bits
    u is split into addends as well; the products of both low ones are left out.
    """

    coefficients: Tensor  # (C, r) in fp32, or fp64
    matrix: Tensor  # (V, r), or (V, 2r): the high addend, and the low one

    @property
    def factor(self) -> Tensor:
        """Return u, (C, r); [high, low], (C, 2r); or [high, high, low], (C, 3r), as wide as the matrix."""
        u, narrow = self.coefficients, self.matrix.dtype
        if narrow.itemsize > 2:
            return u
        parts, r = _addends(u, narrow), u.shape[1]
        return parts if self.matrix.shape[1] == r else torch.cat([parts[:, :r], parts], 1)

    def repeated(self, columns: slice, width: int) -> Tensor:
        """Return rows of the second factor, (n, width): those of the matrix, and its first columns again."""
        matrix = self.matrix[columns]
        return matrix if matrix.shape[1] == width else torch.cat([matrix, matrix], 1)[:, :width]


def _addends(x: Tensor, narrow: torch.dtype) -> Tensor:
    """Return two 16-bit addends of x side by side, (n, r) -> (n, 2r): together they keep its digits."""
    high = x.to(narrow)
    return torch.cat([high, (x - high).to(narrow)], 1)


def _add_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """Add a @ b to `out`, in fp32 for 16-bit factors."""
    if a.dtype != out.dtype:
        accumulate_weight_grad(a.t(), b, out, first=False)
    elif out.device.type == "cpu" and extension.gemm_fp32_serves(out.dtype):
        torch.ops.opsd_kernels.gemm_fp32_(a, b, out, True)
    else:
        out.addmm_(a, b)


class Adapters:
    """Own the buffers of the adapters of a call. `out` receives the gradients of the student's.

    `height` counts the rows of its whole head.
    """

    def __init__(self, problem: Problem, plan: ChunkPlan, out: Outputs, height: int) -> None:
        student, self.out, self.height = problem.student, out, height
        # A GEMM of 16-bit rows takes a 16-bit matrix.
        self.problem, self.dtype, self.wide = problem, student.hidden.dtype, problem.stats_dtype
        self.student = student.lora
        new, self.on_cpu = student.hidden.new_empty, student.hidden.device.type == "cpu"
        self.factors: dict[int, Tensor] = {}
        if self.student is not None:
            self.factors[id(self.student)] = _matrix(self.student, self.dtype)
        teachers: tuple[Side, ...] = () if problem.teacher is None else (problem.teacher,)
        if problem.teachers is not None:
            teachers = problem.teachers.sides
        for side in teachers:
            if side.lora is not None:
                same = self.student is not None and same_adapter(self.student, side.lora)
                alike = same and side.hidden.dtype == self.dtype
                known = self.factors[id(self.student)] if alike else _matrix(side.lora, side.hidden.dtype)
                self.factors[id(side.lora)] = known
        self.size = ADAPTED_BYTES["cpu" if self.on_cpu else "cuda"] // 4
        whole = all(isinstance(side.weight, Tensor) for side in (student, *teachers))
        sliced = plan.logits_dtype.itemsize == 2 and not (
            whole and joins(student.hidden.device.type, self.dtype, student.hidden.shape[1])
        )
        self.scratch = new(self.size if sliced else 0, dtype=torch.float32)
        self.u = self.back = self.dB = None
        if self.student is not None and any(problem.wants):
            B, (V, r) = self.student.B, self.student.B.shape
            self.u = new(plan.rows, r, dtype=self.wide)
            # In the dtype of the logits' gradient: B itself, or two 16-bit addends of it
            split = self.dtype.itemsize == 2 and B.dtype != self.dtype
            self.back = _addends(B.to(self.wide), self.dtype) if split else B.to(self.dtype)
            if problem.wants[3]:
                out.dA = torch.zeros_like(self.student.A, dtype=self.wide)
            if problem.wants[4]:
                # For 16-bit rows the products of both addends of u
                self.dB = new(V, r * (2 if self.dtype.itemsize == 2 else 1), dtype=self.wide).zero_()

    def _term(self, lora: Lora | None, rows: Tensor, sign: float = 1.0) -> list[Term]:
        return [] if lora is None else [Term(lora.coefficients(rows).mul_(sign), self.factors[id(lora)])]

    def fill(
        self,
        problem: Problem,
        student: Tensor,
        teacher: Tensor | None,
        S: Tensor,
        T: Tensor,
        centre: Centre,
        part: slice,
        stack: Tensor | None,
        both: Tensor | None,
    ) -> None:
        """Write the logits of both sides, (C, V), as `Buffers.fill` does without an adapter.

        `part` are the rows' places in the chunk. `stack` holds [student ; teacher - student] where T is to
        hold a difference of logits, and `both` is (2C, V), S and T, if they lie side by side.
        """
        head, mine = problem.student.weight, self._term(self.student, student)
        if self.u is not None:
            self.u[part] = mine[0].coefficients
        if teacher is None or problem.teacher is None:
            self._write(student, head, mine, S, centre.s)
            return
        theirs, rows = problem.teacher.lora, teacher
        if stack is None:
            terms = self._term(theirs, rows)
        else:
            rows = stack[student.shape[0] :]
            if same_adapter(self.student, theirs):
                terms = self._term(self.student, rows)
            else:
                terms = self._term(theirs, teacher) + self._term(self.student, student, -1.0)
        if stack is not None and both is not None:
            # The student's rows have the student's adapter, the rows below them any.
            for k, (own, matrix) in enumerate(terms):
                above = [u for u, other in mine if other is matrix] or [torch.zeros_like(own)]
                terms[k] = Term(torch.cat([*above, own]), matrix)
            self._write(stack, head, terms, both, centre.stacked)
            return
        self._write(student, head, mine, S, centre.s)
        self._write(rows, problem.teacher.weight, terms, T, centre.t)

    def pilot(self, student: Tensor, out: Tensor) -> None:
        """Write the logits of the first columns of the student's head, (C, n)."""
        n = out.shape[1]
        terms = [term._replace(matrix=term.matrix[:n]) for term in self._term(self.student, student)]
        self._write(student, self.problem.student.weight[:n], terms, out, None)

    def _write(
        self, rows: Tensor, weight: Any, terms: list[Term], out: Tensor, centre: Tensor | None
    ) -> None:
        """Compute out = rows @ weight.T + terms - centre.

        A 16-bit `out` is rounded once.
        """
        if not terms:
            project(rows, weight, out, centre)
            return
        factors = [term.factor for term in terms]
        widths = [factor.shape[1] for factor in factors]
        served = isinstance(weight, Tensor) and out.dtype in (rows.dtype, torch.float32)
        if served and joins(rows.device.type, rows.dtype, rows.shape[1]):
            tail, left = terms[0].matrix, torch.cat([rows, *factors], 1)
            # The GEMM repeats the rows of one matrix, if there are pairs of them.
            if len(terms) > 1 or (widths[0] > tail.shape[1] and tail.shape[1] % 2):
                each = zip(terms, widths, strict=True)
                tail = torch.cat([term.repeated(slice(None), width) for term, width in each], 1)
            if rows.dtype == torch.bfloat16:
                torch.ops.opsd_kernels.gemm_bf16_(left, weight.t(), out, False, centre, tail.t())
            else:
                torch.ops.opsd_kernels.gemm_fp32_(left, weight.t(), out, False, tail.t())
            return
        narrow = out.dtype.itemsize == 2
        for columns in self._slices(len(rows), weight.shape[0], narrow):
            n = columns.stop - columns.start
            part = self.scratch[: len(rows) * n].view(len(rows), n) if narrow else out[:, columns]
            project(rows, weight[columns], part)
            for term, factor, width in zip(terms, factors, widths, strict=True):
                _add_product(factor, term.repeated(columns, width).t(), part)
            if centre is not None:
                part.sub_(centre[:, None])
            if narrow:
                out[:, columns].copy_(part)

    def _slices(self, rows: int, V: int, narrow: bool) -> list[slice]:
        """Return slices of the columns that fit the cache of a CPU, or the scratch of `narrow` logits."""
        whole = not (narrow or self.on_cpu)
        step = V if whole else max(1, self.size // max(rows, 1))
        return [slice(start, min(start + step, V)) for start in range(0, V, step)]

    def accumulate(self, G: Tensor, student: Tensor, dh: Tensor | None, scale: Tensor | None) -> None:
        """Add the adapter's part to dh, (C, H) unscaled, and a chunk's part to dA and dB.

        G, (C, V), is the gradient of the chunk's logits; `scale`, (C,), multiplies its rows in dA and dB.
        """
        lora, out = self.student, self.out
        if lora is None or self.u is None or self.back is None:
            return
        n, (r, _), V = len(G), lora.A.shape, G.shape[1]
        u = self.u[:n] if scale is None else self.u[:n] * scale[:, None]
        if self.dB is not None and self.dB.shape[1] > r:
            u = _addends(u, G.dtype)
        products = G.new_zeros(n, self.back.shape[1], dtype=self.wide)  # G B
        for columns in self._slices(n, V, narrow=False):
            part = G[:, columns]
            if dh is not None or out.dA is not None:
                _add_product(part, self.back[columns], products)
            if self.dB is not None:
                _add_product(part.t(), u, self.dB[columns])
        if products.shape[1] > r:
            products = products[:, :r] + products[:, r:]
        products.mul_(lora.scaling)
        if dh is not None:
            dh.addmm_(products, lora.A.to(self.wide))
        if out.dA is not None:
            products = products if scale is None else products * scale[:, None]
            for rows in row_slices(student):
                out.dA.addmm_(products[rows].t(), student[rows].to(self.wide))

    def finish(self) -> None:
        """Complete dB, and sum dA over the ranks of a vocabulary-parallel head."""
        if self.dB is not None and self.student is not None:
            V, r = self.student.B.shape
            dB = self.dB if self.dB.shape[1] == r else self.dB[:, :r] + self.dB[:, r:]
            # Padded rows of the head have no gradient
            self.out.dB = dB if V == self.height else torch.cat([dB, dB.new_zeros(self.height - V, r)])
        if self.out.dA is not None and self.problem.shard is not None:
            self.problem.shard.sum_hidden_grad(self.out.dA)


def _matrix(lora: Lora, rows: torch.dtype) -> Tensor:
    """Return the matrix of the adapter's terms beside rows of this dtype: see `Term`."""
    B, wide = lora.B, torch.promote_types(rows, torch.float32)
    if rows.itemsize == 2 and B.dtype == rows:
        return B
    # fp16 lacks the range of a wider B.
    return _addends(B.to(wide), rows) if rows == torch.bfloat16 else B.to(wide)
