"""The tables of `training_vs_trl.py`, as Markdown that also reads well in a terminal."""

from statistics import median
from typing import Any

from ppo_vs_trl_report import table

Json = dict[str, Any]
TARGETS = {"sft": 2.5, "reward": 2.0, "dpo": 4.0}
WHOLE_TARGET = 1 / 3
LONGER = "ours, longer"
SIDES = ("plain", "same batches", "ours", LONGER)
SAME_LOSS = 1e-4  # nats; sums over a batch in another order, and 40 steps after one another


def report(result: Json) -> str:
    """All tables with a line each on how they were made."""
    machine, settings, versions = result["machine"], result["settings"], result["versions"]
    lines = [
        f"{machine['cores']} cores ({machine['processor']}), {settings['threads']} threads, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, trl {versions['trl']}; {settings['steps']} steps of "
        f"{settings['batch_size']}, {result['parameters'] / 1e6:.2f} million parameters. Took "
        f"{result['took_s'] / 60:.0f} min; load {machine['load_before']:.1f} before, {machine['load']:.1f} at the end.",
        "",
        *table(_speed_rows(result)),
        "",
        "Real tokens a second (no padding counted) from the second step on: median of the processes, and in brackets "
        "each. CPU-second: of all threads, which other work on the machine disturbs less. Share of the rate: "
        "6 × the parameters that a token is multiplied by (no embeddings; the head in sft and dpo) × tokens, over the "
        f"{result['peak_gigaflops']:.0f} GFLOP/s of a large matrix product here; ours leaves the head out at prompts, "
        "and attention is counted nowhere. "
        "Loss: the greatest difference from the plain script at any step; equal up to rounding is less than "
        f"{SAME_LOSS:g}.",
        "",
        *table(_held_out_rows(result)),
        "",
        "Seconds of the steps alone, from the second on. DPO's reference log-probabilities, which the plain script "
        "computes within its steps, are added to ours. Gain: what was taken off the held-out loss, as a share of what "
        f"plain took off. {LONGER}: a quarter more steps of batches by length.",
        "",
        *table(_whole_rows(result)),
        "",
        f"From process start to process end; the target is a ratio of at least {1 / WHOLE_TARGET:.0f}.",
        "",
        *table(_profile_rows(result)),
        "",
        "Our side's operators by their own time, ten steps and all that is around them (loading, held-out rows).",
        "",
    ]
    return "\n".join(lines)


def _of(result: Json, stage: str, side: str, key: str) -> list[Any]:
    return [run[key] for run in result["runs"] if (run["stage"], run["side"]) == (stage, side)]


def _speed_rows(result: Json) -> list[list[str]]:
    rows = [["stage", "side", "tokens/s", "ratio", "target", "tokens/CPU-s", "ratio", "share of the rate", "loss"]]
    for stage, target in TARGETS.items():
        plain = {key: median(_of(result, stage, "plain", key)) for key in ("tokens_per_s", "tokens_per_cpu_s")}
        for side in ("plain", "same batches", "ours"):
            speeds, per_cpu = (_of(result, stage, side, key) for key in ("tokens_per_s", "tokens_per_cpu_s"))
            share = 6 * result["multiplied"][stage] * median(speeds) / (result["peak_gigaflops"] * 1e9)
            rows.append([
                stage, side, f"{median(speeds):.0f} [{', '.join(f'{speed:.0f}' for speed in speeds)}]",
                f"{median(speeds) / plain['tokens_per_s']:.2f}", f"{target:g}" if side == "ours" else "",
                f"{median(per_cpu):.0f}", f"{median(per_cpu) / plain['tokens_per_cpu_s']:.2f}", f"{share:.0%}",
                f"{_loss_difference(result, stage):.1e}" if side == "same batches" else "",
            ])  # fmt: skip
    return rows


def _loss_difference(result: Json, stage: str) -> float:
    """The greatest difference of a step's loss, on the same batches."""
    plain, same = (_of(result, stage, side, "losses")[0] for side in ("plain", "same batches"))
    return max(abs(a - b) for a, b in zip(plain, same, strict=True))


def _held_out_rows(result: Json) -> list[list[str]]:
    rows = [["stage", "side", "held-out loss", "gain", "seconds", "share of the time"]]
    for stage in TARGETS:
        before = result["losses_before"][stage]
        losses = {side: median(_of(result, stage, side, "held_out_loss")) for side in SIDES}
        seconds = {
            side: median(_of(result, stage, side, "steps_s")) + median(_of(result, stage, side, "reference_s"))
            for side in SIDES
        }
        rows.append([stage, "before", f"{before:.4f}", "", "", ""])
        rows += [
            [stage, side, f"{losses[side]:.4f}", f"{(before - losses[side]) / (before - losses['plain']):.2f}",
             f"{seconds[side]:.1f}", f"{seconds[side] / seconds['plain']:.0%}"]
            for side in SIDES
        ]  # fmt: skip
    return rows


def _whole_rows(result: Json) -> list[list[str]]:
    rows = [["whole", "s", "parts, s", "ratio"]]
    totals = {side: [run["total_s"] for run in result["wholes"] if run["side"] == side] for side in ("plain", "ours")}
    for side, name in (("plain", "four scripts"), ("ours", "one align run")):
        parts = next(run["parts_s"] for run in result["wholes"] if run["side"] == side)
        told = ", ".join(f"{part} {seconds:.0f}" for part, seconds in parts.items())
        ratio = f"{median(totals['plain']) / median(totals['ours']):.2f}" if side == "ours" else ""
        each = ", ".join(f"{total:.0f}" for total in totals[side])
        rows.append([name, f"{median(totals[side]):.0f} [{each}]", told, ratio])
    return rows


def _profile_rows(result: Json) -> list[list[str]]:
    rows = [["stage", "where the time goes"]]
    for stage, operators in result["profiles"].items():
        told = ", ".join(f"{row['operator'].removeprefix('aten::')} {row['share']:.0%}" for row in operators[:8])
        rows.append([stage, told])
    return rows
