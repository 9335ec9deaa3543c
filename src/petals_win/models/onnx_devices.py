"""What ONNX Runtime can compute on: devices, precisions, and which of them the installed package has.

Knows names of packages and providers. Does not know models.
"""

from __future__ import annotations

from dataclasses import dataclass

from petals_win.errors import UserError


@dataclass(frozen=True)
class Device:
    """precisions: those that models for it are made in. provider: ONNX Runtime's name for it. package: which brings it."""

    precisions: tuple[str, ...]
    what: str
    provider: str
    package: str


DEVICES = {
    "cpu": Device(("int4", "fp32"), "any PC's processor", "CPUExecutionProvider", "onnxruntime-genai"),
    "cuda": Device(("int4", "fp16", "fp32"), "NVIDIA cards", "CUDAExecutionProvider", "onnxruntime-genai-cuda"),
    "dml": Device(
        ("int4", "fp16"),
        "DirectML: cards of AMD, Intel and NVIDIA under Windows",
        "DmlExecutionProvider",
        "onnxruntime-genai-directml",
    ),
    "webgpu": Device(
        ("int4",), "cards of any maker by WebGPU", "WebGpuExecutionProvider", "onnxruntime-genai with WebGPU"
    ),
}
PRECISIONS = ("int4", "fp16", "fp32")


def table() -> str:
    """Which precisions go with which device, as a sentence."""
    return "; ".join(f"{name} ({device.what}): {', '.join(device.precisions)}" for name, device in DEVICES.items())


def check_pair(precision: str, device: str) -> None:
    """Raises UserError, with the table, for a precision that models for a device are not made in."""
    if device not in DEVICES:
        raise UserError(f"There is no device {device!r}. Use one of: {table()}.")
    if precision not in PRECISIONS:
        raise UserError(f"There is no precision {precision!r}. Use one of: {', '.join(PRECISIONS)}.")
    if precision not in DEVICES[device].precisions:
        raise UserError(f"{precision} does not go with {device}. What goes together: {table()}.")


def available_devices() -> list[str]:
    """Those that the installed ONNX Runtime computes on; none if it is not installed."""
    try:
        import onnxruntime
    except ImportError:
        return []
    providers = onnxruntime.get_available_providers()
    return [name for name, device in DEVICES.items() if device.provider in providers]


def check_device(device: str) -> None:
    """Raises UserError if the installed ONNX Runtime does not compute on it."""
    here = available_devices()
    if not here:
        raise UserError("ONNX Runtime is not installed. Install it with: pip install petals-win[onnx]")
    if device not in here:
        raise UserError(
            f"This model was made for {device}, and the installed ONNX Runtime computes on {', '.join(here)} only. Install "
            f"{DEVICES[device].package} in the place of onnxruntime-genai, or convert the model with --device {here[0]}."
        )
