"""Makes .venv in this checkout, keeps it up to date, and runs a program in it.

Usage: bootstrap.py run|install|test|check|build [argument …], by any Python 3.11 to 3.13, with the standard library alone.

Knows venv and pip. Does not know what is installed: pyproject.toml says that, and petals_win.host.torch_build for torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))  # of it, only what needs the standard library alone

from petals_win.host.gpu import has_nvidia  # noqa: E402

VENV = ROOT / ".venv"
VENV_PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
STAMP = VENV / "petals-win.json"
WORK = ROOT / "build"
LOG = WORK / "bootstrap.log"
LOCK = WORK / "bootstrap.lock"

# What an installation is made from; when one of them changes, it is made again.
INPUTS = (
    "pyproject.toml",
    "hatch_build.py",
    "external/upstream.lock",
    "patches/**/*",
    "src/petals_win/upstream/**/*.py",
    "src/petals_win/daemon/build.py",
    "src/p2pd/*",
    "src/petals_win/kernels/build.py",
    "src/kernels/*",
)
GENERATED = ("external/petals-main", "external/hivemind", "bin/p2pd.exe" if sys.platform == "win32" else "bin/p2pd")

TORCH_WHEELS = "https://download.pytorch.org/whl"
REACH_SECONDS = 4
REPORT_EVERY_S = 10

CAUSES = (
    (
        r"No space left on device|Errno 28\b|WinError 112\b|not enough space on the disk",
        "The disk is full: petals-win with torch takes about 2 GB, with CUDA about 8 GB. Make room, then start again.",
    ),
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "The package index could not be trusted: a proxy or antivirus program of this network inspects connections. "
        "Set PIP_CERT to its certificate, then start again.",
    ),
    (
        r"name resolution|Name or service not known|getaddrinfo failed|nodename nor servname|NewConnectionError|ConnectTimeout"
        r"|ProxyError|Read timed out|Network is unreachable|Connection refused|Connection reset|ConnectionError",
        "The package index cannot be reached. Check the internet connection (behind a proxy, set HTTPS_PROXY), then start again.",
    ),
    (
        r"Long Path|path too long|WinError 206\b",
        "A path is longer than Windows allows. Move this folder to a short path such as C:\\petals-win, then start again.",
    ),
    (
        r"WinError 32\b|WinError 5\b|Permission denied|Errno 13\b",
        "A file of the installation cannot be written. End every running petals-win, look whether this folder is yours, "
        "then start again.",
    ),
    (
        r"No matching distribution found",
        "The package index does not answer, or has no such package for this system and this Python. Check the internet "
        "connection, and use a 64-bit Python 3.11 to 3.13 from python.org.",
    ),
)


NOISE = re.compile(r"note:|hint:|\[end of output\]|[╰─│╭×]+|\^+$", re.IGNORECASE)  # in pip's report of a failure


class Failure(Exception):
    """What the user reads: what happened, why, what to do next."""


class Report:
    """Shows what is being done, how long it has taken, and keeps all of it in the log."""

    def __init__(self, log: Path):
        self._terminal = sys.stderr.isatty()
        self._log = log.open("w", encoding="utf-8")
        self._doing = ""
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        threading.Thread(target=self._keep_alive, daemon=True).start()

    def doing(self, what: str) -> None:
        """This is being done from now on."""
        with self._lock:
            if what == self._doing:
                return
            self._close_line()
            self._doing, self._began = what, time.monotonic()
            self._show(what)

    def say(self, sentence: str) -> None:
        """To be read whole, however long."""
        with self._lock:
            self._close_line()
            self.log(f"{time.strftime('%H:%M:%S')} {sentence}")
            print(sentence, file=sys.stderr, flush=True)

    def log(self, line: str) -> None:
        """For the log only."""
        self._log.write(line + "\n")
        self._log.flush()

    def close(self) -> None:
        self._ended.set()
        with self._lock:
            self._close_line()
            self._log.close()

    def _show(self, text: str) -> None:
        self.log(f"{time.strftime('%H:%M:%S')} {text}")
        if self._terminal:
            print("\r" + text[: self._width()].ljust(self._width()), end="", file=sys.stderr, flush=True)
        else:
            print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)

    def _close_line(self) -> None:
        if self._terminal and self._doing:
            text = f"{self._doing}: {time.monotonic() - self._began:.0f} s"
            print("\r" + text[: self._width()].ljust(self._width()), file=sys.stderr, flush=True)
        self._doing = ""

    def _keep_alive(self) -> None:
        while not self._ended.wait(1 if self._terminal else REPORT_EVERY_S):
            with self._lock:
                elapsed = time.monotonic() - self._began
                if self._doing and not self._ended.is_set() and (self._terminal or elapsed >= REPORT_EVERY_S):
                    text = f"{self._doing}: {elapsed:.0f} s"
                    if self._terminal:
                        print("\r" + text[: self._width()].ljust(self._width()), end="", file=sys.stderr, flush=True)
                    else:
                        self._show(text)

    @staticmethod
    def _width() -> int:
        return shutil.get_terminal_size().columns - 1


def fingerprint() -> str:
    """A digest of everything that an installation is made from."""
    digest = hashlib.sha256()
    files = {path for pattern in INPUTS for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc"}
    for path in sorted(files):
        digest.update(f"{path.relative_to(ROOT).as_posix()}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def is_installed(inputs: str, extras: set[str]) -> bool:
    """Whether .venv was made from these inputs, whole, and has these extras."""
    try:
        stamp = json.loads(STAMP.read_text("utf-8"))
    except (OSError, ValueError):
        return False
    made = stamp.get("inputs") == inputs and extras <= set(stamp.get("extras", ()))
    return made and VENV_PYTHON.exists() and all((ROOT / folder).exists() for folder in GENERATED)


def install(extras: set[str]) -> None:
    """Bring .venv up to date, if it is not. One process at a time; what an interrupted one has done is kept."""
    inputs = fingerprint()
    if is_installed(inputs, extras):
        return
    WORK.mkdir(exist_ok=True)
    with only_one() as lock:
        inputs = fingerprint()
        if is_installed(inputs, extras):
            return  # by the process that was waited for
        had = installed_extras()
        STAMP.unlink(missing_ok=True)
        report = Report(LOG)
        try:
            make_venv(report)
            forget_half_installed(report)
            extras = extras | had
            install_torch(report, lock)
            report.doing("Installing petals-win")
            pip(report, lock, "-e", f"{ROOT}[{','.join(sorted(extras))}]")
            say_in_ascii_where_it_is()
        finally:
            report.close()
        STAMP.write_text(json.dumps({"inputs": inputs, "extras": sorted(extras)}), "utf-8")


def installed_extras() -> set[str]:
    try:
        return set(json.loads(STAMP.read_text("utf-8"))["extras"])
    except (OSError, ValueError, KeyError):
        return set()


def make_venv(report: Report) -> None:
    """An environment that has pip: the one that is there, or else a new one."""
    if venv_works():
        return
    report.doing(f"Making .venv with Python {sys.version.split()[0]}")
    if (
        VENV.exists() and VENV not in Path(sys.executable).parents
    ):  # in place of what this very process runs from, repair it
        shutil.rmtree(VENV)
    # Not in this process: ensurepip shows pip's output, and the standard library of some systems lacks it.
    made = subprocess.run(
        [sys.executable, "-I", "-m", "venv", str(VENV)], capture_output=True, text=True, errors="replace"
    )
    report.log(made.stdout + made.stderr)
    if made.returncode != 0:
        if "ensurepip" in made.stdout + made.stderr:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise Failure(f"This Python cannot make environments. Type: sudo apt install python{version}-venv")
        raise failure("An environment could not be made", (made.stdout + made.stderr).splitlines())


def venv_works() -> bool:
    if not VENV_PYTHON.exists():
        return False
    right = "import sys, pip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))"
    try:
        return subprocess.run([str(VENV_PYTHON), "-I", "-c", right], capture_output=True).returncode == 0
    except OSError:
        return False


def site_packages() -> Path:
    return VENV / "Lib/site-packages" if sys.platform == "win32" else next(VENV.glob("lib/python3.*/site-packages"))


def forget_half_installed(report: Report) -> None:
    """A package whose installation was interrupted looks installed to pip, but has no list of its files yet."""
    for info in site_packages().glob("*.dist-info"):
        if not (info / "RECORD").is_file():
            report.log(f"removing {info.name}: it is not complete")
            shutil.rmtree(info)


def say_in_ascii_where_it_is() -> None:
    """An editable installation names its folders in UTF-8; Python before 3.13 reads that by the code page of Windows."""
    file = site_packages() / "_petals_win.pth"
    folders = file.read_text("utf-8").splitlines()
    if not all(folder.isascii() for folder in folders):
        file.write_text(f"import sys; sys.path += {folders!a}\n", "ascii")


def install_torch(report: Report, lock: int) -> None:
    """Install the build of torch that suits this PC from PyTorch's own index, if that can be reached.

    The package index has one build for each system: on Linux with gigabytes of CUDA libraries, on Windows for CPUs only.
    """
    wanted = re.search(r'"(torch\b[^"]*)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    if wanted is None or any(site_packages().glob("torch-*.dist-info")):
        return
    from petals_win.host.torch_build import choose_torch  # here, since a start that installs nothing does not need it

    report.doing("Choosing the build of torch")
    choice = choose_torch()
    report.say(choice.why)
    for build in choice.builds:
        index = f"{TORCH_WHEELS}/{build}"
        report.doing(f"Looking for torch at {index}")
        if not can_reach(f"{index}/torch/"):
            report.log(f"{index} cannot be reached")
            continue
        report.doing(f"Installing torch ({build})")
        with contextlib.suppress(Failure):  # in the log; the package index has one that works everywhere
            pip(report, lock, wanted[1], "--index-url", index)
            return
    if choice.builds:
        for_cpus = ", which is for CPUs (later, 'petals-win doctor' tells how to use the GPU)"
        report.say(
            f"torch: the package index's own build instead{for_cpus if sys.platform == 'win32' else ''}, since "
            f"{TORCH_WHEELS} does not give {', '.join(choice.builds)}; {LOG} says why."
        )


def can_reach(url: str) -> bool:
    import urllib.request  # here, since it takes half of the time of a start that has nothing to install

    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=REACH_SECONDS):
            return True
    except OSError:
        return False


def pip(report: Report, lock: int, *arguments: str) -> None:
    """`pip install` into .venv, shown as it goes. Raises Failure with the likely cause."""
    command = [str(VENV_PYTHON), "-I", "-u", "-m", "pip", "install", "--no-input", "--disable-pip-version-check"]
    command += ["--progress-bar", "off", *arguments]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PIP_USER": "0", "PYTHONUTF8": "1"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        # Whoever kills this process leaves pip at work for a moment: the lock is held until that has ended too.
        pass_fds=() if sys.platform == "win32" else (lock,),
        start_new_session=True,
    )
    tree = tree_of(process)
    lines: list[str] = []
    assert process.stdout is not None
    try:
        for line in process.stdout:
            lines.append(line.rstrip())
            report.log(line.rstrip())
            if what := progress(line):
                report.doing(what)
        status = process.wait()
    except BaseException:
        tree.kill()  # with the build that pip may have started
        process.wait()
        raise
    if status != 0:
        raise failure("The installation failed", lines)


def tree_of(process: subprocess.Popen[Any]) -> Any:
    """`process` and what it starts, to be ended together."""
    from petals_win.host.process_tree import ProcessTree

    tree = ProcessTree()
    tree.add(process.pid)
    return tree


def progress(line: str) -> str | None:
    """What a line of pip's output means to a user, if it is worth a word."""
    if found := re.match(r"\s*(Downloading|Using cached) ([^-\s]+)-([^-\s]+)\S*\.(?:whl|gz) \((.*[MG]B)\)", line):
        return f"{'Fetching' if found[1] == 'Downloading' else 'Taking from the cache:'} {found[2]} {found[3]} ({found[4]})"
    if found := re.match(r"Installing collected packages: (.*)", line):
        return f"Installing packages: {len(found[1].split(','))}"
    if re.match(r"\s*(Building|Preparing) editable", line):
        return "Fetching and patching petals and hivemind, building p2pd"
    return None


