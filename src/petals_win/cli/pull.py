"""`petals-win pull`: fetch ahead what a PC needs of a model, so that a later start needs no network."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from petals_win.cli.api import read_token
from petals_win.host.imports import importing

if TYPE_CHECKING:
    from petals_win.models.source import ModelSource

_GB = 1e9


def pull(
    model: Annotated[str, typer.Argument(help="Hugging Face id, or the name of the default model.")],
    blocks: Annotated[
        str | None, typer.Option(help="Range of blocks, e.g. 0:15: only the files that hold them; default: all files.")
    ] = None,
    token_file: Annotated[
        Path | None, typer.Option(help="File with a Hugging Face token; default: the one saved by 'hf auth login'.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fetch a model, or the files that hold some of its blocks. What is here already is kept, what was broken off goes on.

    Example: petals-win pull Qwen/Qwen3-32B --blocks 0:16
    """
    with importing():
        from petals_win.models.source import open_model
        from petals_win.node.node import parse_blocks

    began = time.monotonic()
    source = open_model(model, token=read_token(token_file))
    _fetch(source, parse_blocks(blocks, source.num_blocks) if blocks else None)
    files = source.repository.files if source.repository else {}
    size = sum(path.stat().st_size for path in files.values())
    if as_json:
        typer.echo(json.dumps({"model": source.name, "blocks": blocks, "files": sorted(files), "bytes": size}))
    elif files:
        what = f"The blocks {blocks} of {source.name}" if blocks else source.name
        typer.echo(
            f"{what}: {len(files)} files, {size / _GB:.1f} GB, are on this PC ({time.monotonic() - began:.0f} s)."
        )
    else:
        typer.echo(f"{source.name} is on this PC.")


def _fetch(source: ModelSource, blocks: tuple[int, int] | None) -> None:
    import torch

    from petals_win.models.architecture import empty_model, find_blocks
    from petals_win.models.loading import fetch_parts

    prefix = find_blocks(empty_model(source.config, torch.float32)).prefix
    wanted = None if blocks is None else tuple(f"{prefix}{index}." for index in range(*blocks))
    fetch_parts(source, lambda name: wanted is None or name.startswith(wanted))
    source.tokenizer()
    source.generation_config()
