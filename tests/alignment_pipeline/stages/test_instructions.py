import csv
import gzip
import hashlib
import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from alignment_pipeline import rows as rows_module
from alignment_pipeline import workers
from alignment_pipeline.configs import DataConfig
from alignment_pipeline.errors import DataError
from alignment_pipeline.identity import data_version, read_jsonl
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.prompts import prompt_id, row_id
from alignment_pipeline.rows import Chunk, value_chunks
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages import instructions
from alignment_pipeline.stages.instructions import Sifted, ingest_instructions

GOOD = [
    {
        "instruction": f"Write function {number}.\r\n\té",
        "input": f" {number} " if number % 3 else "",
        "output": "x\u2028y\n",
    }
    for number in range(200)
]


def ingest(folder: Path, seed: int = 0, **config: Any) -> tuple[StageResult, Path]:
    output_dir = folder / "output"
    output_dir.mkdir(parents=True)
    log = ProgressLog(folder / "progress.jsonl")
    spec = StageSpec(DataConfig(**config), {}, output_dir, folder / "work", seed)
    return ingest_instructions(spec, log), output_dir


def write_lines(path: Path, lines: list[bytes]) -> str:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def encoded(record: Any) -> bytes:
    return json.dumps(record, ensure_ascii=False).encode()


BAD = {
    "missing_key": [b'{"instruction": "a"}', b'{"output": "a", "input": ""}', b"{}"],
    "wrong_type": [
        b'{"instruction": 1, "output": "a"}', b'{"instruction": "a", "output": null}', b"[1]", b"3", b"null", b'"a"',
        b'{"instruction": "a", "input": ["b"], "output": "c"}', b'{"instruction": "a", "output": {"b": NaN}}',
    ],
    "empty_instruction": [b'{"instruction": " \\n\\t", "output": "a"}'],
    "empty_output": [b'{"instruction": "a", "output": ""}', b'{"instruction": "a", "output": " \\n"}'],
    "over_long": [encoded({"instruction": "a" * 400, "input": "b" * 300, "output": "c" * 301})],
    "duplicate": [encoded(GOOD[0]), encoded({**GOOD[3], "input": None, "extra": 1})],
    "invalid_utf8": [
        b'{"instruction": "a\xff", "output": "b"}', b"\xfe\xfe", b'{"instruction": "a", "output": "\\ud800"}',
        b'{"instruction": "a", "input": "\\udc00", "output": "b"}',
    ],
    "invalid_json": [b'{"instruction": "a", ', b"instruction,output", b"[" * 20_000, b"9" * 5_000],
    "control_characters": [
        b'{"instruction": "a\\u0000", "output": "b"}', b'{"instruction": "a", "output": "\\u001b[31m"}',
        b'{"instruction": "a", "input": "\\u0085", "output": "b"}', b'{"instruction": "a", "output": "\x7f"}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", BAD)
def test_each_kind_of_bad_row_goes_to_quarantine_with_its_reason_and_line(tmp_path: Path, reason: str) -> None:
    lines = [encoded(record) for record in GOOD]
    result, output = ingest(tmp_path, path=write_lines(tmp_path / "rows.jsonl", lines + BAD[reason]), max_chars=1000)
    quarantined = read_jsonl(output / "quarantine.jsonl")
    expected = [(reason, 201 + index) for index in range(len(BAD[reason]))]
    assert [(row["reason"], row["source_line"]) for row in quarantined] == expected
    for row in quarantined:
        assert set(row) == {"reason", "source_line", "detail"}
        assert row["detail"].isprintable() and len(row["detail"]) <= 200
    assert result.metrics["data/quarantined"] == len(expected)


def test_good_rows_are_kept_byte_for_byte_with_their_identities(tmp_path: Path) -> None:
    result, output = ingest(tmp_path, path=write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in GOOD]))
    rows = read_jsonl(output / "rows.jsonl")
    assert [{name: row[name] for name in ("instruction", "input", "output")} for row in rows] == GOOD
    for line, row in enumerate(rows, start=1):
        assert set(row) == {"id", "prompt_id", "instruction", "input", "output", "split", "source_line"}
        assert row["id"] == row_id(row["instruction"], row["input"], row["output"])
        assert row["prompt_id"] == prompt_id(row["instruction"], row["input"])
        assert row["source_line"] == line
    assert {check.name: (check.passed, check.blocking) for check in result.checks} == {
        "splits_share_no_prompt": (True, True),
        "counts_reconcile": (True, True),
    }


