"""What `make types` looks at: all of both Hub folders, strictly, and with a reason for every exception."""

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
HUB_FOLDERS = ("modeling_video_ma2mba", "processing")
FILES = [path for folder in HUB_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
UNTYPED = {  # modules that need not be annotated throughout
    module
    for override in SETTINGS["overrides"]
    if override.get("disallow_untyped_defs") is False
    for module in override["module"]
}


def without_types(tree: ast.Module) -> list[str]:
    """Functions that lack a type of an argument or of the result, but for Triton's kernels."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef):
            continue
        decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
        kernel = any("triton.jit" in text or text.startswith("kernel(") for text in decorators)  # ops_triton_parts'
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        typed = all(argument.annotation or argument.arg in ("self", "cls") for argument in arguments)
        if not kernel and not (typed and node.returns):
            found.append(node.name)
    return found


def test_both_folders_are_looked_at_strictly():
    assert set(SETTINGS["files"]) == set(HUB_FOLDERS) and "exclude" not in SETTINGS
    assert SETTINGS["strict"] is True
    assert not any("ignore_errors" in override for override in SETTINGS["overrides"])
    modules = {f"{path.parent.name}.{path.stem}" for path in FILES}
    assert modules >= UNTYPED, "exceptions are of files that there are"


@pytest.mark.parametrize("path", [p for p in FILES if f"{p.parent.name}.{p.stem}" in UNTYPED], ids=lambda p: p.stem)
def test_only_kernels_go_without_types(path):
    sample = "@triton.jit\ndef a(x): ...\ndef b(x): ...\ndef c(x: int) -> int: ...\n"
    assert without_types(ast.parse(sample)) == ["b"], "the rule finds what it should"
    text = path.read_text(encoding="utf-8")
    assert "@triton.jit" in text
    assert without_types(ast.parse(text)) == []


def test_what_is_ignored_has_a_code_and_a_reason():
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if "type: ignore" in line:
                assert re.search(r"# type: ignore\[[a-z, -]+\]  # .", line), f"{path.name}:{number}: {line.strip()}"
