"""`align oracle`: PPO and DPO against the exact optimum of a model small enough to enumerate, in tables and plots.

The mathematics is in `alignment_pipeline.oracle`, the training in `alignment_pipeline.oracle_training`; docs/oracle.md
explains both.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from alignment_pipeline.errors import AlignmentError

if TYPE_CHECKING:
    from torch import Tensor

    from alignment_pipeline.oracle import Optimum, Problem
    from alignment_pipeline.oracle_training import Trained

DEFAULT_BETAS = (1.0, 2.0, 4.0)
_LARGEST_BETA = 10.0
_GRADIENT_SAMPLES = 16_384
_LONGEST_MEASURED = 7
_EXTRAPOLATED = ((4, 16), (50_272, 3), (50_272, 53))  # OPT's vocabulary; a short answer's length
_CURVE_TOLERANCE = 1e-9  # float64 sums over 64 responses are right to about 1e-15; the search for the bound to 1e-11


@dataclass(frozen=True)
class _Claim:
    """A proposition that the run can refute, and what was measured."""

    text: str
    measured: str
    holds: bool


@dataclass(frozen=True)
class _Outcome:
    """Everything of one β; `trained` is by method, PPO and DPO."""

    beta: float
    best: Optimum
    pairs: int
    trained: dict[str, Trained]


def check_betas(betas: Sequence[float]) -> None:
    """Refuse a β that makes no problem.

    Raises:
        AlignmentError: One is not a number above zero, or too large to matter.
    """
    for beta in betas:
        if not 0 < beta <= _LARGEST_BETA:
            raise AlignmentError(
                f"--beta: found {beta:g}, expected a number above 0 and at most {_LARGEST_BETA:g} (rewards go from "
                "0 to 4). Try `align oracle --beta 1`."
            )


def run_oracle(console: Console, betas: Sequence[float], seed: int, updates: int, folder: Path) -> bool:
    """Train, compare, print, and plot into `folder`; True if every claim holds.

    Raises:
        AlignmentError: A β is out of range.
    """
    check_betas(betas)
    console.print("Loading…", style="dim")
    import torch

    from alignment_pipeline import oracle
    from alignment_pipeline.oracle_training import pairs_needed

    torch.set_num_threads(1)  # a model this small loses more than it gains by more
    problem = oracle.build_problem(seed)
    pairs = {beta: pairs_needed(problem, beta) for beta in betas}
    _introduce(console, problem)
    claims = [*_print_mathematics(console, problem, seed)]
    outcomes = _train(console, problem, pairs, seed, updates, folder)
    _print_policies(console, problem, outcomes)
    claims += _claims(problem, outcomes)
    for claim in claims:
        mark = "[green]✓[/green]" if claim.holds else "[bold red]✗[/bold red]"
        console.print(f" {mark} {escape(claim.text)}: {escape(claim.measured)}", highlight=False, soft_wrap=True)
    for path in _plot(problem, outcomes, folder):
        console.print(f"Plot: {path}", highlight=False, soft_wrap=True)
    return all(claim.holds for claim in claims)


def _introduce(console: Console, problem: Problem) -> None:
    from alignment_pipeline.oracle import PROMPT, text_of

    highest = problem.rewards.max()
    best = ", ".join(text_of(response) for response in problem.responses[problem.rewards == highest])
    console.print(
        f"\nA language model over the letters a, b, c, d answers the prompt [bold]{PROMPT}[/bold] with three letters; "
        "a response gets a point for each step up the alphabet and two for ending on [bold]a[/bold] (best: "
        f"{best}, {highest:g} points).\nThere are only {len(problem.responses)} responses, so the policy "
        "π* that PPO and DPO should find, the maximum of E\\[r] - β KL(π ‖ π_ref), is known exactly: "
        "π*(y) = π_ref(y) exp(r(y)/β) / Z.\n",
        highlight=False,
    )


def _print_mathematics(console: Console, problem: Problem, seed: int) -> list[_Claim]:
    """The cost of Z, and the checks that need no training."""
    from alignment_pipeline import oracle

    table = Table(
        title="What Z costs: V^T responses to score", box=box.SIMPLE_HEAD, caption="extrapolated: V^T at the last "
        "measured row's time a response, for this tiny model on one core", caption_justify="left",
    )  # fmt: skip
    for column in ("V", "T", "responses", "time", ""):
        table.add_column(column, justify="right")
    for cost in oracle.enumeration_costs(problem.model, _LONGEST_MEASURED, _EXTRAPOLATED):
        size = f"{10**cost.log10_responses:,.0f}" if cost.log10_responses < 7 else f"10^{cost.log10_responses:.1f}"
        table.add_row(
            f"{cost.vocab_size:,}", str(cost.response_tokens), size, _duration(cost.log10_seconds, cost.log10_years),
            "measured" if cost.measured else "extrapolated",
        )  # fmt: skip
    console.print(table)
    gradient = oracle.check_gradient(problem, _GRADIENT_SAMPLES, seed)
    error = oracle.gae_error(seed)
    return [
        _Claim(
            f"the log-derivative estimate of ∇E[r] from {gradient.samples:,} samples agrees with the exact gradient",
            f"largest of {len(gradient.z_scores)} |z| {max(map(abs, gradient.z_scores)):.2f}, bound "
            f"{gradient.bound:.2f} (false alarms: {oracle.GRADIENT_FALSE_ALARM_RATE:g}); a baseline takes the standard "
            f"error from {gradient.standard_error:.3f} to {gradient.baseline_standard_error:.3f}",
            gradient.holds,
        ),
        _Claim(
            "generalized advantages equal their double sum", f"largest difference {error:.0e}",
            error < oracle.GAE_TOLERANCE,
        ),
    ]  # fmt: skip


def _train(
    console: Console, problem: Problem, pairs: dict[float, int], seed: int, updates: int, folder: Path
) -> list[_Outcome]:
    from alignment_pipeline import oracle, oracle_training

    outcomes = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:

        def shown(what: str) -> oracle_training.Watch:
            task = progress.add_task(what, total=None)
            return lambda step, total: progress.update(task, completed=step, total=total)

        for beta, count in pairs.items():
            best = oracle.optimum(problem.ref_logprobs, problem.rewards, beta)
            trained: dict[str, Trained] = {}
            for method in ("PPO", "DPO"):
                started = time.monotonic()
                watch = shown(f"{method} at β = {beta:g}")
                if method == "PPO":
                    config = oracle_training.ppo_config(beta, updates)
                    trained[method] = oracle_training.train_ppo(problem, config, seed, watch)
                else:
                    with tempfile.TemporaryDirectory(dir=folder, prefix=".work-") as work:
                        trained[method] = oracle_training.train_dpo(problem, beta, seed, Path(work), count, watch)
                console.print(
                    f"{method} at β = {beta:g} trained in {time.monotonic() - started:.0f} s", style="dim",
                    highlight=False,
                )  # fmt: skip
            outcomes.append(_Outcome(beta, best, count, trained))
    return outcomes


def _print_policies(console: Console, problem: Problem, outcomes: Sequence[_Outcome]) -> None:
    from alignment_pipeline.oracle import kl_divergence, point_of
    from alignment_pipeline.oracle_training import EPSILON_NATS

    table = Table(
        title=f"Policies and the optimum (KL in nats, ε = {EPSILON_NATS:g})", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1)
    )
    table.add_column("β", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    for column in ("E\\[r]", "KL(π‖π_ref)", "E\\[r] - β KL", "KL(π‖π*)", "< ε"):
        table.add_column(column, justify="right", no_wrap=True)
    for outcome in outcomes:
        rows = {"reference": problem.ref_logprobs, "optimum": outcome.best.logprobs}
        rows |= {method: trained.logprobs for method, trained in outcome.trained.items()}
        for name, logprobs in rows.items():
            point, distance = point_of(problem, logprobs), kl_divergence(logprobs, outcome.best.logprobs)
            passed = "" if name not in outcome.trained else "✓" if distance < EPSILON_NATS else "✗"
            table.add_row(
                f"{outcome.beta:g}" if name == "reference" else "",
                f"{name}, {outcome.pairs:,} pairs" if name == "DPO" else name,
                f"{point.reward:.4f}", f"{point.kl_nats:.4f}", f"{point.reward - outcome.beta * point.kl_nats:.4f}",
                f"{distance:.4f}", passed,
            )  # fmt: skip
        log_z = outcome.best.log_z
        table.add_row("", f"log Z = {log_z:.4f}", "", "β log Z =", f"{outcome.beta * log_z:.4f}", "", "",
                      style="dim", end_section=True)  # fmt: skip
    console.print(table)


def _claims(problem: Problem, outcomes: Sequence[_Outcome]) -> list[_Claim]:
    """What the training showed."""
    from alignment_pipeline.oracle import highest_reward, kl_divergence
    from alignment_pipeline.oracle_training import EPSILON_NATS, FIRST_LOSS_TOLERANCE

    claims = []
    for method in ("PPO", "DPO"):
        distances = {each.beta: kl_divergence(each.trained[method].logprobs, each.best.logprobs) for each in outcomes}
        claims.append(
            _Claim(
                f"{method} ends within ε = {EPSILON_NATS:g} nats of π*",
                ", ".join(f"{distance:.4f} at β = {beta:g}" for beta, distance in distances.items()),
                all(distance < EPSILON_NATS for distance in distances.values()),
            )
        )
    points = [point for each in outcomes for trained in each.trained.values() for point in trained.way]
    excess = max(point.reward - highest_reward(problem, point.kl_nats) for point in points)
    first = [each.trained["PPO"].first_metrics["objective/kl"] for each in outcomes]
    losses = [each.trained["DPO"].first_metrics["train/loss"] for each in outcomes]
    return [
        *claims,
        _Claim(
            f"{len(points)} reward-KL points of PPO and DPO lie on or below the exact curve",
            f"the highest is {-excess:.1e} below it", excess <= _CURVE_TOLERANCE,
        ),
        _Claim(
            "PPO starts at the reference policy", f"KL of the first rollout {max(map(abs, first)):g}",
            all(kl == 0 for kl in first),
        ),
        _Claim(
            "DPO's first loss is ln 2", f"{losses[0]:.6f}, ln 2 = {math.log(2):.6f}",
            all(abs(loss - math.log(2)) < FIRST_LOSS_TOLERANCE for loss in losses),
        ),
    ]  # fmt: skip


def _plot(problem: Problem, outcomes: Sequence[_Outcome], folder: Path) -> list[Path]:
    """The distributions at the smallest β, and the reward-KL plane."""
    from alignment_pipeline import oracle, plots

    shown = min(outcomes, key=lambda outcome: outcome.beta)
    order = shown.best.logprobs.argsort(descending=True)

    def sorted_probabilities(logprobs: Tensor) -> list[float]:
        probabilities: list[float] = logprobs[order].exp().tolist()
        return probabilities

    distances = ", ".join(
        f"{method} {oracle.kl_divergence(trained.logprobs, shown.best.logprobs):.4f}"
        for method, trained in shown.trained.items()
    )
    distributions, plane = folder / "policies.png", folder / "reward_kl.png"
    plots.distributions(
        distributions,
        [oracle.text_of(problem.responses[row]) for row in order],
        {"reference π_ref": sorted_probabilities(problem.ref_logprobs),
         "optimum π*": sorted_probabilities(shown.best.logprobs)},
        {method: sorted_probabilities(trained.logprobs) for method, trained in shown.trained.items()},
        title=f"Probability of each response at β = {shown.beta:g} (KL to π*: {distances} nats)",
        xlabel="response to the prompt “a”, most probable under π* first",
        ylabel="probability",
    )  # fmt: skip
    plots.below_a_curve(
        plane,
        ("highest E[r] at each KL", [(point.kl_nats, point.reward) for point in oracle.frontier(problem)]),
        {f"PPO, β = {each.beta:g}": [(point.kl_nats, point.reward) for point in each.trained["PPO"].way]
         for each in outcomes},
        {"optimum π* of each β": [(point.kl_nats, point.reward) for each in outcomes
                                  for point in [oracle.point_of(problem, each.best.logprobs)]],
         "DPO": [(point.kl_nats, point.reward) for each in outcomes for point in each.trained["DPO"].way]},
        title="Reward against distance from the reference",
        xlabel="KL(π ‖ π_ref), nats a response",
        ylabel="E[r], mean reward, points",
    )  # fmt: skip
    return [distributions, plane]


def _duration(log10_seconds: float, log10_years: float) -> str:
    if log10_years >= 4:
        return f"10^{log10_years:.0f} years"
    if log10_years >= 0:
        return f"{10**log10_years:,.0f} years"
    if log10_seconds >= 4:
        return f"{10**log10_seconds / 3600:,.0f} hours"
    return f"{10**log10_seconds:,.3f} s"