def test_a_missing_or_null_input_is_an_empty_input_and_other_keys_are_ignored(tmp_path: Path) -> None:
    records = [
        {"instruction": f"i{n}", "output": "o", **({"input": None} if n % 2 else {}), "extra": {"n": n}}
        for n in range(200)
    ]
    _, output = ingest(tmp_path, path=write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in records]))
    assert [row["input"] for row in read_jsonl(output / "rows.jsonl")] == [""] * 200
    assert read_jsonl(output / "quarantine.jsonl") == []


@pytest.mark.parametrize("seed", range(8))
def test_bad_rows_anywhere_change_no_good_row_and_every_row_is_accounted_for(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    clean_lines = [encoded(record) for record in GOOD]
    bad = [line for lines in BAD.values() for line in lines] + [
        bytes(rng.randbytes(30)).replace(b"\n", b"") for _ in range(20)
    ]
    lines = list(clean_lines)
    for line in rng.choices(bad, k=60):
        lines.insert(rng.randrange(len(lines) + 1), line)
    if rng.random() < 0.5:
        lines.insert(rng.randrange(len(lines) + 1), b"  ")  # a blank line is no row
    _, clean = ingest(tmp_path / "clean", path=write_lines(tmp_path / "clean.jsonl", clean_lines), max_chars=1000)
    result, fuzzed = ingest(tmp_path / "fuzzed", path=write_lines(tmp_path / "fuzzed.jsonl", lines), max_chars=1000)

    def without_lines(folder: Path) -> list[str]:
        return sorted(
            json.dumps({**row, "source_line": 0}, sort_keys=True) for row in read_jsonl(folder / "rows.jsonl")
        )

    assert without_lines(fuzzed) == without_lines(clean)
    summary = json.loads((fuzzed / "summary.json").read_text())
    assert summary["rows_in"] == 260 == summary["kept"] + summary["quarantined"]
    assert sum(summary["by_reason"].values()) == summary["quarantined"] == 60
    assert sum(summary["splits"].values()) == summary["kept"] == 200
    assert all(check.passed for check in result.checks)


def test_the_split_of_a_prompt_does_not_depend_on_order_or_other_rows(tmp_path: Path) -> None:
    shuffled = random.Random(1).sample(GOOD, 150)
    outputs = [
        ingest(tmp_path / name, path=write_lines(tmp_path / f"{name}.jsonl", [encoded(record) for record in records]))[
            1
        ]
        for name, records in (("all", GOOD), ("some", shuffled))
    ]
    whole, part = ({row["id"]: row["split"] for row in read_jsonl(output / "rows.jsonl")} for output in outputs)
    assert part == {identity: whole[identity] for identity in part}


def test_another_seed_is_another_split_of_about_the_same_size(tmp_path: Path) -> None:
    splits = []
    for seed in (0, 1):
        result, output = ingest(
            tmp_path / str(seed), seed=seed, world_rows=1500, validation_fraction=0.1, test_fraction=0.2
        )
        splits.append({row["prompt_id"]: row["split"] for row in read_jsonl(output / "rows.jsonl")})
        # Four standard deviations of a share of 0.2 (0.1) among 1,500.
        assert result.metrics["data/test"] / 1500 == pytest.approx(0.2, abs=0.042)
        assert result.metrics["data/validation"] / 1500 == pytest.approx(0.1, abs=0.031)
    common = splits[0].keys() & splits[1].keys()
    assert any(splits[0][identity] != splits[1][identity] for identity in common)


def test_prompts_that_differ_in_case_and_whitespace_only_fall_in_one_split(tmp_path: Path) -> None:
    variants = [
        {"instruction": text, "input": "", "output": "o"}
        for number in range(60)
        for text in (f"Print number {number}.", f"print  NUMBER {number}.", f" print\nnumber {number}. ")
    ]
    result, output = ingest(
        tmp_path, path=write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in variants]),
        validation_fraction=0.3, test_fraction=0.3,
    )  # fmt: skip
    rows = read_jsonl(output / "rows.jsonl")
    assert len(rows) == 180
    assert all(len({row["split"] for row in rows[start : start + 3]}) == 1 for start in range(0, 180, 3))
    assert next(check for check in result.checks if check.name == "splits_share_no_prompt").passed


