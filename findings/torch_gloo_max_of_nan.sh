#!/usr/bin/env bash
# torch 2.13.0 (CPU): all_reduce over Gloo with ReduceOp.MAX or MIN keeps a NaN of one rank in some places of the tensor
# and drops it in others. Which places depends on the rank that has it and on the number of ranks; where it is dropped, a
# number of another rank stands. All ranks get the same. torch.maximum, torch.minimum, amax and amin keep every NaN. So
# a maximum over ranks (of the logits of a vocabulary in parts, of a loss, of a norm) does not say that one of them failed.
#
# Expected: NaN in all places, as torch.maximum of the ranks' tensors has.
# Seen, a tensor of four equal numbers, NaN on one rank and its own number on every other, in fp32 (fp64, bf16 and fp16
# alike):
#
#   2 ranks, MAX, NaN on rank 0: [nan, nan, 1.0, 1.0]
#   2 ranks, MAX, NaN on rank 1: [0.0, 0.0, nan, nan]
#   3 ranks, MAX, NaN on rank 0: [nan, nan, 2.0, 2.0]
#   3 ranks, MAX, NaN on rank 1: [0.0, 0.0, nan, nan]
#   3 ranks, MAX, NaN on rank 2: [1.0, 1.0, 1.0, 1.0]
#
# and a single number: NaN on rank 0 is kept, on rank 1 of two it becomes 0.0, on rank 2 of three 1.0
#
# Ends with status 1 where a tensor of four keeps every NaN, or a single number one of the last rank.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy torch==2.13.0
cat > "$folder/reduce.py" <<'PY'
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
OPS = {"MAX": (dist.ReduceOp.MAX, torch.maximum), "MIN": (dist.ReduceOp.MIN, torch.minimum)}


def dropped(rank, world, name, failed, dtype, size=4):
    """Return how many places have lost the NaN of the rank `failed`."""
    over_ranks, here = OPS[name]
    tensors = [torch.full((size,), float("nan") if r == failed else float(r), dtype=dtype) for r in range(world)]
    expected = tensors[0]
    for tensor in tensors[1:]:
        expected = here(expected, tensor)
    assert expected.isnan().all()
    found = tensors[rank]
    dist.all_reduce(found, op=over_ranks)
    every = [None] * world
    dist.all_gather_object(every, found.tolist())
    assert all(str(one) == str(every[0]) for one in every), "ranks differ"
    if rank == 0:
        print(f"{world} ranks, {name}, {str(dtype)[6:]}, NaN on rank {failed}: {every[0]}", flush=True)
    return int((~found.isnan()).sum())


def main(rank, world, store):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    lost = [dropped(rank, world, name, failed, dtype) for name in OPS for dtype in DTYPES for failed in range(world)]
    lost.append(dropped(rank, world, "MAX", 0, torch.float32, 1) == 0)
    lost.append(dropped(rank, world, "MAX", world - 1, torch.float32, 1))
    dist.destroy_process_group()
    if 0 in lost:
        sys.exit(1)


if __name__ == "__main__":
    for world in (2, 3):
        mp.spawn(main, (world, f"{sys.argv[1]}/store{world}"), world)
PY
"$folder/venv/bin/python" "$folder/reduce.py" "$folder" 2> "$folder/log" || { cat "$folder/log"; exit 1; }
