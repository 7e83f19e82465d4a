"""A reward model that starts from another model than the trunk: trained, published, read back, and used by PPO."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ModernBertConfig,
    ModernBertForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
)

from alignment_pipeline.configs import PpoConfig, RewardModelConfig
from alignment_pipeline.decoding_configs import EvaluationConfig
from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.generation import Response
from alignment_pipeline.identity import digest, read_jsonl, write_jsonl
from alignment_pipeline.models import head_names, with_adapter
from alignment_pipeline.ppo.rollout import Prompt
from alignment_pipeline.preferences import PreferencePair, make_pair
from alignment_pipeline.progress import ProgressLog, metric_series
from alignment_pipeline.reward import Preference, RewardScorer
from alignment_pipeline.scorers import RewardModelScorer
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages.evaluation import scored
from alignment_pipeline.stages.ppo_policy import train_ppo
from alignment_pipeline.stages.reward_model import train_reward_model
from alignment_pipeline.tokenization import encode, encode_prompts

# A merged adapter computes W + s·BA once, and rows are batched otherwise: float32, scores of size 1.
ROUNDING = 1e-4
LEARNABLE: dict[str, Any] = {"method": "full", "learning_rate": 1e-2, "batch_size": 8, "epochs": 20.0, "max_steps": 25}
WORDS = [f"w{number}" for number in range(40)]
PREFERRED = "yes"


def pair_of(number: int, filler: int = 1) -> PreferencePair:
    """The chosen response holds one word, the rejected one another; all else is alike."""
    prompt = f"Question {WORDS[number]} ?\n"
    body = " ".join([WORDS[number]] * filler)
    return make_pair(prompt_id=str(number), prompt=prompt, chosen=f"{body} {PREFERRED}", rejected=f"{body} no",
                     source="human", labeller="test")  # fmt: skip


def write_pairs(folder: Path, train: list[PreferencePair], validation: list[PreferencePair]) -> Path:
    write_jsonl(folder / "train.jsonl", train)
    write_jsonl(folder / "validation.jsonl", validation)
    return folder


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    everything = [pair_of(number) for number in range(40)]
    return write_pairs(tmp_path / "pairs", everything[:28], everything[28:])


def texts() -> list[str]:
    return [text for pair in map(pair_of, range(40)) for text in (pair["prompt"], pair["chosen"], pair["rejected"])]


def encoder_tokenizer(max_length: int) -> PreTrainedTokenizerFast:
    """WordPiece with [CLS] and [SEP], as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(texts(), trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]",
             "mask_token": "[MASK]"}  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=max_length, **names)


def decoder_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE without a padding token, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts(), trainers.BpeTrainer(vocab_size=330, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")


def build(kind: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """Random weights of two layers; all but DistilBERT come without a score head, and BERT without a pooler too."""
    common = {"vocab_size": len(tokenizer), "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16,
              "intermediate_size": 32, "pad_token_id": tokenizer.pad_token_id, "initializer_range": 0.2}  # fmt: skip
    torch.manual_seed(0)
    if kind == "bert":
        return BertForMaskedLM(BertConfig(**common, max_position_embeddings=32))
    if kind == "roberta":
        return RobertaForMaskedLM(RobertaConfig(**common, max_position_embeddings=34, type_vocab_size=1))
    if kind == "modernbert":
        ids = {"cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
        return ModernBertForMaskedLM(ModernBertConfig(**common, **ids, max_position_embeddings=32))
    if kind == "distilbert":
        shape = {"dim": 16, "hidden_dim": 32, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32}
        return DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=len(tokenizer), pad_token_id=0, num_labels=1, **shape)
        )
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id}
    if kind == "gpt2":
        shape = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 48, "initializer_range": 0.2}
        return GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), **ends, **shape))
    return Qwen3ForCausalLM(
        Qwen3Config(**common, **ends, num_key_value_heads=1, head_dim=8, max_position_embeddings=48)
    )


ENCODERS = ("bert", "distilbert", "modernbert", "roberta")
DECODERS = ("gpt2", "qwen3")


