#!/usr/bin/env bash
# torch 2.13.0 (CPU, x86-64): torch.mm of 16-bit matrices, on a processor whose 16-bit units oneDNN does not use, is many
# times slower where the right operand is stored by rows than where the same numbers are stored by columns, and than
# casting both operands to fp32 and multiplying those.
#
# Expected: a 16-bit product costs about what the fp32 product and the casts cost, whatever the layout.
# Seen, two AMD EPYC cores with AVX-512 and bf16 units but no fp16 units, (256, 4000) @ (4000, 512), the shape of a loss
# head's gradient of the hidden states, two threads, a busy machine:
#
#   float16: by rows 1.135 s, by columns 0.040 s, by way of fp32 0.0440 s
#   bfloat16, ONEDNN_MAX_CPU_ISA=AVX2: by rows 1.246 s, by columns 0.040 s, by way of fp32 0.0098 s
#
# Ends with status 1 where this is no longer so. A processor with fp16 units has nothing to show in the first line.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy torch==2.13.0
cat > "$folder/measure.py" <<'PY'
import sys, time
import torch

torch.set_num_threads(2)
dtype = getattr(torch, sys.argv[1])
units = torch.ops.mkldnn._is_mkldnn_fp16_supported() if dtype == torch.float16 else torch.ops.mkldnn._is_mkldnn_bf16_supported()
if units:
    print(f"{sys.argv[1]}: this processor has units for it, nothing to show")
    sys.exit(0)
a, b = torch.randn(256, 4000).to(dtype), torch.randn(4000, 512).to(dtype)
columns = b.t().contiguous().t()


def seconds(run, times=3):
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return min(taken)


rows, by_columns, cast = (
    seconds(lambda: a @ b), seconds(lambda: a @ columns), seconds(lambda: (a.float() @ b.float()).to(dtype))
)
print(f"{sys.argv[1]}: by rows {rows:.3f} s, by columns {by_columns:.3f} s, by way of fp32 {cast:.4f} s")
sys.exit(0 if rows > 10 * cast and rows > 5 * by_columns else 1)
PY
"$folder/venv/bin/python" "$folder/measure.py" float16
ONEDNN_MAX_CPU_ISA=AVX2 "$folder/venv/bin/python" "$folder/measure.py" bfloat16
