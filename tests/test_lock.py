"""The locks: complete, of one mind with setup.cfg, and free of everything that belongs to one machine."""

import configparser
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
LOCKS = ["requirements.lock", "requirements-oldest.lock"]
# What only the CUDA builds of torch need: left to the installer.
OF_CUDA = re.compile(r"nvidia|triton|cuda")


def locked(name: str) -> list[Requirement]:
    lines = (ROOT / name).read_text().splitlines()
    return [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]


def versions(name: str, python: str) -> dict[str, str]:
    """Versions of the lock on that Python, on this system."""
    environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
    found = {}
    for requirement in locked(name):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (version,) = (spec.version for spec in requirement.specifier)
            assert found.setdefault(canonicalize_name(requirement.name), version) == version, requirement
    return found


def direct(*extras: str) -> list[Requirement]:
    """What setup.cfg asks for, with its references from extra to extra (`%(demo)s`) followed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = [setup["options"]["install_requires"], *(setup["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for text in lines for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("name", LOCKS)
def test_lines_are_names_and_exact_versions(name: str):
    text = (ROOT / name).read_text()
    assert not re.search(r"https?:|file:|index|/", text)  # no address, no path
    assert "make lock" in text.splitlines()[1]
    for requirement in locked(name):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), requirement  # no local version such as +cpu
        assert not requirement.url
        assert not OF_CUDA.match(requirement.name), f"{requirement}: the CPU build of torch does not need it"


@pytest.mark.parametrize(
    ("name", "extra", "python"),
    [*((LOCKS[0], "test", python) for python in ("3.10", "3.11", "3.12", "3.13")), (LOCKS[1], "train", "3.11")],
)
def test_the_locks_hold_what_setup_asks_for(name: str, extra: str, python: str):
    """Fails where setup.cfg was changed without `make lock`."""
    pins = versions(name, python)
    for requirement in direct(extra):
        environment = default_environment() | {"python_version": python, "python_full_version": f"{python}.0"}
        if requirement.marker is None or requirement.marker.evaluate(environment):
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement


def test_the_oldest_lock_holds_the_lower_bounds():
    pins = versions(LOCKS[1], "3.11")
    environment = default_environment() | {"python_version": "3.11", "python_full_version": "3.11.0"}
    for requirement in direct():
        if requirement.name == "torch":  # its oldest release is tested on the GPU machine
            continue
        if requirement.marker is not None and not requirement.marker.evaluate(environment):  # of another Python
            continue
        (bound,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
        assert re.match(rf"{re.escape(bound)}(\.|$)", pins[canonicalize_name(requirement.name)]), requirement


def test_nothing_that_is_needed_is_missing_from_the_lock():
    """Follows what the installed packages ask for, starting with setup.cfg."""
    names = {canonicalize_name(requirement.name) for requirement in locked(LOCKS[0])}

    def applies(requirement: Requirement, extras: set[str]) -> bool:
        environments = [default_environment() | {"extra": extra} for extra in extras or {""}]
        return requirement.marker is None or any(map(requirement.marker.evaluate, environments))

    waiting = [(requirement, "setup.cfg") for requirement in direct("test") if applies(requirement, set())]
    seen = set()
    while waiting:
        requirement, asked_by = waiting.pop()
        name = canonicalize_name(requirement.name)
        if OF_CUDA.match(name) or (name, *sorted(requirement.extras)) in seen:
            continue
        seen.add((name, *sorted(requirement.extras)))
        assert name in names, f"{asked_by} needs {name}"
        try:
            below = map(Requirement, metadata.requires(name) or [])
        except metadata.PackageNotFoundError:  # in an environment that was not made from the lock
            continue
        waiting += [(needed, name) for needed in below if applies(needed, requirement.extras)]
    assert len(seen) > 80
