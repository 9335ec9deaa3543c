"""README's table of what large models take, and of how fast they answer. `--write` puts it there.

    .venv/bin/python scripts/plan_table.py --write

It is what `petals-win plan` says, told from configurations alone, with a processor that is assumed in the place of this PC's.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from petals_win.span.needs import Needs, needs_of
from petals_win.span.quantized_linear import Quant
from petals_win.swarm.cards import GIB, slowest_with
from petals_win.swarm.known_models import STORED_IN, find_known_model
from petals_win.swarm.planner import Pc
from petals_win.swarm.speeds import Alike, alike, processor_of

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- plan:begin -->", "<!-- plan:end -->"
MODELS = {
    "Llama 2 70B": "meta-llama/Llama-2-70b-hf",
    "Llama 3.3 70B": "meta-llama/Llama-3.3-70B-Instruct",
    "Qwen3 32B": "Qwen/Qwen3-32B",
    "gpt-oss 120B": "openai/gpt-oss-120b",
    "GLM-4.5-Air": "zai-org/GLM-4.5-Air",
}
STORED: dict[Quant, str] = {"none": "16 bits", "int4": "int4", "nf4": "nf4"}
CARDS, RAMS = (12, 16, 24), (32, 64)  # GiB
RAM_GB_PER_S = 51.2  # two channels of DDR4-3200
AS_FAST_AS_ONE_READS = 5.0  # tokens per second


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--write", action="store_true", help="put the table into README.md")
    how.add_argument("--check", action="store_true", help="fail if README.md has another one")
    asked = parser.parse_args()
    before, begin, rest = README.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        print(f"README.md has no place for the table, between the lines {BEGIN} and {END}.", file=sys.stderr)
        return 1
    whole = f"{before}{BEGIN}\n{table()}\n{END}{after}"
    if asked.write:
        README.write_text(whole, encoding="utf-8", newline="\n")
    elif whole != before + begin + rest:
        print("README.md's table of plans is out of date. Run: python scripts/plan_table.py --write", file=sys.stderr)
        return 1
    return 0


def table() -> str:
    """In Markdown: a row for each model and way to store it."""
    heads = []
    for size in CARDS:
        card = slowest_with(size * GIB)
        assert card is not None
        heads.append(f"{size} GiB ({card.name.removesuffix(f' {size}GB')})")
    heads += [f"CPU, {size} GiB" for size in RAMS]
    rows = [
        f"| model | stored | weights, GiB | a block, MiB | {' | '.join(heads)} |",
        "|---" * (4 + len(heads)) + "|",
    ]
    pcs = [Pc("gpu", size * GIB) for size in CARDS] + [Pc("ram", size * GIB) for size in RAMS]
    for name, model in MODELS.items():
        known = find_known_model(model)
        assert known is not None
        for quant, stored in STORED.items():
            needs = needs_of(known.config(), STORED_IN, quant)
            cells = [cell(alike(pc, needs, quant, processor_of(RAM_GB_PER_S))) for pc in pcs]
            rows.append(f"| {name} | {stored} | {_gib(needs)} | {_block(needs)} | {' | '.join(cells)} |")
    return "\n".join(rows)


def cell(found: Alike | None) -> str:
    """How many PCs, GiB of the fullest, and tokens per second: bold from where on it is as fast as one reads."""
    if found is None:
        return ""
    where = f"{found.count} × {found.most_bytes / GIB:.1f}"
    speed = 1 / found.token_seconds
    said = f"{speed:.1f}/s"
    return f"{where}, **{said}**" if speed >= AS_FAST_AS_ONE_READS else f"{where}, {said}"


def _gib(needs: Needs) -> str:
    return f"{(sum(needs.block_bytes) + needs.outside_bytes) / GIB:.1f}"


def _block(needs: Needs) -> str:
    return f"{max(needs.block_bytes) / 2**20:,.0f}"


if __name__ == "__main__":
    sys.exit(main())