def test_a_leak_between_splits_fails_the_blocking_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = iter(range(10_000))
    monkeypatch.setattr(instructions, "split_position", lambda *_: next(places) % 20 / 20)
    records = [{"instruction": "same", "input": "", "output": str(number)} for number in range(40)]
    result, _ = ingest(tmp_path, path=write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in records]))
    assert {check.name: check.passed for check in result.checks} == {
        "splits_share_no_prompt": False,
        "counts_reconcile": True,
    }


def test_a_row_lost_on_the_way_fails_the_blocking_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sift = instructions._sift

    def lose_one(chunk: Chunk, config: DataConfig, seed: int) -> Sifted:
        sifted = sift(chunk, config, seed)
        return sifted._replace(rows=sifted.rows.partition(b"\n")[2])

    monkeypatch.setattr(instructions, "_sift", lose_one)
    result, _ = ingest(tmp_path, world_rows=200)
    check = next(check for check in result.checks if check.name == "counts_reconcile")
    assert not check.passed and check.blocking
    assert check.detail == "200 rows in, 199 kept + 0 quarantined"


def test_hub_rows_are_sifted_like_any_other_and_their_commit_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*wanted: str | None) -> tuple[Iterator[Chunk], str]:
        assert wanted == ("owner/name", "v1", "train", None, None)
        values = [*GOOD, {"instruction": "a", "input": None, "output": None}]  # the hub fills a missing key with null
        return value_chunks(values), "c0ffee"

    monkeypatch.setattr(instructions, "read_hub_chunks", read)
    result, output = ingest(tmp_path, hub_name="owner/name", hub_revision="v1")
    assert (result.metrics["data/kept"], result.metrics["data/quarantined"]) == (200, 1)
    assert json.loads((output / "summary.json").read_text())["source"] == "hub owner/name"
    source = json.loads((output / "extras" / "source.json").read_text())
    assert (source["commit"], source["rows"]) == ("c0ffee", 201)
    _, queried = ingest(tmp_path / "sql", hub_name="owner/name", hub_revision="v1", sql="FROM source LIMIT 150")
    other = json.loads((queried / "extras" / "source.json").read_text())
    assert other == source | {"sql": "FROM source LIMIT 150"} and len(source["content_sha256"]) == 64
    assert json.loads((queried / "summary.json").read_text())["rows_in"] == 150


def test_no_usable_row_is_an_error_that_counts_the_reasons(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [b"{}", b"{}", b"oops"])
    with pytest.raises(DataError, match=r"3 rows and none of them usable.*'invalid_json': 1, 'missing_key': 2"):
        ingest(tmp_path, path=path)


def test_too_few_rows_for_three_splits_is_an_error_that_names_the_empty_ones(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in GOOD[:2]])
    with pytest.raises(DataError, match=r"too few rows.*would be empty"):
        ingest(tmp_path, path=path)


def test_the_built_in_world_needs_no_file_and_the_path_wins_over_the_hub(tmp_path: Path) -> None:
    _, world = ingest(tmp_path / "world", world_rows=300)
    assert json.loads((world / "summary.json").read_text())["source"] == "world"
    path = write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in GOOD])
    _, from_file = ingest(tmp_path / "file", path=path, hub_name="nobody/nothing")
    assert json.loads((from_file / "summary.json").read_text())["source"] == "file"
    assert json.loads((from_file / "extras" / "source.json").read_text())["path"] == path


def test_more_rows_than_the_world_has_is_an_error_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.world_rows"):
        ingest(tmp_path, world_rows=10**9)


def test_the_same_rows_from_another_place_are_the_same_data_version(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first = write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in GOOD])
    second = tmp_path / "elsewhere" / "copy.json"
    second.write_text(json.dumps(GOOD))
    versions = {
        data_version(ingest(tmp_path / name, path=path)[1]) for name, path in (("a", first), ("b", str(second)))
    }
    assert len(versions) == 1