def failure(what: str, lines: list[str]) -> Failure:
    """The likely cause and the last words of a program that failed."""
    said = [line.strip() for line in lines[-40:] if line.strip() and not NOISE.match(line.strip())]
    advice = next((advice for pattern, advice in CAUSES if re.search(pattern, "\n".join(said), re.IGNORECASE)), "")
    last = "".join(f"\n    {line[:300]}" for line in said[-6:])
    return Failure(f"{what}. {advice or 'The last lines say why.'}{last}\nAll of it is in {LOG}")


@contextlib.contextmanager
def only_one() -> Iterator[int]:
    """Hold the lock of this checkout, a file descriptor, waiting for another process that has it."""
    with LOCK.open("a") as file:
        waiting = False
        while not try_lock(file.fileno()):
            if not waiting:
                print(
                    "Another start is installing petals-win in this folder; waiting for it.",
                    file=sys.stderr,
                    flush=True,
                )
                waiting = True
            time.sleep(0.2)
        yield file.fileno()


def try_lock(descriptor: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def run(*command: str) -> int:
    """Become `command`, a program of .venv; returns its exit status where a process cannot become another."""
    # A file of the folder that the user is in must not stand in for a module of the same name.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    os.environ["PYTHONUTF8"] = "1"  # whatever the code page
    if sys.platform != "win32":
        os.execv(VENV_PYTHON, [str(VENV_PYTHON), *command])
    process = subprocess.Popen([VENV_PYTHON, *command])
    tree_of(process)  # on Windows it lasts until this process ends
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue  # the console has told the program too, which ends in order


def main(verb: str, *arguments: str) -> int:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        raise Failure(f"petals-win needs Python 3.11 to 3.13; this is {sys.version.split()[0]}.")
    wanted = {"speed"} | ({"quant"} if has_nvidia() else set())
    install(wanted if verb in ("run", "install") else wanted | {"test"})
    if verb == "run":
        return run("-m", "petals_win.cli.main", *arguments)
    if verb == "install":
        print(f"petals-win is installed in {VENV}. Type bin{os.sep}petals-win up", file=sys.stderr)
        return 0
    return run(str(ROOT / "scripts" / f"{verb}.py"), *arguments)


def stop(number: int, _frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")  # as all that it starts writes
    try:
        sys.exit(main(*sys.argv[1:]))
    except Failure as e:
        print(f"petals-win: {e}", file=sys.stderr)
        sys.exit(1)
    except OSError as e:
        print(f"petals-win: {failure(f'The installation failed: {e}', [str(e)])}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nStopped. The next start goes on where this one has ended.", file=sys.stderr)
        sys.exit(130)
