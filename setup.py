"""Everything stands in setup.cfg, but for links: where Git makes none (Windows), it writes the target's name."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithLinkedFiles(build_py):
    """Puts the file that a link names in the place of the link, and leaves this file out."""

    def find_package_modules(self, package, package_dir):
        """All but this file."""
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]

    def copy_file(self, infile, outfile, *args, **kwargs):
        """As ever, from where the link points to."""
        path = Path(infile)
        if path.parent.name == "bundled" and path.suffix == ".py" and path.stat().st_size < 200:
            target = path.parent / path.read_text(encoding="utf-8").strip()
            infile = str(target) if target.suffix == ".py" and target.is_file() else infile
        return super().copy_file(infile, outfile, *args, **kwargs)


setup(cmdclass={"build_py": WithLinkedFiles})
