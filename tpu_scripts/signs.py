"""What the words of gcloud and of the hosts mean to babysit.py, and how long it waits after a failure."""

import re
from collections.abc import Callable


def pause(failures: int, uniform: Callable[[float, float], float], base: float, limit: float) -> float:
    r"""Exponential back-off with jitter, :math:`\min(L, b\,2^{k-1})\,u` for the :math:`k`-th failure in a row, :math:`u` from 1/2 to 1.

    The jitter keeps many babysitters from asking at the same time.

    Examples
    --------
    >>> [pause(k, lambda low, high: high, base=10.0, limit=60.0) for k in (1, 2, 3, 4)]
    [10.0, 20.0, 40.0, 60.0]
    """
    return min(limit, base * 2.0 ** min(failures - 1, 60)) * uniform(0.5, 1.0)


def out_of_quota(text: str) -> bool:
    """Whether Google refuses for want of quota, which waiting does not mend; a limit of requests per minute does not count.

    Examples
    --------
    >>> out_of_quota("Quota 'TPUV5sPreemptibleLitepodPerProjectPerRegionForTPUAPI' exhausted. Limit 16 in region us-west4")
    True
    >>> out_of_quota("There is no more capacity in the zone"), out_of_quota("Quota exceeded for quota metric 'Requests' per minute")
    (False, False)
    """
    return bool(re.search(r"quota", text, re.IGNORECASE)) and not re.search(r"per minute|RATE_LIMIT_EXCEEDED", text, re.IGNORECASE)


def hosts_of(out: str) -> dict[str, str]:
    r"""Read the lines of ``status.sh --run``.

    Examples
    --------
    >>> hosts_of("gcloud says something\npaperjax-run w-0 exit 75\npaperjax-run w-1 running\n")
    {'w-0': 'exit 75', 'w-1': 'running'}
    """
    return dict(re.findall(r"paperjax-run (w-\d+) (running|lost|never|exit \d+)", out))
