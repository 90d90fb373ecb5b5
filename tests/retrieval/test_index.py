"""The index: what is read, taken over and noticed; a killed process; files that are no index."""

import json
import os
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from video_ma2mba.retrieval.index import Clip, Maker, VideoIndex, update_index

MAKER = Maker("model", 2, 5)


class Videos:
    """Files whose only byte is what decoding gives, and a record of what was decoded and encoded."""

    def __init__(self, folder, names):
        self.folder, self.decoded, self.index = folder, [], folder / "index.safetensors"
        for number, name in enumerate(names):
            (folder / name).write_bytes(bytes([number + 1]))

    def clips(self, *names):
        return [Clip.of(self.folder / name) for name in names]

    def decode(self, clip):
        with open(clip.file, "rb") as file:
            value = file.read()[0]
        if value == 255:
            raise ValueError("damaged")
        self.decoded.append(os.path.basename(clip.file))
        return torch.full((2, 3, 4, 4), value, dtype=torch.uint8)

    @staticmethod
    def encode(pixels):
        value = pixels[:, 0, 0, 0, 0].float()
        return value[:, None] * torch.tensor([[1.0, 0.5]]), value[:, None, None].expand(-1, 3, 5).half()

    def update(self, *names):
        self.decoded.clear()
        return update_index(self.index, MAKER, self.clips(*names), decode=self.decode, encode=self.encode)


@pytest.fixture
def videos(tmp_path):
    return Videos(tmp_path, ["a", "b", "c"])


def test_what_is_read_is_read_once(videos):
    first = videos.update("a", "b")
    assert (first.read, first.kept, first.gone, first.failed) == (2, 0, 0, [])
    assert first.index.vectors.tolist() == [[1.0, 0.5], [2.0, 1.0]]
    assert first.index.tokens(1).shape == (3, 5) and first.index.tokens(1).dtype == torch.float16
    assert (first.index.tokens(1) == 2).all()
    again = videos.update("a", "b")
    assert videos.decoded == [] and (again.read, again.kept) == (0, 2)
    assert VideoIndex(videos.index, MAKER).clips == videos.clips("a", "b")
    assert not videos.index.with_name("index.safetensors.parts").exists()


def test_new_changed_and_gone_files_are_noticed(videos):
    videos.update("a", "b")
    (videos.folder / "b").write_bytes(bytes([9, 9]))
    found = videos.update("b", "c")
    assert sorted(videos.decoded) == ["b", "c"] and (found.read, found.kept, found.gone) == (2, 0, 2)
    assert found.index.vectors[:, 0].tolist() == [9.0, 3.0]
    found = videos.update("c")
    assert videos.decoded == [] and (found.read, found.kept, found.gone) == (0, 1, 1)
    parts = [Clip.of(videos.folder / "c", start, start + 1) for start in (0.0, 1.0)]
    found = update_index(videos.index, MAKER, parts, decode=videos.decode, encode=videos.encode)
    assert len(found.index) == 2 and found.index.clips[1].part.endswith("c from 1 s")


def test_what_cannot_be_read_stops_nothing(videos):
    (videos.folder / "b").write_bytes(bytes([255]))
    found = videos.update("a", "b", "c")
    assert [clip.file[-1] for clip in found.index.clips] == ["a", "c"]
    assert [(clip.file[-1], str(error)) for clip, error in found.failed] == [("b", "damaged")]
    before = videos.index.stat().st_mtime_ns
    assert len(videos.update("a", "b", "c").failed) == 1 and videos.index.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="damaged"):
        update_index(videos.folder / "other", MAKER, videos.clips("b"), decode=videos.decode, encode=videos.encode)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process of its own")
def test_a_killed_process_goes_on_where_it_stopped(videos):
    """Killed while it encodes the third video; half a file of another that was killed while writing."""
    child = os.fork()
    if child == 0:
        encode = videos.encode

        def die_at_c(pixels):
            if int(pixels[0, 0, 0, 0, 0]) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            return encode(pixels)

        videos.encode = die_at_c
        videos.update("a", "b", "c")
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not videos.index.exists()
    parts = sorted(videos.index.with_name("index.safetensors.parts").glob("*.safetensors"))
    assert len(parts) == 2
    parts[0].write_bytes(parts[0].read_bytes()[:20])
    found = videos.update("a", "b", "c")
    assert len(videos.decoded) == 2 and "c" in videos.decoded and len(found.index) == 3
    assert found.index.vectors[:, 0].tolist() == [1.0, 2.0, 3.0]


