"""What both sides of `ppo_vs_trl.py` start from: one base model, one reward model, one set of prompts.

Weights are random and seeded: what is measured does not depend on what the models know. Three things are built in so
that the two trainers do the same work on them:

1. The base gives the padding and the end token a probability of about e⁻³⁰, so that every response has full length.
   TRL takes a sampled padding token for padding.
2. The reward model attends evenly to all tokens and reads only what attention brings. The score is therefore close to
   a mean of a per-token value over prompt and response: every token matters, and PPO can learn it.
3. Scores of the base model's own responses are shifted and scaled to mean 0 and standard deviation 1.
"""
# ruff: noqa: TID253  # torch is what is measured here; no part of the product imports benchmarks

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, OPTForSequenceClassification, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

PAD_ID, EOS_ID = 0, 1
_LEVEL_DIMENSION = 0  # hidden dimension that is the same at every position; only padding and end look at it
_LEVEL, _REFUSAL = 5.0, -6.0  # their product is added to the logit of padding and end
_EMBEDDING_STD = 0.05  # times √hidden_size it is about the standard deviation of logits between contexts
_FREQUENCY_STD = 3.0  # of the last layer norm's bias: some words are frequent in every context
_SCORED_PART = 4  # a quarter of the hidden dimensions is where the reward model's attention writes and tokens do not
_CALIBRATION_RESPONSES = 256


@dataclass(frozen=True)
class Workload:
    """Sizes of the models and of a round; the same for both sides."""

    num_layers: int = 4
    hidden_size: int = 256
    ffn_size: int = 1024
    num_heads: int = 4
    vocab_size: int = 8192
    max_positions: int = 128
    prompts: int = 640
    min_prompt_tokens: int = 16
    max_prompt_tokens: int = 32
    rollouts: int = 32
    response_tokens: int = 48
    ppo_epochs: int = 4
    temperature: float = 1.0
    kl_coef: float = 0.05
    clip_range: float = 0.2
    value_clip_range: float = 0.2
    value_coef: float = 0.1
    gamma: float = 1.0
    gae_lambda: float = 0.95
    adam_epsilon: float = 1e-5
    full_learning_rate: float = 1e-4
    lora_learning_rate: float = 1e-3
    lora_rank: int = 16
    lora_alpha: int = 32


def write_workload(folder: Path, workload: Workload, seed: int) -> None:
    """Write `base/model/`, `reward/model/`, `prompts.json` and `workload.json` below the folder."""
    disable_progress_bar()
    tokenizer = _tokenizer(workload)
    base = _base_model(workload, seed)
    prompts = _prompts(workload, seed)
    reward = _reward_model(base, workload, seed)
    _calibrate(reward, base, tokenizer, prompts, workload, seed)
    for name, model in (("base", base), ("reward", reward)):
        model.save_pretrained(folder / name / "model")
        tokenizer.save_pretrained(folder / name / "model")
    (folder / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
    (folder / "workload.json").write_text(json.dumps(asdict(workload)), encoding="utf-8")


def _config(workload: Workload, **options: Any) -> OPTConfig:
    return OPTConfig(
        vocab_size=workload.vocab_size,
        hidden_size=workload.hidden_size,
        word_embed_proj_dim=workload.hidden_size,
        ffn_dim=workload.ffn_size,
        num_hidden_layers=workload.num_layers,
        num_attention_heads=workload.num_heads,
        max_position_embeddings=workload.max_positions,
        dropout=0.0,  # in the config: OPT applies dropout as a function, which TRL's switch for modules does not reach
        attention_dropout=0.0,
        layerdrop=0.0,
        pad_token_id=PAD_ID,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        **options,
    )


def _tokenizer(workload: Workload) -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD_ID, "</s>": EOS_ID} | {f"w{index}": index for index in range(2, workload.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="</s>", padding_side="left"
    )


def _prompts(workload: Workload, seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed + 1)
    lengths = torch.randint(
        workload.min_prompt_tokens, workload.max_prompt_tokens + 1, (workload.prompts,), generator=generator
    )
    return [torch.randint(2, workload.vocab_size, (int(length),), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def _base_model(workload: Workload, seed: int) -> OPTForCausalLM:
    torch.manual_seed(seed)
    model = OPTForCausalLM(_config(workload)).eval()
    decoder = model.model.decoder
    decoder.embed_tokens.weight.mul_(_EMBEDDING_STD / decoder.embed_tokens.weight.std())
    decoder.final_layer_norm.bias.normal_(std=_FREQUENCY_STD)
    decoder.final_layer_norm.weight[_LEVEL_DIMENSION] = 0.0
    decoder.final_layer_norm.bias[_LEVEL_DIMENSION] = _LEVEL
    decoder.embed_tokens.weight[:, _LEVEL_DIMENSION] = 0.0
    decoder.embed_tokens.weight[[PAD_ID, EOS_ID], _LEVEL_DIMENSION] = _REFUSAL
    return model


@torch.no_grad()
def _reward_model(base: OPTForCausalLM, workload: Workload, seed: int) -> OPTForSequenceClassification:
    model = OPTForSequenceClassification(_config(workload, num_labels=1)).eval()
    model.model.load_state_dict(base.model.state_dict())
    decoder = model.model.decoder
    scored = workload.hidden_size // _SCORED_PART
    read = slice(workload.hidden_size - scored, workload.hidden_size)
    decoder.embed_tokens.weight[:, read] = 0.0
    decoder.embed_positions.weight[:, read] = 0.0
    for layer in decoder.layers:
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.zero_()
            projection.bias.zero_()
        layer.fc2.weight[read] = 0.0
    generator = torch.Generator().manual_seed(seed + 2)
    model.score.weight.zero_()
    model.score.weight[0, read] = torch.randn(scored, generator=generator)
    return model


@torch.no_grad()
def _calibrate(
    reward: OPTForSequenceClassification,
    base: OPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[list[int]],
    workload: Workload,
    seed: int,
) -> None:
    torch.manual_seed(seed + 3)
    rows = tokenizer.pad({"input_ids": prompts[:_CALIBRATION_RESPONSES]}, return_tensors="pt")  # padded on the left
    sampled = base.generate(
        **rows, do_sample=True, top_k=0, max_new_tokens=workload.response_tokens, eos_token_id=None
    )  # fmt: skip
    raw = reward(input_ids=sampled, attention_mask=(sampled != PAD_ID).long()).logits[:, 0]
    reward.score.weight /= raw.std()
    # The level dimension carries a constant through the last layer norm, and the head has no bias of its own.
    reward.score.weight[0, _LEVEL_DIMENSION] = -raw.mean() / raw.std() / _LEVEL
