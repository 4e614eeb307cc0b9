"""The checker that the tests put behind jaxtyping's annotations."""

import beartype

# An int is a float, as PEP 484 and every type checker have it.
checked = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
