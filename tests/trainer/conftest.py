"""Makes `tensor_chats.py`, the material that tests and the processes they start share, importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
