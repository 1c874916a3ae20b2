"""What follows from the record, program.md, the data and the image: incumbent, noise, phase, what is due. No state."""

from __future__ import annotations

import contextlib
import zlib
from dataclasses import dataclass, field
from itertools import count, takewhile

import git
import keep_rule
import program as plan
import record
from keep_rule import geometric_mean
from project import IMAGE_MADE_OF, MEASURES, ROOT, number, read_json, write_json
from record import JUDGED, REVERTED, Record

COMPARED = "autoresearch.compared"  # in git's folder: what runs compared with, for whoever cannot ask the engine
PLANNER_EVERY = 5  # discards in a row after which the planner is due again; and at the start of a phase


@dataclass
class History:
    """The attempts, as far as they can be compared with what would run now.

    Worktrees share the record, each with its own branch: `own` filters. `counted` are the comparable candidates that
    were judged or failed: what phases count.
    """

    program: plan.Program
    image: str
    comparable: str  # hash of data, judge, image, budget and device
    branch: str
    records: list[Record]
    head: str  # the commit
    incumbent_train: str  # blob of its train.py
    # blob -> the metric of every comparable run; in the order of their first runs
    values_by_train: dict[str, list[float]] = field(default_factory=dict)

    @classmethod
    def load(cls, program: plan.Program | None = None, image: str = "") -> History:
        """image: what would run; without it (hooks, displays) what the last run here with the same settings had.

        Raises ProgramError, and with an image Refused where the data are missing or damaged.
        """
        program, branch = program or plan.read(), git.branch()
        records = record.load_all()
        if image:
            import dataset  # here, so that hooks stay fast

            comparable = dataset.comparable(program, image)
            remember(program, comparable)
        else:
            comparable = last_comparable(program, branch, records)
        head = git.object_id("HEAD")
        history = cls(program, image, comparable, branch, records, head, git.object_id(f"{head}:train.py"))
        for r in history.compared:
            history.values_by_train.setdefault(r.train, []).extend(history.values(r))
        return history

    @property
    def newest(self) -> int:
        return self.records[-1].number if self.records else 0

    @property
    def next_number(self) -> int:
        """Of the next experiment: for the one after the newest a killed run on another branch may have left a note."""
        return next(n for n in count(self.newest + 1) if not record.run_file(n, "pending").exists())

    def values(self, r: Record) -> list[float]:
        """The metric of every run, in the order they ran; [] for a failure."""
        return r.runs.get(self.program.metric, [])

    def own(self, records: list[Record]) -> list[Record]:
        return [r for r in records if r.branch in ("", self.branch)]

    @property
    def compared(self) -> list[Record]:
        return [r for r in self.records if r.comparable == self.comparable]

    @property
    def counted(self) -> list[Record]:
        return [r for r in self.compared if r.verdict in JUDGED and not r.by_hand]

    @property
    def tried_here(self) -> list[Record]:
        """Of this branch, whatever they were compared with: what `stop` counts."""
        return [r for r in self.own(self.records) if r.verdict in JUDGED and not r.by_hand]

    @property
    def incumbent(self) -> list[float]:
        """The metric of every run of HEAD's train.py; [] when nothing comparable was measured."""
        return self.values_by_train.get(self.incumbent_train, [])

    @property
    def anchor(self) -> str:
        """The blob that simplifications may not be worse than: the last incumbent that won against the one of then."""
        own = (r for r in reversed(self.compared) if r.verdict == "kept" and r.train == self.incumbent_train)
        anchor = next((r.anchor for r in own), "")
        return anchor if self.values_by_train.get(anchor) else self.incumbent_train

    @property
    def measured_on(self) -> str:
        """The device that HEAD's train.py was measured on the last time, '' where nothing tells."""
        return next((r.device for r in reversed(self.records) if r.train == self.incumbent_train and r.device), "")

    @property
    def lost(self) -> list[Record]:
        """The newest attempts of this branch, as far as all were lost to the machine; the newest first."""
        return list(takewhile(lambda r: r.verdict == "lost", reversed(self.own(self.records))))

    @property
    def sigma(self) -> float:
        """By all that ran twice; a training that was cut short says nothing of the noise of whole ones."""
        whole: dict[str, list[float]] = {}
        for r in self.compared:
            whole.setdefault(r.train, []).extend([] if r.reason else self.values(r))
        return keep_rule.pooled_sigma(whole.values())

    # Phases

    def in_phase(self, name: str) -> list[Record]:
        return [r for r in self.counted if r.phase == name]

    @property
    def phase(self) -> plan.Phase | None:
        """The first phase, in file order, whose `until` is not met; None when all are."""
        return next((phase for phase in self.program.phases if not is_over(phase, self.in_phase(phase.name))), None)

    def phase_line(self) -> str:
        phase = self.phase
        if not phase:
            return "all phases of program.md are done"
        rows, until = self.in_phase(phase.name), phase.until
        of = f" of {until.experiments}" if until.experiments else ""
        lost = discards_in_a_row(rows)
        near = f", {lost} of {until.discards} discards in a row" if until.discards and 2 * lost > until.discards else ""
        chain = f", chain {self.link} of at most {phase.patience}" if self.link else ""
        place = f"{self.program.phases.index(phase) + 1} of {len(self.program.phases)}"
        return f"{place} ({phase.name}), {len(rows)}{of} experiments{near}{chain}"

    @property
    def link(self) -> int:
        """How many losers in a row train.py is built on, in a phase with `patience`; 0 outside a chain."""
        here = self.own([r for r in self.compared if r.verdict in REVERTED and not r.by_hand])
        chain = here[-1].chain if here else None
        return chain.link if chain and chain.continues and chain.base == self.incumbent_train[:9] else 0

    def chain_after(self, verdict: str, sigmas: float | None = None) -> record.Chain | None:
        """The chain that an attempt of the current phase extends or opens; it ends with a keep and with the phase.

        sigmas: the gain. Nothing is built on a control, or on what lost by far.
        """
        phase, link = self.phase, self.link + 1
        limit = phase.patience if phase else 0
        hopeless = verdict == "control" or (sigmas or 0) < -keep_rule.HOPELESS
        if link == 1 and (limit < 2 or hopeless):
            return None
        continues = verdict != "kept" and not hopeless and link < limit
        continues = continues and not is_over(phase, [*self.in_phase(phase.name), Record(verdict)])
        return record.Chain(link, max(link, limit), self.incumbent_train[:9], continues)

    # What is due, and what is worth knowing

    def planner_due(self) -> bool:
        """At the start of a phase, and after every five discards in a row."""
        rows = self.own(self.in_phase(self.phase.name)) if self.phase else []
        lost = bool(rows) and rows[-1].verdict in ("discarded", "failed")
        stuck = lost and discards_in_a_row(rows) % PLANNER_EVERY == 0
        return self.phase is not None and (not rows or stuck)

    def incumbent_due(self, simplify: bool = False) -> bool:
        """After every ten discards in a row the incumbent runs again, up to four runs: it may have been lucky.

        One that ran once does so after four, and before it is compared with a simplification.
        """
        measured = ("kept", "discarded", "remeasured", "unmeasured")
        rows = self.own([r for r in self.compared if r.verdict in measured])
        discards = discards_in_a_row([r for r in rows if r.verdict in ("kept", "discarded")])
        # once, whether it succeeded or not: one that fails now must not keep every later candidate from running
        lost, single = bool(rows) and rows[-1].verdict == "discarded", len(self.incumbent) == 1
        due = discards % keep_rule.REMEASURE_AFTER == 0 or single and discards == keep_rule.REMEASURE_SINGLE_AFTER
        return single and simplify or lost and due and len(self.incumbent) < keep_rule.MAX_INCUMBENT_RUNS

    def best_line(self) -> str:
        if not self.incumbent:
            return "not measured yet"
        now, best = geometric_mean(self.incumbent), with_error(self.incumbent, self.sigma)
        baseline = next((self.values(r) for r in self.compared if r.verdict == "baseline"), self.incumbent)
        first = geometric_mean(baseline)
        change = f"{(now / first - 1) * 100:+.1f} % since the baseline {number(first)}"
        return f"{best} ({change}; noise {self.sigma * 100:.1f} % a run)"

    def better_elsewhere(self) -> str:
        """A line on the best of another branch, if it beats the incumbent; '' if none does."""
        means = {train: geometric_mean(values) for train, values in self.values_by_train.items() if values}
        kept = [r for r in self.compared if r.verdict == "kept" and r.branch not in ("", self.branch)]
        best = min((r for r in kept if r.train in means), key=lambda r: means[r.train], default=None)
        if not best or not self.incumbent or means[best.train] >= means[self.incumbent_train]:
            return ""
        where = f"experiment {best.number} on branch {best.branch} has {number(means[best.train])}"
        return f"{where}; a person takes it over with ./run.sh keep {best.number}"


