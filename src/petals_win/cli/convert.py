"""`petals-win convert`: a model in the form that another engine computes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from petals_win.cli.api import read_token
from petals_win.errors import UserError
from petals_win.host.imports import importing
from petals_win.models.onnx_devices import available_devices, check_pair, table


def convert(
    model: Annotated[str, typer.Argument(help="Hugging Face id, folder of safetensors, or .gguf file.")],
    to: Annotated[str, typer.Option(help="The engine that it is for: onnx.")] = "onnx",
    precision: Annotated[str, typer.Option(help="How weights are kept: int4, fp16 or fp32.")] = "int4",
    device: Annotated[str, typer.Option(help=f"What will compute. What goes together: {table()}.")] = "cpu",
    out: Annotated[
        Path | None, typer.Option(help="Folder to make; default: MODEL-onnx-PRECISION-DEVICE in the current one.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
) -> None:
    """Convert a model for --engine onnx, which runs on one PC, also on cards that are not NVIDIA's.

    Example: petals-win convert SmolLM2-135M-Instruct --to onnx
    """
    from petals_win.host.console import Progress

    if to != "onnx":
        raise UserError(f"There is nothing to convert to {to!r}. Use --to onnx.")
    check_pair(precision, device)
    token = read_token(token_file)
    with importing():
        from petals_win.models.onnx_conversion import convert_to_onnx
    name = Path(model).name.removesuffix(".gguf")
    folder = out or Path(f"{name}-onnx-{precision}-{device}")
    with Progress() as progress:
        convert_to_onnx(
            model, folder, precision=precision, device=device, token=token, step=progress.step, detail=progress.detail
        )
        progress.done(f"{folder} is ready: petals-win api --engine onnx --model {folder}")
        if device not in (here := available_devices()):
            progress.note(
                f"The installed ONNX Runtime computes on {', '.join(here)} only: on the PC with that device, install the package for it."
            )
