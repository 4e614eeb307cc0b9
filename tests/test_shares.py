import pytest

from tests.shares import left_to_others

NAMES = [f"tests/limits/test_{word}.py::test_all[{n}]" for word in ("depth", "joined") for n in range(30)]


def test_shares_are_all_slow_tests_once(monkeypatch):
    monkeypatch.delenv("SLOW_SHARE", raising=False)
    monkeypatch.delenv("SLOW_ALSO", raising=False)
    assert not left_to_others(NAMES)
    kept = []
    for share in (1, 2, 3):
        monkeypatch.setenv("SLOW_SHARE", f"{share}/3")
        kept += sorted(set(NAMES) - left_to_others(NAMES))
    assert sorted(kept) == sorted(NAMES)


def test_what_was_changed_runs_in_every_share(monkeypatch):
    monkeypatch.setenv("SLOW_SHARE", "1/3")
    monkeypatch.setenv("SLOW_ALSO", "test_joined.py [tp6-depth-mup]")
    left = left_to_others(NAMES)
    assert left
    assert all("depth" in name for name in left)


@pytest.mark.parametrize("share", ["4/3", "0/3"])
def test_a_share_that_is_not_there(monkeypatch, share):
    monkeypatch.setenv("SLOW_SHARE", share)
    with pytest.raises(ValueError, match="number of a share"):
        left_to_others(NAMES)
