#!/usr/bin/env bash
# torch 2.13.0 (CPU): Tensor.scatter_ on a 16-bit float tensor casts the whole tensor to fp32 and back, to write a few
# numbers. Time and memory follow the size of the tensor instead of the size of the index. A sum (scatter_add_) needs the
# fp32 copy for repeated indices; a plain scatter_ adds nothing up. fp32 and integer tensors are written in place.
#
# Expected: as for an fp32 tensor, or for the same memory viewed as int16, or for index_put_: no memory, microseconds.
# Seen, one number in each row of (256, 151936), the shape of a block of logits, one thread; memory is the growth of the
# process's peak, a bf16 tensor of this shape has 74 MiB:
#
#   float32: index_put_ 0 MiB, 0.003 ms; scatter_ as int32 0 MiB, 0.003 ms; scatter_ 0 MiB, 0.002 ms
#   bfloat16: index_put_ 0 MiB, 0.003 ms; scatter_ as int16 0 MiB, 0.003 ms; scatter_ 148 MiB, 74.947 ms
#   float16: index_put_ 0 MiB, 0.003 ms; scatter_ as int16 0 MiB, 0.002 ms; scatter_ 148 MiB, 66.783 ms
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy torch==2.13.0
cat > "$folder/measure.py" <<'PY'
import resource, sys, time
import torch

torch.manual_seed(0)
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
whole = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
N, V = 256, 151936
rows, ids = torch.arange(N)[:, None], torch.randint(0, V, (N, 1))
source = torch.randn(N, 1).to(dtype)
buffer = torch.zeros(N, V, dtype=dtype).fill_(1)


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(run, times=5):
    """Return the growth of the peak in MiB and the milliseconds of the fastest of some calls, after one on small tensors."""
    run(buffer[:, :1], torch.zeros_like(ids))
    buffer.fill_(1)
    before, taken = peak(), []
    for _ in range(times):
        start = time.perf_counter()
        run(buffer, ids)
        taken.append(time.perf_counter() - start)
    grown = peak() - before
    if not torch.equal(buffer.gather(1, ids), source):
        sys.exit("not the source's numbers")
    return grown, 1e3 * min(taken)


# scatter_ goes last: a peak never falls
seen = {
    "index_put_": measure(lambda x, index: x.index_put_((rows, index), source)),
    f"scatter_ as {str(whole)[6:]}": measure(lambda x, index: x.view(whole).scatter_(1, index, source.view(whole))),
    "scatter_": measure(lambda x, index: x.scatter_(1, index, source)),
}
print(f"{sys.argv[1]}: " + "; ".join(f"{name} {grown:.0f} MiB, {ms:.3f} ms" for name, (grown, ms) in seen.items()))
quiet = [grown < 10 for grown, _ in seen.values()]
if dtype == torch.float32:
    sys.exit(0 if all(quiet) else 1)
(_, fast), _, (grown, slow) = seen.values()
sys.exit(0 if all(quiet[:2]) and grown > 100 and slow > 50 * fast else 1)
PY
for dtype in float32 bfloat16 float16; do "$folder/venv/bin/python" "$folder/measure.py" $dtype; done
