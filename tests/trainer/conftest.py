"""Makes `tensor_chats.py`, the material that tests and the processes they start share, importable."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

if find_spec("trl") is None:  # TRL 1.16 needs Python 3.11; all but training works on 3.10
    collect_ignore_glob = ["test_*.py"]
