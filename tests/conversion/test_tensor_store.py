"""Reading and writing checkpoint files: safely, one tensor at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from video_ma2mba.conversion.tensor_store import TensorStore, load_pickle, write_shards

SOME = {
    "scalar": torch.tensor(1.5),
    "flag": torch.tensor([True, False, True]),
    "half": torch.randn(3, 5).to(torch.bfloat16),
    "wide": torch.randn(2, 7, dtype=torch.float64),
    "odd": torch.arange(5, dtype=torch.uint8),
    "none": torch.zeros(0, 4),
    "ids": torch.arange(4),
}


@pytest.mark.parametrize("limit", [1, 60, 10**9])
def test_files_are_those_of_the_safetensors_library(tmp_path: Path, limit: int):
    save_file(SOME, tmp_path / "model.safetensors")
    store = TensorStore(tmp_path, "some")
    out = tmp_path / "out"
    out.mkdir()
    written = write_shards(out, store.specs, store.read, limit)
    found = {}
    for file in written:
        if file.suffix == ".safetensors":
            found |= load_file(file)
    assert found.keys() == SOME.keys()
    for key, tensor in SOME.items():
        assert found[key].dtype == tensor.dtype
        assert torch.equal(found[key], tensor)
    again = TensorStore(out, "again")  # through the index, if there is one
    assert again.specs.keys() == SOME.keys()
    assert written[-1].name == ("model.safetensors" if limit == 10**9 else "model.safetensors.index.json")


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_pickles_run_no_code(tmp_path: Path):
    torch.save({"a": Harmful(tmp_path / "harm")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin of some cannot be loaded as plain tensors"):
        TensorStore(tmp_path, "some")
    assert not (tmp_path / "harm").exists()


def test_training_arguments_are_not_read(tmp_path: Path):
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"a": Harmful(tmp_path / "harm")}, tmp_path / "training_args.bin")
    assert list(TensorStore(tmp_path, "some").specs) == ["a"]


@pytest.mark.parametrize(
    ("weight_map", "error", "message"),
    [
        ({"a": "../secret.safetensors"}, ValueError, "outside its folder"),
        ({"a": "/etc/passwd"}, ValueError, "outside its folder"),
        ({"a": "one.safetensors", "b": "two.safetensors"}, FileNotFoundError, r"two\.safetensors"),
        ({"a": "one.safetensors", "b": "one.safetensors"}, ValueError, "lack 1 tensors of its index: b"),
    ],
)
def test_indexes_that_do_not_hold(tmp_path: Path, weight_map: dict, error: type, message: str):
    save_file({"a": torch.ones(2)}, tmp_path / "one.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(error, match=message):
        TensorStore(tmp_path, "some")


def test_damaged_files_are_named(tmp_path: Path):
    save_file({"a": torch.ones(200)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors of some is damaged"):
        TensorStore(tmp_path, "some")
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        TensorStore(tmp_path / "none", "nothing")


def test_a_tensor_stored_twice_is_refused(tmp_path: Path):
    for name in ("one", "two"):
        save_file({"a": torch.ones(2)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match="holds the tensor a twice"):
        TensorStore(tmp_path, "some")


MEASURE = """
import sys
from pathlib import Path
from video_ma2mba.conversion.tensor_store import TensorStore, write_shards
def peak():  # of this program; getrusage counts that of the process which started it as well
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

store = TensorStore(Path(sys.argv[1]), "big")
store.read(next(iter(store.specs)))[:1].clone()
store.close()
before = peak()
Path(sys.argv[2]).mkdir()
write_shards(Path(sys.argv[2]), store.specs, store.read, 10**9)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak of memory")
def test_memory_is_that_of_one_file(tmp_path: Path):
    megabytes = 48
    for number in range(6):
        tensors = {f"{number}.{i}": torch.full((megabytes // 4 * 2**18,), float(i)) for i in range(4)}
        save_file(tensors, tmp_path / f"{number}.safetensors")
    arguments = [sys.executable, "-c", MEASURE, str(tmp_path), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 6 * megabytes * 2**20
    assert int(done.stdout.splitlines()[-1]) < 1.5 * megabytes * 2**20


class Strange:
    """An object that a file may not bring along."""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "f.pth cannot be loaded as plain tensors: it is empty"),
        (b"<!DOCTYPE html><html>404</html>", "it was not written by torch.save"),
        (b"hello world" * 50, "it was not written by torch.save"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "it is a Git LFS pointer"),
        (lambda: Strange(), r"it holds [\w.]*Strange; where you trust the file, save its tensors alone"),
        (lambda: torch.zeros(4000), "it is damaged or not whole"),
    ],
    ids=["empty", "page", "text", "pointer", "object", "half"],
)
def test_what_is_no_file_of_tensors_is_told_by_what_it_is(tmp_path: Path, content, said: str):
    file = tmp_path / "f.pth"
    if callable(content):
        torch.save(content(), file)
        if "damaged" in said:
            file.write_bytes(file.read_bytes()[:6000])
    else:
        file.write_bytes(content)
    with pytest.raises(ValueError, match=said) as caught:
        load_pickle(file, "f.pth")
    assert "\n" not in str(caught.value)
