"""bfloat16 passes over float32 weights, and the trainers on each supported architecture."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment_pipeline.errors import RecipeError
from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.recipe import load_recipe

REPOSITORY = Path(__file__).parents[2]
BFLOAT16 = {"precision": "bfloat16"}
WITH_DROPOUT: dict[str, dict[str, Any]] = {
    "opt_projected": {"dropout": 0.3, "do_layer_norm_before": False, "max_position_embeddings": 1024},
    "gpt2": {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3, "n_positions": 1024},
    "qwen3": {"attention_dropout": 0.3, "max_position_embeddings": 1024},
}
"""Shapes of opt-350m, gpt2 and Qwen3, as they are published: with dropout."""


def losses_of(log: ProgressLog) -> list[float]:
    return [metrics["train/loss"] for metrics in metric_series(log.path).values()]


def test_sft_in_bfloat16_has_nearly_the_losses_of_float32_and_keeps_float32_weights(smoke: Any, tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16", "float32"):  # one process, one after another, as a run has them
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        log = ProgressLog(folder / "progress.jsonl")
        smoke.run("sft_model", folder, log, precision=precision)
        losses.setdefault(precision, []).append(losses_of(log))
    assert losses["float32"][0] == losses["float32"][1]
    assert losses["bfloat16"][0] == pytest.approx(losses["float32"][0], abs=0.02)  # of 6; bfloat16 has 8 bits
    assert losses["bfloat16"][0] != losses["float32"][0]
    weights = load_file(folder / "output" / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


def test_dpo_in_bfloat16_starts_at_ln_2(smoke: Any, tmp_path: Path) -> None:
    smoke.run("reference_logprobs", tmp_path / "reference", **BFLOAT16)
    short, long = (
        [row["ref_chosen_logprob"] for row in read_jsonl(folder / "train.jsonl")]
        for folder in (tmp_path / "reference" / "output", smoke.artifact("reference_logprobs"))
    )
    assert short == pytest.approx(long, rel=0.01)
    assert short != pytest.approx(long, rel=1e-5)
    log = ProgressLog(tmp_path / "progress.jsonl")
    reference = {"reference_logprobs": tmp_path / "reference" / "output"}
    smoke.run("dpo_policy", tmp_path / "dpo", log, inputs=reference, max_steps=1, **BFLOAT16)
    assert losses_of(log)[0] == pytest.approx(math.log(2), abs=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_ppo_in_bfloat16_has_a_first_ratio_of_exactly_1(smoke: Any, tmp_path: Path, method: str) -> None:
    log = ProgressLog(tmp_path / "progress.jsonl")
    first_step_only = {"updates": 1, "ppo_epochs": 1, "minibatch_size": 8}
    smoke.run("ppo_policy", tmp_path / "ppo", log, method=method, **first_step_only, **BFLOAT16)
    metrics = metric_series(log.path)["ppo", 1]
    assert metrics["policy/ratio"] == 1.0
    assert metrics["policy/approx_kl"] == 0.0
    assert metrics["policy/clip_fraction"] == 0.0


def test_a_reference_of_another_precision_than_dpo_is_refused() -> None:
    recipe = REPOSITORY / "recipes" / "smoke.yaml"
    with pytest.raises(RecipeError, match=r"reference_logprobs\.precision: found float32, expected dpo\.precision"):
        load_recipe(recipe, ["dpo.precision=bfloat16"])
    load_recipe(recipe, ["dpo.precision=bfloat16", "reference_logprobs.precision=bfloat16"])


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("architecture", list(WITH_DROPOUT))
def test_every_trainer_takes_the_architecture_and_dpo_starts_at_ln_2_with_dropout_off(
    smoke: Any, tiny_models: Any, tmp_path: Path, architecture: str, method: str
) -> None:
    base = tiny_models.save(tiny_models.build(architecture, **WITH_DROPOUT[architecture]), tmp_path / "base")
    changes = {"method": method, "max_steps": 2}
    logs = {asset: ProgressLog(tmp_path / f"{asset}.jsonl") for asset in ("sft_model", "reward_model", "dpo_policy")}
    smoke.run("sft_model", tmp_path / "sft", logs["sft_model"], inputs={"base_model": base}, **changes)
    trunk = {"trunk": base}  # whose configuration has the dropout; that of what SFT saves has none
    smoke.run("reward_model", tmp_path / "reward", logs["reward_model"], inputs=trunk, **changes)
    smoke.run("reference_logprobs", tmp_path / "reference", inputs=trunk)
    reference = trunk | {"reference_logprobs": tmp_path / "reference" / "output"}
    smoke.run("dpo_policy", tmp_path / "dpo", logs["dpo_policy"], inputs=reference, **changes)
    for asset, log in logs.items():
        assert len(losses_of(log)) == 2, asset
        assert all(math.isfinite(loss) for loss in losses_of(log)), asset
    # Sums of some 60 log-probabilities of size up to 20, in other batches than the reference's, times beta 0.1.
    assert losses_of(logs["dpo_policy"])[0] == pytest.approx(math.log(2), abs=2e-4)
