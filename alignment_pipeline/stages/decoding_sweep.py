"""`decoding_sweep`: one policy's responses to the same test prompts under several decoding settings.

One knob is varied at a time. Temperatures stand alone; top-k and top-p sample at temperature 1; beams, penalties of
repetition, shortest and longest lengths go with greedy decoding. Every setting has the same seed, so that sampled
responses differ by the setting and not by the draw.

Whoever takes the best setting over into an evaluation has chosen it by the test prompts.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from alignment_pipeline import atomic
from alignment_pipeline.bleu import corpus_bleu
from alignment_pipeline.decoding import in_words, respond
from alignment_pipeline.decoding_configs import DecodingFields, DecodingSweepConfig
from alignment_pipeline.diversity import distinct, repetition
from alignment_pipeline.generation import Response
from alignment_pipeline.identity import canonical_json, read_jsonl, write_jsonl
from alignment_pipeline.judges import JUDGE_TITLES
from alignment_pipeline.models import load_policy, load_tokenizer
from alignment_pipeline.plots import bar_panels
from alignment_pipeline.progress import ProgressLog
from alignment_pipeline.stage import StageResult, StageSpec
from alignment_pipeline.stages.evaluation import asked_rows, scored
from alignment_pipeline.statistics import mean, standard_error
from alignment_pipeline.tokenization import TokenIds, encode_prompts

_KNOBS = ("temperature", "top_k", "top_p", "num_beams", "repetition_penalty", "min_new_tokens", "max_new_tokens")


def sweep_decoding(spec: StageSpec[DecodingSweepConfig], log: ProgressLog) -> StageResult:
    """Write `table.jsonl` (one row a setting), `examples.jsonl` (a row a prompt and setting), and a plot of the table.

    A resumed sweep keeps the responses of the settings that were done.
    """
    settings, rows = settings_of(spec.config), asked_rows(spec)
    tokenizer = load_tokenizer(spec.inputs["trunk"])
    prompts = encode_prompts(tokenizer, [row["prompt"] for row in rows])
    answers = _answers(spec, log, tokenizer, prompts, settings.values())
    together = [response for responses in answers for response in responses]
    judged, learned = scored(spec, tokenizer, rows * len(settings), prompts * len(settings), together)
    table, examples = [], []
    for number, (name, responses) in enumerate(zip(settings, answers, strict=True)):
        part = slice(number * len(rows), (number + 1) * len(rows))
        row = _row(spec.config, settings[name], rows, responses, judged[part], learned[part])
        table.append({"setting": name, **row})
        examples.append(
            [
                {"setting": name, "prompt_id": row["prompt_id"], "prompt": row["prompt"],
                 "reference": row["reference"], "response": response.text, "judge_score": judge_score,
                 "learned_score": learned_score, "tokens": len(response.token_ids), "ended": response.ended}
                for row, response, judge_score, learned_score
                in zip(rows, responses, judged[part], learned[part], strict=True)
            ]
        )  # fmt: skip
        log.step(
            "sweep", number + 1, len(settings), {f"sweep/{column}": row[column] for column in ("bleu", "judge_score")}
        )
    write_jsonl(spec.output_dir / "table.jsonl", table)
    write_jsonl(spec.output_dir / "examples.jsonl", [each for prompt in zip(*examples, strict=True) for each in prompt])
    title = JUDGE_TITLES[spec.config.judge]
    summary = {"judge": spec.config.judge, "judge_title": title, "prompts": len(rows), "settings": len(settings)}
    atomic.write_json(spec.output_dir / "summary.json", summary)
    _plot(spec, table, title)
    return StageResult({"sweep/settings": float(len(settings)), "sweep/prompts": float(len(rows))})


def settings_of(config: DecodingSweepConfig) -> dict[str, DecodingFields]:
    """The sweep's settings by what they are called, in the order of its table."""
    changes: list[dict[str, Any]] = [
        *({"temperature": value} for value in config.temperatures),
        *({"top_k": value} for value in config.top_ks),
        *({"top_p": value} for value in config.top_ps),
        *({"temperature": 0.0, "num_beams": value} for value in config.num_beams),
        *({"temperature": 0.0, "repetition_penalty": value} for value in config.repetition_penalties),
        *({"temperature": 0.0, "min_new_tokens": value} for value in config.min_new_tokens),
        *({"temperature": 0.0, "max_new_tokens": value} for value in config.max_lengths),
    ]
    usual = {"temperature": 1.0, "max_new_tokens": config.max_new_tokens}
    settings = [DecodingFields(**usual | change) for change in changes]
    return {_words(config, setting): setting for setting in settings}