def test_every_row_of_the_real_codealpaca_is_kept_or_quarantined(tmp_path: Path) -> None:
    folder = os.environ.get("ALIGNMENT_DATA_DIR")
    if not folder:
        pytest.skip("ALIGNMENT_DATA_DIR is not set: the real CodeAlpaca file is not committed to this repository")
    path = Path(folder) / "codealpaca" / "code_alpaca_20k.jsonl"
    result, output = ingest(tmp_path, path=str(path))
    rows = read_jsonl(output / "rows.jsonl")
    reasons = Counter(row["reason"] for row in read_jsonl(output / "quarantine.jsonl"))
    assert (len(rows), dict(reasons)) == (20_016, {"empty_output": 6})
    assert result.metrics["data/rows_in"] == 20_022 == len(rows) + reasons.total()
    source = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
    for row in rows:
        original = source[row["source_line"] - 1]
        assert all(row[name] == original[name] for name in ("instruction", "input", "output"))
    assert all(check.passed for check in result.checks)


def paired(number: int, **changed: Any) -> dict[str, Any]:
    return {"prompt": f"Why {number}?", "chosen": f"So {number}.", "rejected": "Thus.", **changed}


def test_preferences_are_rows_with_the_rejected_response_which_counts_for_identity(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    records = [
        *map(paired, range(200)), paired(3, rejected="No."), paired(3, extra=1), paired(4, chosen="Thus."),
        {"prompt": turns, "chosen": "d", "rejected": "e"},
    ]  # fmt: skip
    _, output = ingest(tmp_path, path=write_lines(tmp_path / "rows.jsonl", list(map(encoded, records))),
                       form="preferences")  # fmt: skip
    rows = read_jsonl(output / "rows.jsonl")
    assert [row["source_line"] for row in rows] == [*range(1, 202), 204]
    for row, record in zip(rows[:201], records, strict=False):
        assert set(row) == {
            "id", "prompt_id", "instruction", "input", "output", "rejected", "split", "source_line",
        }  # fmt: skip
        texts = [record["prompt"], "", record["chosen"], record["rejected"]]
        assert [row["instruction"], row["input"], row["output"], row["rejected"]] == texts
        assert row["id"] == sha256(texts)[:16]
        assert row["prompt_id"] == prompt_id(record["prompt"], "")
    assert rows[3]["id"] != rows[200]["id"] and rows[3]["split"] == rows[200]["split"]
    assert rows[-1]["instruction"] == "Human: a\n\nAssistant: b\n\nHuman: c" and rows[-1]["messages"] == turns
    lines = (output / "rows.jsonl").read_text().splitlines()
    assert lines == [canonical(row) for row in rows]
    assert [(row["reason"], row["source_line"], row["detail"]) for row in read_jsonl(output / "quarantine.jsonl")] == [
        ("duplicate", 202, "same prompt, chosen and rejected as row 4"), ("identical_pair", 203, "'Thus.'"),
    ]  # fmt: skip


def test_rows_of_a_query_are_numbered_by_its_result_and_what_never_came_into_it_by_the_source(tmp_path: Path) -> None:
    lines = [encoded(record) for record in GOOD]
    lines[1] = b"oops"
    path = write_lines(tmp_path / "rows.jsonl", [*lines, b'{"instruction": "in the table", "input": ""}'])
    result, output = ingest(tmp_path, path=path, sql="SELECT * FROM source WHERE input = ''")
    rows = read_jsonl(output / "rows.jsonl")
    expected = [record for record in GOOD if record["input"] == ""]
    assert [{name: row[name] for name in ("instruction", "input", "output")} for row in rows] == expected
    assert [row["source_line"] for row in rows] == list(range(1, len(expected) + 1))
    assert [(row["reason"], row["source_line"]) for row in read_jsonl(output / "quarantine.jsonl")] == [
        ("invalid_json", 2), ("wrong_type", len(expected) + 1),
    ]  # fmt: skip
    assert all(check.passed for check in result.checks)


def test_the_same_rows_as_csv_as_parquet_and_under_other_names_are_the_same_rows(tmp_path: Path) -> None:
    theirs = [{"prompt": r["instruction"], "context": r["input"], "answer": r["output"], "input": 3} for r in GOOD]
    columns = {"instruction": "prompt", "input": "context", "output": "answer"}
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(GOOD[0]))
        writer.writeheader()
        writer.writerows(GOOD)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(theirs), tmp_path / "rows.parquet")
    write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in GOOD])
    query = "SELECT prompt AS instruction, context AS input, answer AS output FROM source"
    settings: dict[str, dict[str, Any]] = {
        "rows.jsonl": {}, "rows.csv": {}, "rows.parquet": {"columns": columns}, "./rows.parquet": {"sql": query},
    }  # fmt: skip
    outputs = [
        ingest(tmp_path / str(n), path=str(tmp_path) + f"/{name}", **more)[1]
        for n, (name, more) in enumerate(settings.items())
    ]
    first, *others = ((output / "rows.jsonl").read_bytes() for output in outputs)
    from_csv, *from_parquet = others
    assert from_parquet == [first, first]
    csv_lines = [json.loads(line)["source_line"] for line in from_csv.splitlines()]
    assert csv_lines == sorted(set(csv_lines)) and csv_lines[-1] > 400  # a record takes more than one line
    for line, other in zip(first.splitlines(), from_csv.splitlines(), strict=True):
        assert json.loads(other) | {"source_line": 0} == json.loads(line) | {"source_line": 0}


