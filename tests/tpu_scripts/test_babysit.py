"""``babysit.py`` against a ``gcloud`` that plays out what can happen; the scripts between them are the real ones, time is not."""

from types import SimpleNamespace

import pytest

QUEUED = ["WAITING_FOR_RESOURCES"]


@pytest.fixture
def babysit(modules, config, gcloud, monkeypatch, tmp_path, capsys):
    """Runs main() with a clock that only sleeping moves; returns its status, what it printed, the kinds of calls, and the hours."""

    def run(*options, changes=None, **play):
        clock = SimpleNamespace(now=0.0)

        def sleep(seconds):
            clock.now += seconds
            assert clock.now < 1e7, "it sleeps for ever"

        time = SimpleNamespace(monotonic=lambda: clock.now, sleep=sleep, strftime=lambda *_: "now", gmtime=lambda: None)
        monkeypatch.setattr(modules.babysit, "time", time)
        monkeypatch.chdir(tmp_path)
        calls = gcloud(**play)
        status = modules.babysit.main(["--config", str(config(**(changes or {}))), *options])
        said = capsys.readouterr()
        return SimpleNamespace(
            status=status, said=said.out + said.err, calls=[kind(call) for call in calls()], lines=calls(), seconds=clock.now
        )

    return run


def kind(call):
    words = call.split()
    if words[2] == "queued-resources":
        return words[3]
    host = call.partition("host.sh ")[2].split()
    return host[0].rstrip("'") if host else words[3]


def test_a_run_survives_waiting_ssh_failures_and_preemption(babysit, tmp_path):
    done = babysit(
        lives=[
            {"queue": ["ACCEPTED", *QUEUED, "PROVISIONING"], "ssh_failures": 2, "run": ["running", "running"], "end": "SUSPENDED"},
            {"queue": QUEUED, "run": ["running", "exit 75", "running", "exit 0"]},
        ],
    )
    assert done.status == 0, done.said
    events = [call for call in done.calls if call in ("create", "setup", "start", "delete")]
    assert events == ["create", "setup", "start", "delete", "create", "setup", "start", "start", "delete"]
    for words in ("Connection refused", "is SUSPENDED", "was preempted", "asks to be started again", "all claims are verified"):
        assert words in done.said
    # The same run, from the same commit.
    starts = [call for call in done.lines if "host.sh start" in call]
    assert len(starts) == 3
    assert len(set(starts)) == 1
    assert " start run-1 " in starts[0]
    assert len({call for call in done.lines if " scp " in call and "paperjax-" in call and "--recurse" not in call}) == 1
    assert (tmp_path / "paperjax-runs" / "run-1" / "out").is_dir()


@pytest.mark.parametrize(("word", "status"), [("exit 0", 0), ("exit 1", 1), ("exit 2", 2)])
def test_the_runs_own_status_is_handed_on(babysit, word, status):
    done = babysit(lives=[{"run": [word]}])
    assert done.status == status
    assert done.calls[-1] == "delete"


def test_keep_leaves_the_tpu_and_says_so(babysit):
    done = babysit("--keep", lives=[{"run": ["exit 0"]}])
    assert done.status == 0
    assert "delete" not in done.calls
    assert "costs money" in done.said


def test_failures_in_a_row_are_capped(babysit):
    done = babysit(changes={"RETRIES": "2"}, lives=[{"run": ["exit 70"]}])
    assert done.status == 3
    assert done.calls.count("start") == 3
    assert "failure 3 in a row, and RETRIES=2" in done.said
    assert done.calls[-1] == "delete"


def test_preemption_without_end_is_capped(babysit):
    done = babysit(changes={"RETRIES": "1"}, lives=[{"end": "SUSPENDED"}])
    assert done.status == 3
    assert done.calls.count("create") == 2


@pytest.mark.parametrize(("healthy", "status"), [("50", 0), ("500", 3)])
def test_a_run_that_goes_on_resets_the_count(babysit, healthy, status):
    lives = [{"run": ["exit 70", "running", "running", "exit 70", "exit 0"]}]
    assert babysit(changes={"RETRIES": "1", "POLL_SECONDS": "60", "HEALTHY_SECONDS": healthy}, lives=lives).status == status


