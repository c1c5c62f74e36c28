#!/usr/bin/env bash
# torch 2.13.0 (CPU): the chunked torch.nn.functional.linear_cross_entropy adds the losses of its chunks up in the dtype of
# the inputs. In bf16 the sum stops growing after some hundred chunks: the loss of many tokens comes out at a fraction of its
# value, without a warning. `acc_policy="accurate"` and `acc_dtype=torch.float32` do not change it.
#
# Expected: what the docstring says, the loss of cross_entropy(linear(input, weight), target), within the rounding of its bf16
# result (.4 %), and with an accumulator in fp32 at least so.
# Seen, 16384 tokens, H = 32, V = 500, bf16, mean over the tokens; the loss in float64 is 7.672:
#
#   options=None: 7.625
#   batch_chunk_size=64, acc_policy=auto, acc_dtype=None: 7.875
#   batch_chunk_size=16, acc_policy=auto, acc_dtype=None: 2.000
#   batch_chunk_size=16, acc_policy=accurate, acc_dtype=torch.float32: 2.000
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy torch==2.13.0
cat > "$folder/measure.py" <<'PY'
import sys
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear_cross_entropy

torch.manual_seed(0)
tokens, H, V = 16384, 32, 500
hidden, weight = torch.randn(tokens, H).bfloat16(), (torch.randn(V, H) * 0.3).bfloat16()
target = torch.randint(0, V, (tokens,))
exact = cross_entropy(hidden.double() @ weight.double().T, target).item()
print(f"in float64: {exact:.3f}")
dense = linear_cross_entropy(hidden, weight, target).item()
print(f"options=None: {dense:.3f}")
seen = {}
for size, policy, dtype in ((64, "auto", None), (16, "auto", None), (16, "accurate", torch.float32)):
    options = LinearCrossEntropyOptions(batch_chunk_size=size, acc_policy=policy, acc_dtype=dtype)
    seen[size, policy] = linear_cross_entropy(hidden, weight, target, options=options).item()
    print(f"batch_chunk_size={size}, acc_policy={policy}, acc_dtype={dtype}: {seen[size, policy]:.3f}")
wrong = seen[16, "auto"] < exact / 2 and seen[16, "accurate"] < exact / 2 and abs(seen[64, "auto"] / exact - 1) > 0.02
sys.exit(0 if abs(dense / exact - 1) < 0.01 and wrong else 1)
PY
"$folder/venv/bin/python" "$folder/measure.py"
