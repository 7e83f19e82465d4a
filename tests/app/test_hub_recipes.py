"""The shipped recipes of hub models and datasets, each as a person runs it, over a hub cache of small stand-ins.

The cache has the real names, the real files' kinds (a `.bin` alone where the hub's main revision has no safetensors)
and the real columns; the models are of the right architecture and two layers. There is no network.
"""

import json
import math
import random
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    DistilBertTokenizerFast,
    GPT2Config,
    GPT2LMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from alignment_pipeline.identity import read_jsonl
from alignment_pipeline.progress import metric_series
from app.recipes import all_recipes
from resources.artifact_store import ArtifactRef, ArtifactStore
from resources.runs import RunRecords

Run = Callable[..., "subprocess.CompletedProcess[str]"]

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PINNED = {
    section.hub_name: section.hub_revision
    for recipe in all_recipes()
    for section in (recipe.data, recipe.base_model, recipe.reward_classifier)
    if section is not None and section.hub_revision
}
"""Repository → the revision that the recipes name."""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
WORDS = ["film", "story", "plot", "cast", "music", "scene", "actor", "end", "good", "bad", "fine", "dull"]

QUICK = {
    "data.validation_fraction": 0.1, "data.test_fraction": 0.2,
    "sft.max_steps": 2, "sft.batch_size": 4, "reward_model.max_steps": 2, "reward_model.batch_size": 4,
    "dpo.max_steps": 2, "dpo.batch_size": 4, "ppo.updates": 2, "ppo.rollout_batch_size": 8, "ppo.minibatch_size": 4,
    "ppo.microbatch_size": "null", "evaluation.prompts": 6, "evaluation.max_new_tokens": 8, "decoding.prompts": 3,
    "decoding.max_new_tokens": 8, "decoding.min_new_tokens": "[4]", "decoding.max_lengths": "[4]",
}  # fmt: skip


def sentence(rng: random.Random, words: int = 6) -> str:
    return " ".join(rng.choices(WORDS, k=words))


