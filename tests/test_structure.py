"""Where files belong and what may import what."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "video_ma2mba"
OUTSIDE = {"tests", "benchmarks", "docs", "examples", "bundled"}  # of the repository, not of the package
HUB_FOLDERS = ("modeling_video_ma2mba", "processing")

# Rooms of the flattened remote code: a file of the folder is one of these or begins with one that ends in "_".
ROOMS = {
    "modeling_video_ma2mba": (
        "__init__", "configuration_", "modeling_", "pipeline_", "generation_", "mixer_", "stack_", "ops_", "vision_",
        "recompute_", "parallel_", "cost_", "planner", "state_", "reading_", "answering_", "decode_",
    ),
    "processing": (
        "__init__", "byte_tokenizer", "chat_", "frame_", "mp4_index", "picture_sources",
        "processing_", "read_ahead", "text_batches", "video_",
    ),
}  # fmt: skip


def module_name(path: Path) -> str:
    """The module of a file, as a dotted name within the package."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def package_files() -> dict[str, Path]:
    """Every module of the package and its file."""
    files = (p for p in ROOT.rglob("*.py") if not {*OUTSIDE, "build"} & set(p.relative_to(ROOT).parts[:1]))
    return {module_name(p): p for p in files if not any(part.startswith(".") for part in p.relative_to(ROOT).parts)}


FILES = package_files()


def imported_modules(name: str) -> set[str]:
    """Modules of the package that a file names in an import, wherever it stands: in functions and for types, too."""
    path = FILES[name]
    here = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    named: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = [PACKAGE, *here[: len(here) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            named |= {".".join([*base, alias.name]) for alias in node.names} | {".".join(base)}
        elif isinstance(node, ast.Import):
            named |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named |= {str(argument.value) for argument in node.args[:1] if isinstance(argument, ast.Constant)}
    within = {full.removeprefix(f"{PACKAGE}.") for full in named if full.startswith(f"{PACKAGE}.")}
    return {module for module in within if module in FILES} - {name}


IMPORTS = {name: imported_modules(name) for name in FILES}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """Groups of nodes that all reach each other (Tarjan's strongly connected components of more than one node)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: set[frozenset[str]] = set()

    def visit(node: str) -> None:
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in sorted(graph[node]):
            if target not in index:
                visit(target)
                low[node] = min(low[node], low[target])
            elif target in stack:
                low[node] = min(low[node], index[target])
        if low[node] == index[node]:
            at = stack.index(node)
            group = frozenset(stack[at:])
            del stack[at:]
            if len(group) > 1:
                found.add(group)

    for node in sorted(graph):
        if node not in index:
            visit(node)
    return found


def forbidden(name: str, target: str) -> bool:
    """Whether the rules of the house forbid this import."""
    here, there = name.split(".")[0], target.split(".")[0]
    if here in HUB_FOLDERS:
        return there != here  # each folder travels alone
    if there == "cli":
        return here not in ("cli", "__main__")
    return (here, there) in (("trainer", "eval"), ("eval", "trainer"))


def test_the_graph_is_read():
    """The rules below would hold of an empty graph, too."""
    assert "modeling_video_ma2mba.planner" in IMPORTS["modeling_video_ma2mba.recompute_engine"]
    assert "trainer.recipe" in IMPORTS["cli.train"], "imports inside functions count"
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {frozenset("abc")}


@pytest.mark.parametrize("folder", HUB_FOLDERS)
def test_file_names_begin_with_their_room(folder):
    for path in sorted((ROOT / folder).glob("*.py")):
        fits = any(path.stem == room or (room.endswith("_") and path.stem.startswith(room)) for room in ROOMS[folder])
        assert fits, f"{folder}/{path.name} belongs to no room: {', '.join(ROOMS[folder])}"


def test_no_circles():
    assert circles(IMPORTS) == set(), "files import each other"


def test_imports_point_one_way():
    found = {(name, target) for name in IMPORTS for target in IMPORTS[name] if forbidden(name, target)}
    assert found == set(), "imports against the rules"


# Methods that a framework calls by these names and documents itself; the class's docstring says what ours do.
FRAMEWORK_METHODS = {
    "forward", "backward",  # torch.nn.Module, torch.autograd.Function
    # transformers.PreTrainedModel
    "get_input_embeddings", "set_input_embeddings", "get_output_embeddings", "set_output_embeddings",
    "model_input_names",  # ProcessorMixin
    "on_train_begin", "on_step_end", "on_log",  # TrainerCallback
    "prediction_step", "log", "get_decay_parameter_names",  # Trainer
    "invoke", "main", "make_context", "parse_args",  # click.Command
    "loglikelihood",  # lmms
}  # fmt: skip


def class_nodes() -> dict[str, ast.ClassDef]:
    """Every class of the package by its name."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in FILES.values())
    return {node.name: node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}


def base_names(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base).partition("[")[0].rpartition(".")[2] for base in node.bases]


def documented_by_a_base(method: str, node: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> bool:
    """Whether a class of ours, from which this one inherits, says what the method does."""
    for base in (classes[name] for name in base_names(node) if name in classes):
        own = [item for item in base.body if isinstance(item, ast.FunctionDef) and item.name == method]
        if any(map(ast.get_docstring, own)) or documented_by_a_base(method, base, classes):
            return True
    return False


def undocumented(tree: ast.Module, classes: dict[str, ast.ClassDef]) -> list[str]:
    """Public functions, classes and methods without a docstring, and "module" where the file has none.

    Nested functions and what begins with `_` are not public. Setters of properties, methods in `FRAMEWORK_METHODS`
    (of classes with a base) and overrides of methods that our own base class documents need none.
    """
    found = [] if ast.get_docstring(tree) else ["module"]

    def visit(owner: ast.Module | ast.ClassDef, prefix: str) -> None:
        for node in owner.body:
            if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) or node.name[0] == "_":
                continue
            exempt = any(ast.unparse(decorator).endswith(".setter") for decorator in node.decorator_list)
            if isinstance(owner, ast.ClassDef) and owner.bases:
                exempt |= node.name in FRAMEWORK_METHODS or documented_by_a_base(node.name, owner, classes)
            if not exempt and not ast.get_docstring(node):
                found.append(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node, f"{prefix}{node.name}.")

    visit(tree, "")
    return found


def test_public_names_have_docstrings():
    sample = (
        "class A(B):\n  def forward(self): ...\n  def run(self): ...\n  def _run(self): ...\ndef f():\n  def g(): ..."
    )
    assert undocumented(ast.parse(sample), {}) == ["module", "A", "A.run", "f"], "the rule finds what it should"
    classes = class_nodes()
    found = {name: undocumented(ast.parse(path.read_text(encoding="utf-8")), classes) for name, path in FILES.items()}
    assert {name: names for name, names in found.items() if names} == {}
