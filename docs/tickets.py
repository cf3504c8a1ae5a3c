"""Makes tickets.md, and its two figures, from the folder of a lottery of LeNet-300-100 on MNIST.

    python docs/tickets.py FOLDER [--conv FOLDER] [--into docs]

FOLDER is what ``losslab tickets mnist --out FOLDER`` wrote; ``--conv`` is the folder of the reduced Conv-2
that `losslab lecture --profile paper --claim C65` keeps beside its report. The rules by which the paper's
statements are judged stand here, and were fixed before the numbers were looked at. Figures are the page's
own; Chromium turns them into SVG.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from losslab.errors import LosslabError
from losslab.files import write_atomically
from losslab.lecture.claim import Drawing
from losslab.lecture.section_6_6.ticket_runs import CONV_NOTE
from losslab.report.tickets import draw_score, draw_stop
from losslab.tickets import comparing

PAPER = {3: "51.3", 7: "21.1", 9: "13.5", 15: "3.6"}
"""Level -> P_m in per cent, as the paper prints it."""

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
COMMAND = (
    "losslab tickets mnist --levels {levels} --replicates {replicates} --controls {controls} "
    "--control-levels {control_levels} --init xavier --steps {steps} --out DIR"
)
AGREES, OPEN, DISAGREES = "agrees", "open", "**disagrees**"


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        ends = "" if math.isnan(self.low) else f" ({self.low:.2f} to {self.high:.2f})"
        return "–" if math.isnan(self.value) else f"{self.value:.2f}{ends}"


def judged(here: Estimate, nothing: float, stated: float | None = None, at_least: bool = False) -> str:
    """A statement of the paper against what was measured here.

    It disagrees where the whole interval lies on the other side of ``nothing`` (no effect), and is open where
    the interval holds it. It agrees where the interval lies on the stated side of ``nothing`` and, if the
    paper gives a number, holds that number (lies above it, for "more than"); else only its direction does.
    The stated side is above ``nothing``.
    """
    if math.isnan(here.value):
        return "not drawn"
    if math.isnan(here.low):
        return f"{OPEN}: no interval"
    if here.low <= nothing <= here.high:
        return f"{OPEN}: the interval holds no effect"
    if here.high < nothing:
        return DISAGREES
    if (
        stated is None
        or (at_least and here.low > stated)
        or (not at_least and here.low <= stated <= here.high)
    ):
        return AGREES
    if here.high < stated:
        return "agrees in direction, **smaller** here"
    return "agrees in direction, its size is open" if at_least else "agrees in direction, **larger** here"


@dataclass
class Found:
    """A lottery's folder.

    Attributes:
        table: One row a network.
        curves: One row a look.
        plan: Its settings.
        machine: Versions and machine it began on, if told.
    """

    table: pd.DataFrame
    curves: pd.DataFrame
    plan: dict[str, Any]
    machine: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Found:
        """What is in a folder."""
        if not (folder / "table.csv").exists():
            raise LosslabError(f"{folder} holds no table.csv: pass the folder of a lottery")
        plan, machine = (folder / name for name in ("plan.json", "machine.json"))
        told = json.loads(machine.read_text("utf-8")) if machine.exists() else {}
        tables = (pd.read_csv(folder / f"{name}.csv") for name in ("table", "curves"))
        return cls(*tables, json.loads(plan.read_text("utf-8")), told)

    @property
    def controlled(self) -> list[int]:
        """Levels with re-initialised networks."""
        return sorted(int(k) for k in self.table[self.table.arm == "reinit"].level.unique())

    def against(self, level: int, mine: str, other: str) -> tuple[Estimate, Estimate]:
        """Points of accuracy between two arms, and how many times as early the first one stops."""
        a, b = (comparing.arm_of(self.table, 0 if arm == "dense" else level, arm) for arm in (mine, other))
        if a.empty or b.empty:
            nothing = Estimate(math.nan, math.nan, math.nan)
            return nothing, nothing
        row = comparing.versus(a, b, "test_accuracy")
        points = Estimate(*(100 * row[name] for name in ("difference", "low", "high")))
        return points, Estimate(row["faster"], row["faster_low"], row["faster_high"])


# -- the paper's statements -----------------------------------------------------------------------------


def statements(found: Found) -> list[tuple[str, str, str, str]]:
    """Each statement whose number was read in the paper: what it says, its number, the one here, judged."""
    saved = _saved(found.against(7, "ticket", "dense")[1])
    better = found.against(9, "ticket", "dense")[0]
    above, faster = found.against(7, "ticket", "reinit")
    told = [
        (
            "tickets of 21.1 % stop earlier than the dense network, by (%)",
            "38",
            str(saved),
            judged(saved, 0, 38),
        ),
        (
            "tickets of 13.5 % are better than the dense network, by (points)",
            "more than 0.3",
            str(better),
            judged(better, 0, 0.3, at_least=True),
        ),
        (
            "tickets of 21.1 % reach their minimum faster than re-initialised networks, by a factor of",
            "2.51",
            str(faster),
            judged(faster, 1, 2.51),
        ),
        (
            "tickets of 21.1 % are more accurate than re-initialised networks, by (points)",
            "half a point",
            str(above),
            judged(above, 0, 0.5),
        ),
    ]
    if found.controlled:
        level = found.controlled[0]
        left = f"{100 * comparing.arm_of(found.table, level, 'reinit').remaining.mean():.1f} %"
        points, speed = found.against(level, "reinit", "dense")
        lost, later = _turned(points), Estimate(1 / speed.value, 1 / speed.high, 1 / speed.low)
        said = "after little pruning re-initialised networks are"
        told += [
            (f"{said} worse than the dense one (here at {left}, points)", "", str(lost), judged(lost, 0)),
            (f"{said} slower (here at {left}, factor)", "", str(later), judged(later, 1)),
        ]
    return told


def remembered(found: Found) -> list[tuple[str, str, str]]:
    """Statements told from memory, without the paper's numbers: what, what is here, judged."""
    told = []
    last = found.against(15, "ticket", "dense")[0]
    if not math.isnan(last.value):
        limit = 100 * found.plan["tolerance"]
        word = AGREES if last.low > -limit else DISAGREES if last.high < -limit else OPEN
        what = "where few weights are left (level 15) tickets are about as good as the dense network: points"
        told.append((f"{what}, at most {limit:g} may be lost", str(last), word))
    rows = found.table[(found.table.arm == "ticket") & (found.table.remaining >= 0.05)]
    if len(rows):
        least = 100 * rows.groupby("level").final_train_accuracy.mean().min()
        what = "in the end tickets of 5 % or more fit the training examples: least mean of a level, %"
        told.append((what, f"{least:.2f}", AGREES if least >= 99.95 else DISAGREES))
    return told


