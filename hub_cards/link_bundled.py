"""Links the code that a checkpoint needs into `bundled/`: the folder loads as remote code and never goes stale.

Run it after adding, renaming or removing a file of the Hub folders:
`python -m video_ma2mba.hub_cards.link_bundled`. A test holds the links against the code.
"""

import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
HUB_FOLDERS = ("modeling_video_ma2mba", "processing")
ENTRY_FILES = (
    "configuration_video_ma2mba",
    "modeling_video_ma2mba",
    "pipeline_video_ma2mba",
    "processing_video_ma2mba",
    "video_processing_video_ma2mba",
)
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def needed_files() -> dict[str, Path]:
    """Module name -> file, of the entry files and all that they import, directly or not."""
    sources = {path.stem: path for folder in HUB_FOLDERS for path in (ROOT / folder).glob("*.py")}
    needed: dict[str, Path] = {}
    waiting = list(ENTRY_FILES)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed[name] = sources[name]
            waiting += RELATIVE_IMPORT.findall(sources[name].read_text(encoding="utf-8"))
    return needed


def main() -> None:
    """Replace all links in `bundled/` by those to the files that are needed now; by copies where links need rights
    that the user lacks (Windows)."""
    bundled = ROOT / "bundled"
    for old in bundled.glob("*.py"):
        old.unlink()
    for name, source in sorted(needed_files().items()):
        try:
            (bundled / f"{name}.py").symlink_to(Path("..") / source.relative_to(ROOT))
        except OSError:
            shutil.copyfile(source, bundled / f"{name}.py")


if __name__ == "__main__":
    main()
