"""The checker that the tests put behind jaxtyping's annotations, and where."""

import beartype
import jaxtyping

# An int is a float, as PEP 484 and every type checker have it.
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))

_jaxtyped = jaxtyping.jaxtyped


def jaxtyped_in_public(*, typechecker):
    """Decorate what has a name in its module; private functions, and those made anew at every call of another, stay as they are.

    A checker is compiled when a function is defined: for closures that is at every call of what is around them, a third of the tests' time.
    """
    decorate = _jaxtyped(typechecker=typechecker)

    def public(fn):
        name = getattr(fn, "__qualname__", "")
        private = any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
        return fn if "<locals>" in name or private else decorate(fn)

    return public
