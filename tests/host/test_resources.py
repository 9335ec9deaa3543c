"""Threads and memory: what torch computes with."""

import json
import os
import subprocess
import sys
import textwrap

import psutil
import pytest

from petals_win.host import threads
from petals_win.host.memory import DESKTOP_BYTES, available_bytes, keep_within_card, own_bytes

OPENMP = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def run(program, **settings):
    environment = {k: v for k, v in os.environ.items() if k not in OPENMP} | settings
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_settings_take_effect_when_torch_comes_later():
    found = run("""
        import json, os, sys
        from petals_win.host.threads import apply_thread_settings
        settings = apply_thread_settings(1)
        import torch
        print(json.dumps([settings, torch.get_num_threads(), sys.getswitchinterval(), os.environ["GOMP_SPINCOUNT"]]))
    """)
    assert found[0] == {"threads": "1", "GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1", "switch_interval": "0.5 ms"}
    assert found[1:] == [1, 0.0005, "20000"]


def test_the_number_of_threads_can_be_changed_afterwards():
    found = run("""
        import json, torch
        from petals_win.host.threads import apply_thread_settings
        torch.set_num_threads(3)
        settings = apply_thread_settings(1)
        print(json.dumps([settings["threads"], torch.get_num_threads(), settings["GOMP_SPINCOUNT"]]))
    """)
    assert found == ["1", 1, "as torch found it"]


def test_none_is_a_thread_for_each_core():
    found = run("""
        import json
        from petals_win.host.threads import apply_thread_settings
        print(json.dumps(apply_thread_settings(None)))
    """)
    assert found["threads"] == f"up to {psutil.cpu_count(logical=False) or os.cpu_count()}"


def test_what_the_user_has_set_stays():
    program = """
        import json, os
        from petals_win.host.threads import apply_thread_settings
        settings = apply_thread_settings(None)
        print(json.dumps([settings, {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "GOMP_SPINCOUNT")}]))
    """
    settings, environment = run(program, OMP_NUM_THREADS="3,1", GOMP_SPINCOUNT="7")
    assert (settings["threads"], settings["GOMP_SPINCOUNT"], environment["GOMP_SPINCOUNT"]) == ("3", "7", "7")
    settings, environment = run(program, OMP_WAIT_POLICY="passive")
    assert settings["OMP_WAIT_POLICY"] == "passive", "a count of ours would win over it"
    assert environment == {"OMP_NUM_THREADS": None, "GOMP_SPINCOUNT": None}


def test_nodes_that_a_process_starts_count_free_cores_by_themselves():
    found = run("""
        import json, os
        from petals_win.host.threads import apply_thread_settings
        apply_thread_settings(None)
        print(json.dumps("OMP_NUM_THREADS" in os.environ))
    """)
    assert found is False, "they would take it for a number that the user has given"


class Pc:
    """A PC of four cores whose clocks the test sets."""

    def __init__(self, monkeypatch):
        self.now = self.others = 0.0
        self.looks = 0
        monkeypatch.setattr(threads, "_now", lambda: self.now)
        monkeypatch.setattr(threads, "_had_by_others", self.had_by_others)
        monkeypatch.setattr(os, "cpu_count", lambda: 4)
        self.cores = threads.FreeCores(4)

    def had_by_others(self):
        self.looks += 1
        return self.others

    def compute(self, seconds, others):
        """One computation, while others keep so many cores busy; returns with how many threads."""
        with self.cores.computing() as number:
            self.now += seconds
            self.others += seconds * others
        return number


def test_cores_that_others_keep_busy_are_left_to_them(monkeypatch):
    pc = Pc(monkeypatch)
    assert pc.compute(1, others=0.2) == 4
    assert pc.compute(1, others=1.1) == 4, "no more was known"
    assert pc.compute(1, others=3) == 3
    assert pc.compute(1, others=9) == 1
    assert pc.compute(1, others=0) == 1, "never none"
    assert pc.compute(1, others=0) == 4


