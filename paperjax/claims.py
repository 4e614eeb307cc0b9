"""What a paper says, as something that can fail: claims with a prediction, a measurement, a tolerance and a control.

One rule decides. The accepted range is ``[p - tol, p + tol]`` for ``==``, ``[p - tol, inf)`` for ``>=`` and
``(-inf, p + tol]`` for ``<=``; the measurement is its 95 % interval ``m ± t s.e.`` over seeds (Student's t). The claim *holds*
if the interval lies inside the range, *fails* if it lies outside, is *unresolved* if it straddles an edge, and *unmeasured* if it is NaN.
A claim is verified if it holds **and** the same check fails on its control, the deliberately wrong setting.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from paperjax.binding import nearest
from paperjax.estimates import Estimate, estimate, fit_slope

if TYPE_CHECKING:
    import xarray
    from matplotlib.figure import Figure

    from paperjax.experiment import Experiment

__all__ = ["SIZES", "TIERS", "Claim", "Control", "Estimate", "Paper", "Verdict", "decide", "estimate", "fit_slope", "judge"]

Relation = Literal["==", ">=", "<="]
Outcome = Literal["holds", "fails", "unresolved", "unmeasured"]
Status = Literal["verified", "failed", "unresolved", "unmeasured", "vacuous", "control undecided"]
Size = Literal["quick", "full"]

SIZES: tuple[Size, ...] = ("quick", "full")
# T: theory that can be measured here; M: a method; A: an architecture; X: a stand-in for what needs other data or machines.
TIERS = ("T", "M", "A", "X")


@dataclass(frozen=True)
class Control:
    """The setting under which the check must fail: where it reads the result ``"digits"`` it is handed ``"shuffled"``.

    Attributes
    ----------
    says
        What is wrong on purpose, and why the claim must break.
    replace
        From names of results that the measurement reads, to names of results that it is given instead.

    Examples
    --------
    >>> Control("labels are shuffled, so there is nothing to learn", {"digits": "shuffled"}).replace["digits"]
    'shuffled'
    """

    says: str
    replace: Mapping[str, str]

    def __post_init__(self):
        if not self.says.strip():
            raise ValueError("Control: says is empty; write what is wrong on purpose.")
        if not self.replace:
            raise ValueError(f"Control {self.says!r}: replace is empty, so it would check the same results again.")
        for name, other in self.replace.items():
            if name == other:
                raise ValueError(f"Control {self.says!r}: replaces {name!r} by itself.")


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper with what it predicts, how that is measured, and the control that must break it.

    Attributes
    ----------
    says
        The sentence, short enough for a table.
    source
        Where the paper says it: ``"Theorem 1"``, ``"eq. 5"``, ``"Fig. 3"``.
    predicted
        The number from the paper's formula, or a function of the results that computes it from their coordinates. For the
        control the prediction stays that of the true setting.
    measured
        From the results by name to an `Estimate`.
    tolerance
        How far off still counts as agreement; not the statistical error, which is added by the rule.
    why
        Why that tolerance: finite width, order of the next term, discretization.
    control
        See `Control`.
    relation
        ``"=="``, ``">="`` (measured at least predicted) or ``"<="``.
    sizes
        The sizes of a run at which the claim is checked; a claim about the paper's own data may need ``("full",)``.

    Raises
    ------
    ValueError
        If a text is empty, a number is not finite, the tolerance is negative or the relation unknown.

    Examples
    --------
    >>> claim = Claim("the loss doubles", "eq. 1", 2.0, lambda r: Estimate(float(r["true"].x), 0.0), 0.1, "exact up to rounding",
    ...               Control("does not double", {"true": "wrong"}))
    >>> import xarray
    >>> judge(claim, dict(true=xarray.Dataset(dict(x=2.05)), wrong=xarray.Dataset(dict(x=1.0)))).status
    'verified'
    """

    says: str
    source: str
    predicted: float | Callable[[Mapping[str, "xarray.Dataset"]], Any]
    measured: Callable[[Mapping[str, "xarray.Dataset"]], Estimate]
    tolerance: float
    why: str
    control: Control
    relation: Relation = "=="
    sizes: Sequence[Size] = SIZES

    def __post_init__(self):
        if not self.sizes or not set(self.sizes) <= set(SIZES):
            raise ValueError(f"Claim {self.says!r}: sizes is {self.sizes!r}; it must name some of {', '.join(SIZES)}.")
        for field in ("says", "source", "why"):
            if not getattr(self, field).strip():
                raise ValueError(f"Claim {self.says!r}: {field} is empty.")
        if not callable(self.predicted) and not math.isfinite(self.predicted):
            raise ValueError(f"Claim {self.says!r}: predicted is {self.predicted}; a prediction is a finite number.")
        if not (math.isfinite(self.tolerance) and self.tolerance >= 0):
            raise ValueError(f"Claim {self.says!r}: tolerance is {self.tolerance}; it must be finite and not negative.")
        if self.relation not in ("==", ">=", "<="):
            raise ValueError(f"Claim {self.says!r}: relation {self.relation!r} is none of ==, >=, <=.")
        if not callable(self.measured):
            raise TypeError(f"Claim {self.says!r}: measured must be a function of the results, not {self.measured!r}.")