def test_a_mapped_column_that_no_row_has_is_an_error_that_lists_the_columns(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [encoded(record) for record in [*GOOD, {"instruction": "a", "x": 1}]])
    for columns in ({"output": "answer"}, {"input": "answer"}):
        with pytest.raises(DataError, match=r"no column answer in any row.*: 'input', 'instruction', 'output', 'x'\.$"):
            ingest(tmp_path / str(columns), path=path, columns=columns)


def test_a_csv_file_without_a_line_of_names_is_an_error_that_shows_what_was_taken_for_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("Say one.,one\nSay two.,two\n")
    with pytest.raises(DataError, match=r"none of them usable .*'missing_key': 1.*the columns are 'Say one\.', 'one'"):
        ingest(tmp_path, path=str(path))


@pytest.mark.parametrize(
    ("file", "rows_in", "by_reason"),
    [
        ("code_preference/python_code_dpo.jsonl", 1800, {"control_characters": 1, "identical_pair": 7}),
        (
            "hh_rlhf/helpful-base-test.jsonl.gz", 2354,
            {"bad_roles": 6, "empty_prompt": 1, "empty_rejected": 3, "identical_pair": 2, "prompts_differ": 9},
        ),
        (
            "ultrafeedback_binarized/train.jsonl", 1000,
            {"control_characters": 1, "empty_chosen": 1, "empty_rejected": 1, "identical_pair": 4},
        ),
        ("ultrafeedback_binarized/eval.jsonl", 200, {"identical_pair": 1}),
    ],
)  # fmt: skip
def test_every_row_of_real_preferences_is_kept_or_quarantined(
    tmp_path: Path, file: str, rows_in: int, by_reason: dict[str, int]
) -> None:
    folder = os.environ.get("ALIGNMENT_DATA_DIR")
    if not folder:
        pytest.skip("ALIGNMENT_DATA_DIR is not set: the real preferences are not committed to this repository")
    result, output = ingest(tmp_path, path=str(Path(folder) / file), form="preferences", max_chars=100_000)
    summary = json.loads((output / "summary.json").read_text())
    assert (summary["rows_in"], summary["by_reason"]) == (rows_in, by_reason)
    assert summary["kept"] == rows_in - sum(by_reason.values()) == len(read_jsonl(output / "rows.jsonl"))
    assert all(check.passed for check in result.checks)


TEXTS = [f"Film number {number} is\n\u2028 long. " for number in range(200)]