def test_what_others_do_between_computations_does_not_count(monkeypatch):
    """The other node of this PC computes while this one waits for it."""
    pc = Pc(monkeypatch)
    for _token in range(20):
        assert pc.compute(0.05, others=0) == 4
        pc.now += 0.05
        pc.others += 0.2


def test_who_is_busy_all_the_time_counts_for_one_with_pauses_too(monkeypatch):
    pc = Pc(monkeypatch)
    for _token in range(20):
        number = pc.compute(0.05, others=3)
        pc.now += 0.05
        pc.others += 0.15
    assert number == 1


def test_looking_at_what_others_have_had_is_rare(monkeypatch):
    """It takes as long as the hundredth part of a small model's token, which has several computations."""
    pc = Pc(monkeypatch)
    for _token in range(1000):
        assert pc.compute(0.004, others=0.1) == 4
        pc.now += 0.0005
    assert pc.looks < 30, "in four seconds"


def test_after_a_pause_it_is_seen_at_once_that_others_have_ended(monkeypatch):
    pc = Pc(monkeypatch)
    assert pc.compute(1, others=3) == 4
    pc.now += 5
    assert pc.compute(0.01, others=0) == 4, "the other program has ended"


def test_what_others_did_in_a_pause_may_be_over(monkeypatch):
    """Two programs that answer in turn must not take each other for busy."""
    pc = Pc(monkeypatch)
    assert pc.compute(1, others=0) == 4
    for _answer in range(3):
        pc.now, pc.others = pc.now + 5, pc.others + 20
        assert pc.compute(0.05, others=0) == 4
        assert pc.compute(0.05, others=0) == 4


def test_after_a_pause_a_short_time_shows_that_others_are_busy(monkeypatch):
    pc = Pc(monkeypatch)
    assert pc.compute(1, others=0) == 4
    pc.now, pc.others = pc.now + 5, pc.others + 15
    assert pc.compute(0.06, others=3) == 4
    assert pc.compute(0.06, others=3) == 4
    assert pc.compute(0.06, others=3) == 1, "seen after a tenth of a second"
    pc.now, pc.others = pc.now + 5, pc.others + 15
    assert pc.compute(0.06, others=3) == 1, "and still known after the next pause"


def test_a_decision_takes_more_than_one_tick_of_the_system_s_clock(monkeypatch):
    pc = Pc(monkeypatch)
    assert pc.compute(0.001, others=10) == 4
    assert pc.compute(0.001, others=0) == 4, "10 ms of somebody else's in 1 ms say nothing"


def test_computations_of_one_process_share_the_free_cores(monkeypatch):
    pc = Pc(monkeypatch)
    with pc.cores.computing() as first, pc.cores.computing() as second:
        assert (first, second) == (4, 2)
    assert pc.compute(1, others=0) == 4


def test_a_computation_inside_of_another_has_its_threads():
    found = run("""
        import json
        from petals_win.host import threads
        threads.apply_thread_settings(None)
        import torch
        threads._free_cores = threads.FreeCores(4)
        numbers = []
        with threads.computing():
            numbers.append(torch.get_num_threads())
            with threads.computing():
                numbers.append(torch.get_num_threads())
            numbers.append(threads._free_cores._running)
        numbers.append(threads._free_cores._running)
        with threads.computing():
            numbers.append(threads._free_cores._running)
        print(json.dumps(numbers))
    """)
    assert found == [4, 4, 1, 0, 1]


def test_beside_busy_programs_torch_computes_with_one_thread():
    """Real programs and the real clocks; as many as there are cores leave none free."""
    busy = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(os.cpu_count())]
    try:
        found = run("""
            import json, time
            from petals_win.host.threads import apply_thread_settings, computing
            apply_thread_settings(None)
            import torch
            a, numbers, end = torch.randn(256, 256), [], time.monotonic() + 20
            while (not numbers or numbers[-1] > 1) and time.monotonic() < end:
                with computing():
                    numbers.append(torch.get_num_threads())
                    a @ a
            print(json.dumps(numbers))
        """)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert found[-1] == 1


