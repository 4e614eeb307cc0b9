import functools

import pytest

from paperjax.binding import argument_names, call_by_name, nearest


def test_required_and_optional_names_in_the_order_of_the_signature():
    def fn(b, a, *args, d=1, c, **kwargs):
        return a, b, c, d

    assert argument_names(fn) == (("b", "a", "c"), ("d",))


def test_what_a_partial_binds_counts_as_given():
    def fn(width, depth, bias):
        return width, depth, bias

    required, optional = argument_names(functools.partial(fn, bias=True))
    assert required == ("width", "depth")
    assert optional == ("bias",)
    assert call_by_name(functools.partial(fn, bias=True), {"width": 3, "depth": 2, "lr": 0.1}, "family") == (3, 2, True)
    assert call_by_name(functools.partial(fn, bias=True), {"width": 3, "depth": 2, "bias": False}, "family") == (3, 2, False)


def test_bound_methods_and_callable_objects():
    class Thing:
        def __call__(self, width):
            return width

        def method(self, lr, seed=0):
            return lr, seed

    assert argument_names(Thing()) == (("width",), ())
    assert argument_names(Thing().method) == (("lr",), ("seed",))
    assert call_by_name(Thing().method, {"lr": 1, "width": 2}, "it") == (1, 0)


def test_only_the_named_arguments_are_given():
    assert call_by_name(lambda: 7, {"lr": 1}, "it") == 7
    assert call_by_name(lambda **kwargs: kwargs, {"lr": 1}, "it") == {}
    assert call_by_name(lambda lr, *, width=5: (lr, width), {"lr": 1}, "it") == (1, 5)


def test_a_missing_name_says_what_there_is():
    with pytest.raises(TypeError, match=r"the family needs 'widht'.*It can be given: lr, width\."):
        call_by_name(lambda widht, lr: None, {"width": 2, "lr": 1}, "the family")


def test_a_type_error_inside_the_function_is_not_swallowed():
    def broken(width):
        raise TypeError("its own")

    with pytest.raises(TypeError, match=r"^its own$"):
        call_by_name(broken, {"width": 1}, "family")


@pytest.mark.parametrize(("name", "meant"), [("widht", "'width'"), ("dpeth", "'depth'"), ("adma", "'adam'")])
def test_nearest_names_what_was_meant(name, meant):
    assert f"Did you mean {meant}" in nearest(name, ["width", "depth", "adam"])


def test_nearest_does_not_guess_when_nothing_is_near():
    assert nearest("zzz", ["width", "depth"]) == "Known: depth, width."


def test_a_class_that_its_metaclass_calls_with_anything_takes_what_its_init_does():
    """Flax nnx."""

    class Meta(type):
        def __call__(cls, *args, **kwargs):
            return super().__call__(*args, **kwargs)

    class Net(metaclass=Meta):
        def __init__(self, width, depth=2, *, rngs):
            self.sizes = width, depth

    assert argument_names(Net) == (("width", "rngs"), ("depth",))
