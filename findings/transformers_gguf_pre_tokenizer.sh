#!/usr/bin/env bash
# transformers 5.24.0, gguf 0.19.0, torch 2.13.0 (CPU): a GGUF file's `tokenizer.ggml.pre` that transformers does not know is
# read as GPT-2's, without a warning. It knows 23 names, among them not those of SmolLM, DeepSeek-V3, Command R and StarCoder.
#
# Expected: the split that the name stands for, or an error: llama.cpp refuses a file with a name that it does not know.
# Seen: "2024" becomes one token under smollm, command-r, starcoder, deepseek-v3, and a name that nobody has, as under gpt-2;
# the first three stand for one token a digit. Under tekken, which is known, it becomes four. Nothing is said.
#
# Ends with status 1 where this is no longer so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q numpy torch==2.13.0 transformers==5.24.0 gguf==0.19.0 accelerate
cat > "$folder/split.py" <<'PY'
import contextlib
import io
import pathlib
import sys
import warnings

import gguf
import tokenizers
import transformers

folder = pathlib.Path(sys.argv[1])


def tokens(pre):
    """Write a byte-level vocabulary with one merged number, and no weights; read it back."""
    path = folder / f"{pre}.gguf"
    words = [*sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "20", "24", "2024"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([1] * len(words))
    writer.add_token_merges(["2 0", "2 4", "20 24"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    said = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(said):
        warnings.simplefilter("always")
        tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder, gguf_file=path.name)
    heard = any("pre" in str(one.message).lower() for one in caught) or "pre-tok" in said.getvalue().lower()
    return len(tokenizer.tokenize("2024")), heard


found = {pre: tokens(pre) for pre in ("gpt-2", "tekken", "smollm", "command-r", "starcoder", "deepseek-v3", "nobodys")}
for pre, (count, heard) in found.items():
    print(f"{pre:12} tokens of 2024: {count}   warned: {heard}")
expected = {pre: (4 if pre == "tekken" else 1, False) for pre in found}
sys.exit(0 if found == expected else 1)
PY
"$folder/venv/bin/python" "$folder/split.py" "$folder"