class Verdict(NamedTuple):
    """A judged `Claim`: its numbers, their outcome, and those of its control."""

    says: str
    source: str
    relation: Relation
    predicted: float
    tolerance: float
    why: str
    measured: Estimate
    outcome: Outcome
    control_says: str
    control_measured: Estimate
    control_outcome: Outcome

    @property
    def status(self) -> Status:
        """``"verified"`` iff the claim holds and its control fails; otherwise what is wrong."""
        if self.outcome != "holds":
            return "failed" if self.outcome == "fails" else self.outcome
        if self.control_outcome == "fails":
            return "verified"
        return "vacuous" if self.control_outcome == "holds" else "control undecided"

    @property
    def verified(self) -> bool:
        """Whether the status is ``"verified"``."""
        return self.status == "verified"


def decide(measured: Estimate, predicted: float, tolerance: float, relation: Relation = "==") -> Outcome:
    """Whether a measurement agrees with a prediction, by the rule at the top of this module.

    Parameters
    ----------
    measured
        May be infinite; NaN is ``"unmeasured"``.
    predicted, tolerance, relation
        As in `Claim`.

    Raises
    ------
    ValueError
        If the standard error is negative.

    Examples
    --------
    >>> decide(Estimate(1.0, 0.1), 1.1, 0.5), decide(Estimate(1.0, 0.1), 1.1, 0.2), decide(Estimate(1.0, 0.1), 2.0, 0.5)
    ('holds', 'unresolved', 'fails')
    """
    if math.isnan(measured.value) or math.isnan(measured.stderr):
        return "unmeasured"
    if measured.stderr < 0:
        raise ValueError(f"the standard error {measured.stderr} is negative.")
    lowest = -math.inf if relation == "<=" else predicted - tolerance
    highest = math.inf if relation == ">=" else predicted + tolerance
    low, high = measured.interval
    if lowest <= low and high <= highest:
        return "holds"
    return "fails" if high < lowest or low > highest else "unresolved"


class _Reader(Mapping[str, Any]):
    """Results by name, some handed out in place of others, that remember which were asked for."""

    def __init__(self, results: Mapping[str, Any], replace: Mapping[str, str], claim: str):
        self.results, self.replace, self.claim, self.read = results, replace, claim, set()

    def __getitem__(self, name: str) -> Any:
        if name not in self.results:
            raise ValueError(f"claim {self.claim!r} reads the result {name!r}, which there is not. {nearest(str(name), self.results)}")
        self.read.add(name)
        return self.results[self.replace.get(name, name)]

    def __contains__(self, name: object) -> bool:
        return name in self.results

    def __iter__(self) -> Iterator[str]:
        return iter(self.results)

    def __len__(self) -> int:
        return len(self.results)


def judge(claim: Claim, results: Mapping[str, "xarray.Dataset"]) -> Verdict:
    """Measure a claim and its control, and decide both with one prediction and one tolerance.

    Raises
    ------
    ValueError
        If a result is missing, the prediction is not finite, or the measurement never reads what the control replaces.
    TypeError
        If the measurement is not an `Estimate`.

    Examples
    --------
    >>> import xarray
    >>> results = dict(mup=xarray.Dataset(dict(slope=("seed", [-1.01, -0.99]))), sp=xarray.Dataset(dict(slope=("seed", [-0.51, -0.49]))))
    >>> control = Control("another parametrization", {"mup": "sp"})
    >>> claim = Claim("the slope is -1", "eq. 2", -1.0, lambda results: estimate(results["mup"].slope), 0.2, "finite width", control)
    >>> verdict = judge(claim, results)
    >>> verdict.outcome, verdict.control_outcome, verdict.status
    ('holds', 'fails', 'verified')
    >>> judge(claim, {**results, "sp": results["mup"]}).status
    'vacuous'
    """
    for name in (*claim.control.replace.keys(), *claim.control.replace.values()):
        if name not in results:
            raise ValueError(f"the control of claim {claim.says!r} names the result {name!r}, which there is not. {nearest(name, results)}")
    true = _Reader(results, {}, claim.says)
    formula = claim.predicted
    predicted = float(_call(claim, "predicted", formula, _Reader(results, {}, claim.says)) if callable(formula) else formula)
    if not math.isfinite(predicted):
        raise ValueError(f"claim {claim.says!r} predicts {predicted}; a prediction is a finite number.")
    measured = _measure(claim, true)
    unread = [name for name in claim.control.replace if name not in true.read]
    if unread:
        raise ValueError(
            f"the control of claim {claim.says!r} replaces {unread[0]!r}, which the measurement does not read (it reads "
            f"{', '.join(sorted(true.read)) or 'nothing'}), so the control would be the claim itself."
        )
    control = _measure(claim, _Reader(results, claim.control.replace, claim.says))
    tolerance = float(claim.tolerance)
    return Verdict(
        claim.says, claim.source, claim.relation, predicted, tolerance, claim.why,
        measured, decide(measured, predicted, tolerance, claim.relation),
        claim.control.says, control, decide(control, predicted, tolerance, claim.relation),
    )  # fmt: skip


