"""Row sweeps on the kernels of triton_kernels.py and triton_columns.py. Contract: contract.py."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..spec import RowSpec
from .contract import Column, clip_tokens, plain_kl
from .torch_topk import row_topk_ as row_topk_
from .triton_columns import COLUMN_KERNELS
from .triton_kernels import KERNELS as ROW_KERNELS
from .triton_launch import (
    COLUMN_HEIGHT,
    COLUMN_WARPS,
    aligned,
    column_block,
    compiler_options,
    config,
    is_narrowed,
    mode,
    pack,
    split_rows,
    terms,
    transforms,
)

KERNELS = {**ROW_KERNELS, **COLUMN_KERNELS}


def interpreted() -> bool:
    """True if the kernels are for Triton's interpreter: TRITON_INTERPRET was 1 when they were imported."""
    return not isinstance(KERNELS["stats"], triton.runtime.JITFunction)


def usable(device_type: str) -> str | None:
    """Return None if the kernels can serve tensors of `device_type`, else the reason."""
    if interpreted():
        wrong = f"TRITON_INTERPRET is set, and the interpreter serves cpu, not {device_type}"
        return None if device_type == "cpu" else wrong
    if device_type != "cuda":
        return (
            f"Triton compiles for cuda, not for {device_type} (TRITON_INTERPRET=1 interprets on cpu, slowly)"
        )
    return None if torch.cuda.is_available() else "no CUDA device is visible"


def _options(num_warps: int, dtype: torch.dtype, PACK: int) -> dict[str, object]:
    return {} if interpreted() else {"num_warps": num_warps, **compiler_options(dtype, PACK)}


def _launch(
    name: str,
    S: Tensor,
    T: Tensor,
    spec: RowSpec,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    **arguments: object,
) -> None:
    BLOCK_V, num_warps = config(S.shape[1], S.dtype)
    PACK = pack(aligned(S, T), S.dtype, BLOCK_V, num_warps)
    flags = {"KIND": int(spec.divergence.kind), "MODE": mode(spec, bias_s, bias_t)}
    flags |= {"BLOCK_V": BLOCK_V, "PACK": PACK}
    options = _options(num_warps, S.dtype, PACK)
    with torch.cuda.device_of(S):
        KERNELS[name][(S.shape[0],)](
            S=S, T=T, BiasS=bias_s, BiasT=bias_t, stride_s=S.stride(0), stride_t=T.stride(0), V=S.shape[1],
            **flags, **transforms(spec), **arguments, **options,
        )  # fmt: skip


def row_stats(
    S: Tensor, T: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None, metrics: bool
) -> Tensor:
    wide = torch.promote_types(S.dtype, torch.float32)
    stats = S.new_empty((S.shape[0], len(Column)), dtype=wide)
    _launch("stats", S, T, spec, bias_s, bias_t, Stats=stats, METRICS=metrics)
    return stats


def row_dot(
    S: Tensor, T: Tensor, stats: Tensor, spec: RowSpec, bias_s: Tensor | None, bias_t: Tensor | None
) -> tuple[Tensor, Tensor]:
    if spec.one_sweep:
        return plain_kl(stats, spec)
    loss, A = stats.new_empty(S.shape[0]), stats.new_empty(S.shape[0])
    _launch("dot", S, T, spec, bias_s, bias_t, Stats=stats, Loss=loss, A=A, **terms(spec))
    return clip_tokens(loss, stats, spec), A


def row_grad_(
    S: Tensor,
    T: Tensor,
    stats: Tensor,
    A: Tensor,
    factor: Tensor,
    spec: RowSpec,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    G: Tensor,
    policy_slope: Tensor | None = None,
    labels: Tensor | None = None,
) -> None:
    _launch(
        "grad", S, T, spec, bias_s, bias_t,
        Stats=stats, A=A, Factor=factor, Policy=policy_slope, Labels=labels, G=G, stride_g=G.stride(0),
        HAS_POLICY=policy_slope is not None, NARROWED=is_narrowed(S, G), **terms(spec),
    )  # fmt: skip


def row_fused_(
    S: Tensor,
    T: Tensor,
    factor: Tensor,
    spec: RowSpec,
    bias_s: Tensor | None,
    bias_t: Tensor | None,
    metrics: bool,
    G: Tensor,
    policy_slope: Tensor | None = None,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(S.dtype, torch.float32)
    stats = S.new_empty((S.shape[0], len(Column)), dtype=wide)
    loss, A = stats.new_empty(S.shape[0]), stats.new_empty(S.shape[0])
    _launch(
        "fused", S, T, spec, bias_s, bias_t,
        Stats=stats, Loss=loss, A=A, Factor=factor, Policy=policy_slope, Labels=labels, G=G,
        stride_g=G.stride(0), token_clip=spec.token_clip, METRICS=metrics,
        HAS_POLICY=policy_slope is not None, NARROWED=is_narrowed(S, G), **terms(spec),
    )  # fmt: skip
    return stats, loss, A


def column_norms(G: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    (n, V), BLOCK, wide = G.shape, column_block(G.dtype), torch.promote_types(G.dtype, torch.float32)
    rows = split_rows(n, V, BLOCK)
    blocks, splits = triton.cdiv(V, BLOCK), triton.cdiv(n, rows)
    norms, sums = G.new_empty((splits, V), dtype=wide), G.new_empty((blocks, n), dtype=wide)
    with torch.cuda.device_of(G):
        KERNELS["norms"][blocks, splits](
            G=G, Scale=scale, Norms=norms, Sums=sums, stride_g=G.stride(0), n=n, V=V, rows=rows,
            HEIGHT=COLUMN_HEIGHT, BLOCK=BLOCK, **_options(COLUMN_WARPS, G.dtype, 0),
        )  # fmt: skip
    return norms.sum(0), sums.sum(0)


def gather_columns_(G: Tensor, columns: Tensor, out: Tensor, sums: Tensor) -> None:
    (n, K), BLOCK = out.shape, column_block(G.dtype)
    blocks = triton.cdiv(K, BLOCK)
    if blocks == 0:
        return
    partial = sums.new_empty((blocks, n))
    with torch.cuda.device_of(G):
        KERNELS["gather"][(blocks * triton.cdiv(n, COLUMN_HEIGHT),)](
            G=G, Columns=columns, Out=out, Sums=partial, stride_g=G.stride(0), stride_out=out.stride(0),
            n=n, K=K, HEIGHT=COLUMN_HEIGHT, BLOCK=BLOCK, **_options(COLUMN_WARPS, G.dtype, 0),
        )  # fmt: skip
    sums -= partial.sum(0)
