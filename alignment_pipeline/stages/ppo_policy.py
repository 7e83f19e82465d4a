"""`ppo_policy`: the trunk trained by proximal policy optimization against a reward. The method is in `ppo.trainer`.

Beside the policy, `extras/` gets every response that was sampled (`rollouts.jsonl`: update, prompt_id, prompt,
response, score, kl_nats, tokens, ended), a few of them over the training (`samples.jsonl`), and a plot of score against
KL.
"""

import shutil
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
    load_tokenizer,
    merged,
    save_trained,
    weights_sha256,
)
from alignment_pipeline.pacing import Pacer
from alignment_pipeline.ppo.policy import PolicyWithValue
from alignment_pipeline.ppo.processes import Processes
from alignment_pipeline.ppo.rollout import Prompt, ScoreFunction
from alignment_pipeline.ppo.rollout_table import RolloutTable
from alignment_pipeline.ppo.trainer import PpoTrainer
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.reward import RewardEncoder, RewardScorer
from alignment_pipeline.scorers import ClassifierReward, FunctionScorer, RewardModelScorer, SharedTrunkScorer
from alignment_pipeline.stage import StageCheck, StageResult, StageSpec
from alignment_pipeline.tokenization import encode_prompts

NON_FINITE_FILE = "non_finite_rows.json"


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
    history = _resume(spec, trainer, log)
    processes.require_same("updates done", trainer.updates_done)
    table = RolloutTable(spec.work_dir, config.rollout_batch_size)
    if processes.is_main:
        table.cut(trainer.updates_done)
    pacer = Pacer(config.checkpoint_every_s)
    for number in range(trainer.updates_done, config.updates):
        metrics = _update(spec, trainer, log)
        history.append([metrics["objective/score"], metrics["objective/kl"]])
        if processes.is_main and trainer.rollout is not None:
            table.append(number + 1, trainer.rollout)
        log.step("ppo", number + 1, config.updates, metrics)
        if processes.is_main and pacer.is_due() and number + 1 < config.updates:
            table.make_durable()
            state = {"trainer": trainer.state(), "history": history}
            checkpoint.save_state(spec.work_dir, number + 1, state)
    del trainer  # the optimizer's memory, before models are read back
    checks: tuple[StageCheck, ...] = ()
    if processes.is_main:
        save_trained(policy.model, tokenizer, spec.output_dir)
        extras = spec.output_dir / "extras"
        write_jsonl(extras / "samples.jsonl", table.samples(config.updates))
        shutil.copyfile(table.path, extras / table.path.name)  # stays in the work folder too, until all is published
        plots.score_against_kl(extras / "score_kl.png", history)
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
    config = spec.config
    trunk = load_causal_lm(spec.inputs["trunk"] / MODEL_FOLDER, device)
    artifact = spec.inputs.get("reward_model")
    if config.reward_function is not None:
        return PolicyWithValue(trunk, config), FunctionScorer(config.reward_function)
    if artifact is None:
        classifier = ClassifierScorer.load(spec.inputs["reward_classifier"], device=device)
        return PolicyWithValue(trunk, config), ClassifierReward(classifier, tokenizer, config.generation_batch_size)
    if config.method == "lora" and (artifact / ADAPTER_FOLDER).exists():
        policy = PolicyWithValue(trunk, config, reward_adapter=artifact)
        encoder = RewardEncoder.load(artifact, spec.inputs["trunk"])
        return policy, SharedTrunkScorer(policy, encoder, config.generation_batch_size)
    scorer = RewardScorer.load(artifact, spec.inputs["trunk"], device)
    policy = PolicyWithValue(trunk, config, reward_model=None if scorer.encoder.own else scorer.model)
    return policy, RewardModelScorer(scorer, tokenizer, config.generation_batch_size)


def _prompts(spec: StageSpec[PpoConfig], tokenizer: Any) -> list[Prompt]:
    rows = read_jsonl(spec.inputs["dataset"] / "train.jsonl")
    unique = sorted({row["prompt"]: row["prompt_id"] for row in reversed(rows)}.items())
    if len(unique) < spec.config.rollout_batch_size:
        raise DataError(
            f"Found {len(unique)} training prompts, expected at least ppo.rollout_batch_size "
            f"({spec.config.rollout_batch_size}). Lower it or add data."
        )
    token_ids = encode_prompts(tokenizer, [text for text, _ in unique])
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


def _resume(spec: StageSpec[PpoConfig], trainer: PpoTrainer, log: ProgressLog) -> list[list[float]]:
    """Scores and KLs of the updates done; the trainer as it was then."""
    state = checkpoint.load_state(spec.work_dir, spec.device)
    if state is None:
        return []
    trainer.load_state(state["trainer"])
    history: list[list[float]] = state["history"]
    log.note(f"Resuming after update {trainer.updates_done} of {spec.config.updates}.")
    return history
