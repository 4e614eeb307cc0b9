#!/usr/bin/env python3
"""What a run costs: chips x hours x price per chip and hour.

    cost.py --hours 12                         # planned, for the ACCELERATOR_TYPE of config.env
    cost.py --since 2026-11-28T01:00:00Z       # elapsed
    cost.py --elapsed [--dry-run]              # elapsed since Google created the TPU, which gcloud is asked for

The price is PRICE_PER_CHIP_HOUR, or a row of prices.csv, which is dated and says where it is from. Google charges for a TPU from when it is
READY until it is deleted, whether something runs on it or not (https://cloud.google.com/tpu/pricing). Disks and buckets are not in it.
"""

import argparse
import csv
import datetime
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import configuration
from topology import Topology, topology

PRICES = configuration.SCRIPTS / "prices.csv"
PAGE = "https://cloud.google.com/tpu/pricing"


class Price(NamedTuple):
    """US dollars per chip and hour, and whence."""

    usd: float
    source: str


def price(config: Mapping[str, str], found: Topology, table: Path = PRICES) -> Price:
    """The price of a chip and hour.

    Raises
    ------
    ValueError
        PRICE_PER_CHIP_HOUR is empty and the table has no row for this generation, region and way of provisioning.
    """
    if config["PRICE_PER_CHIP_HOUR"]:
        return Price(configuration.number(config, "PRICE_PER_CHIP_HOUR"), "PRICE_PER_CHIP_HOUR")
    region = config["ZONE"].rpartition("-")[0]
    with table.open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if (row["accelerator"], row["provisioning"]) == (found.generation, config["PROVISIONING"])
        ]
    for row in [row for row in rows if row["region"] == region] + [row for row in rows if row["region"] == "*"]:
        return Price(float(row["usd_per_chip_hour"]), f"{row['source']}, as of {row['as_of']}")
    raise ValueError(
        f"{table.name} has no {config['PROVISIONING']} price of {found.generation} in {region or 'a zone that is not set (ZONE)'}. "
        f"Set PRICE_PER_CHIP_HOUR, from {PAGE}."
    )


def cost(found: Topology, hours: float, usd: float) -> float:
    r"""The cost in US dollars, :math:`\text{chips} \cdot \text{hours} \cdot \text{price}`.

    Examples
    --------
    >>> cost(topology("v5litepod-16"), hours=2.0, usd=1.5)
    48.0
    """
    return found.chips * hours * usd


def since(text: str, now: datetime.datetime) -> float:
    """Hours from an ISO time to now.

    Raises
    ------
    ValueError
        The text is no time with a zone, or lies ahead.

    Examples
    --------
    >>> since("2026-11-28T01:00:00Z", datetime.datetime(2026, 11, 28, 2, 30, tzinfo=datetime.timezone.utc))
    1.5
    """
    try:
        # Google's times have nanoseconds, which Python 3.11 cuts to microseconds.
        begin = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(f"{text!r} is no time such as 2026-11-28T01:00:00Z.") from None
    if begin.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone; for UTC end it in Z.")
    hours = (now - begin).total_seconds() / 3600
    if hours < 0:
        raise ValueError(f"{text} lies ahead; now it is {now.isoformat(timespec='seconds')}.")
    return hours


def created_command(config: Mapping[str, str]) -> list[str]:
    """The command that prints when Google created the TPU."""
    where = [f"--project={config['PROJECT']}", f"--zone={config['ZONE']}"]
    return ["gcloud", "compute", "tpus", "tpu-vm", "describe", config["TPU_NAME"], *where, "--format=value(createTime)", "--quiet"]


def main(arguments: list[str] | None = None) -> int:
    """Print the cost; exit with 2 if it cannot be said."""
    parser = argparse.ArgumentParser(description="What a run costs.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--hours", type=float, help="planned hours")
    which.add_argument("--since", metavar="TIME", help="when the TPU became ready, such as 2026-11-28T01:00:00Z")
    which.add_argument("--elapsed", action="store_true", help="ask gcloud since when there is the TPU")
    parser.add_argument("--config", type=Path, help="by default config.env beside this script")
    parser.add_argument("--dry-run", action="store_true", help="print the command of --elapsed, and run nothing")
    given = parser.parse_args(arguments)
    try:
        config = configuration.load(given.config)
        found = topology(config["ACCELERATOR_TYPE"])
        if given.dry_run:
            if given.elapsed:
                print(shlex.join(created_command(config)))
            return 0
        hours = given.hours if given.hours is not None else since(given.since or _created(config), datetime.datetime.now(datetime.UTC))
        if not 0 <= hours < float("inf"):
            raise ValueError(f"--hours {hours} must be a number that is not negative.")
        paid = price(config, found)
    except ValueError as error:
        print(f"cost.py: {error}", file=sys.stderr)
        return 2
    print(f"{found.chips} chips x {hours:.2f} h x {paid.usd:.2f} USD = {cost(found, hours, paid.usd):.2f} USD ({paid.source})")
    return 0


def _created(config: Mapping[str, str]) -> str:
    done = subprocess.run(created_command(config), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(f"gcloud does not say when {config['TPU_NAME']} was created: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
