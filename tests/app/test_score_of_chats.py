"""`align score` by a classifier where prompts are chats: it reads what evaluations read."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from alignment_pipeline.identity import read_jsonl

Run = Callable[..., "subprocess.CompletedProcess[str]"]

RECIPE = """
name: chats
description: A chat model measured by a classifier.
data: {path: rows.jsonl, validation_fraction: 0.1, test_fraction: 0.4}
base_model: {path: given}
formatting: {template: chat, max_prompt_tokens: 60, max_tokens: 100}
reward_classifier:
  {train_path: labelled.jsonl, label: GOOD, label_names: [BAD, GOOD], vocab_size: 300, hidden_size: 16, num_heads: 2}
evaluation: {judge: reward_classifier, prompts: 6, max_new_tokens: 8}
"""
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def recipes(tmp_path: Path) -> Path:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "chats.yaml").write_text(RECIPE)
    rows = [{"instruction": f"Say {n}.", "input": "", "output": f"{n} film"} for n in range(40)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labelled = [{"text": f"<|im_start|>a film {n}" if n % 2 else f"a plot {n}", "label": n % 2} for n in range(60)]
    (folder / "labelled.jsonl").write_text("".join(json.dumps(row) + "\n" for row in labelled))
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["Say film"], trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=special[2], pad_token=special[0])
    tokenizer.add_special_tokens({"additional_special_tokens": special[1:2]})
    tokenizer.chat_template = CHATML
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=2)
    GPT2LMHeadModel(config).save_pretrained(folder / "given")
    tokenizer.save_pretrained(folder / "given")
    return folder


def test_a_classifier_gives_a_response_the_score_that_its_evaluation_has(
    recipes: Path, align: Run, tmp_path: Path
) -> None:
    home, env = tmp_path / "home", {"ALIGNMENT_RECIPES": str(recipes)}
    done = align(home, "run", "chats", env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    (table,) = (home / "artifacts" / "evaluation").glob("*/*/examples.jsonl")
    examples = read_jsonl(table)
    assert all(row["prompt"].startswith("<|im_start|>user\n") for row in examples)
    lines = [
        {"prompt": row["prompt"].split("\n")[1].removesuffix("<|im_end|>"), "response": row["response"]}
        for row in examples
    ]
    given = "".join(json.dumps(line) + "\n" for line in lines)
    scored = align(home, "score", "chats", "--json", env=env, input=given)
    assert scored.returncode == 0, scored.stdout + scored.stderr
    found = [json.loads(line)["score"] for line in scored.stdout.splitlines()]
    rounding = 1e-4  # other batches
    assert found == pytest.approx([row["learned_score"] for row in examples], abs=rounding)