def test_conversations_are_split_by_their_prompt_and_the_bad_ones_are_in_quarantine(tmp_path: Path) -> None:
    def told(*turns: str) -> dict[str, Any]:
        roles = ("user", "assistant") * 2
        return {"messages": [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]}

    records = [told(f"Ask {n}.", f"Answer {n}.", f"And {n}?", f"So {n}.") for n in range(200)]
    records += [told("Ask 3.", "Answer 3.", "And 3?", "Else."), records[3], told("Ask."), {"messages": "Ask."}]
    path = write_lines(tmp_path / "chats.jsonl", [encoded(record) for record in records])
    result, output = ingest(tmp_path, path=path, form="conversations")
    rows = read_jsonl(output / "rows.jsonl")
    assert [row["source_line"] for row in rows] == list(range(1, 202))
    assert [(row["messages"], row["output"]) for row in rows[:200]] == [
        (record["messages"][:-1], record["messages"][-1]["content"]) for record in records[:200]
    ]
    assert rows[3]["id"] != rows[200]["id"] and rows[3]["split"] == rows[200]["split"]
    assert {row["split"] for row in rows} == set(instructions.SPLITS)
    quarantined = [(row["reason"], row["source_line"]) for row in read_jsonl(output / "quarantine.jsonl")]
    assert quarantined == [("duplicate", 202), ("no_response", 203), ("wrong_type", 204)]
    assert all(check.passed for check in result.checks)


def ingest_texts(folder: Path, records: list[Any], **config: Any) -> tuple[StageResult, Path]:
    path = write_lines(folder / "texts.jsonl", [r if isinstance(r, bytes) else encoded(r) for r in records])
    return ingest(folder, path=path, text_field="review", **config)


def test_plain_texts_are_rows_of_an_output_alone_and_other_columns_are_ignored(tmp_path: Path) -> None:
    records = [{"review": text, "label": 1, "instruction": "not this", "output": 3} for text in TEXTS]
    result, output = ingest_texts(tmp_path, records)
    rows = read_jsonl(output / "rows.jsonl")
    assert [(row["instruction"], row["input"], row["output"]) for row in rows] == [("", "", text) for text in TEXTS]
    for line, row in enumerate(rows, start=1):
        assert set(row) == {"id", "prompt_id", "instruction", "input", "output", "split", "source_line"}
        assert row["id"] == row_id("", "", row["output"])
        assert row["prompt_id"] == prompt_id(row["output"], "")
        assert row["source_line"] == line
    assert {row["split"] for row in rows} == set(instructions.SPLITS)
    assert {check.name: (check.passed, check.blocking) for check in result.checks} == {
        "splits_share_no_prompt": (True, True),
        "counts_reconcile": (True, True),
    }


BAD_TEXTS = {
    "missing_key": [{"text": "another column"}, {}],
    "wrong_type": [{"review": 3}, {"review": None}, {"review": ["a"]}, ["a"]],
    "empty_text": [{"review": ""}, {"review": " \n"}],
    "over_long": [{"review": "a" * 101}],
    "too_short": [{"review": "a" * 9}],
    "duplicate": [{"review": TEXTS[3], "label": 0}],
    "control_characters": [{"review": "null \x00 in a text"}],
    "invalid_utf8": [b'{"review": "lone surrogate \\ud800"}'],
}


@pytest.mark.parametrize("reason", BAD_TEXTS)
def test_each_kind_of_bad_text_goes_to_quarantine_with_its_reason_and_line(tmp_path: Path, reason: str) -> None:
    records = [*({"review": text} for text in TEXTS), *BAD_TEXTS[reason]]
    result, output = ingest_texts(tmp_path, records, min_chars=10, max_chars=100)
    quarantined = read_jsonl(output / "quarantine.jsonl")
    expected = [(reason, 201 + index) for index in range(len(BAD_TEXTS[reason]))]
    assert [(row["reason"], row["source_line"]) for row in quarantined] == expected
    assert all(check.passed for check in result.checks)


def test_the_bounds_of_a_texts_length_are_themselves_allowed(tmp_path: Path) -> None:
    records = [*({"review": text} for text in TEXTS), {"review": "a" * 10}, {"review": "b" * 100}]
    result, _ = ingest_texts(tmp_path, records, min_chars=10, max_chars=100)
    assert result.metrics["data/kept"] == 202


