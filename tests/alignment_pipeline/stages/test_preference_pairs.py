import copy
import json
import random
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from alignment_pipeline.configs import PairsConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import write_jsonl
from alignment_pipeline.preferences import PairSource, PreferencePair, make_pair, read_pairs
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import format_prompt, prompt_id, split_position
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages import preference_pairs
from alignment_pipeline.stages.preference_pairs import unite_preference_pairs


def pair(instruction: str, chosen: str, rejected: str, source: PairSource = "sampled") -> PreferencePair:
    return make_pair(prompt_id=prompt_id(instruction, ""), prompt=format_prompt(instruction, ""), chosen=chosen,
                     rejected=rejected, source=source, labeller="x")  # fmt: skip


LABELS = [pair(f"Task {number % 100}.", f"good {number}", "bad") for number in range(200)]


def unite(
    folder: Path, labels: list[PreferencePair] | None, human: list[PreferencePair] | None, fraction: float = 0.2
) -> tuple[StageResult, Path]:
    inputs = {}
    for name, pairs in (("labels", labels), ("human", human)):
        if pairs is not None:
            inputs[name] = folder / name
            write_jsonl(inputs[name] / "pairs.jsonl", pairs)
    output_dir = folder / "output"
    output_dir.mkdir(parents=True)
    spec = StageSpec(PairsConfig(validation_fraction=fraction), inputs, output_dir, folder / "work", seed=0)
    return unite_preference_pairs(spec, ProgressLog(folder / "progress.jsonl")), output_dir


def splits(output: Path) -> dict[str, str]:
    return {pair["id"]: split for split in ("train", "validation") for pair in read_pairs(output / f"{split}.jsonl")}


def test_sources_are_united_counted_and_split_by_prompt(tmp_path: Path) -> None:
    human = [pair("Task 1.", "bad", "good 1", "human"), pair("New.", "a", "b", "human")]
    result, output = unite(tmp_path, LABELS, human)
    assert splits(output).keys() == {pair["id"] for pair in [*LABELS, *human]}
    summary = json.loads((output / "summary.json").read_text())
    assert summary["dropped"] == {"identical": 0, "duplicate": 0}
    assert sum(counts["sampled"] for counts in summary["splits"].values()) == 200
    assert sum(counts.get("human", 0) for counts in summary["splits"].values()) == 2 == result.metrics["pairs/human"]
    assert result.metrics["pairs/train"] + result.metrics["pairs/validation"] == 202
    (check,) = result.checks
    assert (check.name, check.passed, check.blocking) == ("splits_share_no_prompt", True, True)


def test_identical_responses_and_repeated_pairs_are_dropped_and_counted(tmp_path: Path) -> None:
    human = [pair("Task 0.", "good 0", "bad", "human"), pair("Task 1.", "same", "same", "human")]
    result, output = unite(tmp_path, [*LABELS, LABELS[5]], human)
    assert json.loads((output / "summary.json").read_text())["dropped"] == {"identical": 1, "duplicate": 2}
    assert result.metrics["pairs/human"] == 0
    assert splits(output).keys() == {pair["id"] for pair in LABELS}


def test_a_vote_moves_no_other_pair_and_order_does_not_matter(tmp_path: Path) -> None:
    _, alone = unite(tmp_path / "a", LABELS, None)
    shuffled = random.Random(0).sample(LABELS, len(LABELS))
    _, more = unite(tmp_path / "b", shuffled, [pair("New.", "a", "b", "human")])
    before, after = splits(alone), splits(more)
    assert {identity: after[identity] for identity in before} == before


def test_the_held_out_share_holds_for_prompts_that_the_first_split_left_to_training(tmp_path: Path) -> None:
    left = [f"Task {n}." for n in range(3000)]
    left = [text for text in left if split_position(0, "instructions", format_prompt(text, "")) >= 0.2]
    result, _ = unite(tmp_path, [pair(text, "a", "b") for text in left], None, fraction=0.2)
    share = result.metrics["pairs/validation"] / len(left)
    assert share == pytest.approx(0.2, abs=0.033)  # four standard deviations of a share of 0.2 among 2,400


def test_one_source_is_enough_and_none_is_an_error(tmp_path: Path) -> None:
    human = [pair(f"Task {number}.", "a", "b", "human") for number in range(60)]
    result, _ = unite(tmp_path / "human", None, human)
    assert result.metrics["pairs/human"] == 60
    with pytest.raises(DataError, match="neither labels nor human"):
        unite(tmp_path / "none", None, None)


@pytest.mark.parametrize("labels", [[], LABELS[:1], [pair("a", "same", "same")]])
def test_an_empty_split_is_an_error_that_says_what_to_do(tmp_path: Path, labels: list[PreferencePair]) -> None:
    with pytest.raises(DataError, match=r"at least one pair in each.*pairs\.validation_fraction"):
        unite(tmp_path, labels, [])


def test_a_leak_between_splits_fails_the_blocking_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter(range(1000))
    monkeypatch.setattr(preference_pairs, "split_position", lambda *_: next(places) % 3 / 3)
    result, _ = unite(tmp_path, LABELS, None)
    assert not result.checks[0].passed


def test_a_pair_that_the_model_cannot_read_is_dropped_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    long = pair("Task 1.", "word " * 500, "bad", "human")
    base = tmp_path / "base"
    tokenizer.save_pretrained(base / "model")
    (base / "model" / "config.json").write_text(json.dumps({"model_type": "opt", "max_position_embeddings": 400}))
    for name, pairs in (("labels", LABELS), ("human", [long])):
        write_jsonl(tmp_path / name / "pairs.jsonl", pairs)
    output = tmp_path / "output"
    output.mkdir()
    inputs = {"labels": tmp_path / "labels", "human": tmp_path / "human", "tokenizer": base}
    spec = StageSpec(PairsConfig(validation_fraction=0.2), inputs, output, tmp_path / "work", seed=0)
    unite_preference_pairs(spec, ProgressLog(tmp_path / "progress.jsonl"))
    assert json.loads((output / "summary.json").read_text())["dropped"]["over_long"] == 1
    assert splits(output).keys() == {pair["id"] for pair in LABELS}


def test_the_token_that_a_tokenizer_puts_before_every_prompt_counts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    given = [*LABELS, pair("The longest task.", "good", "bad")]
    longest = (
        len(tokenizer(given[-1]["prompt"])["input_ids"]) + len(tokenizer("good")["input_ids"]) + 1
    )  # the end token
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    end = [("</s>", tokenizer.eos_token_id)]
    backend.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=end)
    leading = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")
    write_jsonl(tmp_path / "labels" / "pairs.jsonl", given)
    dropped = {}
    for name, reader, positions in (("plain", tokenizer, longest), ("fits", leading, longest + 1),
                                    ("over", leading, longest)):  # fmt: skip
        base, output = tmp_path / name / "base", tmp_path / name / "output"
        output.mkdir(parents=True)
        reader.save_pretrained(base / "model")
        (base / "model" / "config.json").write_text(
            json.dumps({"model_type": "opt", "max_position_embeddings": positions})
        )
        inputs = {"labels": tmp_path / "labels", "tokenizer": base}
        spec = StageSpec(PairsConfig(validation_fraction=0.2), inputs, output, tmp_path / "work", seed=0)
        unite_preference_pairs(spec, ProgressLog(tmp_path / "progress.jsonl"))
        dropped[name] = json.loads((output / "summary.json").read_text())["dropped"]["over_long"]
    assert dropped == {"plain": 0, "fits": 0, "over": 1}
