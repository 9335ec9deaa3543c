"""README's table of the families of models that are served. `--write` computes it and puts it there.

    .venv/bin/python scripts/families.py --write

A row for each small random model of tests/span/families.py and hybrids.py: a family or a layout of its own. `--check` takes the measured differences as they
stand, since tests/span/test_equal_logits.py holds them to the bound; so a new family is a line there and a call of this.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from span.equal_logits import BOUND, Differences, cut_of, differences  # noqa: E402
from span.families import FAMILIES as WITHOUT_STATES  # noqa: E402
from span.families import VOCABULARY, config_of, random_model  # noqa: E402
from span.hybrids import HYBRIDS  # noqa: E402

from petals_win.errors import UserError  # noqa: E402
from petals_win.models.architecture import (  # noqa: E402
    attention_windows,
    attentions_of_a_block,
    check_supported,
    text_config,
)
from petals_win.models.cuts import sources_of_choices, sources_of_keys  # noqa: E402
from petals_win.models.gguf_metadata import MODEL_TYPES  # noqa: E402
from petals_win.models.rows import Row  # noqa: E402

README = ROOT / "README.md"
FAMILIES = {**WITHOUT_STATES, **HYBRIDS}
BEGIN, END = "<!-- families:begin -->", "<!-- families:end -->"
HEAD = "| family | layout | spans | prefill | decode | chunked | batched | files |\n|---|---|---|---|---|---|---|---|"
ROW = re.compile(r"^\| `(.+?)` \|.*?((?: (?:0|\d\.\de-\d\d) \|){4}) [^|]* \|$", re.MULTILINE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument(
        "--write", nargs="*", metavar="FAMILY", help="compute these families and those that have no row yet"
    )
    how.add_argument("--check", action="store_true", help="fail if README.md has other rows, or too large differences")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    held, end, after = rest.partition(END)
    if not begin or not end:
        print(f"README.md has no place for the table, between the lines {BEGIN} and {END}.", file=sys.stderr)
        return 1
    figures = {row[1]: Differences(*(float(value) for value in row[2].split("|")[:4])) for row in ROW.finditer(held)}
    if asked.check:
        good = figures.keys() >= FAMILIES.keys() and all(found.largest <= BOUND for found in figures.values())
        if good and held.strip() == table(figures):
            return 0
        print("README.md's table of families is out of date. Run: python scripts/families.py --write", file=sys.stderr)
        return 1
    for family in FAMILIES:
        if family in asked.write or family not in figures:
            figures[family] = measured(family)
            print(family, figures[family], flush=True)
            # After each, since all of them take minutes.
            README.write_text(f"{before}{BEGIN}\n{table(figures)}\n{END}{after}", encoding="utf-8", newline="\n")
    README.write_text(f"{before}{BEGIN}\n{table(figures)}\n{END}{after}", encoding="utf-8", newline="\n")
    return 0


def measured(family: str) -> Differences:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # Windows deletes no file that is mapped
        random_model(family).save_pretrained(folder)
        return differences(Path(folder), VOCABULARY)


def table(figures: dict[str, Differences]) -> str:
    """In Markdown, and below it what is refused and why. A family without figures gets a row without them."""
    rows = [HEAD]
    for family in sorted(FAMILIES):
        config = config_of(family)
        decoder = text_config(config)
        spans = ", ".join(f"{start}:{end}" for start, end in cut_of(config))
        found = figures.get(family)
        measures = (found.prefill, found.decode, found.chunked, found.batched) if found else ()
        numbers = " | ".join("0" if value == 0 else f"{value:.1e}" for value in measures)
        files = "safetensors, GGUF" if {config.model_type, decoder.model_type} & MODEL_TYPES else "safetensors"
        rows.append(f"| `{family}` | {layout(config)} | {spans} | {numbers} | {files} |")
    return "\n".join([*rows, "", *refused()])


def layout(config: PreTrainedConfig) -> str:
    """What is special about a model's blocks."""
    decoder = text_config(config)
    said = ["text of a model for more"] if decoder is not config else []
    kinds = list(dict.fromkeys(getattr(decoder, "layer_types", None) or ()))
    windows = [window for window in attention_windows(decoder) if window]
    if len(kinds) > 1:
        said.append(" and ".join(kind.replace("_", " ") for kind in kinds))
    elif windows:
        said.append("sliding windows")
    elif "indexed_attention" in kinds:
        said.append("attention to chosen tokens")
    for name in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        chosen = hasattr(decoder, "num_experts_per_tok") or getattr(decoder, "enable_moe_block", False)
        if isinstance(getattr(decoder, name, None), int) and chosen:
            said.append("experts")
            break
    if getattr(decoder.per_layer_config[0], "kv_lora_rank", None):
        said.append("latent attention")
    row = Row.of(decoder)
    said += [f"{row.streams} streams"] if row.streams > 1 else []
    said += ["inputs for each block"] if row.own else []
    said += ["blocks that use others' keys"] if sources_of_keys(decoder) else []
    said += ["blocks that use others' choices"] if sources_of_choices(decoder) else []
    said += ["attends twice in a block"] if attentions_of_a_block(decoder) > 1 else []
    rope = getattr(decoder, "rope_parameters", None) or {}
    ropes = {table.get("rope_type") for table in (rope, *rope.values()) if isinstance(table, dict)}
    said += [f"rotary tables: {name}" for name in sorted(ropes - {None, "default"})]
    if getattr(decoder, "alibi", False):
        said.append("alibi")
    return ", ".join(said)


@cache
def refused() -> list[str]:
    """A row for each reason why a type of decoder is refused before anything of it is read."""
    types: dict[str, list[str]] = {}
    for model_type in sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES}):
        try:
            config = CONFIG_MAPPING[model_type]()
        except (ValueError, StrictDataclassError):  # without settings there is no such model
            continue
        if config.is_encoder_decoder:
            continue
        try:
            check_supported(config)
        except UserError as e:
            why = re.sub(r"(?<=of the type )\S+", "…", str(e)).partition(" Choose ")[0]
            types.setdefault(why, []).append(f"`{model_type}`")
    return [
        "| refused | what is said |",
        "|---|---|",
        *(f"| {', '.join(names)} | {why} |" for why, names in types.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
