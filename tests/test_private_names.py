"""Private names of the libraries that this package stands on: each is a promise that nobody gave us.

`past_key_values` was public and was renamed all the same; what begins with an underscore changes without notice. Every
such name that our code imports, reads, sets or overrides must be in `ALLOWED` with its reason. The list only shrinks.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import transformers  # noqa: F401 (before the package's own modules, which it registers)

ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "trl", "accelerate", "peft", "lmms_eval", "huggingface_hub")
NOT_OURS = ("tests", "bundled", "benchmarks", "build", "dist", "setup.py")  # setup.py would install

BY_NAME = ("getattr", "hasattr", "setattr", "delattr")

_CLASS = "a model class declares it: transformers has no public way to say it"
_PIPELINE = "a pipeline class declares it: part of transformers' documented recipe for own pipelines"
_PIPELINE_SETTINGS = "settings given to the pipeline's constructor, which it keeps nowhere else"
_TRAINER = "transformers' Trainer has no public hook at this place"
_TRL = "TRL's trainers fill their model card from it"
_TORCH = "PyTorch's own: modules have no public way to ask for it"
_FOREACH = "many small tensors in one launch, as torch.optim does; PyTorch documents these functions under this name"

ALLOWED: dict[str, str] = {
    "_init_weights": _CLASS,
    "_keep_in_fp32_modules_strict": _CLASS,
    "_no_split_modules": _CLASS,
    "_set_gradient_checkpointing": "every public road to checkpointing of transformers, PEFT and TRL ends in it",
    "_skip_keys_device_placement": _CLASS,
    "_supports_attention_backend": _CLASS,
    "_supports_flash_attn": _CLASS,
    "_supports_flex_attn": _CLASS,
    "_supports_sdpa": _CLASS,
    "_tied_weights_keys": _CLASS,
    "_from_config": "AutoModel.from_config does not know a class that came with a checkpoint",
    "_commit_hash": "a checkpoint's revision is known by no other name; without it a state says no revision",
    "_hf_hook": "where accelerate computes a module whose weights are elsewhere; without it, where the weights are",
    "_forward": _PIPELINE,
    "_load_feature_extractor": _PIPELINE,
    "_load_image_processor": _PIPELINE,
    "_load_processor": _PIPELINE,
    "_load_tokenizer": _PIPELINE,
    "_load_video_processor": _PIPELINE,
    "_pipeline_calls_generate": _PIPELINE,
    "_sanitize_parameters": _PIPELINE,
    "_batch_size": _PIPELINE_SETTINGS,
    "_forward_params": _PIPELINE_SETTINGS,
    "_postprocess_params": _PIPELINE_SETTINGS,
    "_preprocess_params": _PIPELINE_SETTINGS,
    "_get_eval_sampler": _TRAINER,
    "_get_output_dir": _TRAINER,
    "_get_train_sampler": _TRAINER,
    "_prepare_inputs": _TRAINER,
    "_push_from_checkpoint": _TRAINER,
    "_save_checkpoint": _TRAINER,
    "_set_signature_columns_if_needed": _TRAINER,
    "_train_batch_size": _TRAINER,
    "_name": _TRL,
    "_tag_names": _TRL,
    "_reset_state": "accelerate keeps one state per process, and has no public way to begin anew after a run",
    "_DropoutNd": _TORCH,
    "_forward_hooks": _TORCH,
    "_forward_pre_hooks": _TORCH,
    "_foreach_copy_": _FOREACH,
    "_foreach_zero_": _FOREACH,
}

NO_PRIVATE = {
    # documented API whose name begins with an underscore
    *("_make", "_fields", "_replace", "_asdict", "_exit"),
    # put on our classes by `abc` and by the public `register_for_auto_class`
    *("_abc_impl", "_auto_class"),
}


def sources() -> list[Path]:
    found = [path.relative_to(ROOT) for path in ROOT.rglob("*.py") if not path.is_symlink()]
    kept = [path for path in found if path.parts[0] not in NOT_OURS]
    return sorted(ROOT / path for path in kept if not any(part.startswith(".") for part in path.parts))


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def own_names(trees: dict[Path, ast.AST]) -> set[str]:
    """Underscore names that our code itself makes: functions, classes, variables, parameters, attributes of self."""
    found = set()
    for tree in trees.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls", "state"):
                    found.add(node.attr)
            elif isinstance(node, ast.alias):
                found.add(node.asname or "")
    return {name for name in found if is_private(name)}


def read_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Underscore names that a file reads or sets on anything, or gives to getattr and its like."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            texts = [part.value for part in node.args[1:2] if isinstance(part, ast.Constant)]
            yield from ((text, node.lineno) for text in texts if isinstance(text, str) and is_private(text))


def imported_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Underscore names, modules among them, that a file imports from the libraries."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in LIBRARIES:
            for part in (*node.module.split("."), *(alias.name for alias in node.names)):
                if is_private(part):
                    yield part, node.lineno
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                yield from ((part, node.lineno) for part in parts if parts[0] in LIBRARIES and is_private(part))


def module_of(path: Path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return importlib.import_module(".".join(("video_ma2mba", *(part for part in parts if part != "__init__"))))


def inherited_names(path: Path, tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Underscore names of the libraries' classes that our subclasses override, or read from themselves."""
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases]
    if not classes or "import" not in path.read_text(encoding="utf-8"):
        return
    try:
        module = module_of(path)
    except ImportError:  # kernels, where there is no triton
        return
    for node in classes:
        made = getattr(module, node.name, None)
        if not inspect.isclass(made):
            continue
        theirs = {
            name
            for base in made.__mro__
            if base.__module__.split(".")[0] in LIBRARIES
            for name in (*vars(base), *vars(base).get("__annotations__", {}))
            if is_private(name)
        }
        overridden = [name for name in vars(made) if name in theirs]
        yield from ((name, node.lineno) for name in overridden)
        for inner in ast.walk(node):
            if isinstance(inner, ast.Attribute) and inner.attr in theirs:
                yield inner.attr, inner.lineno


@pytest.fixture(scope="module")
def used() -> dict[str, set[str]]:
    trees = {path: ast.parse(path.read_text()) for path in sources()}
    own = own_names(trees)
    found: dict[str, set[str]] = {}
    for path, tree in trees.items():
        foreign = [entry for entry in read_names(tree) if entry[0] not in own]
        for name, line in (*foreign, *imported_names(tree), *inherited_names(path, tree)):
            if name not in NO_PRIVATE:
                found.setdefault(name, set()).add(f"{path.relative_to(ROOT)}:{line}")
    return found


def test_every_private_name_has_a_reason(used):
    new = {name: sorted(places) for name, places in used.items() if name not in ALLOWED}
    assert not new, f"private names of other packages: use something public, or say in ALLOWED why not: {new}"


def test_the_list_only_shrinks(used):
    unused = sorted(ALLOWED.keys() - used.keys())
    assert not unused, f"these names are not used any more: take them from the list: {unused}"
