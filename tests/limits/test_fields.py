"""What is known of values before anything is computed."""

import itertools

import numpy as np

from paperjax.limits import fields as fl
from paperjax.limits import nodes as nd


def values(count):
    source = nd.Det((), const=np.ones(()))
    return [nd.Field((), (leaf, (), ()), source, (lambda a: a,), 1.0, True) for leaf in range(count)]


def terms_of(node):
    return [*terms_of(node.u), node.v] if isinstance(node, nd.Add) else [node]


def test_sums_are_in_the_order_in_which_they_were_met():
    # Whatever their addresses, by which a process would round its own way.
    for order in itertools.permutations(range(4)):
        given = values(4)
        first = [given[i] for i in order]
        made = fl.total(first)
        assert terms_of(made) == first
        assert all(fl.total(list(again)) is made for again in itertools.permutations(given))


def test_multiples_are_one_field():
    u, v = values(2)
    field, one = fl.multiple({u: 2.0, v: 4.0})
    again, three = fl.multiple({v: 12.0, u: 6.0})
    assert field is again
    assert three == 3 * one
    other, _ = fl.multiple({u: 2.0, v: 5.0})
    assert other is not field
