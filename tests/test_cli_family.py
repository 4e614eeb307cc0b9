"""`paperjax plan` for a user's own file."""

import json
import re

import pytest

from paperjax.cli import main
from paperjax.parametrization import Plan

FILE = """
import flax.linen as nn
import jax.numpy as jnp
import paperjax as pj


class Net(nn.Module):
    width: int
    depth: int

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width)(x)
        for _ in range(self.depth):
            h = h + nn.Dense(self.width)(nn.relu(h))
        return nn.Dense(3)(h)


class Heads(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        assert self.width % 4 == 0
        return nn.Dense(3)(nn.Dense(self.width)(x))


family = pj.family(lambda width, depth: Net(width, depth), x=jnp.ones((2, 5)))
bare = lambda width: pj.models.mlp(width, 2, 3)
base = dict(width=8, depth=1)
halving = pj.family(lambda width: Heads(width), x=jnp.ones((2, 5)))
halved = pj.abc("halved", a=(0, 0, 0), b=(0, 0.5, 1), c_sgd=(-1, 0, 1), c_adam=(0, 0.5, 0.5))
"""


@pytest.fixture(name="file")
def _file(tmp_path):
    path = tmp_path / "nets.py"
    path.write_text(FILE)
    return path


def test_the_plan_is_printed_and_written(file, tmp_path, capsys):
    out = tmp_path / "plan.json"
    line = ["plan", f"{file}:family", "--target", "width=32", "depth=4", "--parametrization", "depth-mup", "--json", str(out)]
    assert main(line) == 0
    shown = capsys.readouterr().out
    assert "Depth-muP" in shown
    assert all(role in shown for role in ("input", "hidden", "output", "vector"))
    plan = Plan.from_json(out.read_text())
    factors = {leaf.path: leaf.factors for leaf in plan.leaves}
    # Width × 4, depth × 4: Adam's hidden learning rate 1 / (4 · 2), branch multiplier 1/2; the readout's 1/4.
    assert factors["['Dense_3']['kernel']"].learning_rate == pytest.approx(1 / 8)
    assert factors["['Dense_3']['kernel']"].multiplier == pytest.approx(1 / 2)
    assert factors["['Dense_5']['kernel']"].learning_rate == pytest.approx(1 / 4)
    assert json.loads(out.read_text())["target"] == [["width", 32], ["depth", 4]]


def test_a_parametrization_of_the_file(file, capsys):
    assert main(["plan", f"{file}:family", "--target", "width=32", "depth=1", "--parametrization", "halved"]) == 0
    assert "halved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nets"], "PATH.py:NAME"),
        (["absent.py:family"], "there is no file absent.py"),
        (["{}:famly", "--target", "width=16", "depth=1"], "has no 'famly'.*'family'"),
        (["{}:family"], "no target sizes: give --target"),
        (["{}:family", "--target", "width"], "write NAME=VALUE"),
        (["{}:family", "--target", "width=big", "depth=1"], "'big' is no number"),
        (["{}:family", "--target", "width=16", "dept=1"], "'dept'.*'depth'"),
        (["{}:family", "--target", "width=4", "depth=1"], "base width = 8 is larger"),
        (["{}:family", "--target", "width=16", "depth=1", "--parametrization", "mupp"], "none of that name.*'mup'"),
        (["{}:family", "--target", "width=16", "depth=1", "--optimizer", "adamm"], "'adamm' is of no family.*'adam'"),
        (["{}:bare", "--base", "width=8", "--target", "width=16"], "no example batch"),
        (["{}:family", "--target", "width=16", "depth=1", "--json", "absent/plan.json"], "cannot be written"),
        (["{}:family", "--target", "width=16.5", "depth=1"], r"error: the family fails at width=16\.5, depth=1: TypeError: Shapes must be"),
        (["{}:halving", "--base", "width=8", "--target", "width=18"], r"fails at width=18: AssertionError: assert self\.width % 4 == 0\."),
        (["{}:halving", "--base", "width=6", "--target", "width=16"], "fails at width=6: AssertionError"),
    ],
)
def test_bad_command_lines_are_refused(file, capsys, arguments, message):
    assert main(["plan", *(text.format(file) for text in arguments)]) == 2
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "Traceback" not in said


@pytest.mark.parametrize("study", ["coord-check", "transfer"])
def test_a_study_names_the_width_that_the_family_fails_at(file, capsys, study):
    assert main([study, f"{file}:halving", "--widths", "8", "12", "18", "20"]) == 2
    assert re.search(r"the family fails at width=18: AssertionError: assert self\.width % 4 == 0", capsys.readouterr().err)


def test_a_files_batch_that_is_not_one_array_is_refused(tmp_path, capsys):
    path = tmp_path / "nets.py"
    path.write_text(FILE + "x = dict(a=jnp.ones((2, 5)))\nempty = pj.family(bare)\n")
    for name in ("bare", "empty"):
        assert main(["plan", f"{path}:{name}", "--base", "width=8", "--target", "width=16"]) == 2
        # The width of the terminal breaks lines.
        assert f"{name}: x is a dict with 'a', and must be one array" in " ".join(capsys.readouterr().err.split())


def test_no_emoji_is_made_of_the_users_text(tmp_path, capsys):
    path = tmp_path / "nets.py"
    path.write_text(FILE + 'named = pj.abc(":fire: [bold]m[/bold]", a=(0, 0, 0), b=(0, 0.5, 1), c_sgd=(-1, 0, 1), c_adam=(0, 1, 1))\n')
    assert main(["plan", f"{path}:family:", "--target", "width=16"]) == 2
    assert ":family:" in capsys.readouterr().err
    assert main(["plan", f"{path}:family", "--target", "width=16", "depth=1", "--parametrization", "named"]) == 0
    assert ":fire: [bold]m[/bold], adam rule" in capsys.readouterr().out