def _saved(faster: Estimate) -> Estimate:
    """Per cent of the other's updates that are saved by stopping so many times as early."""
    return Estimate(*(100 * (1 - 1 / v) for v in (faster.value, faster.low, faster.high)))


def _turned(estimate: Estimate) -> Estimate:
    return Estimate(-estimate.value, -estimate.high, -estimate.low)


# -- the page -------------------------------------------------------------------------------------------

PAGE = """# Lottery tickets: LeNet-300-100 on MNIST at the paper's settings

Frankle & Carbin, The Lottery Ticket Hypothesis (2019), section 2, drawn again. This page and its figures are
made by `docs/tickets.py` from the folder that the command wrote; nothing on it is typed by hand.

{command}

{settings}

## What was found

{sentences}

![Test accuracy at early stop against the share of weights left](tickets-accuracy.svg)

![Early-stop step against the share of weights left](tickets-early-stop.svg)

Lines: means over replicates, with their 95 % t intervals (for steps by the logarithm); dashed: the dense
networks, which are also the leftmost point. The view is that of the single networks.

## Level by level

{levels}

Intervals are 95 % t intervals over replicates; those of steps and of ratios are taken by the logarithm.
Differences and ratios are paired by replicate. A winning ticket loses at most {tolerance:g} points against
the dense network and beats every control, each by its interval; without a control a level stays undecided.
{shares}

## Against re-initialised networks

{controls}

## Agreements and disagreements

The rule, fixed before the numbers were looked at: a statement *agrees* where the 95 % interval lies on its
side of no effect and holds the paper's number (for "more than": lies above it), agrees *in direction* where
only the side is right, is *open* where the interval holds no effect, and *disagrees* where it lies on the
other side.

{statements}

The next statements are told from memory of the paper; their numbers here are not the paper's. The first
agrees where the interval lies above what may be lost, the second where no level's mean is below 99.95 %.

{remembered}{conv}
"""

