"""What the three TRL stages share: arguments, progress, sealed checkpoints, exact resume.

Import this module (it takes seconds: TRL's trainers) only from stages that train.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback, set_seed

from alignment_pipeline import checkpoint
from alignment_pipeline.configs import TrainerFields
from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.pacing import Pacer
from alignment_pipeline.padding import order_by_length
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.stage import StageSpec
from alignment_pipeline.trl_adapter import UNMEASURED

# Names that TRL logs → ours. Anything else keeps its name below `train/`.
_METRIC_NAMES: Mapping[str, str] = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "num_tokens": "train/tokens",
    "mean_token_accuracy": "train/token_accuracy",
    "accuracy": "reward/accuracy",
    "margin": "reward/margin",
    "rewards/accuracies": "dpo/accuracy",
    "rewards/margins": "dpo/margin",
    "rewards/chosen": "dpo/chosen_reward",
    "rewards/rejected": "dpo/rejected_reward",
}


def trainer_arguments(spec: StageSpec[Any], config: TrainerFields) -> dict[str, Any]:
    """Keyword arguments common to SFTConfig, RewardConfig and DPOConfig."""
    on_gpu = spec.device.startswith("cuda")
    return {
        "output_dir": str(spec.work_dir),
        "per_device_train_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": 1.0 if config.batching == "by_length" else config.epochs,  # see training_dataset
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,  # type: ignore[attr-defined]  # every subclass has it, defaults differ
        "warmup_steps": config.warmup_fraction,  # below one it is a share of the steps
        "weight_decay": config.weight_decay,
        "lr_scheduler_type": "linear",
        "seed": spec.seed,
        "data_seed": spec.seed,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # it would log the mean of the losses before in place of a NaN
        "save_strategy": "no",  # `_Checkpoints` decides by time
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        # Never chosen by the device, which the key does not know: results keyed as one precision are of that precision.
        "bf16": config.precision == "bfloat16",
        "use_cpu": not on_gpu,
        "activation_checkpointing": False,
        "dataloader_pin_memory": on_gpu,
        "train_sampling_strategy": "sequential" if config.batching == "by_length" else "random",
    }


def training_dataset(rows: list[dict[str, Any]], lengths: Sequence[int], spec: StageSpec[Any], what: str) -> Dataset:
    """The rows to train on; batched by length, they are in the order of training, all passes one after another.

    Args:
        rows: Columns that the trainer reads.
        lengths: Tokens of each row's longest sequence.
        spec: Of the stage; its configuration says how batches are made.
        what: Name of the rows, for the error.

    Raises:
        DataError: There is no row.
    """
    dataset, config = dataset_of(rows, what), spec.config
    if config.batching == "shuffled":
        return dataset
    step_rows = config.batch_size * config.gradient_accumulation_steps
    wanted = config.max_steps * step_rows if config.max_steps else max(1, round(config.epochs * len(rows)))
    return dataset.select(order_by_length(lengths, step_rows, wanted, spec.seed))


def train(trainer: Any, spec: StageSpec[Any], log: ProgressLog) -> None:
    """Run a TRL trainer to its end, from the newest intact checkpoint if there is one.

    Raises:
        ModelError: The loss became NaN or infinite; the message names the step.
    """
    newest = checkpoint.newest_sealed(spec.work_dir)
    if newest:
        log.note(f"Resuming from {newest.name}.")
    trainer.add_callback(_Progress(log, _tokens_before(newest, log)))
    trainer.add_callback(_Checkpoints(spec.config.checkpoint_every_s))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train(resume_from_checkpoint=str(newest) if newest else None)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch before a model gets new weights."""
    set_seed(seed)


def dataset_of(rows: list[dict[str, Any]], what: str) -> Dataset:
    """A dataset in memory.

    Raises:
        DataError: There is no row to train on.
    """
    if not rows:
        raise DataError(
            f"Found no {what} to train on, expected at least one. Look at the upstream table's dropped rows."
        )
    return Dataset.from_list(rows)


def _tokens_before(newest: Path | None, log: ProgressLog) -> float:
    """Tokens trained on before the checkpoint that is resumed from; TRL counts from zero again."""
    if newest is None:
        return 0.0
    step = int(newest.name.rpartition("-")[2])
    return metric_series(log.path).get(("train", step), {}).get("train/tokens", 0.0)


class _Progress(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Copies what the trainer logs while it trains into the progress log, and stops on a loss that is not a number."""

    def __init__(self, log: ProgressLog, tokens_before: float) -> None:
        self._log = log
        self._tokens_before = tokens_before
        self._tokens, self._since = 0.0, 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        metrics = {
            _METRIC_NAMES.get(name, f"train/{name}"): float(value)
            for name, value in (logs or {}).items()
            if isinstance(value, int | float)
            and name not in ("epoch", *UNMEASURED)
            and not name.startswith(("train_", "total_flos", "eval_"))
        }
        if not metrics:
            return
        if "train/tokens" in metrics:
            now, tokens = time.monotonic(), metrics["train/tokens"]
            metrics["time/tokens_per_s"] = (tokens - self._tokens) / (now - self._since)
            self._tokens, self._since = tokens, now
            metrics["train/tokens"] += self._tokens_before
        loss = metrics.get("train/loss", 0.0)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise ModelError(
                f"The loss became {loss} at step {state.global_step}; nothing was published. "
                "Lower the learning rate or raise warmup_fraction."
            )
        self._log.step("train", state.global_step, state.max_steps, metrics)


class _Checkpoints(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    """Saves when the interval has passed, and seals what the trainer wrote."""

    def __init__(self, interval_s: float) -> None:
        self._pacer = Pacer(interval_s)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and self._pacer.is_due():
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        checkpoint.seal(Path(args.output_dir) / f"checkpoint-{state.global_step}")
