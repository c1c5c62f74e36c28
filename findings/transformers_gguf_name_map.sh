#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, torch 2.13.0 (CPU): from_pretrained(gguf_file=...) builds gguf's map of tensor names, which
# has the names of all layers, anew for every module of the model, though it depends on the architecture and the depth alone.
#
# Expected: one map for a file.
# Seen: for a Llama of 4, 8 and 16 layers 59, 111 and 215 maps, one for each module, so that the work grows with the square of
# the depth: for 64 layers of 30 kB, 839 maps, 62 of the 64 s of processor time of a load.
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate
cat > "$folder/maps.py" <<'PY'
import pathlib
import sys
import time

import gguf
import numpy as np
import transformers

WIDTH, WORDS = 32, 40
SHAPES = {
    **dict.fromkeys(["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"], (WIDTH, WIDTH)),
    **dict.fromkeys(["attn_norm", "ffn_norm"], (WIDTH,)),
}
make, calls, seconds = gguf.get_tensor_name_map, 0, 0.0


def counted(arch, layers):
    global calls, seconds
    began = time.process_time()
    made = make(arch, layers)
    calls, seconds = calls + 1, seconds + time.process_time() - began
    return made


def written(folder, layers):
    """Write a Llama without a tokenizer, one head of WIDTH."""
    path = folder / f"{layers}.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(WORDS)
    names = {f"blk.{layer}.{name}": shape for layer in range(layers) for name, shape in SHAPES.items()}
    names |= {"token_embd": (WORDS, WIDTH), "output": (WORDS, WIDTH), "output_norm": (WIDTH,)}
    for name, shape in names.items():
        writer.add_tensor(f"{name}.weight", np.ones(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


gguf.get_tensor_name_map = counted
folder, seen = pathlib.Path(sys.argv[1]), []
for layers in (4, 8, 16, 64):
    path, calls, seconds, began = written(folder, layers), 0, 0.0, time.process_time()
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), gguf_file=path.name)
    whole = time.process_time() - began
    assert len(model.model.layers) == layers and model.lm_head.weight.eq(1).all()
    modules = len(list(model.modules()))
    print(f"{layers} layers: {modules} modules, {calls} maps in {seconds:.1f} of {whole:.1f} s of processor time")
    seen.append(calls == modules)
sys.exit(0 if all(seen) else 1)
PY
"$folder/venv/bin/python" "$folder/maps.py" "$folder"
