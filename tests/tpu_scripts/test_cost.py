"""Costs: chips x hours x price, and prices that are not known are not invented."""

import csv
import datetime

import pytest


@pytest.fixture
def cost(modules):
    return modules.cost


def test_planned_cost(script, config):
    done = script("cost.py", "--hours", "12", "--config", config(PRICE_PER_CHIP_HOUR="0.5"))
    # 16 chips, 12 hours, half a dollar.
    assert done.stdout == "16 chips x 12.00 h x 0.50 USD = 96.00 USD (PRICE_PER_CHIP_HOUR)\n"


def test_elapsed_cost(script, config):
    begin = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2)
    done = script("cost.py", "--since", begin.isoformat(), "--config", config(PRICE_PER_CHIP_HOUR="1"))
    assert "x 2.00 h x 1.00 USD = 32.00 USD" in done.stdout


def test_a_price_of_the_table_comes_with_its_source_and_date(cost, modules):
    paid = cost.price({"PRICE_PER_CHIP_HOUR": "", "ZONE": "us-west4-a", "PROVISIONING": "on-demand"}, modules.topology.topology("v5p-8"))
    assert paid.usd > 0
    assert "as of 20" in paid.source


def test_the_region_goes_before_any_region(cost, modules, tmp_path):
    table = tmp_path / "prices.csv"
    table.write_text(
        "accelerator,region,provisioning,usd_per_chip_hour,as_of,source\nv5p,*,spot,1,2026-01,all\nv5p,us-east5,spot,2,2026-01,east\nv5p,us-east5,on-demand,9,2026-01,x\n"
    )
    found = modules.topology.topology("v5p-8")
    config = {"PRICE_PER_CHIP_HOUR": "", "PROVISIONING": "spot"}
    assert cost.price({**config, "ZONE": "us-east5-a"}, found, table) == (2.0, "east, as of 2026-01")
    assert cost.price({**config, "ZONE": "us-west4-a"}, found, table) == (1.0, "all, as of 2026-01")


def test_every_row_of_the_table_can_be_found(cost, modules):
    generations = {each.name for each in modules.topology.GENERATIONS}
    with cost.PRICES.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert rows
    for row in rows:
        assert row["accelerator"] in generations
        assert row["provisioning"] in ("spot", "on-demand", "reserved")
        assert float(row["usd_per_chip_hour"]) > 0
        datetime.datetime.strptime(row["as_of"], "%Y-%m")
        assert row["source"]


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({"PROVISIONING": "spot"}, ["--hours", "1"], "Set PRICE_PER_CHIP_HOUR, from https://cloud.google.com/tpu/pricing"),
        ({"PRICE_PER_CHIP_HOUR": "cheap"}, ["--hours", "1"], "PRICE_PER_CHIP_HOUR=cheap"),
        ({"PRICE_PER_CHIP_HOUR": "-1"}, ["--hours", "1"], "PRICE_PER_CHIP_HOUR=-1"),
        ({"PRICE_PER_CHIP_HOUR": "1"}, ["--hours", "-1"], "--hours -1"),
        ({"PRICE_PER_CHIP_HOUR": "1"}, ["--hours", "nan"], "--hours nan"),
        ({"PRICE_PER_CHIP_HOUR": "1"}, ["--since", "yesterday"], "2026-11-28T01:00:00Z"),
        ({"PRICE_PER_CHIP_HOUR": "1"}, ["--since", "2026-11-28T01:00:00"], "no time zone"),
        ({"PRICE_PER_CHIP_HOUR": "1"}, ["--since", "2999-01-01T00:00:00Z"], "lies ahead"),
        ({"ACCELERATOR_TYPE": "v5p-9"}, ["--hours", "1"], "Nearest"),
    ],
)
def test_what_cannot_be_said_is_refused(script, config, changes, options, words):
    done = script("cost.py", *options, "--config", config(**changes))
    assert done.returncode == 2
    assert words in done.stderr
    assert done.stdout == ""
