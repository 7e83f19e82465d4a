import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from alignment_pipeline.configs import FormattingConfig
from alignment_pipeline.errors import DataError, ModelError
from alignment_pipeline.identity import data_version, read_jsonl, write_jsonl
from alignment_pipeline.progress import ProgressLog, read_progress
from alignment_pipeline.prompts import format_prompt, normalised, prefix_length, prompt_id, row_id
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages.formatted_dataset import cut_text, format_dataset

SPLITS = ("train", "validation", "test")
EOS = "</s>"


def row(instruction: str, input: str, output: str, split: str) -> dict[str, Any]:
    return {
        "id": row_id(instruction, input, output), "prompt_id": prompt_id(instruction, input), "split": split,
        "instruction": instruction, "input": input, "output": output, "source_line": 1,
    }  # fmt: skip


ROWS = [
    row(
        f"Write function {number}.",
        f"x{number}" if number % 2 else "",
        f"def f{number}():\n    pass\n",
        SPLITS[number % 3],
    )
    for number in range(30)
]


@pytest.fixture(scope="module")
def tokenizer_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model artifact with the tokenizer only: byte-level BPE, pad and EOS distinct."""
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("base_model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=["<pad>", EOS], initial_alphabet=alphabet)
    texts = [format_prompt(row["instruction"], row["input"]) + row["output"] for row in ROWS]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=EOS)
    fast.save_pretrained(folder / "model")
    return folder


def load(artifact: Path, **settings: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(artifact / "model", **settings)


def format_rows(folder: Path, tokenizer: Path, rows: list[dict[str, Any]], **config: Any) -> tuple[StageResult, Path]:
    write_jsonl(folder / "instructions" / "rows.jsonl", rows)
    output_dir = folder / "output"
    output_dir.mkdir()
    inputs = {"instructions": folder / "instructions", "tokenizer": tokenizer}
    log = ProgressLog(folder / "progress.jsonl")
    spec = StageSpec(FormattingConfig(**config), inputs, output_dir, folder / "work", seed=0)
    return format_dataset(spec, log), output_dir


def test_rows_are_put_into_the_template_and_completions_end_with_eos(tmp_path: Path, tokenizer_artifact: Path) -> None:
    result, output = format_rows(tmp_path, tokenizer_artifact, ROWS)
    tokenizer = load(tokenizer_artifact)
    for split in SPLITS:
        formatted = read_jsonl(output / f"{split}.jsonl")
        source = [row for row in ROWS if row["split"] == split]
        assert [row["id"] for row in formatted] == [row["id"] for row in source]
        for made, original in zip(formatted, source, strict=True):
            prompt = format_prompt(original["instruction"], original["input"])
            completion = original["output"] + EOS
            ids = [tokenizer.encode(text, add_special_tokens=False) for text in (prompt, completion)]
            assert ids[1][-1] == tokenizer.eos_token_id
            assert tokenizer.decode(ids[0] + ids[1]) == prompt + completion
            assert made == {
                **{name: original[name] for name in ("id", "prompt_id", "instruction", "input")},
                "prompt": prompt, "completion": completion, "reference": original["output"],
                "prompt_tokens": len(ids[0]), "completion_tokens": len(ids[1]),
            }  # fmt: skip
    assert {check.name: (check.passed, check.blocking) for check in result.checks} == {
        "splits_share_no_prompt": (True, True),
        "completions_end_with_eos": (True, True),
    }
    assert (output / "extras" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert next(read_progress(tmp_path / "progress.jsonl"))["step"] == 30


def test_a_preference_keeps_its_rejected_response_as_the_template_begins_responses(
    tmp_path: Path, tokenizer_artifact: Path
) -> None:
    rows = [each | {"rejected": "no idea"} for each in ROWS]
    _, output = format_rows(tmp_path, tokenizer_artifact, rows, template="human_assistant")
    tokenizer = load(tokenizer_artifact)
    made = read_jsonl(output / "train.jsonl")
    first = next(each for each in ROWS if each["split"] == "train")
    assert made[0]["prompt"].startswith("\n\nHuman: ") and made[0]["prompt"].endswith("\n\nAssistant:")
    assert (made[0]["completion"], made[0]["reference"]) == (f" {first['output']}{EOS}", first["output"])
    assert {each["rejected"] for each in made} == {" no idea"}
    with_end = tokenizer.encode(f" no idea{EOS}", add_special_tokens=False)
    assert {each["rejected_tokens"] for each in made} == {len(with_end)}
    summary = json.loads((output / "summary.json").read_text())
    assert summary["template"] == {"name": "human_assistant", "chat_template_sha256": None}


def test_a_preference_is_dropped_for_what_either_response_holds(tmp_path: Path, tokenizer_artifact: Path) -> None:
    rows = [each | {"rejected": "no"} for each in ROWS]
    train = [number for number, each in enumerate(rows) if each["split"] == "train"]
    rows[train[0]]["rejected"] = f"before {EOS} after"
    rows[train[1]]["rejected"] = "very " * 200
    _, output = format_rows(tmp_path, tokenizer_artifact, rows, max_tokens=200)
    dropped = {each["id"]: each["reason"] for each in read_jsonl(output / "dropped.jsonl")}
    assert dropped == {rows[train[0]]["id"]: "contains_eos", rows[train[1]]["id"]: "over_max_tokens"}


def test_long_rows_and_rows_that_hold_the_eos_text_are_dropped_with_their_reason(
    tmp_path: Path, tokenizer_artifact: Path
) -> None:
    long_prompt = row("word " * 300, "", "short", "train")
    long_response = row("Say it.", "", "word " * 300, "train")
    with_eos = row("Strike it.", "", f"<s>gone{EOS}", "test")
    rows = [*ROWS, long_prompt, long_response, with_eos]
    result, output = format_rows(tmp_path, tokenizer_artifact, rows, max_prompt_tokens=60, max_tokens=120)
    dropped = {line["id"]: line for line in read_jsonl(output / "dropped.jsonl")}
    assert {identity: line["reason"] for identity, line in dropped.items()} == {
        long_prompt["id"]: "over_max_prompt_tokens",
        long_response["id"]: "over_max_tokens",
        with_eos["id"]: "contains_eos",
    }
    assert dropped[long_prompt["id"]]["prompt_tokens"] > 60
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows_in"], summary["kept"], summary["dropped"]) == (33, 30, 3)
    assert summary["dropped_by_reason"] == {"contains_eos": 1, "over_max_prompt_tokens": 1, "over_max_tokens": 1}
    assert result.metrics["data/dropped"] == 3


def test_a_row_exactly_as_long_as_the_limits_is_kept(tmp_path: Path, tokenizer_artifact: Path) -> None:
    _, first = format_rows(tmp_path / "a", tokenizer_artifact, ROWS)
    made = [line for split in SPLITS for line in read_jsonl(first / f"{split}.jsonl")]
    longest_prompt = max(line["prompt_tokens"] for line in made)
    longest = max(line["prompt_tokens"] + line["completion_tokens"] for line in made)
    limits = {"max_prompt_tokens": longest_prompt, "max_tokens": longest}
    result, _ = format_rows(tmp_path / "b", tokenizer_artifact, ROWS, **limits)
    assert result.metrics["data/dropped"] == 0
    for number, name in enumerate(limits):
        shorter = {**limits, name: limits[name] - 1}
        result, _ = format_rows(tmp_path / str(number), tokenizer_artifact, ROWS, **shorter)
        assert result.metrics["data/dropped"] > 0


def test_the_summary_describes_the_lengths_by_split(tmp_path: Path, tokenizer_artifact: Path) -> None:
    result, output = format_rows(tmp_path, tokenizer_artifact, ROWS)
    summary = json.loads((output / "summary.json").read_text())
    for split in SPLITS:
        lengths = sorted(line["prompt_tokens"] for line in read_jsonl(output / f"{split}.jsonl"))
        found = summary["splits"][split]["prompt_tokens"]
        assert (found["min"], found["max"]) == (lengths[0], lengths[-1])
        assert found["mean"] == pytest.approx(sum(lengths) / len(lengths), abs=0.005)  # rounded to two places
        assert found["p50"] == (lengths[4] + lengths[5]) / 2
        assert found["min"] <= found["p50"] <= found["p95"] <= found["max"]
        assert result.metrics[f"data/{split}"] == summary["splits"][split]["rows"] == 10


def test_a_prompt_in_two_splits_fails_the_blocking_check(tmp_path: Path, tokenizer_artifact: Path) -> None:
    leak = row(ROWS[0]["instruction"].upper(), ROWS[0]["input"], "other", "test")
    result, _ = format_rows(tmp_path, tokenizer_artifact, [*ROWS, leak])
    assert not next(check for check in result.checks if check.name == "splits_share_no_prompt").passed


def test_a_tokenizer_that_splits_its_eos_text_fails_the_blocking_check(
    tmp_path: Path, tokenizer_artifact: Path
) -> None:
    tokenizer = load(tokenizer_artifact, split_special_tokens=True)  # a setting of tokenizer_config.json
    tokenizer.save_pretrained(tmp_path / "splitting" / "model")
    result, _ = format_rows(tmp_path, tmp_path / "splitting", ROWS)
    check = next(check for check in result.checks if check.name == "completions_end_with_eos")
    assert not check.passed and check.blocking
    assert check.detail.startswith("30 of 30")


def test_limits_that_empty_a_split_are_an_error_that_names_them(tmp_path: Path, tokenizer_artifact: Path) -> None:
    with pytest.raises(
        DataError, match=r"no rows left in train and validation and test.*formatting\.max_prompt_tokens"
    ):
        format_rows(tmp_path, tokenizer_artifact, ROWS, max_prompt_tokens=4)


def test_a_missing_or_unusable_tokenizer_is_an_error_of_the_user(tmp_path: Path, tokenizer_artifact: Path) -> None:
    with pytest.raises(ModelError, match="no such folder"):
        format_rows(tmp_path / "a", tmp_path / "absent", ROWS)
    (tmp_path / "empty" / "model").mkdir(parents=True)
    with pytest.raises(ModelError, match="no tokenizer"):
        format_rows(tmp_path / "b", tmp_path / "empty", ROWS)
    tokenizer = load(tokenizer_artifact)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "no_eos" / "model")
    with pytest.raises(ModelError, match="without an EOS token"):
        format_rows(tmp_path / "c", tmp_path / "no_eos", ROWS)


def test_formatting_twice_gives_one_data_version(tmp_path: Path, tokenizer_artifact: Path) -> None:
    outputs = [format_rows(tmp_path / name, tokenizer_artifact, ROWS)[1] for name in ("a", "b")]
    assert data_version(outputs[0]) == data_version(outputs[1])


def text_row(text: str, split: str) -> dict[str, Any]:
    return row("", "", text, split) | {"prompt_id": prompt_id(text, "")}


# Two or more tokens of a number, so that no two texts have one beginning, and at times a character of two tokens.
TEXTS = [
    text_row(f"{number:02d}{'é' if number % 4 == 0 else ' '}function x{number} ends here.", SPLITS[number % 3])
    for number in range(60)
]


def test_a_texts_prompt_is_its_first_tokens_and_the_completion_the_rest(
    tmp_path: Path, tokenizer_artifact: Path
) -> None:
    result, output = format_rows(tmp_path, tokenizer_artifact, TEXTS, prefix_tokens_min=3, prefix_tokens_max=6)
    tokenizer = load(tokenizer_artifact)
    source = {row["id"]: row["output"] for row in TEXTS}
    made = [line for split in SPLITS for line in read_jsonl(output / f"{split}.jsonl")]
    assert len(made) == len(TEXTS)
    longer = 0
    for line in made:
        assert line["prompt"] + line["completion"] == source[line["id"]] + EOS
        assert line["reference"] + EOS == line["completion"]
        assert (line["instruction"], line["input"]) == ("", "")
        assert line["prompt_id"] == prompt_id(line["prompt"], "")
        ids = tokenizer.encode(source[line["id"]], add_special_tokens=False)
        assert tokenizer.encode(line["prompt"], add_special_tokens=False) == ids[: line["prompt_tokens"]]
        drawn = prefix_length(0, line["id"], 3, 6)
        assert line["prompt_tokens"] >= drawn
        longer += line["prompt_tokens"] > drawn  # é is two tokens, between which no text can be cut
    assert 0 < longer < 15
    assert all(check.passed for check in result.checks)


def test_a_texts_prompt_does_not_depend_on_order_or_other_rows(tmp_path: Path, tokenizer_artifact: Path) -> None:
    prompts = []
    for name, rows in (("all", TEXTS), ("some", TEXTS[::-1][:40])):
        _, output = format_rows(tmp_path / name, tokenizer_artifact, rows)
        lines = [line for split in SPLITS for line in read_jsonl(output / f"{split}.jsonl")]
        prompts.append({line["id"]: line["prompt"] for line in lines})
    assert prompts[1] == {identity: prompts[0][identity] for identity in prompts[1]}


def test_a_prompt_that_several_splits_have_is_kept_in_the_one_that_is_held_out_most(
    tmp_path: Path, tokenizer_artifact: Path
) -> None:
    same = {
        split: [text_row(f"Write  function {split} {number}." if number else f"write function {split}.", split)
                for number in range(3)]
        for split in SPLITS
    }  # fmt: skip
    others = [text_row(f"{number} x {split}", split) for number, split in enumerate(SPLITS)]
    shouted = text_row("ZQ is a name", "train")
    rows = [*(row for split in SPLITS for row in same[split]), *others, shouted, text_row("zq is a name too", "test")]
    two = {"prefix_tokens_min": 2, "prefix_tokens_max": 2}
    result, output = format_rows(tmp_path, tokenizer_artifact, rows, **two)
    kept = {split: read_jsonl(output / f"{split}.jsonl") for split in SPLITS}
    owner = {
        normalised(line["prompt"]): split for split in reversed(SPLITS[1:]) for line in kept[split]
    }  # a prompt's split is the first of test and validation that has it
    assert "test" in owner.values() and len(owner) < 7
    dropped = {line["id"]: line["reason"] for line in read_jsonl(output / "dropped.jsonl")}
    assert set(dropped.values()) == {"prompt_is_held_out"}
    assert {line["id"] for line in kept["test"]} >= {row["id"] for row in same["test"]}
    assert set(dropped) >= {row["id"] for split in ("train", "validation") for row in same[split]} | {shouted["id"]}
    assert next(check for check in result.checks if check.name == "splits_share_no_prompt").passed


def test_a_text_too_short_to_be_cut_or_with_the_eos_text_in_it_is_dropped_with_its_reason(
    tmp_path: Path, tokenizer_artifact: Path
) -> None:
    short, ends, starts = (text_row(text, "train") for text in ("x", f"films end {EOS} here", f"{EOS} films end here"))
    _, output = format_rows(
        tmp_path, tokenizer_artifact, [*TEXTS, short, ends, starts], prefix_tokens_min=2, prefix_tokens_max=2
    )
    dropped = {line["id"]: line["reason"] for line in read_jsonl(output / "dropped.jsonl")}
    assert dropped == {short["id"]: "no_place_to_cut", ends["id"]: "contains_eos", starts["id"]: "contains_eos"}


@pytest.fixture(scope="module")
def prepending_tokenizer() -> Any:
    """Llama's kind: a space is put before every text and taken off every decoded one."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["<unk>", "<pad>", EOS])
    tokenizer.train_from_iterator(["the films are long and the reviews are short"] * 10, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token=EOS, unk_token="<unk>")


def test_a_tokenizer_that_puts_a_space_before_texts_is_cut_between_words_without_it(prepending_tokenizer: Any) -> None:
    text = "the reviews are long"
    ids = prepending_tokenizer.encode(text, add_special_tokens=False)
    cuts = {cut_text(text, prepending_tokenizer, tokens) for tokens in range(1, len(ids))}
    assert cuts <= {("the", "reviews are long"), ("the reviews", "are long"), ("the reviews are", "long"), ("", "")}
    assert len(cuts) >= 3
    for prompt, rest in cuts - {("", "")}:
        parts = [prepending_tokenizer.encode(part, add_special_tokens=False) for part in (prompt, rest)]
        assert parts[0] + parts[1] == ids
        assert prepending_tokenizer.decode(parts[1]) == rest  # a continuation by the policy compares with it


def test_a_text_that_the_tokenizer_does_not_give_back_has_no_place_to_cut(prepending_tokenizer: Any) -> None:
    assert cut_text("ЖЖЖ the films are long", prepending_tokenizer, 2) == ("", "")
