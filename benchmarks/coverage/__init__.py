"""Every plus-minus beside a planted truth: how often do stated errors hold?"""

from benchmarks.coverage.kinds import (
    SEEN,
    Checked,
    Row,
    Study,
    alarm,
    clopper_pearson,
    interval,
    p_value,
    watched,
)
from benchmarks.coverage.registry import (
    EXCEPTIONS,
    GROUPS,
    SILENT,
    functions,
    named_in_source,
    unlisted,
)

__all__ = [
    "EXCEPTIONS",
    "GROUPS",
    "SEEN",
    "SILENT",
    "Checked",
    "Row",
    "Study",
    "alarm",
    "clopper_pearson",
    "functions",
    "interval",
    "named_in_source",
    "p_value",
    "unlisted",
    "watched",
]
