#!/usr/bin/env bash
# torch 2.13.0 (CPU): torch.compile traces a string method on the module or the name of a tensor's class, except where the tensor
# is an nn.Parameter or an nn.Buffer, as every weight of a module is.
#
# Expected: type(w).__module__.startswith("x") is one graph for a Parameter and a Buffer (whose class is torch.Tensor) as it is
# for a Tensor and for a subclass of it; it depends on the class alone, which the graph is guarded by in any case.
# Seen: "Unsupported: Dynamo does not know how to trace method `startswith` of class `str`", under fullgraph=True an error,
# without it a graph break. The same with __name__ and __qualname__. A comparison (type(w).__name__ == "x") is one graph.
# A check of a weight's class that passes its tests with plain tensors breaks the graph of every real model.
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy setuptools torch==2.13.0
cat > "$folder/classes.py" <<'PY'
import torch


class Subclass(torch.Tensor):
    pass


READ = {
    "__module__.startswith": lambda w: type(w).__module__.startswith("x"),
    "__name__.startswith": lambda w: type(w).__name__.startswith("x"),
    "__qualname__.startswith": lambda w: type(w).__qualname__.startswith("x"),
    "__name__ ==": lambda w: type(w).__name__ == "x",
}
plain = torch.ones(2)
TENSORS = {
    "Tensor": plain,
    "a subclass": plain.as_subclass(Subclass),
    "Parameter": torch.nn.Parameter(plain),
    "Buffer": torch.nn.Buffer(plain),
}
seen = {}
for name, read in READ.items():
    for kind, w in TENSORS.items():
        torch._dynamo.reset()
        try:
            compiled = torch.compile(lambda w, read=read: w * 2 if read(w) else w + 1, fullgraph=True, backend="eager")
            result = "one graph" if torch.equal(compiled(w), w + 1) else "wrong"
        except torch._dynamo.exc.Unsupported:
            result = "unsupported"
        print(f"{name:24} {kind:10} {result}")
        seen[name, kind] = result
for (name, kind), result in seen.items():
    method = name.endswith("startswith")
    expected = "unsupported" if method and kind in ("Parameter", "Buffer") else "one graph"
    assert result == expected, (name, kind, result, expected)
PY
"$folder/venv/bin/python" "$folder/classes.py"