CONV = """

## Conv-2 on CIFAR-10, reduced

{note} The paper's numbers are of the whole experiment, and stand beside nothing here.

{settings}

{sentences}

{levels}

{controls}"""


def page(found: Found, conv: Found | None = None) -> str:
    """The page."""
    settings = found.plan
    given = {n: settings[n] for n in ("replicates", "steps")}
    given |= {n: " ".join(map(str, settings[n] or ["ALL"])) for n in ("controls", "control_levels")}
    command = COMMAND.format(levels=int(found.table.level.max()), **given)
    return PAGE.format(
        command=f"```\n{command}\n```",
        settings=_settings(found),
        sentences=_bullets(comparing.sentences(found.table, settings["tolerance"])),
        levels=_levels(found, PAPER),
        tolerance=100 * settings["tolerance"],
        shares=_shares(found),
        controls=_controls(found),
        statements=_markdown(("the paper says", "there", "here", ""), statements(found)),
        remembered=_markdown(("statement", "here", ""), remembered(found)) or "No such level has been drawn.",
        conv="" if conv is None else _convolutional(conv),
    )


def _convolutional(found: Found) -> str:
    """The section on Conv-2."""
    return CONV.format(
        note=CONV_NOTE,
        settings=_bullets(
            [
                f"{found.plan['replicates']} replicates, a look at the validation loss every "
                f"{found.plan['evaluate']} updates; re-initialised networks at levels "
                f"{', '.join(map(str, found.controlled)) or '–'}",
                *_machine(found),
            ]
        ),
        sentences=_bullets(comparing.sentences(found.table, found.plan["tolerance"])),
        levels=_levels(found, {}),
        controls=_controls(found),
    )


def _settings(found: Found) -> str:
    plan, rule, scope = found.plan, found.plan["rule"], found.plan["scope"]
    output = scope["rate"] / 2 if scope["output"] is None else scope["output"]
    rates = f"{100 * scope['rate']:g} % of each layer's weights and {100 * output:g} % of the output layer's"
    told = [
        f"{plan['examples']:,} training examples, 5,000 for validation, 10,000 for testing; one mean and one "
        "deviation standardise all pixels",
        f"weights started by `{plan['init']}` (Glorot normal), biases 0; {rule['rule'].capitalize()} at "
        f"{rule['lr']:g}, batches of {plan['batch_size']}, {plan['steps']:,} updates always",
        f"{rates} go a level, smallest first; the rest is set back to its first values",
        f"a look at the validation loss every {plan['evaluate']} updates; the early stop is that with the "
        "least, found afterwards, and test accuracy is read there",
        f"{plan['replicates']} replicates; re-initialised networks, one a replicate (the paper: three), at "
        f"levels {', '.join(map(str, found.controlled)) or '–'}; all networks of a replicate see the same "
        "batches in the same order",
    ]
    return _bullets([*told, *_machine(found)])


def _machine(found: Found) -> list[str]:
    names = ("losslab", "torch", "python", "platform", "cores", "threads", "revision", "started")
    told = [f"{n} {found.machine[n]}" for n in names if found.machine.get(n)]
    return [", ".join(told)] if told else []


def _levels(found: Found, paper: dict[int, str]) -> str:
    rows = []
    told = comparing.summary(found.table)
    for row in told[told.arm.isin(["dense", "ticket"])].itertuples():
        level = int(row.level)
        points, faster = found.against(level, "ticket", "dense")
        verdict = ""
        if level:
            verdict = comparing.decide(comparing.compare(found.table, level), found.plan["tolerance"])
        accuracy = Estimate(100 * row.score, 100 * row.low, 100 * row.high)
        cells = [
            level,
            f"{row.kept:,}",
            f"{100 * row.remaining:.2f}",
            *([paper.get(level, "")] if paper else []),
            accuracy,
            _steps(row),
        ]
        rows.append((*cells, *((points, faster) if level else ("", "")), verdict))
    head = (
        "level",
        "weights",
        "P_m, %",
        *(["paper's P_m"] if paper else []),
        "test accuracy, %",
        "early stop",
    )
    return _markdown((*head, "points above dense", "times as early as dense", "verdict"), rows)


