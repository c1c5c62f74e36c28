"""Time heads of more than one matrix against the plain call, in turns, and print the ratios of the medians.

    OMP_NUM_THREADS=2 python benchmarks/heads_time.py
    OMP_NUM_THREADS=1 python benchmarks/heads_time.py --only draft

Each comparison checks its values before it prints a time. That of one thread is processor time, which a busy
machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from opsd_kernels import linear_divergence
from opsd_kernels.testing.heads import dense_head


def times(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each call; the calls take turns."""
    seen: dict[str, list[float]] = {name: [] for name in calls}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = clock()
            call()
            seen[name].append(clock() - start)
    return {name: statistics.median(values) for name, values in seen.items()}


def adapter(N: int, H: int, V: int, dtype: torch.dtype, rank: int, rounds: int) -> None:
    """Compare an adapter of `rank` on a frozen head with the frozen head, for one head and for two."""
    torch.manual_seed(0)
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    teacher, head, other = (torch.randn(*shape).to(dtype) for shape in ((N, H), (V, H), (V, H)))
    head, other = head / H**0.5, other / H**0.5
    A = (torch.randn(rank, H) / H**0.5).to(dtype).requires_grad_()
    B = (torch.randn(V, rank) / rank**0.5).to(dtype).requires_grad_()
    few = slice(0, 16)
    small = linear_divergence(hidden[few], head, teacher[few], other, student_lora=(A, B, 0.5))
    dense = dense_head(head, (A, B, 0.5)).to(dtype)
    exact = linear_divergence(hidden[few], dense, teacher[few], other)
    assert abs(small / exact - 1) < 0.02, (small, exact)
    for name, theirs in (("one head", head), ("two heads", other)):

        def run(lora: tuple | None, theirs: torch.Tensor = theirs) -> None:
            leaves = [hidden] if lora is None else [hidden, A, B]
            loss = linear_divergence(hidden, head, teacher, theirs, student_lora=lora)
            torch.autograd.grad(loss, leaves)

        found = times({"frozen": lambda: run(None), "adapter": lambda: run((A, B, 0.5))}, rounds)
        ratio = found["adapter"] / found["frozen"]
        print(f"rank {rank}, {dtype}, {name}: {ratio:.3f}x of {1e3 * found['frozen']:.0f} ms", flush=True)


def teachers(N: int, H: int, V: int, dtype: torch.dtype, count: int, rounds: int) -> None:
    """Compare `count` teachers by index, with heads of their own, with one teacher."""
    torch.manual_seed(0)
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    head = (torch.randn(V, H) / H**0.5).to(dtype).requires_grad_()
    states = [torch.randn(N, H).to(dtype) for _ in range(count)]
    heads = [(torch.randn(V, H) / H**0.5).to(dtype) for _ in range(count)]
    index = torch.randint(count, (N,))

    def one() -> torch.Tensor:
        return linear_divergence(hidden, head, states[0], heads[0])

    def several() -> torch.Tensor:
        return linear_divergence(hidden, head, states, heads, teacher_index=index)

    with torch.no_grad():
        parts = (
            linear_divergence(hidden, head, states[k], heads[k], mask=index == k, reduction="sum")
            for k in range(count)
        )
        expected, found = sum(parts) / N, several()
    assert abs(found / expected - 1) < 1e-3, (found, expected)
    calls = {
        "one": lambda: torch.autograd.grad(one(), (hidden, head)),
        "several": lambda: torch.autograd.grad(several(), (hidden, head)),
    }
    seen = times(calls, rounds)
    ratio = seen["several"] / seen["one"]
    print(f"{count} teachers, {dtype}: {ratio:.3f}x of {1e3 * seen['one']:.0f} ms", flush=True)


def draft(N: int, H: int, V: int, dtype: torch.dtype, rows: int, rounds: int) -> None:
    """Compare a draft head of `rows` tokens, by ids, with the teacher's rows gathered once by hand."""
    torch.manual_seed(0)
    hidden = torch.randn(N, H).to(dtype).requires_grad_()
    head = (torch.randn(rows, H) / H**0.5).to(dtype).requires_grad_()
    states, other = torch.randn(N, H).to(dtype), (torch.randn(V, H) / H**0.5).to(dtype)
    ids = torch.randperm(V)[:rows]
    gathered = other[ids]
    exact = linear_divergence(hidden, head, states, gathered, divergence="tvd")
    found = linear_divergence(hidden, head, states, other, divergence="tvd", student_vocab_ids=ids)
    assert abs(found / exact - 1) < 1e-3, (found, exact)

    def run(teacher: torch.Tensor, **options: torch.Tensor) -> None:
        loss = linear_divergence(hidden, head, states, teacher, divergence="tvd", **options)
        torch.autograd.grad(loss, (hidden, head))

    calls = {"by hand": lambda: run(gathered), "by ids": lambda: run(other, student_vocab_ids=ids)}
    seen = times(calls, rounds)
    ratio = seen["by ids"] / seen["by hand"]
    print(f"{rows} of {V} tokens, {dtype}: {ratio:.3f}x of {1e3 * seen['by hand']:.0f} ms", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--teachers", type=int, default=3)
    parser.add_argument("--draft-vocab", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--only", choices=("adapter", "teachers", "draft"))
    told = parser.parse_args()
    for name in told.dtype:
        sizes = told.tokens, told.hidden, told.vocab
        for compare, size in ((adapter, told.rank), (teachers, told.teachers), (draft, told.draft_vocab)):
            if told.only in (None, compare.__name__):
                compare(*sizes, getattr(torch, name), size, told.rounds)


if __name__ == "__main__":
    main()
