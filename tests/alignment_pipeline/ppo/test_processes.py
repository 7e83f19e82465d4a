"""One process, and two on the same machine that are started as `torchrun` starts them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import ModelError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.ppo.processes import Processes
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.stage import StageSpec
from alignment_pipeline.stages.ppo_policy import train_ppo

SETTINGS: dict[str, Any] = {
    "lora_rank": 2, "updates": 3, "rollout_batch_size": 8, "minibatch_size": 4, "ppo_epochs": 2, "learning_rate": 1e-3,
    "max_new_tokens_min": 1, "max_new_tokens": 8, "score_normalization": "running", "kl_target_nats": 0.5,
    "kl_horizon": 20, "checkpoint_every_s": 1e-9,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "value_trunk": "separate"},
    "full": {"method": "full", "microbatch_size": 1},
    "reward_model": {"method": "lora", "value_trunk": "reward_model", "score_normalization": "none"},
}
# Gradients are the same sums in another order: they differ in a float32's last places (1e-6 of the largest), which
# AdamW (its epsilon 1e-5) turns into at most a thousandth of a step of 1e-3. Twelve steps move weights by up to 1e-2.
ROUNDING = 1e-5

SCRIPT = """
import json, os, sys
from pathlib import Path

import torch

from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageSpec
from alignment_pipeline.stages.ppo_policy import train_ppo

torch.set_num_threads(1)
folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
inputs = {name: Path(path) for name, path in json.loads(sys.argv[3]).items()}
for name, config in cases.items():
    own = folder / name / f"process_{os.environ['RANK']}"
    (own / "output").mkdir(parents=True)
    spec = StageSpec(PpoConfig(**config), inputs, own / "output", own / "work", seed=0)
    result = train_ppo(spec, ProgressLog(own / "progress.jsonl"))
    (own / "result.json").write_text(json.dumps([dict(result.metrics), len(result.checks)]))
"""


def weights_in(output: Path) -> dict[str, torch.Tensor]:
    (path,) = output.glob("*/*.safetensors")
    return load_file(path)


def steps_of(log: Path) -> list[dict[str, float]]:
    return [
        {name: value for name, value in metrics.items() if not name.startswith("time/")}
        for metrics in metric_series(log).values()
    ]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dataset")
    write_jsonl(folder / "train.jsonl", ({"prompt": "1" * (n % 5) + f"{n}:", "prompt_id": str(n)} for n in range(32)))
    return folder


def test_two_processes_train_the_policy_of_one_and_only_the_main_one_writes(
    reward_artifact: Callable[[str], tuple[Path, Path]], dataset: Path, tmp_path: Path
) -> None:
    trunk, reward = reward_artifact("opt")
    inputs = {"trunk": trunk, "reward_model": reward, "dataset": dataset}
    configs = {name: SETTINGS | config for name, config in CASES.items()}
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    arguments = [
        str(tmp_path), json.dumps(configs), json.dumps({name: str(path) for name, path in inputs.items()}),
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *arguments],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    for name, config in configs.items():
        main, other, alone = (tmp_path / name / folder for folder in ("process_0", "process_1", "alone"))
        (alone / "output").mkdir(parents=True)
        spec = StageSpec(PpoConfig(**config), inputs, alone / "output", alone / "work", seed=0)
        result = train_ppo(spec, ProgressLog(alone / "progress.jsonl"))

        expected, found, start = weights_in(alone / "output"), weights_in(main / "output"), None
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=ROUNDING)
        if name == "full":
            start = load_file(trunk / "model" / "model.safetensors")
            assert max((expected[key] - start[key]).abs().max().item() for key in start) > 1e-3

        tables = [read_jsonl(folder / "output" / "extras" / "rollouts.jsonl") for folder in (main, alone)]
        assert len(tables[0]) == 3 * 8  # the main process records what the other one sampled, too
        for two, one in zip(*tables, strict=True):
            assert {key: two[key] for key in ("update", "prompt_id", "response", "tokens", "ended")} == {
                key: one[key] for key in ("update", "prompt_id", "response", "tokens", "ended")
            }
        for two, one in zip(steps_of(main / "progress.jsonl"), steps_of(alone / "progress.jsonl"), strict=True):
            assert two == pytest.approx(one, rel=1e-3, abs=1e-3)  # of all metrics the clip fractions move most
            assert two["train/tokens"] == one["train/tokens"]
            assert two["train/steps"] == 4.0

        main_result, other_result = (json.loads((folder / "result.json").read_text()) for folder in (main, other))
        assert main_result[0] == other_result[0] == pytest.approx(dict(result.metrics), abs=1e-4)
        assert (main_result[1], other_result[1]) == (1, 0)  # the check of what was saved is the main one's
        written = sorted(str(path.relative_to(other)) for path in other.rglob("*") if path.is_file())
        assert written == ["progress.jsonl", "result.json"]
        assert (other / "progress.jsonl").read_text() == ""
        assert list((main / "work").glob("checkpoint-*/sealed.json"))


def test_one_process_holds_everything_and_exchanges_nothing(tmp_path: Path) -> None:
    processes, log = Processes(), ProgressLog(tmp_path / "progress.jsonl")
    assert (processes.count, processes.is_main, processes.device) == (1, True, "cpu")
    items = ["a", "b", "c"]
    assert processes.gather(processes.share(items), 3) == items
    tensor = torch.tensor([1.0, 2.0])
    assert torch.equal(processes.sum(tensor), tensor)
    parameter = torch.nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    processes.sum_gradients([parameter, torch.nn.Parameter(torch.zeros(1))])
    assert parameter.grad.tolist() == [3.0, 4.0]
    assert processes.log_of_main(log) is log


def test_processes_that_resume_from_different_checkpoints_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    processes = Processes()
    processes.require_same("updates done", 3)
    monkeypatch.setattr(processes, "gather", lambda values, length: [*values, 0])
    with pytest.raises(ModelError, match=r"different numbers of updates done \(\[3, 0\]\), expected the same"):
        processes.require_same("updates done", 3)
