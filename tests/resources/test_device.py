import os
from pathlib import Path

import pytest

from alignment_pipeline.errors import AlignmentError
from resources import device

HERE, NOWHERE = Path(__file__), Path(__file__) / "none"


@pytest.mark.parametrize(
    ("driver", "build", "visible", "expected", "left"),
    [
        (HERE, "2.13.0", None, "cuda:0", "0"),
        (HERE, "2.13.0+cu130", "3,5", "cuda:0", "3"),
        (HERE, "2.13.0+cu130", "7", "cuda:0", "7"),
        (HERE, "2.13.0", "", "cpu", ""),
        (HERE, "2.13.0", "-1", "cpu", "-1"),
        (HERE, "2.13.0+cpu", None, "cpu", None),
        (NOWHERE, "2.13.0", None, "cpu", None),
    ],
    ids=["one GPU", "two are visible", "one is visible", "hidden", "hidden by -1", "torch for CPUs", "no driver"],
)
def test_by_itself_the_first_gpu_is_taken_that_is_visible_and_that_torch_can_use(
    monkeypatch: pytest.MonkeyPatch, driver: Path, build: str, visible: str | None, expected: str, left: str | None
) -> None:
    monkeypatch.setattr(device, "_DRIVER", driver)
    monkeypatch.setattr("importlib.metadata.version", lambda name: build)
    leave_visible(monkeypatch, visible)
    assert device.only_device("auto") == expected
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == left


@pytest.mark.parametrize(("visible", "left"), [(None, "1"), ("4,6", "6"), ("4", "4")])
def test_of_several_gpus_only_the_named_one_stays_visible(
    monkeypatch: pytest.MonkeyPatch, visible: str | None, left: str
) -> None:
    leave_visible(monkeypatch, visible)
    assert device.only_device("cuda:1") == "cuda:0"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left


def leave_visible(monkeypatch: pytest.MonkeyPatch, visible: str | None) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")  # what the code sets is taken back at the end
    if visible is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")


def test_the_environment_names_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNMENT_DEVICE", raising=False)
    assert device.named_device() == "auto"
    monkeypatch.setenv("ALIGNMENT_DEVICE", "cpu")
    assert device.only_device(device.named_device()) == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu "])
def test_what_is_no_device_is_told(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("ALIGNMENT_DEVICE", name)
    with pytest.raises(AlignmentError, match=f"ALIGNMENT_DEVICE: found '{name}', expected auto, cpu, cuda"):
        device.named_device()
