"""From a model as Hugging Face or llama.cpp have it to a folder for ONNX Runtime.

Knows which files such a folder needs, and that it is there as a whole or not at all. Does not know graphs: another process builds them.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from petals_win.errors import UserError
from petals_win.host.children import spawn
from petals_win.models import onnx_builder
from petals_win.models.checkpoint import SafetensorsCheckpoint
from petals_win.models.onnx_devices import check_pair
from petals_win.models.onnx_folder import CONFIG, MARKER, open_onnx_folder
from petals_win.models.source import ModelSource, open_model

NEEDED = ("onnxruntime_genai", "onnxruntime", "onnx", "onnx_ir")  # modules


def convert_to_onnx(
    model: str,
    out: Path,
    *,
    precision: str,
    device: str,
    token: str | None = None,
    step: Callable[[str], None] = lambda _: None,
    detail: Callable[[str], None] = lambda _: None,
) -> Path:
    """Make the folder `out` of a model as `open_model` finds it, and return it. `step` and `detail` are told what goes on.

    A folder that this function made before is replaced, when the new one is there. Raises UserError for what cannot be converted;
    nothing is left behind then.
    """
    check_pair(precision, device)
    _check_packages()
    _check_out(out)
    step(f"Opening {model}")
    source = open_model(model, token=token)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the result, so that it gets there in one move, and has room where the result has it.
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        made, cache = Path(scratch) / "made", Path(scratch) / "cache"
        plain = _plain_folder(source, model, Path(scratch) / "plain", precision, step)
        step(f"Building {source.name} for ONNX Runtime: {precision}, {device}")
        _build(source, plain, made, precision, device, cache, detail)
        for name in ("config.json", "generation_config.json"):
            if (plain / name).is_file():
                shutil.copyfile(plain / name, made / name)
        marker = {"name": source.name, "precision": precision, "device": device}
        (made / MARKER).write_text(json.dumps(marker), encoding="utf-8")
        open_onnx_folder(made).tokenizer()  # as whoever loads it does
        _put(made, out, Path(scratch) / "before")
    return out


def _check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"What builds models for ONNX Runtime is not installed ({', '.join(missing)}). "
            "Install it with: pip install petals-win[onnx]"
        )


def _check_out(out: Path) -> None:
    """Raises UserError for what must not be written over."""
    if not out.exists() or (out / MARKER).is_file() or (out.is_dir() and not any(out.iterdir())):
        return
    raise UserError(
        f"{out} is there already, and was not made by 'petals-win convert'. Name another folder with --out, or move it away."
    )


def _plain_folder(source: ModelSource, model: str, scratch: Path, precision: str, step: Callable[[str], None]) -> Path:
    """A folder with the model's plain safetensors files: its own, or one that is written to `scratch`."""
    own = Path(model).expanduser()
    if own.is_dir() and isinstance(source.checkpoint, SafetensorsCheckpoint):
        source.tokenizer()
        return own.resolve()
    step(f"Reading all weights of {source.name}")
    source.tokenizer().save_pretrained(scratch)
    # What is quantized later loses nothing in bfloat16 that it would keep, and takes half of the memory.
    whole = source.whole_model(torch.float32 if precision == "fp32" else torch.bfloat16)
    whole.save_pretrained(scratch)
    return scratch


def _build(
    source: ModelSource,
    plain: Path,
    made: Path,
    precision: str,
    device: str,
    cache: Path,
    detail: Callable[[str], None],
) -> None:
    def show(line: str) -> None:
        if line.startswith(("Reading ", "Saving ONNX")):
            detail(line)

    command = [sys.executable, "-m", onnx_builder.__name__, str(plain), str(made), precision, device, str(cache)]
    child = spawn(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, on_line=show)
    try:
        status = child.wait()
    finally:
        child.stop()
    if status == 0 and (made / CONFIG).is_file():
        return
    said = child.output_tail(200)
    if onnx_builder.UNKNOWN in said:
        architecture = (source.config.architectures or [source.config.model_type])[0]
        raise UserError(
            f"{source.name} is a {architecture}, which ONNX Runtime's builder does not know. Take --engine local or petals for it, or a "
            "newer onnxruntime-genai."
        )
    reasons = [line.removeprefix(onnx_builder.FAILED) for line in said if line.startswith(onnx_builder.FAILED)]
    why = (reasons or said[-1:] or [f"it ended with status {status}"])[-1][:400]
    raise UserError(f"{source.name} could not be converted: {why.rstrip('.')}. Nothing was written to disk.")


def _put(made: Path, out: Path, before: Path) -> None:
    """Let `made` be what `out` is, in one move; what was there goes with the scratch folder."""
    if out.exists():
        os.replace(out, before)
    try:
        os.replace(made, out)
    except OSError:
        if before.exists():
            os.replace(before, out)
        raise
