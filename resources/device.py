"""The device that models run on: what ALIGNMENT_DEVICE names, else the first GPU where there is one."""

import importlib.metadata
import os
import re
from pathlib import Path

from alignment_pipeline.errors import AlignmentError

DEVICE_VARIABLE = "ALIGNMENT_DEVICE"
AUTO = "auto"
_NAMES = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_DRIVER = Path("/dev/nvidiactl")
"""Not `/proc/driver/nvidia`, which a container shows that was given no GPU."""


def named_device() -> str:
    """What the environment asks for: a device's name, or `auto`.

    Raises:
        AlignmentError: It is no name of a device.
    """
    name = os.environ.get(DEVICE_VARIABLE) or AUTO
    if not _NAMES.fullmatch(name):
        raise AlignmentError(f"{DEVICE_VARIABLE}: found {name!r}, expected auto, cpu, cuda, cuda:0, cuda:1, … or mps.")
    return name


def only_device(name: str) -> str:
    """The device of that name, all other GPUs hidden; before torch is imported, since trainers take every GPU they see.

    Args:
        name: `cpu`, `cuda`, `cuda:1`, or `auto`.

    Returns:
        What torch calls the device from now on.
    """
    device = _best_device() if name == AUTO else name
    kind, _, number = device.partition(":")
    if kind != "cuda":
        return device
    visible, index = _visible(), int(number or 0)
    if visible is None:
        os.environ[_VISIBLE] = str(index)
    elif len(visible) > 1:
        os.environ[_VISIBLE] = visible[min(index, len(visible) - 1)]
    return "cuda:0"


def _best_device() -> str:
    """`cuda:0` where there is one that torch can use, found without importing torch: a reused asset never needs it."""
    hidden = _visible() in ([""], ["-1"])
    usable = _DRIVER.exists() and not hidden and not importlib.metadata.version("torch").endswith("+cpu")
    return "cuda:0" if usable else "cpu"


def _visible() -> list[str] | None:
    """The GPUs that the environment leaves visible; None: all, `[""]` and `["-1"]`: none."""
    value = os.environ.get(_VISIBLE)
    return None if value is None else value.split(",")
