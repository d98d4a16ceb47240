"""With ``pytest -n`` every worker computes with one thread: two cores do not run four at once."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