def byte_level(special: list[str], before: str | None = None, **tokens: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2's, OPT's and Qwen's are; `before` is put before every text, as OPT does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 20, trainer)
    if before:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{before} $A", special_tokens=[(before, tokenizer.token_to_id(before))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


class Hub:
    """A hub cache that tests fill."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def snapshot(self, kind: str, name: str) -> Path:
        """Folder of a repository's only revision."""
        repository = self.home / "hub" / f"{kind}s--{name.replace('/', '--')}"
        commit = PINNED.get(name, COMMIT)
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text(commit)
        folder = repository / "snapshots" / commit
        folder.mkdir(parents=True)
        return folder

    def add_model(self, name: str, model: Any, tokenizer: Any, *, bin_only: bool = False) -> None:
        """A model as its repository holds it; with `bin_only` without safetensors."""
        folder = self.snapshot("model", name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        if bin_only:
            (folder / "model.safetensors").unlink()
            torch.save(model.state_dict(), folder / "pytorch_model.bin")

    def add_dataset(self, name: str, file: str, rows: list[dict[str, Any]]) -> None:
        """A dataset of one Parquet, JSON or JSONL file."""
        path = self.snapshot("dataset", name) / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            datasets.Dataset.from_list(rows).to_parquet(path)
        elif path.suffix == ".json":
            path.write_text(json.dumps(rows))
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def add_models(hub: Hub) -> None:
    torch.manual_seed(0)
    opt = byte_level(["</s>", "<pad>"], "</s>", bos_token="</s>", eos_token="</s>", pad_token="<pad>")
    hub.add_model(
        "facebook/opt-350m",
        OPTForCausalLM(
            OPTConfig(vocab_size=len(opt), hidden_size=16, word_embed_proj_dim=8, ffn_dim=32, num_hidden_layers=2,
                      num_attention_heads=2, do_layer_norm_before=False, max_position_embeddings=2048, dropout=0.1,
                      bos_token_id=0, eos_token_id=0, pad_token_id=1)
        ),
        opt,
        bin_only=True,
    )  # fmt: skip
    gpt2 = byte_level(["<|endoftext|>"], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
    for name, bin_only in (("openai-community/gpt2", False), ("lvwerra/gpt2-imdb", True)):
        config = GPT2Config(vocab_size=len(gpt2), n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        hub.add_model(name, GPT2LMHeadModel(config), gpt2, bin_only=bin_only)
    qwen = byte_level(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    qwen.chat_template = CHATML
    hub.add_model(
        "Qwen/Qwen3-0.6B",
        Qwen3ForCausalLM(
            Qwen3Config(vocab_size=len(qwen), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                        num_attention_heads=2, num_key_value_heads=1, head_dim=8, max_position_embeddings=4096,
                        eos_token_id=qwen.eos_token_id, pad_token_id=0, tie_word_embeddings=True)
        ),
        qwen,
    )  # fmt: skip
    vocabulary = hub.home / "vocab.txt"
    vocabulary.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    labels = {0: "NEGATIVE", 1: "POSITIVE"}
    config = DistilBertConfig(vocab_size=5 + len(WORDS), dim=16, hidden_dim=32, n_layers=2, n_heads=2, id2label=labels)
    hub.add_model(
        "lvwerra/distilbert-imdb",
        DistilBertForSequenceClassification(config),
        DistilBertTokenizerFast(str(vocabulary), model_max_length=512),
        bin_only=True,
    )


def add_datasets(hub: Hub) -> None:
    rng = random.Random(0)
    hub.add_dataset(
        "sahil2801/CodeAlpaca-20k", "code_alpaca_20k.json",
        [{"instruction": sentence(rng), "input": sentence(rng, 2) if n % 4 == 0 else "", "output": sentence(rng)}
         for n in range(160)],
    )  # fmt: skip
    pairs = [{"prompt": sentence(rng), "chosen": sentence(rng), "rejected": sentence(rng, 3)} for _ in range(160)]
    hub.add_dataset("Dahoas/synthetic-instruct-gptj-pairwise", "data/train-00000-of-00001.parquet", pairs)
    chats = [
        {side: [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
         for side in ("chosen", "rejected")} | {"score_chosen": 8.0, "score_rejected": 3.0}
        for pair in pairs
    ]  # fmt: skip
    hub.add_dataset("trl-lib/ultrafeedback_binarized", "data/train-00000-of-00001.parquet", chats)
    turns = "\n\nHuman: {}\n\nAssistant: {}\n\nHuman: {}\n\nAssistant: {}"
    dialogues = []
    for _ in range(160):
        before = [sentence(rng), sentence(rng), sentence(rng)]
        dialogues.append({side: turns.format(*before, sentence(rng)) for side in ("chosen", "rejected")})
    hub.add_dataset("Anthropic/hh-rlhf", "train.jsonl", dialogues)
    reviews = [{"text": sentence(rng, 45), "label": n % 2} for n in range(160)]
    hub.add_dataset("stanfordnlp/imdb", "plain_text/train-00000-of-00001.parquet", reviews)


class Runs:
    """Runs recipes in one home over the hub cache."""

    def __init__(self, home: Path, hub: Hub, align: Run) -> None:
        self.home, self._hub, self._align = home, hub, align

    def run(self, recipe: str, **changes: object) -> "subprocess.CompletedProcess[str]":
        """`align run` with few steps; `a__b=c` stands for --set a.b=c."""
        present = set(Path(f"recipes/{recipe}.yaml").read_text().split("\n"))
        sections = {line.split(":")[0] for line in present}
        quick = {key: value for key, value in QUICK.items() if key.split(".")[0] in sections}
        quick |= {name.replace("__", "."): value for name, value in changes.items()}
        settings = [part for key, value in quick.items() for part in ("--set", f"{key}={value}")]
        env = {"HF_HOME": str(self._hub.home), "HF_HUB_OFFLINE": "1"}
        done = self._align(self.home, "run", recipe, *settings, env=env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done

    def artifact(self, recipe: str, asset: str) -> Path:
        ref: ArtifactRef = RunRecords(self.home).current(recipe)[asset]
        return ArtifactStore(self.home).path(ref)

    def rows(self, recipe: str, asset: str, table: str) -> list[dict[str, Any]]:
        return read_jsonl(self.artifact(recipe, asset) / table)

    def losses(self, recipe: str, asset: str) -> list[float]:
        """Training loss of each step."""
        series = metric_series(self.artifact(recipe, asset) / "extras" / "progress.jsonl")
        return [metrics["train/loss"] for metrics in series.values() if "train/loss" in metrics]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, align: Run) -> Runs:
    folder = tmp_path_factory.mktemp("hub")
    hub = Hub(folder / "hf")
    hub.home.mkdir()
    add_models(hub)
    add_datasets(hub)
    return Runs(folder / "home", hub, align)


def suffixes(folder: Path) -> set[str]:
    return {path.suffix for path in folder.iterdir()}


def source_of(instructions: Path) -> dict[str, Any]:
    source: dict[str, Any] = json.loads((instructions / "extras" / "source.json").read_text())
    return source


def policies(rows: Iterable[dict[str, Any]]) -> list[str]:
    return [row["policy"] for row in rows]


def test_instruction_tuning_of_opt_350m_on_code_alpaca(runs: Runs) -> None:
    done = runs.run("codealpaca_opt350m", decoding__temperatures="[0, 1.0]", decoding__num_beams="[2]")
    recipe = "codealpaca_opt350m"
    source = source_of(runs.artifact(recipe, "instructions"))
    assert (source["commit"], len(source["content_sha256"])) == (PINNED["sahil2801/CodeAlpaca-20k"], 64)
    kept = runs.rows(recipe, "instructions", "rows.jsonl")
    assert len(kept) == 120 and {row["input"] for row in kept} == {""}
    assert ".bin" not in suffixes(runs.artifact(recipe, "base_model") / "model")
    adapter = json.loads((runs.artifact(recipe, "sft_model") / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], sorted(adapter["target_modules"])) == (16, 32, ["q_proj", "v_proj"])
    table = runs.rows(recipe, "comparison", "table.jsonl")
    assert policies(table) == ["base_model", "sft_model"]
    before, after = table
    assert after["bleu_change"] == pytest.approx(after["bleu"] - before["bleu"])
    assert after["bleu_change_low"] <= after["bleu_change"] <= after["bleu_change_high"]
    examples = runs.rows(recipe, "sft_evaluation", "examples.jsonl")
    assert all(row["decoding"].startswith("beams 5") for row in examples) and len(examples) == after["prompts"]
    assert len(runs.rows(recipe, "decoding_sweep", "table.jsonl")) >= 6
    assert "BLEU" in done.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__hub_name": "Anthropic/hh-rlhf"},
        {"data__hub_name": "trl-lib/ultrafeedback_binarized", "seed": 7},
        {
            "reward_model__hub_name": "lvwerra/distilbert-imdb",
            "reward_model__lora_targets": "all-linear",
            "reward_model__max_tokens": 128,
        },
    ],
    ids=["pairs", "dialogues", "chats", "encoder"],
)
def test_a_reward_model_of_gpt2_on_preference_pairs(runs: Runs, changes: dict[str, object]) -> None:
    done = runs.run("reward_gpt2", **changes)
    scores = runs.rows("reward_gpt2", "reward_model", "scores.jsonl")
    held_out = runs.rows("reward_gpt2", "preference_pairs", "validation.jsonl")
    assert [row["id"] for row in scores] == [pair["id"] for pair in held_out]
    assert all(pair["prompt"].startswith("\n\nHuman: ") for pair in held_out)
    assert all(pair["chosen"].startswith(" ") and pair["rejected"].startswith(" ") for pair in held_out)
    if "hh-rlhf" in str(changes):
        assert all(pair["prompt"].count("\n\nAssistant:") == 2 for pair in held_out)
    assert "length alone" in done.stdout and "shuffled prompts" in done.stdout


def test_ppo_of_gpt2_imdb_for_positive_reviews(runs: Runs) -> None:
    runs.run("imdb_ppo_gpt2")
    recipe = "imdb_ppo_gpt2"
    assert ".bin" not in suffixes(runs.artifact(recipe, "reward_classifier") / "model")
    rollouts = runs.rows(recipe, "ppo_policy", "extras/rollouts.jsonl")
    assert len(rollouts) == 16 and all(row["tokens"] <= 16 for row in rollouts)
    lengths = {row["prompt_tokens"] for row in runs.rows(recipe, "formatted_dataset", "train.jsonl")}
    assert min(lengths) >= 2 and len(lengths) > 3
    before, after = runs.rows(recipe, "comparison", "table.jsonl")
    assert (before["policy"], after["policy"]) == ("base_model", "ppo_policy")
    assert after["learned_change_low"] <= after["learned_change"] <= after["learned_change_high"]
    assert after["learned_change"] == pytest.approx(after["learned_score"] - before["learned_score"])


def test_dpo_of_gpt2_on_ultrafeedback(runs: Runs) -> None:
    done = runs.run("dpo_gpt2")
    assert runs.losses("dpo_gpt2", "dpo_policy")[0] == pytest.approx(math.log(2), abs=1e-5)
    before, after = runs.rows("dpo_gpt2", "comparison", "table.jsonl")
    assert policies([before, after]) == ["base_model", "dpo_policy"]
    assert after["win_rate_low"] < after["win_rate"] < after["win_rate_high"] and after["prompts"] == 6
    assert before["kl_nats"] == 0 < after["kl_nats"]
    assert "dpo_policy tells" in done.stdout
    artifact = runs.artifact("dpo_gpt2", "dpo_policy")
    assert (artifact / "extras" / "curves.png").is_file()


@pytest.mark.parametrize("recipe", ["qwen3_chat", "qwen3_chat_gpu"])
def test_a_chat_model_goes_through_every_stage_in_its_own_template(runs: Runs, recipe: str) -> None:
    changes = {"sft__gradient_accumulation_steps": 1, "dpo__gradient_accumulation_steps": 1, "ppo__max_new_tokens": 8}
    runs.run(recipe, **changes)
    rows = runs.rows(recipe, "formatted_dataset", "train.jsonl")
    assert all(row["prompt"].startswith("<|im_start|>user\n") for row in rows)
    assert all(row["prompt"].endswith("assistant\n<think>\n\n</think>\n\n") for row in rows)
    assert all(row["completion"].endswith("<|im_end|>") for row in rows)
    found = policies(runs.rows(recipe, "comparison", "table.jsonl"))
    assert found == ["base_model", "sft_model", "ppo_policy", "dpo_policy"]
    tolerance = 1e-5 if recipe == "qwen3_chat" else 2e-3  # bfloat16 has 8 bits
    assert runs.losses(recipe, "dpo_policy")[0] == pytest.approx(math.log(2), abs=tolerance)
