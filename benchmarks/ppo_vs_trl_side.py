"""One side of `ppo_vs_trl.py` in a process of its own: trains on the workload and writes what it measured as JSON.

    python benchmarks/ppo_vs_trl_side.py job.json

It runs under either interpreter: ours has no trl 1.12, TRL's has no `alignment_pipeline`. What only one of them has is
imported inside that side's function. Neither trainer is changed; clocks are put around functions that they call.
"""
# ruff: noqa: TID253  # torch is what is measured here; no part of the product imports benchmarks

import contextlib
import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

Json = dict[str, Any]


@dataclass
class Recorder:
    """Seconds, scores, KLs, phases and optimizer steps of each update."""

    updates: int
    seconds: list[float] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    kls: list[float] = field(default_factory=list)
    optimizer_steps: list[int] = field(default_factory=list)
    phases: list[dict[str, float]] = field(default_factory=list)
    _open: dict[str, float] = field(default_factory=dict)
    _steps: int = 0
    _started: float = 0.0

    def start(self) -> None:
        """The first update begins now."""
        self._started = time.perf_counter()

    def end_update(self, score: float, kl: float, phases: dict[str, float] | None = None) -> None:
        """An update has ended, and the next begins now."""
        now = time.perf_counter()
        self.seconds.append(now - self._started)
        self.scores.append(score)
        self.kls.append(kl)
        self.optimizer_steps.append(self._steps)
        self.phases.append(self._open | (phases or {}))
        self._open, self._steps, self._started = {}, 0, now
        say(f"update {len(self.seconds)}/{self.updates} {self.seconds[-1]:.2f} s  score {score:+.3f}  KL {kl:.3f}")

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds to a phase of the running update."""
        self._open[phase] = self._open.get(phase, 0.0) + seconds

    def clocked(self, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with a clock around it."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.add(phase, time.perf_counter() - started)

        return timed

    @contextlib.contextmanager
    def watching_torch(self) -> Iterator[None]:
        """Within, backward passes and optimizer steps are timed, and the steps counted, whoever makes them."""
        began = [0.0]

        def before(*_: Any) -> None:
            began[0] = time.perf_counter()

        def after(*_: Any) -> None:
            self._steps += 1
            self.add("optimizer", time.perf_counter() - began[0])

        backward = torch.Tensor.backward
        hooks = (
            register_optimizer_step_pre_hook(before),
            register_optimizer_step_post_hook(after),
        )
        torch.Tensor.backward = self.clocked("backward", backward)  # type: ignore[method-assign]
        try:
            yield
        finally:
            torch.Tensor.backward = backward  # type: ignore[method-assign]
            for hook in hooks:
                hook.remove()


def run_trl(job: Json, recorder: Recorder) -> Callable[[], None]:
    """Import trl 1.12 and return what loads the models and trains."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        PrinterCallback,
        TrainerCallback,
    )
    from transformers.models.opt import modeling_opt  # noqa: F401  # before memory is measured
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    class Watch(TrainerCallback):  # type: ignore[misc]  # transformers is untyped
        """Tells the recorder when updates begin and end."""

        def __init__(self) -> None:
            self.logged: dict[str, float] = {}

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            recorder.start()

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            self.logged = logs

        def on_step_end(self, *_: Any, **__: Any) -> None:
            recorder.end_update(self.logged["objective/scores"], self.logged["objective/kl"])

    def forward(model: Any, *args: Any, **kwargs: Any) -> Any:
        phase = "update_forward" if torch.is_grad_enabled() else "reference"
        return recorder.clocked(phase, trl_forward)(model, *args, **kwargs)

    def get_reward(model: Any, *args: Any, **kwargs: Any) -> Any:
        phase = "reward" if model is models["reward"] else "value"
        return recorder.clocked(phase, trl_get_reward)(model, *args, **kwargs)

    trl_forward, trl_get_reward = ppo_trainer.forward, ppo_trainer.get_reward
    ppo_trainer.batch_generation = recorder.clocked("sampling", ppo_trainer.batch_generation)
    ppo_trainer.forward, ppo_trainer.get_reward = forward, get_reward
    models: dict[str, Any] = {}

    def train() -> None:
        folder, load = Path(job["workload_folder"]), job["workload"]
        base, reward = folder / "base" / "model", folder / "reward" / "model"
        lora = job["method"] == "lora"
        options = {"dtype": torch.float32, "local_files_only": True}
        models["policy"] = AutoModelForCausalLM.from_pretrained(base, **options)
        models["ref"] = None if lora else AutoModelForCausalLM.from_pretrained(base, **options)
        models["reward"] = AutoModelForSequenceClassification.from_pretrained(reward, num_labels=1, **options).eval()
        # As in TRL's own example the value model starts as the reward model; or as the base, with a head of zeros.
        start = reward if job["trl_value_model"] == "reward" else base
        models["value"] = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1, **options)
        if start == base:
            torch.nn.init.zeros_(models["value"].score.weight)
        config = PPOConfig(
            output_dir=str(folder / "trl_output"),
            per_device_train_batch_size=load["rollouts"],
            gradient_accumulation_steps=1,  # above 1, num_mini_batches has no effect (trl#5645)
            num_mini_batches=1,
            num_ppo_epochs=load["ppo_epochs"],
            total_episodes=load["rollouts"] * job["updates"],
            local_rollout_forward_batch_size=load["rollouts"],
            response_length=load["response_tokens"],
            temperature=load["temperature"],
            learning_rate=load[f"{job['method']}_learning_rate"],
            lr_scheduler_type="linear",
            adam_epsilon=load["adam_epsilon"],
            kl_coef=load["kl_coef"],
            cliprange=load["clip_range"],
            cliprange_value=load["value_clip_range"],
            vf_coef=load["value_coef"],
            gamma=load["gamma"],
            lam=load["gae_lambda"],
            seed=job["seed"],
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            num_sample_generations=0,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        peft_config = LoraConfig(
            r=load["lora_rank"], lora_alpha=load["lora_alpha"], lora_dropout=0.0,
            target_modules="all-linear", task_type="CAUSAL_LM",
        )  # fmt: skip
        trainer = PPOTrainer(
            args=config,
            processing_class=AutoTokenizer.from_pretrained(base, local_files_only=True),
            model=models["policy"],
            ref_model=models["ref"],
            reward_model=models["reward"],
            value_model=models["value"],
            train_dataset=Dataset.from_dict({"input_ids": json.loads((folder / "prompts.json").read_text())}),
            callbacks=[Watch()],
            peft_config=peft_config if lora else None,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    return train


def run_ours(job: Json, recorder: Recorder) -> Callable[[], None]:
    """Import `alignment_pipeline` and return what loads the models and trains."""
    from transformers.models.opt import modeling_opt  # noqa: F401  # before memory is measured

    from alignment_pipeline.configs import PpoConfig
    from alignment_pipeline.models import load_causal_lm, load_tokenizer
    from alignment_pipeline.ppo.policy import PolicyWithValue
    from alignment_pipeline.ppo.rollout import Prompt
    from alignment_pipeline.ppo.trainer import PpoTrainer
    from alignment_pipeline.reward import RewardScorer
    from alignment_pipeline.scorers import RewardModelScorer

    def train() -> None:
        folder, load = Path(job["workload_folder"]), job["workload"]
        config = PpoConfig(
            method=job["method"],
            lora_rank=load["lora_rank"],
            lora_alpha=load["lora_alpha"],
            updates=job["updates"],
            rollout_batch_size=load["rollouts"],
            minibatch_size=load["rollouts"],
            generation_batch_size=load["rollouts"],
            ppo_epochs=load["ppo_epochs"],
            max_new_tokens=load["response_tokens"],
            temperature=load["temperature"],
            learning_rate=load[f"{job['method']}_learning_rate"],
            kl_coef=load["kl_coef"],
            clip_range=load["clip_range"],
            value_clip_range=load["value_clip_range"],
            value_coef=load["value_coef"],
            gamma=load["gamma"],
            gae_lambda=load["gae_lambda"],
            missing_eos_penalty=0.0,  # no response ends, and TRL's side has no penalty either
            **job["ours"],
        )
        tokenizer = load_tokenizer(folder / "base")
        reward = RewardScorer.load(folder / "reward", folder / "base")
        prompts = [
            Prompt(str(row), tokenizer.decode(token_ids), token_ids)
            for row, token_ids in enumerate(json.loads((folder / "prompts.json").read_text()))
        ]
        torch.manual_seed(job["seed"])
        policy = PolicyWithValue(load_causal_lm(folder / "base" / "model"), config, reward_model=reward.model)
        policy.evaluate = split_forward(policy.evaluate)  # type: ignore[method-assign]
        policy.reference_logprobs = recorder.clocked("reference", policy.reference_logprobs)  # type: ignore[method-assign]
        score = recorder.clocked("reward", RewardModelScorer(reward, tokenizer, load["rollouts"]))
        trainer = PpoTrainer(policy, score, tokenizer, prompts, config, job["seed"])
        recorder.start()
        for _ in range(job["updates"]):
            metrics = trainer.update()
            recorder.end_update(
                metrics["objective/score"],
                metrics["objective/kl"],
                {"sampling": metrics["time/sampling_s"]},
            )

    def split_forward(evaluate: Callable[..., Any]) -> Callable[..., Any]:
        training = recorder.clocked("update_forward", evaluate)
        scoring = recorder.clocked("policy", evaluate)
        return lambda *args, **kwargs: (training if torch.is_grad_enabled() else scoring)(*args, **kwargs)

    return train


SIDES = {"ours": run_ours, "trl": run_trl}


def main() -> None:
    """Run the job that the argument names."""
    job: Json = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    torch.set_num_threads(job["threads"])
    recorder = Recorder(job["updates"])
    started = time.perf_counter()
    train = SIDES[job["side"]](job, recorder)
    import_seconds = time.perf_counter() - started
    after_imports = resident_mib("VmRSS")
    reset_peak()
    with recorder.watching_torch():
        train()
    result = {
        "seconds": recorder.seconds,
        "scores": recorder.scores,
        "kls": recorder.kls,
        "optimizer_steps": recorder.optimizer_steps,
        "phases": recorder.phases,
        "imports_mib": after_imports,
        "peak_mib": resident_mib("VmHWM"),
        "import_seconds": import_seconds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "trl": importlib.metadata.version("trl"),
    }
    Path(job["output"]).write_text(json.dumps(result), encoding="utf-8")


def resident_mib(name: str) -> float:
    """Resident memory of this process now (`VmRSS`) or at its highest since the last reset (`VmHWM`), MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    raise SystemExit(f"/proc/self/status has no line {name}, expected one (this benchmark needs Linux).")


def reset_peak() -> None:
    """Let the peak of resident memory start from what is resident now (proc(5), clear_refs)."""
    Path("/proc/self/clear_refs").write_text("5")


def say(line: str) -> None:
    """A line of progress for the driver."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
