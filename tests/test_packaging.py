"""The package as a whole: what travels to the Hub, what a wheel holds, what importing costs."""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

import video_ma2mba

ROOT = Path(__file__).resolve().parents[1]
HUB_FOLDERS = ("modeling_video_ma2mba", "processing")
HUB_FILES = [path for folder in HUB_FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
# transformers finds what to copy by regular expressions on the text, so docstrings count as well.
RELATIVE_IMPORT = re.compile(r"^\s*(?:from\s+\.(\S*)\s+import|import\s+\.(\S+))", re.MULTILINE)
LOADABLE = {"torch", "transformers", "numpy", "PIL", "safetensors", "tokenizers"}  # transformers needs them all


def tracked_files(*patterns: str) -> list[str]:
    """Names of the files that Git knows; the checkout may belong to another user, as in a container."""
    command = ["git", "-c", "safe.directory=*", "ls-files", *patterns]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()


def python_folders() -> set[str]:
    """Dotted names of the folders of the package that hold Python modules, as Git knows them."""
    folders = {Path(name).parent for name in tracked_files("*.py")}
    apart = {"tests", "benchmarks", "docs", "examples", "bundled"}  # of the repository, not of the package
    return {".".join(["video_ma2mba", *f.parts]) for f in folders if not apart & set(f.parts[:1])}


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_relative_imports_name_sibling_files(path: Path):
    """Anything else breaks `save_pretrained` or loading with `trust_remote_code`."""
    for match in RELATIVE_IMPORT.finditer(path.read_text(encoding="utf-8")):
        module = match.group(1) or match.group(2) or ""
        assert module.isidentifier(), f"{match.group(0).strip()!r} is not `from .sibling import name`"
        assert (path.parent / f"{module}.py").is_file(), f"{match.group(0).strip()!r} has no sibling file"


@pytest.mark.parametrize("path", HUB_FILES, ids=lambda path: path.name)
def test_hub_files_need_only_the_usual_packages(path: Path):
    """What a file imports outside functions and `try` is needed to load a model."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module]
        for module in modules:
            top = module.split(".")[0]
            assert top in LOADABLE | sys.stdlib_module_names, f"{path.name} imports {module} at load time"


@pytest.mark.bundled
def test_loading_from_the_hub_asks_for_no_optional_package():
    """From the Hub (unlike from a folder) transformers looks for every import in every file, inside functions as well,
    and refuses to load where a package is missing; only imports inside `try` are left alone."""
    from transformers.dynamic_module_utils import get_imports

    for path in sorted((ROOT / "bundled").glob("*.py")):
        wanted = set(get_imports(path)) - LOADABLE - sys.stdlib_module_names - {"av"}
        assert wanted == set(), f"{path.name}: import {wanted} by importlib.import_module, or inside `try`"


def test_hub_file_names_are_unique():
    """The two folders are flattened into one on the Hub (their `__init__.py` stay behind)."""
    names = [path.name for path in HUB_FILES if path.name != "__init__.py"]
    assert sorted(names) == sorted(set(names))


@pytest.mark.bundled
def test_bundled_checkpoint_brings_all_its_code():
    """Its code is that of the two folders, so a file that they gain must be there as well."""
    bundled = ROOT / "bundled"
    for path in bundled.glob("*.py"):
        (source,) = [file for file in HUB_FILES if file.name == path.name]
        assert path.read_text() == source.read_text()
        imported = {match.group(1) or match.group(2) for match in RELATIVE_IMPORT.finditer(path.read_text())}
        assert [name for name in imported if not (bundled / f"{name}.py").is_file()] == []


def test_setup_lists_every_package():
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    assert set(setup["options"]["packages"].split()) == python_folders()


def test_one_version():
    """It stands in one file; what people read agrees with it."""
    version = video_ma2mba.__version__
    assert f"version: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version


def test_tree_names_no_machine():
    """Paths of one machine or hosts of one network do not belong in the tree."""
    pattern = re.compile("|".join(["/" + "home/", "/" + "root/", "/" + "Users/", "index" + "-url", "find" + "-links"]))
    found = []
    for name in tracked_files():
        path = ROOT / name
        if not path.is_file():
            continue
        if path.suffix in {".py", ".md", ".cfg", ".toml", ".txt", ".lock", ".yaml", ".json", ".jinja", ""}:
            found += [f"{name}: {hit.group(0)}" for hit in pattern.finditer(path.read_text(errors="replace"))]
    assert found == []


def test_pickles_are_loaded_as_plain_tensors_only():
    """`torch.load` runs whatever a file says, unless `weights_only` is set; nothing else here reads pickles."""
    calls = 0
    for name in tracked_files("*.py"):
        path = ROOT / name
        if name.startswith("tests/") or not path.is_file():
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func)
            assert called not in {"pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"}, name
            if called == "torch.load":
                calls += 1
                settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert settings.get("weights_only") == "True", f"{name}, line {node.lineno}"
    assert calls > 0


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import video_ma2mba", ["torch", "transformers", "numpy", "rich"]),
        ("from video_ma2mba.cli.main import app", ["torch", "transformers", "av"]),
        (
            "from video_ma2mba import VideoMa2mbaForConditionalGeneration, VideoMa2mbaProcessor",
            ["mamba_ssm", "causal_conv1d", "torchvision", "trl", "peft", "datasets", "lmms_eval", "matplotlib"],
        ),
    ],
    ids=["package", "command", "model"],
)
def test_imports_stay_light(statement: str, absent: list[str]):
    script = f"import sys\n{statement}\nprint([name for name in {absent} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("first", ["video_ma2mba", "transformers", "video_ma2mba.processing.frame_decoding"])
def test_auto_classes_know_the_package_in_either_import_order(first: str):
    second = "video_ma2mba" if first == "transformers" else "transformers"
    script = (
        f"import {first}, {second}\n"
        "from video_ma2mba.processing import frame_decoding, video_reader\n"
        "assert video_reader.decode_frames is frame_decoding.decode_frames, 'a file ran twice'\n"
        "from transformers import AutoConfig, AutoModelForImageTextToText\n"
        "from transformers.pipelines import PIPELINE_REGISTRY\n"
        "config = AutoConfig.for_model('video_ma2mba')\n"
        "print(AutoModelForImageTextToText._model_mapping[type(config)].__module__)\n"
        "print(PIPELINE_REGISTRY.check_task('video-question-answering')[1]['impl'].__name__)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT.parent)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [
        "video_ma2mba.modeling_video_ma2mba.modeling_video_ma2mba",
        "VideoQuestionAnsweringPipeline",
    ]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel built from what Git tracks, links as Windows gets them: as files that hold the target's name."""
    pytest.importorskip("setuptools")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked_files():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (source / name).write_text(os.readlink(ROOT / name), encoding="utf-8")
            else:
                shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", str(out), str(source)]
    subprocess.run(command, check=True, capture_output=True, cwd=out)
    (wheel,) = out.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel_names(wheel: Path) -> set[str]:
    return set(zipfile.ZipFile(wheel).namelist())


def test_wheel_holds_the_package(wheel_names: set[str]):
    wanted = [
        name
        for name in tracked_files()
        if name.split("/")[0] in {"__init__.py", "cli", "trainer", "world", "bundled", *HUB_FOLDERS}
        and Path(name).suffix in {".py", ".jinja", ".yaml", ".json", ".safetensors"}
    ]
    assert [name for name in wanted if f"video_ma2mba/{name}" not in wheel_names] == []


@pytest.mark.bundled
def test_wheel_has_code_where_the_repository_has_links(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"video_ma2mba/bundled/\w+\.py", name)]
        assert len(names) > 50
        for name in names:
            assert archive.read(name) == (ROOT / "bundled" / Path(name).name).read_bytes()
        assert "video_ma2mba/setup.py" not in archive.namelist()