def given(kind: str, folder: Path) -> Path:
    tokenizer = decoder_tokenizer() if kind in DECODERS else encoder_tokenizer(32)
    build(kind, tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(folder: Path, pairs: Path, path: Path, seed: int = 0, **config: Any) -> tuple[StageResult, ProgressLog]:
    output = folder / "output"
    output.mkdir(parents=True)
    log = ProgressLog(folder / "progress.jsonl")
    settings = RewardModelConfig(path=str(path), **(LEARNABLE | config))
    return train_reward_model(StageSpec(settings, {"pairs": pairs}, output, folder / "work", seed), log), log


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_it_learns_what_can_be_seen_and_is_read_back_as_it_scored(tmp_path: Path, pairs: Path, kind: str) -> None:
    result, _ = train(tmp_path / "run", pairs, given(kind, tmp_path / "given"))
    assert result.metrics["reward/held_out_accuracy"] > 0.8
    assert result.metrics["reward/train_accuracy"] > 0.8
    assert result.metrics["reward/length_baseline_accuracy"] in (0.0, 1.0)  # "yes" is longer than "no"
    scorer = RewardScorer.load(tmp_path / "run" / "output")  # no trunk
    held_out = read_jsonl(pairs / "validation.jsonl")
    rows = read_jsonl(tmp_path / "run" / "output" / "scores.jsonl")
    prompts = [pair["prompt"] for pair in held_out]
    for side in ("chosen", "rejected"):
        found = scorer.score(prompts, [pair[side] for pair in held_out], batch_size=3)
        assert found == pytest.approx([row[f"{side}_score"] for row in rows], abs=ROUNDING)


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_the_head_whatever_it_is_called_is_trained_whole_and_gets_no_adapter(tmp_path: Path, kind: str) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(given(kind, tmp_path), num_labels=1)
    heads = {"bert": {"classifier"}, "roberta": {"classifier"}, "distilbert": {"pre_classifier", "classifier"},
             "modernbert": {"head", "classifier"}, "gpt2": {"score"}, "qwen3": {"score"}}[kind]  # fmt: skip
    assert set(head_names(model)) == heads
    adapted = with_adapter(model, RewardModelConfig(lora_rank=2), "SEQ_CLS")
    trained = {
        (name.removeprefix("base_model.model.").split(".", 1)[0], "lora_" in name)
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    body = next(name for name, module in model.named_children() if module is model.base_model)
    inside = [name for name, _ in adapted.named_parameters() if name.split(".")[2] in heads]
    assert inside and not any("lora_" in name for name in inside)
    assert trained == {(head, False) for head in heads} | {(body, True)}


@pytest.mark.parametrize("kind", [*ENCODERS, *DECODERS])
def test_an_adapter_learns_and_is_published_merged(tmp_path: Path, pairs: Path, kind: str) -> None:
    path = given(kind, tmp_path / "given")
    result, log = train(
        tmp_path / "run", pairs, path, method="lora", lora_rank=4, lora_alpha=8, max_steps=25, learning_rate=1e-2
    )
    losses = [metrics["train/loss"] for metrics in metric_series(log.path).values()]
    assert min(losses) < 0.8 * losses[0]
    output = tmp_path / "run" / "output"
    assert not (output / "adapter").exists()
    scorer = RewardScorer.load(output)
    rows, held_out = read_jsonl(output / "scores.jsonl"), read_jsonl(pairs / "validation.jsonl")
    found = scorer.score([pair["prompt"] for pair in held_out], [pair["chosen"] for pair in held_out])
    assert found == pytest.approx([row["chosen_score"] for row in rows], abs=ROUNDING)
    assert result.metrics["reward/held_out_pairs"] == 12.0


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_training_and_scoring_read_the_same_tokens(tmp_path: Path, pairs: Path, kind: str) -> None:
    train(tmp_path / "run", pairs, given(kind, tmp_path / "given"), max_steps=1)
    output = tmp_path / "run" / "output"
    trained_on = json.loads((output / "summary.json").read_text())["held_out_tokens_sha256"]
    scorer, held_out = RewardScorer.load(output), read_jsonl(pairs / "validation.jsonl")
    seen: list[list[int]] = []

    def record(module: Any, arguments: Any, given: dict[str, torch.Tensor]) -> None:
        seen.extend(
            ids[mask.bool()].tolist() for ids, mask in zip(given["input_ids"], given["attention_mask"], strict=True)
        )

    scorer.model.register_forward_pre_hook(record, with_kwargs=True)
    for pair in held_out:
        scorer.score([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]], batch_size=1)
    by_pair = [sorted((seen[2 * n], seen[2 * n + 1])) for n in range(len(held_out))]
    read = [
        {"chosen_ids": better, "rejected_ids": worse}
        for better, worse in (
            scorer.encoder.encode([pair["prompt"]] * 2, [pair["chosen"], pair["rejected"]], [True, True])
            for pair in held_out
        )
    ]
    assert by_pair == [sorted(row.values()) for row in read]  # what the model saw is what the encoder says
    assert digest(read) == trained_on


def test_an_encoder_reads_one_text_between_its_special_tokens_and_a_decoder_up_to_the_end_token(tmp_path: Path) -> None:
    for kind, first, last in (("bert", "[CLS]", "[SEP]"), ("gpt2", None, "<|end|>")):
        write = write_pairs(tmp_path / kind / "pairs", [pair_of(n) for n in range(4)], [pair_of(5)])
        train(tmp_path / kind / "run", write, given(kind, tmp_path / kind / "given"), max_steps=1)
        encoder = RewardScorer.load(tmp_path / kind / "run" / "output").encoder
        ended, cut = encoder.encode(["Question w1 ?\n"] * 2, ["w1 yes"] * 2, [True, False])
        names = encoder.tokenizer.convert_ids_to_tokens(ended)
        assert names[-1] == last and (first is None or names[0] == first)
        assert names.count(last) == 1
        assert (ended == cut) == (kind == "bert")  # an encoder has no token for the end of a response


def test_pairs_with_a_side_that_is_too_long_are_dropped_and_counted(tmp_path: Path) -> None:
    path = given("bert", tmp_path / "given")
    # [CLS] Question wN ? (and the filler words) yes/no [SEP]: 7 tokens with one filler word, one more for each.
    short, long = [pair_of(n) for n in range(12)], [pair_of(n, filler=20) for n in range(12, 16)]
    pairs = write_pairs(tmp_path / "pairs", [*short[:8], *long[:3]], [*short[8:], *long[3:]])
    result, _ = train(tmp_path / "run", pairs, path, max_steps=1, max_tokens=24)
    summary = json.loads((tmp_path / "run" / "output" / "summary.json").read_text())
    assert summary["pairs"] == {"train": 8, "validation": 4, "dropped": 4}
    assert result.metrics["reward/dropped_pairs"] == 4.0
    assert len(read_jsonl(tmp_path / "run" / "output" / "scores.jsonl")) == 4
    whole, _ = train(tmp_path / "whole", pairs, path, max_steps=1)
    assert whole.metrics["reward/dropped_pairs"] == 0.0


def test_one_long_side_is_enough_and_what_the_model_cannot_read_is_dropped_without_a_setting(tmp_path: Path) -> None:
    path = given("bert", tmp_path / "given")  # reads 32 tokens
    sides = {"chosen": "w1 " * 40, "rejected": "w2 yes"}
    one_long = [
        make_pair(prompt_id="1", prompt="Question w1 ?\n", source="human", labeller="test", **either)
        for either in (sides, {"chosen": sides["rejected"], "rejected": sides["chosen"]})
    ]
    pairs = write_pairs(tmp_path / "pairs", [pair_of(n) for n in range(4)] + one_long, [pair_of(5)])
    result, _ = train(tmp_path / "run", pairs, path, max_steps=1)
    assert result.metrics["reward/dropped_pairs"] == 2.0
    message = r"^reward_model: found 6 pairs in train, none of at most 8 tokens on both sides, expected at least one\."
    with pytest.raises(DataError, match=message):
        train(tmp_path / "none", write_pairs(tmp_path / "b", [pair_of(n, 9) for n in range(6)], []), path, max_tokens=8)


def test_of_a_text_that_is_too_long_to_score_the_end_is_read(tmp_path: Path, pairs: Path) -> None:
    train(tmp_path / "run", pairs, given("bert", tmp_path / "given"), max_steps=1, max_tokens=12)
    encoder = RewardScorer.load(tmp_path / "run" / "output").encoder
    (row,) = encoder.encode(["Question w1 ?\n"], ["w3 " * 20 + "yes"], [True])
    cut = encoder.cut(row)
    assert len(row) > 12 and len(cut) == 12
    assert cut[0] == encoder.tokenizer.cls_token_id and cut[1:] == row[-11:]


def test_a_missing_head_is_drawn_from_the_seed(tmp_path: Path, pairs: Path) -> None:
    path = given("bert", tmp_path / "given")
    weights = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train(tmp_path / name, pairs, path, seed=seed, max_steps=1, learning_rate=1e-9)
        weights[name] = RewardScorer.load(tmp_path / name / "output").model.classifier.weight
    assert torch.equal(weights["a"], weights["b"])
    assert not torch.allclose(weights["a"], weights["c"], atol=1e-3)


def test_a_head_that_is_there_is_kept(tmp_path: Path, pairs: Path) -> None:
    path = given("distilbert", tmp_path / "given")
    before = DistilBertForSequenceClassification.from_pretrained(path).classifier.weight
    train(tmp_path / "run", pairs, path, max_steps=1, learning_rate=1e-9)
    assert torch.allclose(RewardScorer.load(tmp_path / "run" / "output").model.classifier.weight, before, atol=1e-6)


def test_a_body_that_lacks_weights_is_refused(tmp_path: Path, pairs: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = given("bert", tmp_path / "given")
    state = load_file(path / "model.safetensors")
    name = "bert.encoder.layer.1.output.dense.weight"
    save_file(
        {key: tensor for key, tensor in state.items() if key != name}, path / "model.safetensors", {"format": "pt"}
    )
    with pytest.raises(ModelError, match=r"^reward_model: .* lacks 1 of the weights .*layer\.1\.output\.dense\.weight"):
        train(tmp_path / "run", pairs, path)


def test_a_classifier_with_several_labels_gets_a_head_of_its_own(tmp_path: Path, pairs: Path) -> None:
    path = given("distilbert", tmp_path / "given")
    config = DistilBertConfig.from_pretrained(path)
    config.num_labels = 3
    body = DistilBertForSequenceClassification(config)
    body.save_pretrained(path)
    train(tmp_path / "run", pairs, path, max_steps=1, learning_rate=1e-9)
    made = DistilBertForSequenceClassification.from_pretrained(tmp_path / "run" / "output" / "model")
    assert made.classifier.weight.shape[0] == 1
    kept = made.distilbert.embeddings.word_embeddings.weight
    assert torch.allclose(kept, body.distilbert.embeddings.word_embeddings.weight, atol=1e-6)


def test_a_model_that_cannot_read_up_to_its_files_limit_is_refused_before_training(tmp_path: Path, pairs: Path) -> None:
    """RoBERTa counts positions from its padding token on, so that it reads fewer than its config says."""
    path = tmp_path / "given"
    tokenizer = encoder_tokenizer(10**30)  # no limit of its own
    build("roberta", tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    message = r"^reward_model: .*given cannot read 34 tokens \(index .* Set reward_model\.max_tokens lower"
    with pytest.raises(ModelError, match=message):
        train(tmp_path / "whole", pairs, path, max_steps=1)
    train(tmp_path / "lower", pairs, path, max_steps=1, max_tokens=33)


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path, pairs: Path) -> None:
    with pytest.raises(ModelError, match=r"^reward_model\.path: .*nowhere is not a folder"):
        train(tmp_path / "run", pairs, tmp_path / "nowhere")


def test_one_tokenizers_scores_of_sampled_tokens_are_those_of_their_texts(
    tmp_path: Path, pairs: Path, tiny_models: Any
) -> None:
    train(tmp_path / "run", pairs, given("bert", tmp_path / "given"))
    scorer, tokenizer = RewardScorer.load(tmp_path / "run" / "output"), tiny_models.tokenizer
    prompts, responses = ["Question w1 ?\n", "Question w2 ?\n"], [" w1 yes", "no"]
    sampled = [[*encode(tokenizer, responses[:1])[0], tokenizer.eos_token_id], encode(tokenizer, responses[1:])[0]]
    found = scorer.score_sampled(tokenizer, prompts, encode(tokenizer, prompts), sampled, batch_size=2)
    assert found == pytest.approx(scorer.score(prompts, responses), abs=ROUNDING)
    preference = Preference.between(found[:1], found[1:])
    assert (preference.win_rate, preference.pairs) == (1.0, 1)


def test_a_chat_templates_special_tokens_are_read_alike_in_training_ppo_and_evaluation(
    tmp_path: Path, tiny_models: Any
) -> None:
    special = "</s>"  # one of the policy's, and text to the reward model
    chats = [
        make_pair(prompt_id=pair["prompt_id"], prompt=special + pair["prompt"], chosen=pair["chosen"],
                  rejected=pair["rejected"], source="human", labeller="test")
        for pair in map(pair_of, range(8))
    ]  # fmt: skip
    pairs, tokenizer = write_pairs(tmp_path / "pairs", chats[:6], chats[6:]), tiny_models.tokenizer
    train(tmp_path / "run", pairs, given("qwen3", tmp_path / "given"), max_steps=1)
    reward, held_out = tmp_path / "run" / "output", chats[6:]
    scorer, seen = RewardScorer.load(reward), [pair["prompt"] for pair in held_out]
    answers = [encode(tokenizer, [pair["chosen"]])[0] + [tokenizer.eos_token_id] for pair in held_out]
    responses = [Response(ids, pair["chosen"], True) for ids, pair in zip(answers, held_out, strict=True)]
    prompts = encode_prompts(tokenizer, seen)
    assert all(tokenizer.decode(ids).startswith(special) for ids in prompts)
    trained = [row["chosen_score"] for row in read_jsonl(reward / "scores.jsonl")]

    asked = [Prompt("", text, ids) for text, ids in zip(seen, prompts, strict=True)]
    assert RewardModelScorer(scorer, tokenizer, 2)(asked, responses) == pytest.approx(trained, abs=ROUNDING)
    inputs = {"reward_model": reward, "trunk": tmp_path}
    spec = StageSpec(EvaluationConfig(judge="reference_chrf"), inputs, tmp_path, tmp_path / "work", 0)
    rows = [{"prompt": text, "reference": "yes"} for text in seen]
    _, learned = scored(spec, tokenizer, rows, prompts, responses)
    assert learned == pytest.approx(trained, abs=ROUNDING)


@pytest.mark.parametrize("kind", ["bert", "qwen3"])
def test_ppo_is_rewarded_by_a_reward_model_of_another_tokenizer(
    tmp_path: Path, pairs: Path, tiny_models: Any, kind: str
) -> None:
    train(tmp_path / "run", pairs, given(kind, tmp_path / "given"))
    reward = tmp_path / "run" / "output"
    trunk = tiny_models.save(tiny_models.build("opt"), tmp_path / "trunk")
    write_jsonl(tmp_path / "dataset" / "train.jsonl", [{"prompt": f"{n}:", "prompt_id": str(n)} for n in range(16)])
    output = tmp_path / "ppo"
    output.mkdir()
    config = PpoConfig(updates=2, rollout_batch_size=8, minibatch_size=8, ppo_epochs=1, lora_rank=2, max_new_tokens=6)
    inputs = {"trunk": trunk, "reward_model": reward, "dataset": tmp_path / "dataset"}
    train_ppo(StageSpec(config, inputs, output, tmp_path / "work", 0), ProgressLog(tmp_path / "ppo.jsonl"))
    rows = read_jsonl(output / "extras" / "rollouts.jsonl")
    assert len(rows) == 16
    scorer = RewardScorer.load(reward)
    expected = scorer.score([r["prompt"] for r in rows], [r["response"] for r in rows], [r["ended"] for r in rows])
    assert [row["score"] for row in rows] == pytest.approx(expected, abs=ROUNDING)