def test_a_tpu_that_is_active_but_deaf_is_replaced(babysit):
    done = babysit(changes={"REPLACE_AFTER": "2"}, lives=[{"ssh_failures": 99}, {"run": ["exit 0"]}])
    assert done.status == 0
    assert done.calls.count("create") == 2
    assert "REPLACE_AFTER=2 times in a row" in done.said


QUOTA = "RESOURCE_EXHAUSTED: Quota 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' exhausted. Limit 0 in region us-west4"


def test_no_quota_is_final(babysit):
    done = babysit(create_errors=[QUOTA] * 9)
    assert done.status == 4
    assert done.calls.count("create") == 1
    for words in ("Limit 0 in region us-west4", "ZONE", "PROVISIONING"):
        assert words in done.said


def test_no_quota_found_later_is_final_too(babysit):
    done = babysit(lives=[{"end": "FAILED", "message": QUOTA}])
    assert done.status == 4
    assert not any(call == "start" for call in done.calls)
    assert "delete" in done.calls


def test_no_capacity_and_too_many_requests_are_not(babysit):
    done = babysit(
        create_errors=["There is no more capacity in the zone", "Quota exceeded for 'Requests' per minute"], lives=[{"run": ["exit 0"]}]
    )
    assert done.status == 0
    assert done.calls.count("create") == 3


def test_a_stuck_queue_is_given_up_and_withdrawn(babysit):
    done = babysit(changes={"QUEUE_TIMEOUT": "200", "POLL_SECONDS": "40"}, lives=[{"queue": QUEUED * 99}])
    assert done.status == 5
    assert 200 <= done.seconds <= 240
    assert "QUEUE_TIMEOUT=200 s" in done.said
    assert done.calls[-1] == "delete"


def test_hosts_that_go_on_alone_are_stopped(babysit):
    alone = ["running", "exit 70", "running", "running"]
    done = babysit(changes={"GRACE_SECONDS": "100", "POLL_SECONDS": "60"}, lives=[{"run": [alone] * 3 + ["exit 70", "exit 0"]}])
    assert done.status == 0
    assert done.calls.count("stop") == 1
    assert done.calls.index("stop") < done.calls.index("start", done.calls.index("start") + 1)


def test_who_comes_back_to_a_run_installs_nothing_under_it(babysit):
    assert babysit("--keep", lives=[{"run": ["exit 75", "running", "exit 0"]}], changes={"RETRIES": "0"}).status == 3
    # The fake world stays as it was left: it is ACTIVE, and the run is going.
    done = babysit("--keep", lives=[{"run": ["exit 75", "running", "exit 0"]}])
    assert done.status == 0
    assert done.calls.count("setup") == 1


def test_a_state_that_is_not_known_is_not_guessed_at(babysit):
    done = babysit(lives=[{"queue": ["HIBERNATING"] * 9}])
    assert done.status == 6
    assert "HIBERNATING" in done.said
    assert "delete" not in done.calls


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ACCELERATOR_TYPE": "v5litepod-12"}, "v5litepod-16"),
        ({"ACCELERATOR_TYPE": "tpu7x-8"}, "gke/submit.sh"),
        ({"RETRIES": "many"}, "RETRIES=many"),
        ({"ZNOE": "us-west4-a"}, "ZNOE"),
        ({"PROVISIONING": "free"}, "PROVISIONING=free"),
        ({"SLUG": ""}, "SLUG is not set"),
    ],
)
def test_wrong_configuration_is_refused(babysit, changes, words):
    done = babysit(changes=changes, lives=[{"run": ["exit 0"]}])
    assert done.status == 6
    assert words in done.said
    assert "start" not in done.calls


def test_back_off_doubles_with_jitter_up_to_a_limit(modules):
    draws = []

    def uniform(low, high):
        draws.append((low, high))
        return high

    assert [modules.signs.pause(k, uniform, 10.0, 600.0) for k in (1, 2, 3, 7, 1000)] == [10.0, 20.0, 40.0, 600.0, 600.0]
    assert set(draws) == {(0.5, 1.0)}
