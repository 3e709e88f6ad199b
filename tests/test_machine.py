"""A cluster's job sees the cores that it was given, not those of the node."""

import os
import subprocess
import sys

import pytest


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="the system binds no process to cores")
def test_a_process_bound_to_one_core_counts_one() -> None:
    lines = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))}); import covid_cls.machine as m; "
    done = subprocess.run(
        [sys.executable, "-c", lines + "print(m.cores())"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "1\n"