def _shares(found: Found) -> str:
    """Whether P_m is the paper's, digit by digit."""
    left = {k: comparing.arm_of(found.table, k, "ticket").remaining for k in PAPER}
    here = {k: f"{100 * r.iloc[0]:.1f}" for k, r in left.items() if len(r)}
    if not here:
        return ""
    wrong = [k for k, told in here.items() if told != PAPER[k]]
    same = f"P_m is the paper's at levels {', '.join(map(str, here))}, digit by digit."
    return f"P_m is **not** the paper's at levels {', '.join(map(str, wrong))}." if wrong else same


def _controls(found: Found) -> str:
    told, rows = comparing.summary(found.table), []
    for row in told[told.arm == "reinit"].itertuples():
        accuracy = Estimate(100 * row.score, 100 * row.low, 100 * row.high)
        points, faster = found.against(int(row.level), "ticket", "reinit")
        rows.append((row.level, f"{100 * row.remaining:.2f}", accuracy, _steps(row), points, faster))
    head = ("level", "P_m, %", "test accuracy, %", "early stop")
    return _markdown((*head, "tickets: points above", "tickets: times as early"), rows)


def _steps(row: Any) -> str:
    ends = "" if math.isnan(row.stop_low) else f" ({row.stop_low:,.0f} to {row.stop_high:,.0f})"
    return f"{row.stop:,.0f}{ends}"


def _bullets(lines: list[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _markdown(head: tuple[str, ...], rows: list[Any]) -> str:
    if not rows:
        return ""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


# -- figures --------------------------------------------------------------------------------------------

SHELL = """<body><script>{plotly}</script><script>
Plotly.toImage({figure}, {{format: "svg", width: 680, height: 400}}).then(made => {{
  document.documentElement.innerHTML = "<pre>" + made.slice(made.indexOf(",") + 1) + "</pre>";
}});
</script>"""


def write_svg(drawing: Drawing, path: Path) -> None:
    """A figure as SVG, drawn by a headless Chromium."""
    import plotly.io
    from plotly.offline import get_plotlyjs

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise LosslabError(f"figures are drawn by Chromium, and none of {', '.join(BROWSERS)} is installed")
    drawing.figure.update_layout(title=None, paper_bgcolor="white")  # legible on a dark page too
    figure = plotly.io.to_json(drawing.figure, validate=False)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "figure.html"
        place.write_text(SHELL.format(plotly=get_plotlyjs(), figure=figure), "utf-8")
        command = [browser, "--headless", "--disable-gpu", "--virtual-time-budget=20000", "--dump-dom"]
        command += ["--no-sandbox"] if os.geteuid() == 0 else []
        done = subprocess.run([*command, place.as_uri()], capture_output=True, text=True, timeout=300)
    inside = done.stdout.partition("<pre>")[2].partition("</pre>")[0]
    picture = urllib.parse.unquote(inside)
    if not picture.startswith("<svg"):
        raise LosslabError(f"{browser} drew no figure ({done.stderr.strip()[-200:]}): try it by hand")
    write_atomically(path, picture.encode())


def main(arguments: list[str]) -> None:
    """Writes the page and its figures."""
    parser = argparse.ArgumentParser(description="Makes tickets.md from the folder of a lottery.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--conv", type=Path, default=None, help="the folder of the reduced Conv-2")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="where tickets.md goes")
    options = parser.parse_args(arguments)
    try:
        found = Found.read(options.folder)
        write_svg(draw_score(found.table), options.into / "tickets-accuracy.svg")
        write_svg(draw_stop(found.table), options.into / "tickets-early-stop.svg")
        conv = None if options.conv is None else Found.read(options.conv)
        write_atomically(options.into / "tickets.md", page(found, conv).encode())
    except LosslabError as error:
        sys.exit(f"docs/tickets.py: {error}")
    print(f"written: {options.into / 'tickets.md'} and two figures")


if __name__ == "__main__":
    main(sys.argv[1:])
