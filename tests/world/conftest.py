"""Training on the rendered world needs TRL, which needs Python 3.11."""

from importlib.util import find_spec

if find_spec("trl") is None:
    collect_ignore_glob = ["test_t*.py", "test_accuracy.py"]
