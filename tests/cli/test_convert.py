"""`petals-win convert`: what it refuses, and that nothing is left of what failed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from tiny_chat import tiny_chat_model
from typer.testing import CliRunner

from petals_win.cli.main import app
from petals_win.errors import UserError
from petals_win.models import onnx_conversion
from petals_win.models.onnx_conversion import convert_to_onnx
from petals_win.models.onnx_devices import DEVICES, PRECISIONS, check_pair, table
from petals_win.models.onnx_folder import MARKER, open_onnx_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_chat_model(tmp_path_factory.mktemp("chat") / "tiny", context=64, ends=0)


def refused(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["convert", *arguments])
    assert isinstance(result.exception, UserError), result.exception
    return str(result.exception)


def test_a_folder_is_made_and_replaced_whole(model, tmp_path):
    """By the command, then by one that stays what it was because the next one fails."""
    out = tmp_path / "made"
    result = CliRunner().invoke(app, ["convert", str(model), "--out", str(out), "--precision", "int4"])
    assert result.exit_code == 0, result.exception
    made = open_onnx_folder(out)
    assert (made.name, made.device, made.context_length) == ("tiny", "cpu", 64)
    (out / "kept").write_text("")
    with pytest.raises(UserError, match="int8"):
        convert_to_onnx(str(model), out, precision="int8", device="cpu")
    assert (out / "kept").exists()
    convert_to_onnx(str(model), out, precision="fp32", device="cpu")
    assert not (out / "kept").exists() and [each.name for each in tmp_path.iterdir()] == ["made"]


def test_what_the_builder_does_not_know(tmp_path):
    """And nothing is left behind."""
    model = tiny_chat_model(tmp_path / "tiny", "gpt2", context=64)
    with pytest.raises(UserError, match="tiny is a GPT2LMHeadModel, which ONNX Runtime's builder does not know"):
        convert_to_onnx(str(model), tmp_path / "out" / "made", precision="fp32", device="cpu")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_the_builder_fails_at(model, tmp_path, monkeypatch):
    """Its own words are told; here a folder that goes away before it is read."""
    plain = tmp_path / "nowhere"
    monkeypatch.setattr(onnx_conversion, "_plain_folder", lambda *_: plain)
    with pytest.raises(UserError, match="tiny could not be converted: .*nowhere.* Nothing was written"):
        convert_to_onnx(str(model), tmp_path / "made", precision="fp32", device="cpu")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_somebody_else_is_left_alone(model, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "was not made by 'petals-win convert'" in refused(str(model), "--out", str(tmp_path))
    assert "was not made by" in refused(str(model), "--out", str(tmp_path / "file"))
    assert [each.name for each in tmp_path.iterdir()] == ["file"] and MARKER not in "file"


def test_what_does_not_go_together(model, tmp_path):
    assert "fp16 does not go with cpu. What goes together: cpu (" in refused(str(model), "--precision", "fp16")
    assert "fp32 does not go with dml" in refused(str(model), "--precision", "fp32", "--device", "dml")
    assert "no device 'tpu'" in refused(str(model), "--device", "tpu")
    assert "no precision 'int8'" in refused(str(model), "--precision", "int8")
    assert "nothing to convert to 'gguf'" in refused(str(model), "--to", "gguf")
    for device, each in DEVICES.items():
        assert set(each.precisions) <= set(PRECISIONS) and device in table()
        for precision in each.precisions:
            check_pair(precision, device)


def test_without_the_package(model, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    assert "pip install petals-win[onnx]" in refused(str(model), "--out", str(tmp_path / "made"))


def test_a_model_that_is_not_there(tmp_path):
    assert "There is no file or folder" in refused(str(tmp_path / "nope.gguf"), "--out", str(tmp_path / "made"))
    assert list(tmp_path.iterdir()) == []
