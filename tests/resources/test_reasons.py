from typing import Any

from resources.reasons import differences

BEFORE: dict[str, Any] = {
    "config": {"learning_rate": 1e-4, "gone": 1, "limit": None},
    "seed": 0,
    "inputs": {"pairs": {"stage": "preference_pairs", "key": "k", "data_version": "a" * 64}},
    "code_version": "0123456789",
    "code": {"one": "1", "two": "2", "three": "3"},
}


def changed(**values: Any) -> list[str]:
    return differences(BEFORE, BEFORE | values, "dpo", {"pairs": "preference_pairs"})


def test_the_same_differs_in_nothing() -> None:
    assert changed() == []


def test_settings_bear_the_recipes_names_and_spelling() -> None:
    after = {"learning_rate": 1.00000001e-4, "limit": 5, "targets": ["q_proj"], "method": "full"}
    assert changed(config=after, seed=3) == [
        "dpo.gone 1 → absent",
        "dpo.learning_rate 0.0001 → 0.000100000001",
        "dpo.limit null → 5",
        "dpo.method absent → full",
        'dpo.targets absent → ["q_proj"]',
        "seed 0 → 3",
    ]


def test_inputs_bear_the_names_of_assets_and_files_those_of_their_keys() -> None:
    pairs = {"stage": "preference_pairs", "key": "other", "data_version": "b" * 64}
    files = {"source": {"sha256": "c" * 64, "path": "rows.jsonl"}, "journal": {"sha256": "d" * 64, "path": "j"}}
    assert changed(inputs={"pairs": pairs, **files}) == [
        "dpo.journal absent → dddddddd",
        "preference_pairs aaaaaaaa → bbbbbbbb",
        "dpo.path absent → cccccccc",
    ]
    assert changed(inputs={}) == ["preference_pairs aaaaaaaa → absent"]


def test_a_parent_that_was_computed_anew_with_the_same_content_is_no_difference() -> None:
    assert changed(inputs={"pairs": BEFORE["inputs"]["pairs"] | {"key": "other"}}) == []


def test_code_is_named_by_module() -> None:
    assert changed(code_version="9876543210", code={"one": "1", "two": "other", "four": "4"}) == [
        "code: four added",
        "code: three removed",
        "code: two changed",
    ]


def test_manifests_that_name_no_modules_differ_in_the_whole_codes_version() -> None:
    older = {name: value for name, value in BEFORE.items() if name != "code"}
    newer = BEFORE | {"code_version": "9876543210"}
    assert differences(older, newer, "dpo", {}) == ["code 01234567 → 98765432"]
