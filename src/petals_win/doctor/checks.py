"""All checks, in the order in which they are shown: what the later ones need comes first. Knows no more than that."""

from petals_win.doctor import computer, model, network, peers
from petals_win.doctor.findings import Check

CHECKS: tuple[tuple[str, Check], ...] = (
    ("python", computer.check_python),
    ("torch", computer.check_torch),
    ("gpu", computer.check_gpu_memory),
    ("kernels", computer.check_kernels),
    ("bitsandbytes", computer.check_bitsandbytes),
    ("memory", computer.check_memory),
    ("disk", computer.check_disk),
    ("paths", computer.check_long_paths),
    ("p2pd", network.check_p2pd),
    ("ports", network.check_ports),
    ("firewall", network.check_firewall),
    ("model", model.check_model),
    ("peers", peers.check_peers),
)