def test_pieces_are_shared_out_among_threads():
    """Each of which computes alone; threads that come later begin as before."""
    found = run("""
        import json, threading, time
        import torch
        from petals_win.host.threads import share_out

        def work(piece):
            if together is not None and threading.get_ident() not in {who for _, who, *_ in done}:
                together.wait(30)  # until each thread has a piece
            if piece > 100:
                time.sleep(0.2)  # seconds in all before so many are done as may not be
            done.append((piece, threading.get_ident(), torch.get_num_threads(), torch.is_grad_enabled()))
            if piece == 100:
                raise ValueError("a hundred")

        shared = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            done, together = [], threading.Barrier(threads)
            share_out(work, range(9))
            pieces, who, alone, learns = zip(*done)
            after = [torch.get_num_threads()]
            later = threading.Thread(target=lambda: after.append(torch.get_num_threads()))
            later.start()
            later.join()
            shared.append([sorted(pieces), len(set(who)), set(alone) == {1}, any(learns), after])
        done, together = [], None
        try:
            share_out(work, range(98, 200))
        except ValueError as e:
            shared.append([str(e), len(done) < 50, torch.get_num_threads(), torch.is_grad_enabled()])
        with torch.inference_mode():
            filled = torch.empty(9)
            share_out(lambda piece: filled[piece].fill_(piece), range(9))
        shared.append(filled.tolist())
        print(json.dumps(shared))
    """)
    assert found[:2] == [
        [list(range(9)), threads, True, False, [threads] * 2] for threads in (1, 3)
    ], "all of them, by so many threads"
    assert found[2] == ["a hundred", True, 3, True]
    assert found[3] == [float(piece) for piece in range(9)]


def test_memory_of_the_pc_and_of_this_process():
    assert 0 < own_bytes() < psutil.virtual_memory().total
    assert 0 < available_bytes() <= psutil.virtual_memory().total


def test_memory_of_an_accelerator_is_not_worth_importing_torch():
    found = run("""
        import json, sys
        from petals_win.host.memory import available_bytes
        try:
            available_bytes("cuda:0")
        except RuntimeError as e:
            print(json.dumps([str(e), "torch" in sys.modules]))
    """)
    assert "cuda:0" in found[0] and found[1] is False


def test_memory_of_a_torch_device():
    import torch  # here, since the other tests do without it

    assert abs(available_bytes(torch.device("cpu")) - available_bytes("cpu")) < 1e9


class Card:
    """Counters of an NVIDIA card with 8 GiB, of which other programs have 2, and this one some."""

    def __init__(self, monkeypatch, allocated: int, kept: int):
        import torch

        self.fraction = 1.0
        free = 6 * 2**30 - allocated - kept
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (free, 8 * 2**30))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _device: allocated)
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _device: allocated + kept)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.limit)

    def limit(self, fraction: float, device) -> None:
        assert isinstance(fraction, float) and 0 <= fraction <= 1 and device.type == "cuda"
        self.fraction = fraction


@pytest.mark.parametrize(("allocated", "kept"), [(0, 0), (3 * 2**30, 2**30)])
def test_of_a_card_the_desktop_has_its_share(monkeypatch, allocated, kept):
    import torch

    card, device = Card(monkeypatch, allocated, kept), torch.device("cuda", 0)
    ours = 6 * 2**30 - DESKTOP_BYTES
    assert available_bytes(device) == available_bytes("cuda:0") == ours - allocated
    keep_within_card(device)
    assert card.fraction == pytest.approx(ours / 2**33)


def test_a_card_that_is_full(monkeypatch):
    import torch

    card = Card(monkeypatch, 2**30, 0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _device: (2**20, 8 * 2**30))
    assert available_bytes("cuda:0") == 0
    keep_within_card(torch.device("cuda", 0))
    assert card.fraction == 1 / 8


def test_where_there_is_no_card_nothing_is_limited(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *_: pytest.fail("a limit"))
    keep_within_card(torch.device("cpu"))