def test_every_file_that_setup_names_is_there(wheel_names: set[str]):
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    for package, patterns in setup["options.package_data"].items():
        for pattern in re.split(r"[,\s]+", patterns.strip()):
            wanted = [
                path
                for path in (ROOT / package.replace(".", "/").removeprefix("video_ma2mba").strip("/")).glob(pattern)
                if path.is_file() and path.suffix != ".pyc"
            ]
            assert wanted, f"{package} has no {pattern}"
            for path in wanted:
                assert f"video_ma2mba/{path.relative_to(ROOT).as_posix()}" in wheel_names


@pytest.mark.bundled
@pytest.mark.slow
def test_an_installed_wheel_answers_from_anywhere_and_writes_nothing_there(wheel: Path, tmp_path: Path):
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(site), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    before = {path: path.stat().st_mtime_ns for path in site.rglob("*")}
    home = tmp_path / "home"
    home.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(home)}

    def run(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home)
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = (
        "import video_ma2mba, importlib.metadata as m\n"
        "from pathlib import Path\n"
        "print(Path(video_ma2mba.__file__).parent)\n"
        "print(m.version('video-ma2mba') == video_ma2mba.__version__)\n"
        "print([p.load().__module__ for p in m.entry_points(group='lmms_eval.models', name='video_ma2mba')])\n"
    )
    said = run(sys.executable, "-c", script).splitlines()
    assert said[0] == str(site / "video_ma2mba")
    assert said[1] == "True"
    assert "video_ma2mba.eval.lmms_manifest" in said[2]
    assert re.search(r"^2[0-9] of 28 answers right", run(str(site / "bin" / "video-ma2mba"), "demo"), re.MULTILINE)
    notebook = json.loads((ROOT / "examples" / "ask_a_video.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    if find_spec("matplotlib") is None:
        cells = [cell for cell in cells if "matplotlib" not in cell]
    code = "import os\nos.environ['MPLBACKEND'] = 'Agg'\n" + "\n".join(cells) + "\nprint(len(answers), video)"
    told = run(sys.executable, "-c", code)
    assert f"3 {site}" in told and "GB on the GPU" in told
    assert {path: path.stat().st_mtime_ns for path in site.rglob("*")} == before


def test_the_notebook_is_stripped():
    notebook = json.loads((ROOT / "examples" / "ask_a_video.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], {cell["cell_type"] for cell in notebook["cells"]}) == (4, {"code", "markdown"})
    for cell in notebook["cells"]:
        assert cell["metadata"] == {} and cell.get("outputs", []) == [] and cell.get("execution_count") is None


def test_the_wheel_says_where_things_are(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        told = archive.read(name).decode()
    assert told.count("Project-URL: ") >= 2 and "arxiv.org/abs/2411.19460" in told


def test_the_install_page_names_every_extra_and_every_command():
    from video_ma2mba.cli.main import app

    page = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    setup = configparser.ConfigParser(interpolation=None)
    setup.read(ROOT / "setup.cfg")
    rows = dict(re.findall(r"^\| `?(\S+?)`? \|.*\| (.*) \|$", page, re.MULTILINE))
    assert set(setup["options.extras_require"]) - {"test"} == set(rows) - {"(none)", "extra", "---"}
    named = {word for row in rows.values() for code in re.findall(r"`([^`]+)`", row) for word in code.split()[:1]}
    verbs = {command.name or command.callback.__name__ for command in app.registered_commands}
    verbs |= {group.name for group in app.registered_groups}
    assert verbs - named == set()


def test_the_image_is_made_of_what_is_there():
    """Without Docker, what a build would trip over first; nothing names a registry."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^FROM \S+ AS (\w+)$", text, re.MULTILINE) == ["wheel", "cpu", "cuda"]
    assert not re.search(r"://|\w\.(io|com|org|net)/", text)
    for source in re.findall(r"^COPY (?!--from)(\S+)", text, re.MULTILINE):
        assert (ROOT / source).exists()
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert re.findall(r"build --target (\w+)", makefile) == ["cpu", "cuda"]


@pytest.mark.slow
def test_docker_builds_the_image_and_it_answers():
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "info"], capture_output=True).returncode:
        pytest.skip("no Docker daemon here")
    built = subprocess.run(["make", "image"], cwd=ROOT, capture_output=True, text=True)
    if "failed to resolve" in built.stderr:
        pytest.skip("the base image is not to be had here")
    assert built.returncode == 0, built.stderr[-2000:]
    told = subprocess.run([docker, "run", "--rm", "video-ma2mba:cpu"], capture_output=True, text=True)
    assert re.search(r"^2[0-9] of 28 answers right", told.stdout, re.MULTILINE), told.stderr


def test_wheel_leaves_the_repository_out(wheel_names: set[str]):
    folders = {name.split("/")[1] for name in wheel_names if name.startswith("video_ma2mba/")}
    assert not folders & {"tests", "benchmarks", "docs", "examples", "Makefile", ".ci"}


def test_registration_waits_for_transformers_itself():
    """Other packages only look whether transformers is there (accelerate does, from TRL): that must not use it up."""
    code = (
        "import video_ma2mba, importlib.util\n"
        "assert importlib.util.find_spec('transformers') is not None\n"
        "import transformers\n"
        "assert 'video_ma2mba' in transformers.CONFIG_MAPPING"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=250)
