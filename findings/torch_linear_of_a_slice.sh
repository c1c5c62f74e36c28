#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.nn.functional.linear without a bias, on the last rows of prompts as transformers' generate gives
# them to the LM head (hidden[:, -1:, :] of (B, L, H)), copies the weight once for each prompt if the weight has
# requires_grad=False and is bf16. It runs one product per prompt then, not one product; so a frozen model (a teacher, the
# base of an adapter) answers from its first token on with B times the memory of its head, and two orders slower.
#
# Expected: that requires_grad changes nothing under no_grad, and that no slice of 16 rows costs more than a copy of 16 rows.
# Seen (1 thread, V=49152, H=576, 16 prompts of 200 tokens; a head of 54 MiB):
#
#   torch.bfloat16 requires_grad=True:   mm, 12 ms, 8 MiB more at the peak
#   torch.bfloat16 requires_grad=False:  bmm, 1821 ms, 866 MiB more at the peak
#   torch.float32 requires_grad=True:    mm, 29 ms, 8 MiB more at the peak
#   torch.float32 requires_grad=False:   bmm, 156 ms, 3 MiB more at the peak
#
# With hidden[:, -1:, :].contiguous() all four are one mm. Ends with status 1 where the operators are others, or where the
# frozen head in bf16 takes less than 400 MiB on a processor with 16-bit products.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy torch==2.13.0
cat > "$folder/measure.py" <<'PY'
import sys
import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode

torch.set_num_threads(1)
V, H = 49152, 576


class Operators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field + ":"))


seen = {}
for dtype in (torch.bfloat16, torch.float32):
    head, hidden = torch.randn(V, H).to(dtype), torch.randn(16, 200, H).to(dtype)
    for trained in (True, False):
        head.requires_grad_(trained)
        for rows in (hidden[:, -1:, :].contiguous(), hidden[:, -1:, :]):
            with torch.no_grad():
                with open("/proc/self/clear_refs", "w") as handle:
                    handle.write("5")
                before, began = status("VmRSS"), time.perf_counter()
                torch.nn.functional.linear(rows, head)
                took, more = time.perf_counter() - began, status("VmHWM") - before
                names = []
                with Operators():
                    torch.nn.functional.linear(rows, head)
            product = next(name for name in names if name in ("mm", "bmm"))
            seen[dtype, trained, rows.is_contiguous()] = product, more
            print(f"{dtype} requires_grad={trained} contiguous={rows.is_contiguous()}: {product}, "
                  f"{1000 * took:.0f} ms, {more:.0f} MiB more at the peak")
expected = {key: "mm" if key[1] or key[2] else "bmm" for key in seen}
units = torch.cpu._is_avx512_bf16_supported()
copied = seen[torch.bfloat16, False, False][1] > 400 or not units
sys.exit(0 if {key: value[0] for key, value in seen.items()} == expected and copied else 1)
PY
"$folder/venv/bin/python" "$folder/measure.py"
