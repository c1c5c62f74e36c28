#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.library.opcheck cannot check the schema of an operator that takes a float8 tensor. test_schema
# fails with a NotImplementedError of `mul`, which the operator does not call; the operator itself is right.
#
# Expected: that test_schema passes, as with int8 and bfloat16: the operator mutates nothing and returns a fresh tensor.
# Seen:
#
#   torch.int8, test_schema: passes
#   torch.bfloat16, test_schema: passes
#   torch.float8_e4m3fn, test_schema: NotImplementedError: "mul_cpu_reduced_float" not implemented for 'Float8_e4m3fn'
#   torch.float8_e5m2, test_schema: NotImplementedError: "mul_cpu_reduced_float" not implemented for 'Float8_e5m2'
#
# and test_faketensor passes with all four. Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy torch==2.13.0
cat > "$folder/measure.py" <<'PY'
import sys
import torch
from torch.library import custom_op, opcheck

@custom_op("finding::half_of", mutates_args=())
def half_of(x: torch.Tensor) -> torch.Tensor:
    return x.float() / 2

@half_of.register_fake
def _(x):
    return torch.empty_like(x, dtype=torch.float32)

seen = {}
for dtype in (torch.int8, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
    x = torch.ones(4, 4).to(dtype)
    assert torch.equal(half_of(x), torch.full((4, 4), 0.5))
    for test in ("test_schema", "test_faketensor"):
        try:
            opcheck(half_of, (x,), test_utils=(test,))
            seen[dtype, test] = "passes"
        except Exception as error:
            cause = error.__cause__ or error
            seen[dtype, test] = f"{type(cause).__name__}: {str(cause).splitlines()[0]}"
        print(f"{dtype}, {test}: {seen[dtype, test]}")
wrong = [d for d in (torch.float8_e4m3fn, torch.float8_e5m2) if "not implemented for 'Float8" in seen[d, "test_schema"]]
others = all(v == "passes" for (d, t), v in seen.items() if d not in wrong or t != "test_schema")
sys.exit(0 if len(wrong) == 2 and others else 1)
PY
"$folder/venv/bin/python" "$folder/measure.py"