def broken(kind, tensors, facts):
    """An index that is wrong in some way: tensors and metadata, or bytes."""
    clips = json.loads(facts["clips"])
    match kind:
        case "bytes":
            return b"no safetensors at all", facts
        case "other file":
            return tensors, {"format": "pt"}
        case "other model":
            return tensors, facts | {"model": "another"}
        case "no list":
            return tensors, facts | {"clips": "[[[[["}
        case "a list of other things":
            return tensors, facts | {"clips": '[{"file": 3}, {"file": "a"}]'}
        case "unknown fields":
            return tensors, facts | {"clips": json.dumps([{**clips[0], "run": "rm"}, clips[1]])}
        case "deep list":
            return tensors, facts | {"clips": "[" * 100_000}
        case "too few tensors":
            return {name: tensor for name, tensor in tensors.items() if name != "tokens.1"}, facts
        case "one more":
            return tensors | {"more": torch.zeros(1)}, facts
        case "other shapes":
            return tensors | {"tokens.1": torch.zeros(4, 5).half()}, facts
        case "other widths":
            return {name: tensor[..., :1].contiguous() for name, tensor in tensors.items()}, facts
        case "other types":
            return tensors | {"vectors": torch.zeros(2, 2).int()}, facts
        case "more vectors":
            return tensors | {"vectors": torch.zeros(3, 2)}, facts
        case _:
            return tensors | {"vectors": torch.full((2, 2), torch.nan)}, facts


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("bytes", "cannot be used"),
        ("other file", "it is no index of video-ma2mba retrieve"),
        ("other model", "it was made with another model"),
        ("no list", "its list of videos is damaged"),
        ("a list of other things", "its list of videos is damaged"),
        ("unknown fields", "its list of videos is damaged"),
        ("deep list", "its list of videos is damaged"),
        ("too few tensors", "it lists 2 videos, but does not hold"),
        ("one more", "it lists 2 videos, but does not hold"),
        ("other shapes", "its tensors have other types or shapes"),
        ("other widths", "its tensors have other types or shapes"),
        ("other types", "its tensors have other types or shapes"),
        ("more vectors", "its tensors have other types or shapes"),
        ("no numbers", "it holds vectors that are no numbers"),
    ],
)
def test_what_is_no_index_is_said(videos, kind, said):
    videos.update("a", "b")
    with safe_open(str(videos.index), framework="pt") as file:
        facts = file.metadata()
    content, facts = broken(kind, load_file(videos.index), facts)
    if isinstance(content, bytes):
        videos.index.write_bytes(content)
    else:
        save_file(content, videos.index, facts)
    for open_it in (lambda: VideoIndex(videos.index, MAKER), lambda: videos.update("a", "b")):
        with pytest.raises(ValueError, match=said) as caught:
            open_it()
        assert str(videos.index) in str(caught.value) and "Delete it, or name another with --index" in str(
            caught.value
        )


def test_tokens_that_are_no_numbers_are_said(videos):
    videos.update("a")
    with safe_open(str(videos.index), framework="pt") as file:
        facts = file.metadata()
    save_file(load_file(videos.index) | {"tokens.0": torch.full((3, 5), torch.inf).half()}, videos.index, facts)
    with pytest.raises(ValueError, match="it holds tokens that are no numbers. Delete it"):
        VideoIndex(videos.index, MAKER).tokens(0)


def test_half_an_index_is_said(videos):
    videos.update("a", "b")
    videos.index.write_bytes(videos.index.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cannot be used"):
        VideoIndex(videos.index, MAKER)
    with pytest.raises(FileNotFoundError, match="there is no such index"):
        VideoIndex(videos.folder / "none", MAKER)
