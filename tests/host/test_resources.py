"""Threads and memory: what torch computes with."""

import json
import os
import subprocess
import sys
import textwrap

import psutil

from petals_win.host.memory import available_bytes, own_bytes


def run(program):
    environment = {
        k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "GOMP_SPINCOUNT")
    }
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
    assert int(found["threads"]) == (psutil.cpu_count(logical=False) or os.cpu_count())


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