def _words(config: DecodingSweepConfig, setting: DecodingFields) -> str:
    shorter = setting.max_new_tokens < config.max_new_tokens
    return in_words(setting) + (f", max {setting.max_new_tokens} tokens" if shorter else "")


def _answers(
    spec: StageSpec[DecodingSweepConfig],
    log: ProgressLog,
    tokenizer: Any,
    prompts: list[TokenIds],
    settings: Collection[DecodingFields],
) -> list[list[Response]]:
    """The responses by setting, from the work folder where an earlier run has left them."""
    policy = load_policy(spec.inputs["policy"], spec.inputs["trunk"], spec.device)
    answers = []
    for number, setting in enumerate(settings, start=1):
        path = spec.work_dir / f"responses-{number}.jsonl"
        responses = _kept(path, len(prompts))
        if responses is None:
            responses = respond(policy, tokenizer, prompts, setting, batch_size=spec.config.batch_size, seed=spec.seed)
            atomic.write_text(path, "".join(canonical_json(vars(response)) + "\n" for response in responses))
        answers.append(responses)
        log.step("decode", number, len(settings))
    return answers


def _kept(path: Path, prompts: int) -> list[Response] | None:
    """What an earlier run has left, where that is a response to every prompt."""
    try:
        responses = [Response(**row) for row in read_jsonl(path)]
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return responses if len(responses) == prompts else None


def _row(
    config: DecodingSweepConfig,
    setting: DecodingFields,
    rows: list[dict[str, Any]],
    responses: list[Response],
    judged: list[float],
    learned: list[float] | list[None],
) -> dict[str, Any]:
    # The end token is no part of a text's variety.
    words = [response.token_ids[:-1] if response.ended else response.token_ids for response in responses]
    scores = [score for score in learned if score is not None]
    return {
        **{name: getattr(setting, name) for name in _KNOBS},
        "judge": config.judge,
        "prompts": len(rows),
        "bleu": corpus_bleu([response.text for response in responses], [row["reference"] for row in rows]),
        "judge_score": mean(judged),
        "judge_score_se": standard_error(judged),
        "learned_score": mean(scores) if scores else None,
        "distinct_1": distinct(words, 1),
        "distinct_2": distinct(words, 2),
        "repetition": mean([repetition(tokens) for tokens in words]),
        "mean_tokens": mean([len(response.token_ids) for response in responses]),
        "eos_rate": mean([float(response.ended) for response in responses]),
    }


def _plot(spec: StageSpec[DecodingSweepConfig], table: list[dict[str, Any]], judge_title: str) -> None:
    def exact(name: str) -> list[tuple[float, float]]:
        return [(row[name], 0.0) for row in table]

    bar_panels(
        spec.output_dir / "extras" / "sweep.png",
        [row["setting"] for row in table],
        {
            "BLEU": exact("bleu"),
            judge_title: [(row["judge_score"], 1.96 * row["judge_score_se"]) for row in table],
            "distinct-2": exact("distinct_2"),
            "tokens a response": exact("mean_tokens"),
            "repeated 4-grams": exact("repetition"),
        },
        title=f"Decoding settings on {table[0]['prompts']} test prompts (lines on bars: 95% intervals)",
    )