def is_over(phase: plan.Phase, rows: list[Record]) -> bool:
    """Whether one of the phase's limits is met by what it tried."""
    limits = ((phase.until.experiments, len(rows)), (phase.until.discards, discards_in_a_row(rows)))
    return any(limit is not None and reached >= limit for limit, reached in limits)


def discards_in_a_row(records: list[Record]) -> int:
    """Counted from the newest; a failure counts, a control never does, a keep ends it."""
    since = takewhile(lambda r: r.verdict != "kept", reversed(records))
    return sum(r.verdict == "discarded" or not r.is_a(record.CONTROL) for r in since)


def with_error(values: list[float], sigma: float) -> str:
    """Their mean and its standard error."""
    mean = geometric_mean(values)
    digits = 1 if mean >= 10 else 2  # as project.number has it
    return f"{mean:.{digits}f} ± {mean * sigma / len(values) ** 0.5:.{digits}f}"


# What is comparable, for hooks and displays


def settings(program: plan.Program) -> str:
    """What decides what is comparable and can be read at once: all but the device."""
    content = read_json(git.data_folder(program.data) / "info.json", {}).get("hash")
    files = (*MEASURES, *(f"image/{f}" for f in IMAGE_MADE_OF))
    code = zlib.crc32(b"".join((ROOT / "container" / f).read_bytes() for f in files))
    return f"{program.data} {content} {program.budget} {' '.join(program.launch)} {code}"


def remember(program: plan.Program, comparable: str) -> None:
    file = git.folder() / COMPARED
    known = read_json(file, {})
    new = {**known, settings(program): comparable}
    if new != known:
        with contextlib.suppress(OSError):  # a full disk: then hooks go by what they know
            write_json(file, new)


def last_comparable(program: plan.Program, branch: str, records: list[Record]) -> str:
    """What the last run with these settings had; with new ones nothing is comparable, as a run will find."""
    if known := read_json(git.folder() / COMPARED, {}):
        return str(known.get(settings(program), "new"))
    compared = [r for r in records if r.comparable]  # nothing ran in this clone yet
    own = [r for r in compared if r.branch in ("", branch)]
    return (own or compared)[-1].comparable if compared else ""
