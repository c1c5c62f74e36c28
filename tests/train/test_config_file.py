"""The commented configuration file: it has every key and is read back to the same configuration."""

import dataclasses

import pytest
from typer.testing import CliRunner

from opsd_kernels.cli import app
from opsd_kernels.train.config import TrainConfig, load_config
from opsd_kernels.train.config.commented_file import COMMENTS

pytest.importorskip("yaml")


def test_every_key_has_its_line():
    assert [key for keys in COMMENTS.values() for key in keys] == [
        field.name for field in dataclasses.fields(TrainConfig)
    ]


OTHERS = ["env=chain", "learning_rate=1e-6", "topk=7", "segment_separator=# no: comment", "tensorboard=false"]


@pytest.mark.parametrize(
    "settings", [[], OTHERS, ["env=jsonl", "data=a b.jsonl", "model=m"]], ids=["defaults", "others", "jsonl"]
)
def test_the_file_reads_back(tmp_path, settings):
    path = tmp_path / "run.yaml"
    arguments = [
        "train",
        "--write-config",
        str(path),
        *(part for setting in settings for part in ("--set", setting)),
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert load_config(path) == load_config(None, settings)
    assert CliRunner().invoke(app, arguments).exit_code == 2, "a file that is there is not written over"


def test_a_json_name_is_refused(tmp_path):
    result = CliRunner().invoke(app, ["train", "--write-config", str(tmp_path / "run.json")])
    assert result.exit_code == 2 and "ends in .yaml" in result.output


@pytest.mark.parametrize(
    "text, value", [("1e-6", 1e-6), ("5E-4", 5e-4), ("+2e3", 2e3), ("1.5e-3", 1.5e-3), ("1", 1)]
)
def test_numbers_without_a_point_are_numbers(tmp_path, text, value):
    (tmp_path / "run.yaml").write_text(f"learning_rate: {text}  # a comment\n")
    assert load_config(tmp_path / "run.yaml").learning_rate == value


def test_broken_yaml_is_one_line(tmp_path):
    (tmp_path / "run.yaml").write_text("steps: [1\n")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml")])
    assert result.exit_code == 2 and "expected valid JSON or YAML" in result.output
