"""``laavit power --gain 5 --baseline 60``: how many questions a claimed gain needs, and what n questions can show."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from laavit.commands.common import Parser
from laavit.evaluation.power import detectable_gain, independent_discordance, mcnemar_power, questions_needed
from laavit.registry import UserError


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    parser = Parser(prog="power", description="Paired McNemar test, two-sided; all figures in per cent or points.")
    parser.add_argument("--baseline", type=float, required=True, help="the baseline's accuracy, per cent")
    parser.add_argument("--gain", type=float, help="points claimed or hoped for; negative for a loss")
    parser.add_argument("--n", type=int, help="questions at hand: what gain do they show?")
    parser.add_argument(
        "--discordant", type=float, help="questions that exactly one of the two answers, per cent; default: bounds"
    )
    parser.add_argument("--power", type=float, default=80.0, help="the chance to find the gain, per cent")
    parser.add_argument("--level", type=float, default=95.0, help="100 less the test's α, per cent: 95 is α = 0.05")
    parser.add_argument("--comparisons", type=int, default=1, help="tests in all: α is shared out (Bonferroni)")
    options = parser.parse_args(list(argv))
    if options.gain is None and options.n is None:
        raise UserError("power needs --gain (how many questions?) or --n (what gain?)")
    if options.comparisons < 1:
        raise UserError(f"--comparisons {options.comparisons} was given; allowed: whole numbers from 1")
    if not 0 <= options.baseline <= 100:
        raise UserError(f"--baseline {options.baseline:g} was given; allowed: 0 to 100 per cent")
    for name in ("power", "level"):
        given = getattr(options, name)
        if not 1 <= given < 100:
            raise UserError(f"--{name} {given:g} was given; allowed: per cent, from 1 to less than 100")
    level = 1 - (1 - options.level / 100) / options.comparisons
    lines = [] if options.gain is None else _needed(options, level)
    if options.n is not None:
        lines += _shown(options, level)
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _needed(options: argparse.Namespace, level: float) -> list[str]:
    baseline, gain, power = options.baseline / 100, options.gain / 100, options.power / 100
    if gain == 0:
        raise UserError("--gain 0 was given; allowed: points other than 0")
    if not 0 <= baseline + gain <= 1:
        raise UserError(f"--gain {options.gain:g} on --baseline {options.baseline:g} leaves 0 to 100 per cent")
    cases = {"as given": options.discordant / 100} if options.discordant is not None else {}
    cases["none lost: the gain alone"] = abs(gain)
    cases["independent answers"] = independent_discordance(baseline, gain)
    lines = [f"{options.gain:+g} points on {options.baseline:g} %, found with {options.power:g} % power:"]
    for name, discordance in cases.items():
        n = questions_needed(gain, discordance, power, level)
        said = ""
        if n <= 200_000:  # of millions it takes hours
            said = f"(the exact test's power there: {100 * mcnemar_power(n, gain, discordance, level):.0f} %)"
        lines.append(f"  {100 * discordance:5.1f} % discordant, {name:26} {n:7} questions  {said}".rstrip())
    return lines


def _shown(options: argparse.Namespace, level: float) -> list[str]:
    baseline, power = options.baseline / 100, options.power / 100
    lines = [f"{options.n} questions at {options.baseline:g} % show, with {options.power:g} % power:"]
    cases: list[tuple[str, float | None]] = [("independent answers", None)]
    if options.discordant is not None:
        cases.insert(0, (f"{options.discordant:g} % discordant", options.discordant / 100))
    for name, discordance in cases:
        gain = detectable_gain(options.n, baseline, discordance, power, level)
        lines.append(f"  {name:26} {'no gain at all' if gain is None else f'{100 * gain:.1f} points or more'}")
    return lines
