"""The user's data file: read in every form, every bad row named before the first step, the same on resume."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, MambaConfig, MptConfig, OPTConfig
from typer.testing import CliRunner

from opsd_kernels import cli
from opsd_kernels.train import loop
from opsd_kernels.train.config import ConfigError, TrainConfig
from opsd_kernels.train.envs import make_task
from opsd_kernels.train.envs.rows import LISTED
from opsd_kernels.train.loop import train
from opsd_kernels.train.models import pretrained
from opsd_kernels.train.models.tiny import CHAT_TEMPLATE
from opsd_kernels.train.records.log import read_metrics
from opsd_kernels.train.types import RunDirectoryError

GOOD = [{"prompt": f"{i}+{i}", "answer": str(2 * i), "feedback": "1 2"} for i in range(10)]


def task_of(path, **changes):
    return make_task(
        TrainConfig(env="jsonl", model="somewhere", data=str(path), **{"feedback": "text", **changes})
    )


def written(tmp_path, content):
    path = tmp_path / "data.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LINES = "\n".join(json.dumps(row) for row in GOOD)


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES + "\n",
        "\n\n" + LINES.replace("\n", "\n \t\n\n"),
        LINES.replace("\n", "\r\n"),
        LINES.replace("\n", "\r"),
        LINES.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        LINES.encode("utf-16-le"),
        LINES.encode("utf-16-be"),
        LINES.encode("utf-32"),
        json.dumps(GOOD),
        json.dumps(GOOD, indent=2),
        "\ufeff" + json.dumps(GOOD, indent=2).replace("[", "[\n ", 1),
        "[\n" + ",\n".join(json.dumps(row) for row in GOOD) + "\n]\n",
        "\n".join(json.dumps(row, indent=1) for row in GOOD),
        "\n\ufeff".join(json.dumps(row) for row in GOOD),
    ],
    ids=range(16),
)
def test_a_file_is_read_in_every_form_that_json_allows(tmp_path, content):
    task = task_of(written(tmp_path, content))
    assert task.rows == GOOD
    (tmp_path / "plain").mkdir()
    assert task.fingerprint() == task_of(written(tmp_path / "plain", LINES)).fingerprint()


@pytest.mark.parametrize(
    "sign", ["\u2028", "\u2029", "\u0085", "\x0b", "\x0c", "\x1c", "\x00", "\u00a0", "\U0001f600"]
)
@pytest.mark.parametrize("escaped", [True, False])
def test_a_string_holds_any_sign(tmp_path, sign, escaped):
    rows = [{"prompt": f"a{sign}b", "answer": f"{sign}c"}, *GOOD]
    raw = "\n".join(json.dumps(row, ensure_ascii=escaped or sign < " ") for row in rows)
    task = task_of(written(tmp_path, raw))
    assert task.rows == rows and task.env(0, 0).prompt().text == f"a{sign}b"


def test_an_answer_keeps_its_type_whatever_the_other_rows_have(tmp_path):
    answers = ["007", 2, "2024-01-01", "true", "null", 12345678901234567890123, 1.0, "1"]
    rows = [{"prompt": "a", "answer": answer} for answer in answers]
    read = task_of(written(tmp_path, "\n".join(map(json.dumps, rows)))).rows
    assert [repr(row["answer"]) for row in read] == [repr(answer) for answer in answers]


def test_an_optional_key_may_be_null(tmp_path):
    rows = [{**GOOD[0], "feedback": None, "split": None, "source": None}, *GOOD]
    task = task_of(written(tmp_path, "\n".join(map(json.dumps, rows))))
    assert len(task.train) + len(task.held_out) == 11
    assert task.env(0, 0).verify("9").feedback == "The answer is not the expected one."
    assert task.env(1, 0).verify("9").feedback == "1 2"


def raw(**changes):
    return json.dumps({**GOOD[0], **changes})


# A line that cannot be used, and what is said of it.
BAD = {
    "syntax": ('{"prompt": "a", "answer": 1', "Expecting ',' delimiter"),
    "string": ('{"prompt": "a', "Invalid control character at column"),
    "more": ('{"prompt": "a", "answer": 1}}', "Expecting value at column 29"),
    "twice": ('{"prompt": "a", "answer": 1, "prompt": "b"}', "the key 'prompt' twice"),
    "turn twice": (
        '{"prompt": [{"role": "user", "role": "user", "content": "a"}], "answer": 1}',
        "the key 'role' twice",
    ),
    "nan": ('{"prompt": "a", "answer": NaN}', "NaN, which JSON does not have"),
    "infinite": ('{"prompt": "a", "answer": -Infinity}', "-Infinity, which JSON does not have"),
    "huge": ('{"prompt": "a", "answer": 1e999}', "beyond a double"),
    "digits": ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", "a JSON object .*got Exceeds the limit"),
    "deep": ('{"prompt": ' + "[" * 200_000 + "}", "nested too deeply"),
    "byte": (b'{"prompt": "caf\xe9", "answer": "1"}', "expected UTF-8 .*got the byte 0xe9"),
    "list": ('["a", "b"]', r"an object with prompt and answer .*got \['a', 'b'\]"),
    "no answer": ('{"prompt": "a"}', "got none of answer"),
    "nothing": ("{}", "got none of prompt, answer"),
    "null answer": (raw(answer=None), "an answer that is a text or a number .*got None"),
    "list answer": (raw(answer=["1"]), r"an answer that is a text or a number .*got \['1'\]"),
    "true answer": (raw(answer=True), "an answer that is a text or a number .*got True"),
    "empty answer": (raw(answer=" "), "an answer with a text .*got ' '"),
    "no number": (raw(answer="seven"), "an answer that is a number, for verifier=numeric .*got 'seven'"),
    "a root": (raw(answer="\\sqrt{2}"), "an answer that is a number, for verifier=numeric"),
    "split": (raw(split="test"), "a split among .*got 'test'"),
    "list split": (raw(split=["train"]), r"a split among .*got \['train'\]"),
    "feedback": (raw(feedback=3), "a feedback that is a text or null .*got 3"),
    "null prompt": (raw(prompt=None), "a prompt that is a text or a list of turns .*got None"),
    "empty prompt": (raw(prompt=" \n"), r"a prompt with a text .*got ' \\n'"),
    "no turns": (raw(prompt=[]), r"ending with the user's .*got \[\]"),
    "assistant last": (
        raw(prompt=[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]),
        "ending with the user's",
    ),
    "turn": (raw(prompt=["a"]), "a list of turns"),
    "no role": (raw(prompt=[{"content": "a"}]), "a list of turns"),
    "role": (raw(prompt=[{"role": 1, "content": "a"}]), "a list of turns"),
    "parts": (raw(prompt=[{"role": "user", "content": [{"type": "text", "text": "a"}]}]), "a list of turns"),
    "empty turn": (raw(prompt=[{"role": "user", "content": ""}]), "a prompt with a text"),
    "surrogate": (raw(prompt="a\ud800b"), "Unicode in the prompt .*half of a surrogate pair"),
    "turn surrogate": (
        raw(prompt=[{"role": "system", "content": "\udfff"}, {"role": "user", "content": "a"}]),
        "Unicode in the prompt",
    ),
    "feedback surrogate": (raw(feedback="\udc00"), "Unicode in the feedback"),
    "answer surrogate": (raw(answer="\ud83d 7"), "Unicode in the answer"),
}
# These need the tokenizer and the context of the model.
REFUSED = {
    "system": (
        raw(prompt=[{"role": "system", "content": "a"}, {"role": "user", "content": "1+1"}]),
        "the chat template and the tokenizer accept .*got no system turn here",
    ),
    "long": (raw(prompt="1+" * 100), "at most 60 tokens.*got 202 tokens"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_row_is_named_with_its_line(tmp_path, kind):
    line, told = BAD[kind]
    lines = [raw(), b"", line, raw()]
    content = b"\n".join(each if isinstance(each, bytes) else each.encode() for each in lines)
    path = written(tmp_path, content)
    with pytest.raises(ConfigError, match=f"^data: expected .* in {path}, line 3, got ") as raised:
        task_of(path, verifier="numeric")
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 600
    raised.match(told)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_line_is_right_in_an_array_and_in_every_encoding(tmp_path, encoding):
    text = json.dumps([*GOOD[:2], {"prompt": "x"}, *GOOD, 7], indent=1)
    lines = text.splitlines()
    path = written(tmp_path, text.encode(encoding))
    with pytest.raises(ConfigError, match="data: 2 bad rows:") as raised:
        task_of(path)
    for told, place in (("none of answer", lines.index('  "prompt": "x"')), ("7", lines.index(" 7") + 1)):
        assert f"line {place}, got {told}" in str(raised.value)


@pytest.mark.parametrize(
    "ending, told",
    [
        ("", "a comma or the end of the array .*line 4, got the end of the file"),
        (",", "a JSON object .*line 4, got Expecting value"),
        (",\n{}", "an object with prompt"),
        ("\n{}]", "a comma or the end of the array .*line 5, got '{'"),
        (",\n{]", "a JSON object .*line 5, got Expecting property name"),
        ("]\n\n7", "the end of the file after the array .*line 6, got '7'"),
        (",\nNaN]", "a JSON object .*line 5, got NaN"),
    ],
)
def test_an_array_that_is_cut_or_broken_is_named(tmp_path, ending, told):
    text = "\n[" + ",\n".join(map(json.dumps, GOOD[:3])) + ending
    with pytest.raises(ConfigError, match=f"expected {told}"):
        task_of(written(tmp_path, text))


def test_a_long_list_is_cut_and_counted(tmp_path):
    with pytest.raises(ConfigError, match=f"data: {LISTED + 7} bad rows:") as raised:
        task_of(written(tmp_path, '{"prompt": "a"}\n' * (LISTED + 7) + LINES))
    assert str(raised.value).endswith("and 7 more") and str(raised.value).count(", line ") == LISTED


def test_no_file_and_a_half_of_utf16_are_named(tmp_path):
    with pytest.raises(ConfigError, match="data: expected an existing JSONL file"):
        task_of(tmp_path)
    with pytest.raises(ConfigError, match="data: expected UTF-8, UTF-16 or UTF-32 in "):
        task_of(written(tmp_path, LINES.encode("utf-16-le")[:-1]))
    with pytest.raises(ConfigError, match="got no train row"):
        task_of(written(tmp_path, ""))


SHAPE = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}


def saved(folder, encoder, make, template=CHAT_TEMPLATE, **changes):
    """Save a model with random weights beside the tiny tokenizer."""
    torch.manual_seed(6)
    settings = make(vocab_size=pretrained.vocabulary(encoder.tokenizer), **{**SHAPE, **TOKENS, **changes})
    AutoModelForCausalLM.from_config(settings, dtype=torch.float32).save_pretrained(folder)
    tokenizer = encoder.tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, template
    try:
        tokenizer.save_pretrained(folder)
    finally:
        tokenizer.chat_template = before
    return folder


def llama(folder, encoder, template=CHAT_TEMPLATE, positions=64):
    return saved(
        folder, encoder, LlamaConfig, template, intermediate_size=32, max_position_embeddings=positions
    )


def opt(folder, encoder, positions=64):
    return saved(
        folder,
        encoder,
        OPTConfig,
        ffn_dim=32,
        max_position_embeddings=positions,
        word_embed_proj_dim=16,
    )


def settings_of(config, folder, path, **changes):
    common = {"env": "jsonl", "data": str(path), "model": str(folder), "feedback": "text", "cache_dir": None}
    return dataclasses.replace(config, **{**common, "rehearsal_prompts": 0, "max_new_tokens": 4, **changes})


NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
    + CHAT_TEMPLATE
)


def test_the_command_names_a_row_of_each_kind_before_the_first_step(encoder, tmp_path):
    folder, kinds = llama(tmp_path / "model", encoder, NO_SYSTEM), {**BAD, **REFUSED}
    lines = [raw(), raw()]
    for line, _ in kinds.values():
        lines += [line, raw()]
    path = written(tmp_path, b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines))
    chosen = {"env": "jsonl", "data": path, "model": folder, "verifier": "numeric", "tensorboard": "false"}
    options = [part for key, value in chosen.items() for part in ("--set", f"{key}={value}")]
    done = CliRunner().invoke(
        cli.app, ["train", *options, "--set", "max_new_tokens=4", "--out", str(tmp_path / "o")]
    )
    assert done.exit_code == 2 and not (tmp_path / "o").exists()
    assert f"opsd: error: data: {len(kinds)} bad rows:" in done.output
    for place, kind in enumerate(kinds):
        assert f"{path}, line {2 * place + 3}, got " in done.output, kind


@pytest.mark.parametrize("kind", REFUSED)
def test_a_row_that_the_model_cannot_read_is_named(config, encoder, tmp_path, kind):
    line, told = REFUSED[kind]
    path = written(tmp_path, "\n".join([LINES, line]))
    settings = settings_of(config, llama(tmp_path / "model", encoder, NO_SYSTEM), path)
    with pytest.raises(ConfigError, match=f"data: expected a prompt .*{path}, line 11, got") as raised:
        train(settings, tmp_path / "out")
    raised.match(told)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("make", [opt, llama])
@pytest.mark.parametrize("changes", [{}, {"policy_weight": 0.5}])
def test_a_view_beyond_the_context_is_left_out_and_counted(config, encoder, tmp_path, make, changes):
    """A fifth of the rows have a feedback of 80 words, for which the model has no positions."""
    rows = [
        {**GOOD[i], "split": split, "feedback": "1 " * (80 if i == 3 else 3)}
        for split in ("train", "held_out")
        for i in range(4)
    ]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)))
    settings = settings_of(config, make(tmp_path / "model", encoder, positions=48), path, steps=2, **changes)
    train(settings, tmp_path / "out")
    for line in read_metrics(tmp_path / "out" / "metrics.jsonl"):
        assert line["samples_too_long"] == 0.25  # every epoch asks each of the four questions once
        assert line["samples_in_loss"] == 0.75
        assert line["loss"] is not None


def test_a_run_whose_views_are_all_too_long_says_so(config, encoder, tmp_path, capsys):
    path = written(tmp_path, LINES.replace('"1 2"', json.dumps("1 " * 80)))
    folder = llama(tmp_path / "model", encoder, positions=48)
    settings = settings_of(config, folder, path, steps=2, siblings=False)
    train(settings, tmp_path / "out")
    for line in read_metrics(tmp_path / "out" / "metrics.jsonl"):
        assert line["samples_too_long"] == 1 and line["samples_in_loss"] == 0 and line["loss"] is None
    told = "step 1: 12 of 12 views of the teacher are longer than the model's context of 48 tokens"
    printed = capsys.readouterr().out
    assert told in printed and printed.count("longer than the model's context") == 1


def test_answers_longer_than_the_context_are_an_error_at_the_start(config, encoder, tmp_path):
    settings = settings_of(
        config, opt(tmp_path / "model", encoder), written(tmp_path, LINES), max_new_tokens=64
    )
    with pytest.raises(ConfigError, match="data: 10 bad rows:\n  expected a prompt of at most 0 tokens"):
        train(settings, tmp_path / "out")
    with pytest.raises(
        ConfigError, match="max_new_tokens: expected at most 18., as the model reads 192 tokens"
    ):
        train(dataclasses.replace(config, max_new_tokens=190), tmp_path / "out")


def test_the_length_of_a_context_comes_from_the_config():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    linear = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    assert pretrained.context_length(LlamaConfig(max_position_embeddings=32)) == 32
    assert pretrained.context_length(LlamaConfig(max_position_embeddings=32, rope_parameters=yarn)) == 128
    assert pretrained.context_length(LlamaConfig(max_position_embeddings=128, rope_parameters=yarn)) == 128
    assert pretrained.context_length(LlamaConfig(max_position_embeddings=32, rope_parameters=linear)) == 64
    assert pretrained.context_length(MptConfig(max_seq_len=40)) == 40
    assert (
        pretrained.context_length(BloomConfig()) is None and pretrained.context_length(MambaConfig()) is None
    )
    assert pretrained.context_length(MambaConfig(), OPTConfig(), LlamaConfig(max_position_embeddings=9)) == 9


@pytest.fixture
def stopped(config, encoder, tmp_path):
    """Return a function that makes a run of two steps of four, and its settings."""
    rows = [{**row, "split": "train" if i < 8 else "held_out"} for i, row in enumerate(GOOD)]
    path = written(tmp_path, "\n".join(map(json.dumps, rows)))
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATE)
    settings = settings_of(
        config,
        llama(tmp_path / "model", encoder),
        path,
        steps=4,
        prompts_per_step=4,
        chat_template=str(tmp_path / "chat.jinja"),
    )

    def stop(out):
        train(dataclasses.replace(settings, steps=2), out)
        (out / "summary.json").unlink()
        (out / "config.json").write_text(settings.to_json())
        return settings

    return stop


def test_an_epoch_that_ends_where_a_run_stopped_is_not_repeated(stopped, tmp_path, monkeypatch):
    """8 rows, 4 a step: two steps are an epoch."""
    asked = []
    ordinary = loop.prompts_of_step

    def recording(run, problems, count, stream):
        prompts = ordinary(run, problems, count, stream)
        asked.append([prompt.problem for prompt in prompts])
        return prompts

    monkeypatch.setattr(loop, "prompts_of_step", recording)
    settings = stopped(tmp_path / "part")
    train(settings, tmp_path / "part", resume=True)
    parted, asked[:] = [each for each in asked if each], []
    train(settings, tmp_path / "whole")
    assert parted == [each for each in asked if each]
    for epoch in (parted[:2], parted[2:]):
        assert sorted(sum(epoch, [])) == list(range(8))
    clock = {"seconds": None, "tokens_per_second": None}
    lines = [
        [{**line, **clock} for line in read_metrics(tmp_path / out / "metrics.jsonl")]
        for out in ("part", "whole")
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 4


@pytest.mark.parametrize(
    "file, change, named",
    [
        ("data.jsonl", lambda text: text.replace('"2+2"', '"2+3"'), "data"),
        ("data.jsonl", lambda text: "\n".join(reversed(text.splitlines())), "data"),
        ("data.jsonl", lambda text: text + "\n" + json.dumps(GOOD[0]), "data"),
        ("chat.jinja", lambda text: text + "<user>", "chat_template"),
    ],
)
def test_a_run_is_not_resumed_with_other_data(stopped, tmp_path, file, change, named):
    settings, path = stopped(tmp_path / "out"), tmp_path / file
    path.write_text(change(path.read_text()))
    with pytest.raises(
        RunDirectoryError, match=f"{named}: expected the contents .*{file} changed since then"
    ):
        train(settings, tmp_path / "out", resume=True)
    assert len(read_metrics(tmp_path / "out" / "metrics.jsonl")) == 2


def test_the_same_rows_in_another_form_are_the_same_data(stopped, tmp_path):
    settings, path = stopped(tmp_path / "out"), tmp_path / "data.jsonl"
    path.write_bytes(path.read_text().replace("\n", "\r\n").encode("utf-16"))
    assert train(settings, tmp_path / "out", resume=True)["steps"] == 4
