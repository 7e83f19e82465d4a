"""The tables of `ppo_vs_trl.py`, as Markdown that also reads well in a terminal."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

Json = dict[str, Any]
NAMES = {"ours": "ours", "trl": "TRL"}
PHASES = {
    "sampling": "sampling",
    "policy": "scoring: policy forward",
    "reference": "scoring: reference forward",
    "value": "scoring: value model forward",
    "reward": "scoring: reward model forward",
    "update_forward": "update: forward",
    "backward": "update: backward",
    "optimizer": "update: optimizer",
}
_SMOOTHED_UPDATES = 5
_KL_SHARES = (0.25, 0.5, 0.75, 1.0)
_KERNEL_SHARE = 0.1  # standard deviation of the weights around a KL, as a share of the highest KL compared


def report(result: Json) -> str:
    """All tables with a line each on how they were made."""
    methods = list(result["limits"])
    large, small, machine = result["workloads"]["large"], result["workloads"]["small"], result["machine"]
    versions = {key: result["runs"][0][key] for key in ("torch", "transformers")}
    return "\n".join(
        [
            f"{machine['cores']} cores ({machine['processor']}), {result['settings']['threads']} threads, "
            f"torch {versions['torch']}, transformers {versions['transformers']}, trl {result['versions']['trl']}; "
            f"took {result['took_s'] / 60:.1f} min, load at its end {machine['load']:.1f}.",
            "",
            f"Time and memory: {_describe(large)}.",
            "",
            *table(_time_rows(result, methods)),
            "",
            "Seconds an update over all updates but each process's first. The ratio is TRL's median over ours; in "
            "brackets that of each pair of processes. Memory: highest resident memory (VmHWM, reset after the imports) "
            "less what was resident after the imports; range over the processes. Optimizer steps were counted.",
            "",
            f"Score at equal KL: {_describe(small)}.",
            "",
            *table(_score_rows(result, methods)),
            "",
            f"Mean ± standard deviation over {_seeds(result)} seeds. Score and KL are those of each update's rollout. "
            "At each KL (the highest is one that every run reached) a line is fitted to a run's updates near it; the "
            f"end is the last {_SMOOTHED_UPDATES} updates. TRL's value model starts as the "
            f"{result['settings']['trl_value_model']} model. Ours: {_options(result['settings']['ours'])}.",
            *(line for method in methods for line in ("", *_phase_lines(result, method))),
            "",
        ]
    )


def score_at_kl(kls: Sequence[float], scores: Sequence[float], grid: Sequence[float]) -> list[float]:
    """Scores of one run at some KLs: a line fitted to its updates, those near the KL weighing most."""
    kl, score = np.asarray(kls), np.asarray(scores)
    width = _KERNEL_SHARE * max(grid)
    fits = [np.polyfit(kl - at, score, 1, w=np.exp(-(((kl - at) / width) ** 2) / 4)) for at in grid]
    return [float(fit[1]) for fit in fits]


def smoothed(values: Sequence[float]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """Moving averages over some updates."""
    window = min(_SMOOTHED_UPDATES, len(values))
    return np.convolve(np.asarray(values, dtype=np.float64), np.ones(window) / window, mode="valid")


def _describe(workload: Json) -> str:
    return (
        f"OPT of {workload['num_layers']} layers × {workload['hidden_size']}, {workload['vocab_size']} tokens, random "
        f"weights; prompts of {workload['min_prompt_tokens']}–{workload['max_prompt_tokens']} tokens, "
        f"{workload['rollouts']} rollouts × {workload['response_tokens']} tokens, {workload['ppo_epochs']} PPO epochs "
        "× 1 minibatch, "
        f"learning rate {workload['full_learning_rate']:g} (full) and {workload['lora_learning_rate']:g} "
        f"(LoRA), KL coefficient {workload['kl_coef']:g}"
    )


def _runs(result: Json, part: str, side: str, method: str) -> list[Json]:
    wanted = (part, side, method)
    return [run for run in result["runs"] if (run["part"], run["side"], run["method"]) == wanted]


def _time_rows(result: Json, methods: Sequence[str]) -> list[list[str]]:
    rows = [["method", "side", "s / update: median", "min", "max", "TRL ÷ ours", "peak memory, MiB", "optimizer steps"]]
    for method in methods:
        medians = {
            side: [statistics.median(run["seconds"][1:]) for run in _runs(result, "timed", side, method)]
            for side in NAMES
        }
        pairs = [trl / ours for ours, trl in zip(medians["ours"], medians["trl"], strict=True)]
        overall = {}
        for side, name in NAMES.items():
            runs = _runs(result, "timed", side, method)
            seconds = [value for run in runs for value in run["seconds"][1:]]
            overall[side] = statistics.median(seconds)
            memory = [run["peak_mib"] - run["imports_mib"] for run in runs]
            steps = sorted({count for run in runs for count in run["optimizer_steps"]})
            ratio = (
                f"{overall['trl'] / overall['ours']:.2f} [{min(pairs):.2f}, {max(pairs):.2f}]" if side == "trl" else ""
            )
            rows.append(
                [method, name, f"{overall[side]:.2f}", f"{min(seconds):.2f}", f"{max(seconds):.2f}", ratio,
                 _range(memory), ", ".join(map(str, steps))]
            )  # fmt: skip
    return rows


def _score_rows(result: Json, methods: Sequence[str]) -> list[list[str]]:
    rows = [["method", "KL, nats", "score: ours", "score: TRL", "ours − TRL"]]
    for method in methods:
        runs = {side: _runs(result, "curve", side, method) for side in NAMES}
        reached = min(smoothed(run["kls"]).max() for side in NAMES for run in runs[side])
        grid = [share * float(reached) for share in _KL_SHARES]
        scores = {
            side: np.array([score_at_kl(run["kls"], run["scores"], grid) for run in runs[side]]) for side in NAMES
        }
        for column, kl in enumerate(grid):
            ours, trl = (scores[side][:, column] for side in NAMES)
            rows.append([method, f"{kl:.2f}", _spread(ours), _spread(trl), f"{ours.mean() - trl.mean():+.2f}"])
        last = {side: [smoothed(run["scores"])[-1] for run in runs[side]] for side in NAMES}
        kls = {side: [smoothed(run["kls"])[-1] for run in runs[side]] for side in NAMES}
        cells = [f"{_spread(last[side])} at KL {np.mean(kls[side]):.2f}" for side in NAMES]
        rows.append([method, "at the end", *cells, f"{np.mean(last['ours']) - np.mean(last['trl']):+.2f}"])
    return rows


def _phase_lines(result: Json, method: str) -> list[str]:
    rows = [
        ["phase", "side", "s", "GFLOP", "GFLOP/s", "least s at peak", "least s at these shapes", "time at that limit"]
    ]
    for side, name in NAMES.items():
        runs = _runs(result, "timed", side, method)
        total = statistics.median([value for run in runs for value in run["seconds"][1:]])
        limits, explained = result["limits"][method][side], 0.0
        for phase, title in PHASES.items():
            found = [update[phase] for run in runs for update in run["phases"][1:] if phase in update]
            if not found:
                continue
            seconds = statistics.median(found)
            explained += seconds
            cells = [title, name, f"{seconds:.3f}"]
            if limit := limits.get(phase):
                least = limit["seconds_at_these_shapes"]
                cells += [f"{limit['gigaflop']:.1f}", f"{limit['gigaflop'] / seconds:.0f}",
                          f"{limit['seconds_at_peak']:.3f}", f"{least:.3f}", f"{least / seconds:.0%}"]  # fmt: skip
            rows.append(cells + [""] * (len(rows[0]) - len(cells)))
        at_peak, at_shapes, work = (
            sum(limit[key] for limit in limits.values())
            for key in ("seconds_at_peak", "seconds_at_these_shapes", "gigaflop")
        )
        rows.append(["everything else", name, f"{total - explained:.3f}", *[""] * 5])
        rows.append(["**update**", name, f"{total:.3f}", f"{work:.1f}", f"{work / total:.0f}", f"{at_peak:.3f}",
                     f"{at_shapes:.3f}", f"{at_shapes / total:.0%}"])  # fmt: skip
    return [
        f"Where the time goes ({method}); a large square product runs at {result['peak_gigaflops']:.0f} GFLOP/s:",
        "",
        *table(rows),
    ]


def _options(ours: Json) -> str:
    return ", ".join(f"{key} = {value}" for key, value in ours.items()) or "defaults otherwise"


def _seeds(result: Json) -> int:
    return len({run["seed"] for run in result["runs"] if run["part"] == "curve"})


def _spread(values: Any) -> str:
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) if len(values) > 1 else 0.0:.2f}"


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.0f}", f"{max(values):.0f}"
    return low if low == high else f"{low}–{high}"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table whose first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]