def test_texts_that_differ_in_case_and_whitespace_only_fall_in_one_split(tmp_path: Path) -> None:
    records = [{"review": text} for number in range(60) for text in (f"Film {number}.", f"film  {number}. ")]
    _, output = ingest_texts(tmp_path, records, validation_fraction=0.3, test_fraction=0.3)
    rows = read_jsonl(output / "rows.jsonl")
    assert len(rows) == 120
    assert all(rows[start]["split"] == rows[start + 1]["split"] for start in range(0, 120, 2))


def test_a_text_field_that_no_row_has_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'missing_key': 200.*expected records with a text .* in review"):
        ingest_texts(tmp_path, [{"text": text} for text in TEXTS])


KNOWN_BAD: dict[bytes, tuple[str, str]] = {
    b'{"a": 1}': ("missing_key", "no instruction and no output among ['a']"),
    b"3": ("wrong_type", "3"),
    b'{"instruction": "a", "input": "b", "output": " "}': ("empty_output", "' '"),
    b'{"instruction": "a", "output": 1.50}': ("wrong_type", "output: 1.5"),
    b'{"instruction": "\\udc00", "output": "b"}': ("invalid_utf8", r"instruction has a lone surrogate: '\udc00'"),
    b'{"instruction": "a", "output": "\\b"}': ("control_characters", r"output has '\x08': '\x08'"),
}
NOT_JSON = {b"{": ("invalid_json", "Expecting property name enclosed in double quotes: line 1 column 2 (ch: '{'")}


def canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def sha256(value: Any) -> str:
    return hashlib.sha256(canonical(value).encode()).hexdigest()


def second_implementation(lines: list[bytes], seed: int) -> dict[str, Any]:
    """The stage's tables and counts by the shortest way, a row at a time and all of them in memory."""
    rows, quarantine, first = [], [], {}
    prompts: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        known = (KNOWN_BAD | NOT_JSON).get(line)
        record = {} if known else json.loads(line)
        texts = [] if known else [record["instruction"], record.get("input") or "", record["output"]]
        identity = sha256(texts)[:16]
        if not known and first.setdefault(identity, number) != number:
            known = ("duplicate", f"same instruction, input and output as row {first[identity]}")
        if known:
            quarantine.append({"reason": known[0], "source_line": number, "detail": known[1]})
            continue
        part = f"### Input:\n{texts[1]}\n\n" if texts[1].strip() else ""
        prompt = " ".join(f"### Instruction:\n{texts[0]}\n\n{part}### Response:\n".split()).casefold()
        place = (int(sha256(["instructions", seed, prompt])[:16], 16) >> 11) / 2**53
        split = "test" if place < 0.05 else "validation" if place < 0.1 else "train"
        prompts[prompt] = split
        rows.append({"id": identity, "prompt_id": sha256(texts[:2])[:16], "instruction": texts[0], "input": texts[1],
                     "output": texts[2], "split": split, "source_line": number})  # fmt: skip
    reasons = Counter(row["reason"] for row in quarantine)
    return {
        "rows.jsonl": "".join(canonical(row) + "\n" for row in rows),
        "quarantine.jsonl": "".join(canonical(row) + "\n" for row in quarantine),
        "counts": {"rows_in": len(lines), "kept": len(rows), "quarantined": len(quarantine)},
        "by_reason": dict(sorted(reasons.items())),
        "splits": {name: sum(row["split"] == name for row in rows) for name in ("train", "validation", "test")},
        "prompts": len(prompts),
    }


