"""`ppo_policy`: the trunk trained by proximal policy optimization against a reward. The method is in `ppo.trainer`.

Beside the policy, `extras/` gets a table of sampled responses over the training, and a plot of score against KL.
"""

from typing import Any

import torch

from alignment_pipeline import atomic, checkpoint, plots
from alignment_pipeline.classifier import ClassifierScorer
from alignment_pipeline.configs import PpoConfig
from alignment_pipeline.errors import DataError, ModelError, NonFiniteError
from alignment_pipeline.identity import read_jsonl, write_jsonl
from alignment_pipeline.models import (
    ADAPTER_FOLDER,
    MODEL_FOLDER,
    load_causal_lm,
    load_policy,
    load_scorer,
    load_tokenizer,
    merged,
    save_trained,
    weights_sha256,
)
from alignment_pipeline.pacing import Pacer
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.processes import Processes
from alignment_pipeline.ppo.rollout import Prompt, Rollout, ScoreFunction
from alignment_pipeline.ppo.trainer import PpoTrainer
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.scorers import ClassifierReward, FunctionScorer, RewardModelScorer, SharedTrunkScorer
from alignment_pipeline.sequences import encode
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec

NON_FINITE_FILE = "non_finite_rows.json"
_TABLES = 10  # updates whose first responses are kept
_ROWS_A_TABLE = 4

State = dict[str, Any]