def _call(claim: Claim, field: str, fn: Callable[[Any], Any], results: _Reader) -> Any:
    try:
        return fn(results)
    except (LookupError, AttributeError, ArithmeticError) as error:
        raise ValueError(
            f"claim {claim.says!r}: {field} does not fit the results ({type(error).__name__}: {error}). If axes or steps were overruled, "
            "the claim may not apply to them; otherwise a measure or an axis that it reads is not there."
        ) from error


def _measure(claim: Claim, results: _Reader) -> Estimate:
    found = _call(claim, "measured", claim.measured, results)
    if not isinstance(found, Estimate):
        raise TypeError(
            f"claim {claim.says!r}: measured returned {type(found).__name__}, not an Estimate. Use estimate(samples over seeds)."
        )
    return Estimate(float(found.value), float(found.stderr), int(found.samples))


@dataclass(frozen=True, kw_only=True)
class Paper:
    """A paper as something that runs; a file in ``paperjax/papers/<area>/`` defines one as ``PAPER``.

    Attributes
    ----------
    slug
        Its name on the command line: lower case with hyphens; the file has underscores.
    title, authors, year, arxiv
        As published; `arxiv` is an id such as ``"1804.08838"``, or empty if there is none.
    area
        The folder's name, with hyphens.
    tier
        ``"T"``, ``"M"``, ``"A"`` or ``"X"``: a theory to be measured, a method, an architecture, a stand-in.
    claims
        At least one `Claim` for each size.
    experiments
        From a size, ``"quick"`` or ``"full"``, to the Experiments by name, controls among them.
    figure
        From the results by name and the verdicts to the paper's figure.
    run_time
        What each size takes and on what: ``dict(quick="40 s on two CPU cores", full="20 min on a GPU")``.
    data
        What it is trained on, and how that differs from the paper's.

    Raises
    ------
    ValueError
        Naming the field that does not fit.

    Examples
    --------
    >>> from paperjax.finder import load
    >>> paper = load("intrinsic-dimension")
    >>> paper.area, paper.year, paper.arxiv
    ('landscape', 2018, '1804.08838')
    """

    slug: str
    title: str
    authors: str
    year: int
    arxiv: str
    area: str
    tier: Literal["T", "M", "A", "X"]
    claims: Sequence[Claim]
    experiments: Callable[[Size], Mapping[str, "Experiment"]]
    figure: "Callable[[Mapping[str, xarray.Dataset], Sequence[Verdict]], Figure]"
    run_time: Mapping[str, str]
    data: str = ""

    def __post_init__(self):
        for field in ("slug", "area"):
            if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", getattr(self, field)):
                raise ValueError(f"Paper {self.slug!r}: {field} is {getattr(self, field)!r}; write lower-case words with hyphens between.")
        for field in ("title", "authors"):
            if not getattr(self, field).strip():
                raise ValueError(f"Paper {self.slug!r}: {field} is empty.")
        if not re.fullmatch(r"(\d{4}\.\d{4,5}|[a-z.-]+/\d{7})?", self.arxiv):
            raise ValueError(
                f"Paper {self.slug!r}: arxiv is {self.arxiv!r}, not an id such as '1804.08838' (leave it empty if there is none)."
            )
        if self.tier not in TIERS:
            raise ValueError(f"Paper {self.slug!r}: tier is {self.tier!r}, none of {', '.join(TIERS)}.")
        for size in SIZES:
            if not self.claims_at(size):
                raise ValueError(f"Paper {self.slug!r}: no claims at size {size!r}; a paper has at least one at each.")
        if set(self.run_time) != set(SIZES):
            raise ValueError(f"Paper {self.slug!r}: run_time has {sorted(self.run_time)}; it needs {', '.join(SIZES)}.")
        said = [claim.says for claim in self.claims]
        if len(set(said)) < len(said):
            raise ValueError(f"Paper {self.slug!r}: two claims say the same; tell them apart.")

    def claims_at(self, size: Size) -> tuple[Claim, ...]:
        """The claims that are checked at a size, in order."""
        return tuple(claim for claim in self.claims if size in claim.sizes)

    def plan(self, size: Size) -> dict[str, "Experiment"]:
        """The Experiments of a size by name, once it is sure that every control finds its results.

        Raises
        ------
        ValueError
            If there are none, a name cannot be used in a file, or a control names none of them.
        """
        if size not in SIZES:
            raise ValueError(f"size {size!r} is none of {', '.join(SIZES)}.")
        found = dict(self.experiments(size))
        if not found:
            raise ValueError(f"Paper {self.slug!r} has no experiments at size {size!r}.")
        for name in found:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise ValueError(f"Paper {self.slug!r}: an experiment is called {name!r}; use letters, digits, '_', '-' and '.'.")
        for claim in self.claims_at(size):
            for name in (*claim.control.replace.keys(), *claim.control.replace.values()):
                if name not in found:
                    raise ValueError(
                        f"Paper {self.slug!r}: the control of {claim.says!r} names {name!r}, which is no experiment. {nearest(name, found)}"
                    )
        return found
