"""``laavit analyse NAME OUT MODEL=FOLDER ...``: the paper's analyses, each as figures with intervals and a picture."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from laavit.commands.common import Parser
from laavit.commands.gaze import chosen, looker_parser, parse_looking
from laavit.files import write_json, write_text
from laavit.registry import UserError, nearest

logger = logging.getLogger(__name__)

#: analysis -> one line
ANALYSES = {
    "focus": "S_focus, the attention inside the boxes, against right and wrong answers (Sec. 3.1, Fig. 2)",
    "gap": "KL of the attention and distance of the states of a teacher and students, by token group (Fig. 3)",
    "attention": "entropy, salient regions and CV of the attention, and differences of models (Table 2, Fig. 4)",
    "overlay": "a contact sheet: samples by models, with boxes, shares and answers (Fig. 5)",
}


def _parser(name: str) -> Parser:
    parser = looker_parser(
        f"analyse {name}", f"{ANALYSES[name]}; writes OUT/{name}.json and OUT/{name}.png.", "analysis"
    )
    parser.add_argument("--limit", type=int, help="samples, drawn at random; all by default")
    parser.add_argument("--seed", type=int, default=0, help="of that draw")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=64, help="of a model's own answer, at most")
    parser.add_argument("--dtype", default="float32", help="of the weights: float32, bfloat16 or float16")
    parser.add_argument("--device-map", help="'auto' spreads a model over the devices")
    parser.add_argument("--max-pixels", type=int, help="larger images are scaled down to these")
    if name in ("focus", "overlay"):
        parser.add_argument("--minimum", type=float, default=1.0, help="score from which on an answer is right")
    if name == "attention":
        parser.add_argument("--answers", choices=("gold", "own"), default="gold", help="whose words are read")
    if name == "overlay":
        parser.add_argument("--show", type=int, default=6, help="samples drawn")
    if name == "gap":
        parser.add_argument("--answers", choices=("teacher", "gold"), default="teacher", help="whose words are read")
        parser.add_argument("--unit", choices=("token", "word"), default="token", help="what is compared")
        parser.add_argument("--rows", choices=("predicting", "own"), default="predicting", help="rows of a token")
        parser.add_argument("--tagger", default="textblob", help="finds the groups: textblob, or spacy:PATH_OR_NAME")
    return parser


def _analysed(name: str, options: argparse.Namespace, samples: Sequence[Any]) -> dict[str, Any]:
    """The figures of an analysis; focus leaves its records beside them."""
    from laavit.evaluation.analyses.attention import attention
    from laavit.evaluation.analyses.focus import focus
    from laavit.evaluation.analyses.gap import gap
    from laavit.evaluation.analyses.overlay import overlay
    from laavit.evaluation.gaze import Looker

    lookers = [Looker.parse(text) for text in options.lookers]
    given = {"dtype": options.dtype, "device_map": options.device_map, "max_pixels": options.max_pixels}
    common: dict[str, Any] = {
        "batch_size": options.batch_size,
        "max_new_tokens": options.max_new_tokens,
        "loading": {key: value for key, value in given.items() if value is not None},
    }
    if name == "focus":
        result, records = focus(lookers, samples, minimum=options.minimum, **common)
        lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in records]
        write_text(options.out / "focus.jsonl", "".join(lines))
        return result
    if name == "gap":
        chosen_rows = {"answers": options.answers, "unit": options.unit, "rows": options.rows}
        return gap(lookers, samples, tagger=options.tagger, **chosen_rows, **common)
    if name == "attention":
        return attention(lookers, samples, answers=options.answers, **common)
    return overlay(lookers, samples, show=options.show, minimum=options.minimum, **common)


def _said(value: Sequence[float] | None, digits: int = 3) -> str:
    """'0.716 [0.680, 0.752]'."""
    return "–" if value is None else "{0:.{d}f} [{1:.{d}f}, {2:.{d}f}]".format(*value, d=digits)


def _p(value: float | None) -> str:
    return "–" if value is None else f"{value:.2g}"


def summary(name: str, result: Mapping[str, Any]) -> list[str]:
    """The figures that are printed, a line each."""
    lines = []
    if name == "focus":
        for model, each in result["models"].items():
            lines.append(f"{model}: accuracy {_said(each['accuracy'])}, n = {each['n']}")
            lines.append(f"  S_focus right {_said(each['focus_correct'])}, wrong {_said(each['focus_wrong'])}")
            for words, one in (("right - wrong", each), ("within kinds", each["within"])):
                lines.append(f"  {words} {_said(one['difference'])}, p = {_p(one['p'])}")
    if name == "gap":
        for model, each in result["students"].items():
            for measure in ("kl", "cosine", "cka_distance"):
                values = each[measure] or {"of states of {} and {} numbers": None}
                said = ", ".join(f"{k.format(*each['widths'])} {_said(v)}" for k, v in values.items())
                lines.append(f"{model}: {measure} {said}")
    if name == "attention":
        for model, each in result["models"].items():
            values = (f"{key} {_said(each[key]['mean'])}" for key in each if key != "tokens")
            lines.append(f"{model}: " + ", ".join(values))
    if name == "overlay":
        lines = [f"{result['n']} samples"]
    return lines


def main(argv: Sequence[str]) -> int:
    """Run the command with its words; returns the exit code."""
    if not argv or argv[0] in ("-h", "--help"):
        listed = "\n".join(f"  {name:10} {line}" for name, line in ANALYSES.items())
        sys.stdout.write(f"usage: laavit analyse NAME OUT MODEL=FOLDER ...   (each has --help)\n\n{listed}\n")
        return 0
    name = argv[0]
    if name not in ANALYSES:
        raise UserError(f"laavit analyse: no analysis is called '{name}'; {nearest(name, ANALYSES)}")
    options, data = parse_looking(_parser(name), argv[1:])
    for flag in ("batch_size", "max_new_tokens", *(["show"] if name == "overlay" else [])):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag.replace('_', '-')}: at least 1, got {getattr(options, flag)}")
    samples = chosen(data, options.limit, options.seed)
    from laavit.reports.analysis_figures import write_figure

    options.out.mkdir(parents=True, exist_ok=True)
    result = _analysed(name, options, samples)
    write_json(options.out / f"{name}.json", {"analysis": name, "models_read": options.lookers} | result)
    write_figure(name, result, options.out / f"{name}.png")
    sys.stdout.write("\n".join(summary(name, result)) + "\n")
    logger.info("%s -> %s", name, options.out)
    return 0