def train_ppo(spec: StageSpec[PpoConfig], log: ProgressLog) -> StageResult:
    """Train the policy; the reported score and KL are means over the last tenth of the updates.

    Raises:
        NonFiniteError: A NaN or an infinity turned up; the rows are in the work folder's `non_finite_rows.json`.
    """
    config, processes = spec.config, Processes(spec.device)
    log = processes.log_of_main(log)
    tokenizer = load_tokenizer(spec.inputs["trunk"])
    torch.manual_seed(spec.seed)
    policy, score = _policy_and_score(spec, tokenizer, processes.device)
    trainer = PpoTrainer(policy, score, tokenizer, _prompts(spec, tokenizer), config, spec.seed, processes)
    history, samples = _resume(spec, trainer, log)
    processes.require_same("updates done", trainer.updates_done)
    pacer = Pacer(config.checkpoint_every_s)
    for number in range(trainer.updates_done, config.updates):
        metrics = _update(spec, trainer, log)
        history.append([metrics["objective/score"], metrics["objective/kl"]])
        if number in _tabled(config.updates) and trainer.rollout is not None:
            samples.extend(_sample_rows(number + 1, trainer.rollout))
        log.step("ppo", number + 1, config.updates, metrics)
        if processes.is_main and pacer.is_due() and number + 1 < config.updates:
            state = {"trainer": trainer.state(), "history": history, "samples": samples}
            checkpoint.save_state(spec.work_dir, number + 1, state)
    del trainer  # the optimizer's memory, before models are read back
    checks: tuple[StageCheck, ...] = ()
    if processes.is_main:
        save_trained(policy.model, tokenizer, spec.output_dir)
        write_jsonl(spec.output_dir / "extras" / "samples.jsonl", samples)
        plots.score_against_kl(spec.output_dir / "extras" / "score_kl.png", history)
        checks = (_saved_is_trained(spec, policy),)
    processes.wait()
    last = history[-max(1, len(history) // 10) :]
    score, kl = (sum(values) / len(last) for values in zip(*last, strict=True))
    return StageResult(
        {
            "objective/score": score,
            "objective/kl": kl,
            "objective/score_gain": score - history[0][0],
            "train/updates": float(config.updates),
        },
        checks,
    )


def _policy_and_score(spec: StageSpec[PpoConfig], tokenizer: Any, device: str) -> tuple[PolicyWithValue, ScoreFunction]:
    """The trunk as policy, and what it is rewarded by. A reward adapter of the same trunk moves in with the policy."""
    config, pad_id = spec.config, tokenizer.pad_token_id
    trunk = load_causal_lm(spec.inputs["trunk"] / MODEL_FOLDER, device)
    artifact = spec.inputs.get("reward_model")
    if config.reward_function is not None:
        return PolicyWithValue(trunk, config), FunctionScorer(config.reward_function)
    if artifact is None:
        classifier = ClassifierScorer.load(spec.inputs["reward_classifier"], device=device)
        return PolicyWithValue(trunk, config), ClassifierReward(classifier, tokenizer, config.generation_batch_size)
    if config.method == "lora" and (artifact / ADAPTER_FOLDER).exists():
        policy = PolicyWithValue(trunk, config, reward_adapter=artifact)
        return policy, SharedTrunkScorer(policy, pad_id, config.generation_batch_size)
    model = load_scorer(artifact, spec.inputs["trunk"], device)
    policy = PolicyWithValue(trunk, config, reward_model=model)
    return policy, RewardModelScorer(model, pad_id, config.generation_batch_size)


def _prompts(spec: StageSpec[PpoConfig], tokenizer: Any) -> list[Prompt]:
    rows = read_jsonl(spec.inputs["dataset"] / "train.jsonl")
    unique = sorted({row["prompt"]: row["prompt_id"] for row in reversed(rows)}.items())
    if len(unique) < spec.config.rollout_batch_size:
        raise DataError(
            f"Found {len(unique)} training prompts, expected at least ppo.rollout_batch_size "
            f"({spec.config.rollout_batch_size}). Lower it or add data."
        )
    token_ids = encode(tokenizer, [text for text, _ in unique])
    return [Prompt(identity, text, ids) for (text, identity), ids in zip(unique, token_ids, strict=True)]


def _update(spec: StageSpec[PpoConfig], trainer: PpoTrainer, log: ProgressLog) -> dict[str, float]:
    """One update; rows with numbers that are not finite are recorded before the stage stops."""
    try:
        return trainer.update()
    except NonFiniteError as error:
        record = {"update": trainer.updates_done + 1, "problem": str(error), "prompt_ids": error.row_ids}
        spec.work_dir.mkdir(parents=True, exist_ok=True)
        atomic.write_json(spec.work_dir / NON_FINITE_FILE, record)
        log.note(f"Update {trainer.updates_done + 1}: {error}")
        raise ModelError(
            f"PPO update {trainer.updates_done + 1}: {error}. The weights are as the last good step left them and "
            f"nothing was published. The rows are listed in {spec.work_dir / NON_FINITE_FILE}. Look at them, lower "
            "ppo.learning_rate, or raise ppo.kl_coef."
        ) from error


def _tabled(updates: int) -> set[int]:
    """Evenly spaced updates, the first and the last among them, whose responses are kept."""
    return {round(number * (updates - 1) / max(1, _TABLES - 1)) for number in range(_TABLES)}


def _sample_rows(update: int, rollout: Rollout) -> list[State]:
    return [
        {
            "update": update,
            "prompt_id": rollout.prompts[row].row_id,
            "prompt": rollout.prompts[row].text,
            "response": rollout.responses[row].text,
            "score": rollout.scores[row].item(),
            "kl_nats": rollout.kl_nats[row].item(),
            "tokens": len(rollout.responses[row].token_ids),
            "ended": rollout.responses[row].ended,
        }
        for row in range(min(_ROWS_A_TABLE, len(rollout.responses)))
    ]


def _saved_is_trained(spec: StageSpec[PpoConfig], policy: PolicyWithValue) -> StageCheck:
    """What was written is what was trained, and not what training started from: by hashes of all weights."""
    trunk = spec.inputs["trunk"]
    parent = weights_sha256(load_causal_lm(trunk / MODEL_FOLDER, policy.device))
    trained = weights_sha256(merged(policy.model))
    saved = weights_sha256(load_policy(spec.output_dir, trunk, policy.device))
    return StageCheck(
        "saved_policy_is_the_trained_one",
        saved == trained != parent,
        f"Weights: trained {trained[:12]}, read back {saved[:12]}, before training {parent[:12]}.",
        blocking=True,
    )


def _resume(spec: StageSpec[PpoConfig], trainer: PpoTrainer, log: ProgressLog) -> tuple[list[list[float]], list[State]]:
    """Scores and KLs of the updates done and their sample rows; the trainer as it was then."""
    state = checkpoint.load_state(spec.work_dir, spec.device)
    if state is None:
        return [], []
    trainer.load_state(state["trainer"])
    history, samples = state["history"], state["samples"]
    log.note(f"Resuming after update {trainer.updates_done} of {spec.config.updates}.")
    return history, samples
