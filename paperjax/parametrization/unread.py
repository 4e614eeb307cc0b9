"""What the trace sees grow with a width and no factor of a plan can bring to order 1: it is said, and left to the model."""

import warnings

from paperjax.trace.graph import CONTRACTING, Graph
from paperjax.trace.interactions import Interaction
from paperjax.trace.origins import makers
from paperjax.trace.probe import pattern_of
from paperjax.trace.program import Program

# Below this exponent it is n^-1: a mean, over a coordinate more or less.
MEAN = -0.9


def warn_of_product(program: Program, found: Interaction, base_size: int, exponent: float) -> None:
    """Warn of a product of two activations over coordinates that grow, of which the trace cannot tell how large its operands are."""
    graph = Graph(program.walk)
    made = [makers(graph, node) for node in found.operands]
    # Of an activation with itself it is a square, which a norm divides by again; given numbers (a frozen copy) do not learn.
    if len(set(found.operands)) == 1 or not all(made) or exponent < MEAN:
        return
    # A weight that is made of the data (a hypernetwork's) is what the caller has said.
    told = {site.leaf for site in program.walk.sites if site.told and site.kind in CONTRACTING}
    if any(told & set(leaves) for leaves in made):
        return
    warnings.warn(
        f"a product of two activations (equation {found.path} of apply) sums over {found.size} coordinates, {base_size} at the base, and "
        "between them and the weights stands a function, so how it grows with them could not be read. The plan leaves it as it is: if it "
        "is to stay of order 1 while both learn (attention's logits), divide it by their number in the model. A coordinate check of what "
        "follows it (pj.coord_check) shows whether it grows.",
        UserWarning,
        stacklevel=4,
    )


def warn_of_sums(program: Program) -> None:
    """Warn of sums over coordinates that grow and that no leaf weighs, where the model does not divide them by their number."""
    seen: set[tuple[str, ...]] = set()
    for found, base_size, exponent in program.sums:
        made = tuple(program.leaves[leaf].path for leaf in found.leaves)
        kind = tuple(sorted({pattern_of(path) for path in made}))
        if exponent < MEAN or kind in seen:
            continue
        seen.add(kind)
        warnings.warn(
            f"a sum (equation {found.path} of apply) of what {', '.join(made)} made runs over {found.size} coordinates, {base_size} at "
            "the base, and no leaf has their axis, so no factor of a plan brings it to order 1. Up to the next leaf the model multiplies "
            f"it by n^{exponent:.2g}, and features that learn add up, so what is to stay of order 1 wants n^-1: divide the sum by their "
            "number (a mean; the division after the sum), or weigh its terms with a leaf. A coordinate check of what follows it "
            "(pj.coord_check) shows whether it grows.",
            UserWarning,
            stacklevel=4,
        )


def warn_of_numbers(program: Program) -> None:
    """Warn of numbers that change with a width and that no leaf, product or sum has taken for its own."""
    for number in program.unclaimed:
        warnings.warn(
            f"apply multiplies an activation by a number that changes with the width ({number.op}, equation {number.path}, "
            f"{number.ratio:.4g} times that of the base), and whose it is could not be read: what it multiplies is not the result of "
            "leaves alone, or goes on without it elsewhere. The plan takes it for nobody's, so what follows changes with the width. "
            "Multiply the leaf itself, or its result before anything else is done to it: h @ (w * number) or (h @ w) * number. A "
            "coordinate check (pj.coord_check) shows what it does.",
            UserWarning,
            stacklevel=4,
        )