@pytest.mark.parametrize("chunks_done_here", [0, 10**9], ids=["workers", "one process"])
@pytest.mark.parametrize("source", ["file", "compressed", "array", "hub"])
def test_tables_are_byte_for_byte_those_of_a_second_implementation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, chunks_done_here: int
) -> None:
    rng = random.Random(2)
    texts = ["naïve “x”", 'a\\b "c"', "\U0001f600\u2028", "tab\t", "line\r\n", "\x7e", "STRASSE ß", "plain"]
    records = [
        {"instruction": f"{rng.choice(texts)} {rng.randrange(900)}", "input": rng.choice(["", " ", None, *texts]),
         "output": rng.choice(texts), "more": [1]}
        for _ in range(1500)
    ]  # fmt: skip
    lines = [json.dumps(record, ensure_ascii=rng.random() < 0.5).encode() for record in records]
    bad = [*KNOWN_BAD, *(NOT_JSON if source in ("file", "compressed") else ())]
    for line in [*rng.choices(bad, k=200), *rng.choices(lines, k=100)]:
        lines.insert(rng.randrange(len(lines)), line)
    path = tmp_path / "source"
    content = b"[" + b",".join(lines) + b"]" if source == "array" else b"\n".join(lines)
    path.write_bytes(gzip.compress(content) if source == "compressed" else content)
    monkeypatch.setattr(rows_module, "CHUNK_BYTES", 10_000)
    monkeypatch.setattr(rows_module, "CHUNK_VALUES", 150)
    monkeypatch.setattr(workers, "CHUNKS_DONE_HERE", chunks_done_here)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    hub = (value_chunks(map(json.loads, lines)), "c0ffee") if source == "hub" else None
    monkeypatch.setattr(instructions, "read_hub_chunks", lambda *_: hub)
    result, output = ingest(tmp_path, seed=3, **({"hub_name": "a/b"} if source == "hub" else {"path": str(path)}))

    expected = second_implementation(lines, seed=3)
    for name in ("rows.jsonl", "quarantine.jsonl"):
        assert (output / name).read_bytes() == expected[name].encode()
    assert expected["by_reason"]["duplicate"] >= 100
    summary = json.loads((output / "summary.json").read_text())
    named = "hub a/b" if source == "hub" else "file"
    assert list(summary.items()) == [
        ("source", named), *expected["counts"].items(), ("by_reason", expected["by_reason"]),
        ("splits", expected["splits"]),
    ]  # fmt: skip
    counts = {**expected["counts"], **expected["splits"]}
    assert result.metrics == {f"data/{name}": float(value) for name, value in counts.items()}
    assert [(check.passed, check.detail) for check in result.checks] == [
        (True, f"{expected['prompts']} distinct prompts, 0 in more than one of train, validation, test"),
        (True, "{rows_in} rows in, {kept} kept + {quarantined} quarantined".format(**expected["counts"])),
    ]


def peak_memory(folder: Path, source: Path) -> float:
    """MiB that a process which ingests a file had resident at most."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from alignment_pipeline.configs import DataConfig\n"
        "from alignment_pipeline.progress import ProgressLog\n"
        "from alignment_pipeline.stage import StageSpec\n"
        "from alignment_pipeline.stages.instructions import ingest_instructions\n"
        "folder = Path(sys.argv[1])\n"
        "spec = StageSpec(DataConfig(path=sys.argv[2]), {}, folder, folder / 'work', 0)\n"
        "ingest_instructions(spec, ProgressLog(folder / 'progress.jsonl'))\n"
        # getrusage would count what the process that started this one had
        "status = Path('/proc/self/status').read_text()\n"
        "print(int(status.partition('VmHWM:')[2].split()[0]) / 1024)\n"
    )
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(source)], env=environment, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    return float(done.stdout)


def test_memory_does_not_grow_with_the_size_of_the_file(tmp_path: Path) -> None:
    lines = (encoded({"instruction": f"Say {number}.", "output": "x" * 900}) for number in range(40_000))
    source = tmp_path / "rows.jsonl"
    source.write_bytes(b"\n".join(lines))
    part = tmp_path / "part.jsonl"
    part.write_bytes(source.read_bytes()[: 10 << 20])
    small, large = peak_memory(tmp_path / "small", part), peak_memory(tmp_path / "large", source)
    # 26 MiB and 29,000 rows more. A row may keep 24 bytes, some 40 at the worst moment: 1 MiB; the rest is noise.
    assert large - small < 10


def test_a_plain_text_that_is_in_quarantine_as_a_duplicate_says_so(tmp_path: Path) -> None:
    _, output = ingest_texts(tmp_path, [{"review": text} for text in [*TEXTS, TEXTS[3]]])
    assert read_jsonl(output / "quarantine.jsonl")[0]["detail"] == "same text as row 4"
