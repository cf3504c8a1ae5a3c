"""The commands and their options, as types: the parser and the help are made from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Execution = Literal["auto", "stacked", "loop"]


@dataclass(frozen=True)
class _OnTask:
    task: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK")]
    """FILE.py:NAME of a Task (or of a function that returns one), or digits, mnist, cifar10, ..."""


@dataclass(frozen=True)
class Lecture:
    """Run the lecture's claims and write report.html, claims.json and tables/."""

    profile: str = "quick"
    """quick (minutes), full (all replicates) or paper (the papers' own settings)."""
    section: tuple[str, ...] = ()
    """Only these sections: 6.3 includes 6.3.1, 6.3.2, ..."""
    claim: tuple[str, ...] = ()
    """Only these claims: C16 C31."""
    seeds: int | None = None
    """Replicates, where an experiment has seeds."""
    data: Path | None = None
    """Folder with mnist/ and cifar10/, for the experiments that use them."""
    out: Path = Path("losslab-report")
    """Where the report goes."""
    resume: bool = False
    """Keep the claims that are finished in the output folder and run the rest."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.lecture import lecture

        lecture(self)


@dataclass(frozen=True)
class Train(_OnTask):
    """Train a population on a task of yours and print what came of each member."""

    rule: str = "adam"
    """Update rule; `losslab rules` lists them. torch.NAME takes a torch.optim class."""
    lr: tuple[float, ...] = ()
    """Learning rates; each is trained with every seed."""
    hyper: tuple[str, ...] = ()
    """Other options of the rule, NAME=VALUE or NAME=VALUE,VALUE,...: beta1=0.9,0.99 variant=lecture."""
    seeds: int = 1
    """Members for each combination of values, with seeds 0, 1, ..."""
    epochs: float | None = None
    """Passes over the training data (1 if steps are not given either)."""
    steps: int | None = None
    """Updates, instead of epochs."""
    batch_size: int | None = None
    """Examples a batch: 32 by default, all of them for gd and newton."""
    shared_batches: bool = False
    """One data order for all members."""
    replacement: bool = False
    """Draw every batch anew, with replacement."""
    drop_last: bool = False
    """Leave out an epoch's last, smaller batch."""
    dtype: str = "float32"
    """float32, float64 or bfloat16."""
    device: str = "cpu"
    """Where to train."""
    execution: Execution = "auto"
    """auto picks the fastest; stacked insists on one program; loop trains one by one."""
    memory: float | None = None
    """Gigabytes to stay within."""
    patience: int | None = None
    """Stop a member after so many evaluations without a better validation (or else test) loss."""
    data: Path | None = None
    """Folder with mnist/ and cifar10/."""
    out: Path | None = None
    """Folder for checkpoints, history and the trained weights."""
    resume: bool = False
    """Go on with the run in the output folder, bit for bit."""
    checkpoint_every: float = 30.0
    """Seconds between checkpoints."""
    threads: int | None = None
    """CPU threads; all cores by default."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.train import train

        train(self)


@dataclass(frozen=True)
class Signals(_OnTask):
    """Look at what flows through a task's networks, forward and backward, and at what needs attention."""

    steps: int = 0
    """Updates before the look; 0 looks at the networks as they start."""
    rule: str = "sgd"
    """Update rule; `losslab rules` lists them."""
    lr: float | None = None
    """Learning rate; the rule's own by default."""
    batch_size: int | None = None
    """Examples a batch of training."""
    seeds: int = 1
    """Networks, with seeds 0, 1, ..."""
    init: str | None = None
    """Initial weights: lecun, xavier, xavier_uniform, he, standard or orthogonal (:GAIN), gaussian:STD."""
    examples: int = 256
    """Training examples looked at."""
    layers: tuple[str, ...] = ()
    """Only these layers."""
    eval_mode: bool = False
    """Look in evaluation mode (running statistics, no dropout)."""
    dtype: str = "float32"
    """float32, float64 or bfloat16."""
    data: Path | None = None
    """Folder with mnist/ and cifar10/."""
    out: Path | None = None
    """A page to write: figures, sentences, the table."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.signals import signals

        signals(self)


@dataclass(frozen=True)
class Smoothness(_OnTask):
    """Probe the loss along its gradient while a task trains: how far the slope can be trusted."""

    compare: Literal["none", "batchnorm"] = "none"
    """batchnorm probes a second network beside it: with batch norm, or without where the task's has it."""
    steps: int = 200
    """Updates."""
    every: int = 20
    """Updates between two probes; the first is before training."""
    rule: str = "sgd"
    """Update rule; `losslab rules` lists them."""
    lr: float | None = None
    """Learning rate of every network; the rule's own by default."""
    batch_size: int | None = None
    """Examples a batch of training."""
    seeds: int = 3
    """Networks, with seeds 0, 1, ..."""
    examples: int = 128
    """Training examples of a probe, the same for all."""
    raw: float = 0.4
    """Longest raw step, in units of the gradient."""
    relative: float = 0.02
    """Longest relative step, in units of the weights' length."""
    data: Path | None = None
    """Folder with mnist/ and cifar10/."""
    out: Path | None = None
    """A page to write: figures, sentences, the table."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.smoothness import smoothness

        smoothness(self)


@dataclass(frozen=True)
class Curvature(_OnTask):
    """Measure how the loss bends at a point: eigenvalues, density, layers, the largest stable rate."""

    run_folder: Annotated[Path | None, tyro.conf.arg(name="run", help_behavior_hint="")] = None
    """Folder of a run saved by `losslab train --out`; without it, a network as it starts."""
    member: int = 0
    """Which network of the run; without a run, its seed."""
    k: int | None = None
    """Largest eigenvalues: 10 by default, or all where there are fewer."""
    matrix: Literal["hessian", "gauss-newton", "fisher"] = "hessian"
    """Which matrix."""
    density: bool = False
    """Also the density of the whole spectrum."""
    layers: bool = False
    """Also each layer's own block."""
    lr: float | None = None
    """Learning rate to compare with the stability limit; the run's own by default."""
    tol: float = 1e-3
    """Residual wanted, relative to the largest eigenvalue."""
    examples: int | None = None
    """Only the first training examples."""
    batch_norm: Literal["batch", "running", "re-estimate"] = "batch"
    """Statistics that batch norm uses: the batch's, the running ones, or re-estimated ones."""
    dtype: str = "float32"
    """float32, float64 or bfloat16."""
    data: Path | None = None
    """Folder with mnist/ and cifar10/."""
    out: Path | None = None
    """A page to write: figures, sentences, tables."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.curvature import curvature

        curvature(self)


@dataclass(frozen=True)
class Landscape(_OnTask):
    """Measure loss and error on a line or a plane of weight space, through a run's networks or around one."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of a run saved by `losslab train --out`."""
    members: tuple[int, ...] = ()
    """Two members for a line, three for a plane, one for random directions; by default the best three."""
    random: int | None = None
    """So many random directions around one member instead."""
    normalise: Literal["filter", "layer", "global", "unit"] = "filter"
    """How long random directions are: as the weights' filters, layers or all of them, or one."""
    seed: int = 0
    """Of the random directions."""
    points: int = 51
    """Points along each axis."""
    margin: float = 0.25
    """How far beyond the networks, as a share of their distance."""
    batch_norm: Literal["re-estimate", "running", "batch"] = "re-estimate"
    """Statistics that batch norm uses: re-estimated at each point, the running ones, or the batch's."""
    data: Path | None = None
    """Folder with mnist/ and cifar10/."""
    out: Path | None = None
    """A page to write: figures, sentences, tables. Unfinished work is kept beside it."""
    resume: bool = False
    """Go on with the unfinished work beside the page."""
    checkpoint_every: float = 30.0
    """Seconds between two writes of unfinished work."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.paths import landscape

        landscape(self)


@dataclass(frozen=True)
class Connect(_OnTask):
    """Find paths of low loss between the networks of a run, and compare them with straight ones."""

    run_folder: Annotated[Path, tyro.conf.arg(name="run")]
    """Folder of a run saved by `losslab train --out`."""
    members: tuple[int, ...] = ()
    """Which networks, each with each; by default the best four."""
    method: Literal["polychain", "bezier", "autoneb", "dss", "linear"] = "polychain"
    """Trained chains or Bezier curves, elastic bands that grow, strings below a level, or straight lines."""
    align: bool = False
    """Also the same between networks whose units have been put in the order of the first one's."""
    bends: int = 1
    """Bends of a chain or a Bezier curve."""
    plane: int = 31
    """Points a side of the plane, on the page, through two networks and the bend between them; 0 for none."""
    level: float | None = None
    """Loss that a string must stay below; by default 1.1 times the higher end's plus 0.01."""
    steps: int | None = None
    """Updates; each method has its own by default."""
    lr: float | None = None
    """Learning rate; each method has its own by default."""
    batch_size: int | None = 128
    """Examples a batch."""
    seed: int = 0
    """Of batches and draws."""
    batch_norm: Literal["re-estimate", "running", "batch"] = "re-estimate"
    """Statistics that batch norm uses: re-estimated at each point, the running ones, or the batch's."""
    data: Path | None = None
    """Folder with mnist/ and cifar10/."""
    out: Path | None = None
    """A page to write: figures, sentences, tables. Unfinished work is kept beside it."""
    resume: bool = False
    """Go on with the unfinished work beside the page."""
    checkpoint_every: float = 30.0
    """Seconds between two writes of unfinished work."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.paths import connect

        connect(self)


@dataclass(frozen=True)
class Tickets(_OnTask):
    """Draw lottery tickets: prune, go back, train again beside controls, level after level."""

    levels: int = 5
    """Rounds of pruning."""
    rate: float = 0.2
    """Share of the living weights that goes each round."""
    output_rate: float | None = None
    """That of the output layer; half of --rate by default."""
    conv_rate: float | None = None
    """That of convolutions; --rate by default."""
    scope: Literal["layer", "global", "units"] = "layer"
    """Rank weights within each layer or over all of them, or take whole units."""
    criterion: str = "magnitude"
    """magnitude, movement, distance, random, snip, grasp or synflow."""
    one_shot: bool = False
    """Prune each level's share at once, by the dense network's scores."""
    rewind: str = "init"
    """init, a number of steps, learning-rate, fine-tune or continue."""
    replicates: int = 3
    """Independent networks, with seeds 0, 1, ..."""
    controls: tuple[str, ...] = ("reinit", "random")
    """Of reinit, random, shuffled, signs, dense."""
    control_levels: tuple[int, ...] = ()
    """Levels with controls; all by default."""
    init: str | None = None
    """Initial weights: xavier, xavier_uniform, he, lecun or orthogonal."""
    rule: str = "adam"
    """Update rule; `losslab rules` lists them."""
    lr: float = 1.2e-3
    """Learning rate."""
    steps: int = 1000
    """Updates of each training."""
    batch_size: int = 60
    """Examples a batch."""
    evaluate: int = 100
    """Updates between two looks at the validation loss."""
    instability: tuple[int, ...] = ()
    """Instead of a lottery: runs part at these steps, and the barrier between each two is measured."""
    ticket: int | None = None
    """With --instability: of this level's tickets of the lottery in --out, instead of new networks."""
    execution: Literal["auto", "stacked", "loop"] = "auto"
    """auto trains as one program where the network allows it; stacked insists; loop trains one by one."""
    data: Path | None = None
    """Folder with mnist/ and cifar10/."""
    out: Path | None = None
    """Folder for the tables, a file a level, and the page tickets.html."""
    resume: bool = False
    """Go on with the lottery in the output folder, bit for bit; more --levels may be asked for."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.tickets import tickets

        tickets(self)


@dataclass(frozen=True)
class Rules:
    """List the update rules, or show one rule's page."""

    name: Annotated[
        str | None, tyro.conf.Positional, tyro.conf.arg(metavar="RULE", help_behavior_hint="")
    ] = None
    """A rule: its equation, defaults, variants, and how torch and the notes differ."""

    def run(self) -> None:
        """Runs the command."""
        from losslab.cli.rules import rules

        rules(self.name)
