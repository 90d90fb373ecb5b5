"""Processes of `test_reading_shared.py`: python shared_reading_worker.py FOLDER VIDEO CHECKPOINT

For 2 and for 3 ranks, forked from this process so that everything is imported once: each scenario reads alone, then
together, and compares. The last one runs the command as torchrun starts it.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from video_ma2mba import (
    VideoMa2mbaConfig,
    VideoMa2mbaForConditionalGeneration,
    VideoMa2mbaProcessor,
    VideoMa2mbaVideoProcessor,
    VideoState,
)
from video_ma2mba.modeling_video_ma2mba.reading_shared import read_shared, reading_blocks
from video_ma2mba.processing.byte_tokenizer import build_byte_tokenizer

VIDEO = 2  # token id
SECONDS = 100


def tiny_model(layers: int = 5, clip: int = 1) -> VideoMa2mbaForConditionalGeneration:
    """fp64, 4 tokens a frame, read 4 frames at a time; `clip` frames go through the tower together."""
    text = {"vocab_size": 272, "pad_token_id": 1, "hidden_size": 16, "num_hidden_layers": layers, "state_size": 8,
            "head_dim": 8, "chunk_size": 8}  # fmt: skip
    vision = {"model_type": "clip_vision_model", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 16, "patch_size": 4, "projection_dim": 16}  # fmt: skip
    config = VideoMa2mbaConfig(
        text_config=text, vision_config=vision, video_token_id=VIDEO, vision_chunk_frames=3, prefill_segment_length=18
    )
    torch.manual_seed(layers)
    model = VideoMa2mbaForConditionalGeneration(config).double().eval()
    model.model.language_model.prefill_segment_length = 7  # a piece takes several passes
    assert model.config.read_chunk_frames == 4
    return model


def pixels(frames: int) -> Tensor:
    generator = torch.Generator().manual_seed(frames)
    return torch.randint(0, 256, (frames, 3, 16, 16), dtype=torch.uint8, generator=generator)


def chunks(found: Tensor) -> list[SimpleNamespace]:
    times = np.arange(len(found)) / 2
    return [
        SimpleNamespace(pixels=found[i : i + 4].permute(0, 2, 3, 1).numpy(), timestamps=times[i : i + 4])
        for i in range(0, len(found), 4)
    ]


def assert_same(found: VideoState, expected: VideoState, bits: bool = True) -> None:
    for one, other in ((found.ssm, expected.ssm), (found.conv, expected.conv)):
        if bits:
            assert torch.equal(one, other), (one - other).abs().max()
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert found.seen_tokens == expected.seen_tokens
    assert found.metadata == expected.metadata, (found.metadata, expected.metadata)


def any_length(rank: int, world: int, folder: Path, video: Path) -> None:
    """Fewer segments than ranks, uneven ones, more and fewer blocks than ranks, rows of a batch, a state read on."""
    for layers in (5, 1):
        model = tiny_model(layers)
        prefix, state = torch.tensor([[7, 8, VIDEO]]), None
        for frames in (1, 9, 29):
            found, seen = pixels(frames), []
            alone = model.read(prefix, [iter(chunks(found))], state)
            own = iter(chunks(found)[rank::world])
            together = read_shared(model.model, prefix, own, dist.group.WORLD, state, seen.append)
            assert_same(together, alone)
            assert seen == sorted({min(4 * world * n, frames) for n in range(1, 9)})
            everything = {"pixel_values_videos": found, "past_key_values": state and state.fork(), "use_cache": True}
            ids = torch.cat([torch.tensor([[7, 8]]), torch.full((1, 4 * frames), VIDEO)], dim=1)
            with torch.no_grad():
                whole = model(input_ids=ids, **everything).past_key_values
            whole.metadata = alone.metadata
            assert_same(together, whole, bits=False)
            state = alone
        rows = VideoState.concatenate([alone, model.read(prefix, [[pixels(3)]])])
        alone = model.read(torch.tensor([[VIDEO]]), [iter(chunks(pixels(14)))], rows)
        own = iter(chunks(pixels(14))[rank::world])
        assert_same(read_shared(model.model, torch.tensor([[VIDEO]]), own, dist.group.WORLD, rows), alone)


def a_file(rank: int, world: int, folder: Path, video: Path) -> None:
    """A real file from `read_video`: parts of it, interrupted and finished by one process or by several."""
    model = tiny_model()
    side = {"height": 16, "width": 16}
    processor = VideoMa2mbaProcessor(build_byte_tokenizer(), VideoMa2mbaVideoProcessor(size=side), tokens_per_frame=4)
    group = dist.group.WORLD
    for chosen in ({"fps": 4}, {"fps": 8, "start": 1.2, "end": 4.1}, {"num_frames": 2}):
        alone = model.read_video(video, processor, **chosen)
        seen = []
        told = {"group": group, "on_frames": lambda *n, seen=seen: seen.append(n), **chosen}
        together = model.read_video(video, processor, **told)
        assert_same(together, alone)
        frames = int(alone.metadata["frames"])
        assert seen[-1] == (frames, frames)

    alone = model.read_video(video, processor, fps=8)
    for first, second in ((group, group), (group, None), (None, group)):
        partial = folder / f"{first is None}-{second is None}.partial"
        calls = []

        def stop(read: int, expected: int, calls=calls) -> None:
            calls.append(read)
            if len(calls) == 3:
                raise KeyboardInterrupt

        if first is not None or rank == 0:
            settings = {"fps": 8, "partial": partial, "save_seconds": 0.0}
            with contextlib.suppress(KeyboardInterrupt):
                model.read_video(video, processor, on_frames=stop, group=first, **settings)
        dist.barrier()
        if first is not None:
            # As if every process had been started anew: nothing that was under way arrives any more.
            drain(rank, world, model)
        assert partial.exists()
        if second is not None or rank == 0:
            again = []
            found = model.read_video(
                video, processor, fps=8, partial=partial, group=second, on_frames=lambda n, _, a=again: a.append(n)
            )
            assert_same(found, alone)
            assert again[0] > 4 * (world if second else 1), "it began again from the first frame"
        dist.barrier()
    with pytest.raises(ValueError, match="another fps"):
        model.read_video(video, processor, fps=6, partial=partial, group=group)


def drain(rank: int, world: int, model: VideoMa2mbaForConditionalGeneration) -> None:
    """Take what the last rank had sent to the first before all were interrupted after a round."""
    from video_ma2mba.modeling_video_ma2mba.reading_shared import SharedStack, reading_group

    link = reading_group(dist.group.WORLD, torch.device("cpu"))
    stack = model.model.language_model
    shared = SharedStack(stack, link, VideoState.zeros(stack.config, 1, "cpu", torch.float64))
    shared.begun = True
    shared.drop()


def an_error(rank: int, world: int, folder: Path, video: Path) -> None:
    """What one rank cannot decode ends the call on all of them, in any round, and the next one works."""
    model, prefix = tiny_model(), torch.tensor([[7, VIDEO]])
    for failing in (1, 6, world + 1):

        def own(failing=failing):
            for number, chunk in list(enumerate(chunks(pixels(40))))[rank::world]:
                if number == failing:
                    raise OSError("the disk is gone")
                yield chunk

        kind = OSError if failing % world == rank else ValueError
        with pytest.raises(kind, match="the disk is gone"):
            read_shared(model.model, prefix, own(), dist.group.WORLD)
        alone = model.read(prefix, [iter(chunks(pixels(11)))])
        assert_same(read_shared(model.model, prefix, iter(chunks(pixels(11))[rank::world]), dist.group.WORLD), alone)
    for wrong, message in ((prefix[:, :1], "ends in a video"), (prefix, "no frames")):
        with pytest.raises(ValueError, match=message):
            read_shared(model.model, wrong, iter(()), dist.group.WORLD)


def evaluation(rank: int, world: int, folder: Path, video: Path) -> None:
    """Needles and questions about films: what one process finds, long films being read by all ranks together."""
    from video_ma2mba.eval.answer_log import AnswerLog
    from video_ma2mba.eval.answering import Answerer
    from video_ma2mba.eval.lmms_ranks import answer_together
    from video_ma2mba.eval.lmms_requests import Job
    from video_ma2mba.eval.needle_grid import NeedleGrid
    from video_ma2mba.eval.needle_haystack import open_haystack
    from video_ma2mba.eval.needle_search import measure
    from video_ma2mba.eval.state_store import Reading, StateStore
    from video_ma2mba.loading import load_pipeline

    pipe = load_pipeline(sys.argv[3], device="cpu")
    grid, said = NeedleGrid((4, 70, 9), (0.0, 0.5), 2), []
    told = (open_haystack("synthetic", pipe.processor), grid)
    alone = measure(pipe, *told, folder / f"alone{rank}")
    together = measure(pipe, *told, folder / "together", said.append, None, dist.group.WORLD, 60)
    dist.barrier()
    for one, other in zip(alone, together, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    lengths = [sorted({cell["frames"] for cell in found}) for found in everyone_of(said)]
    assert lengths == [[9, 70], [4]], lengths  # the long one together, the others dealt out
    assert len(list((folder / "together" / "cells").iterdir())) == 6

    clip = str(Path(video).with_name("short.png"))
    if rank == 0:
        from PIL import Image

        Image.new("RGB", (32, 32), (200, 30, 30)).save(clip)
    dist.barrier()
    films = [str(video)] * 3 + [clip] * 2
    settings = {"max_new_tokens": 3, "until": []}
    jobs = {
        f"key{n}": Job("films", "test", n, f"What is number {n}?", settings, lambda doc: [doc], False)
        for n in range(len(films))
    }
    answers = []
    for group_rank, ranks, own in ((0, 1, jobs), (rank, world, dict(list(jobs.items())[rank::world]))):
        log = AnswerLog(folder / f"answers{ranks}.jsonl", rank if ranks > 1 else 7 + rank)
        store = StateStore(pipe, Reading(fps=4.0))
        answerer = Answerer(pipe, store, log, share_frames=20)
        found = answer_together(answerer, own, lambda job: films[job.doc_id], group_rank, ranks)
        answers.append({key: (row["answer"], row["frames"]) for key, row in found.items()})
    assert answers[1] == {key: answers[0][key] for key in answers[1]} and len(answers[1]) in (2, 3)
    assert {frames for _, frames in answers[0].values()} == {1, 24}
    # Both ranks read the film of 24 frames, and one of them the picture.
    assert sorted(everyone_of(store.tally.videos_read)) == [1, 2]
    assert sum(everyone_of(answerer.answered)) == 5


def everyone_of(mine: object) -> list:
    from video_ma2mba.eval.ranks import everyone

    return everyone(mine)


SCENARIOS: dict[int, tuple[Callable[[int, int, Path, Path], None], ...]] = {
    2: (a_file, an_error, evaluation),
    3: (any_length, an_error),
}


def connect_as_nccl_does(rank: int, world: int, folder: Path) -> None:
    """The first message of a group between two ranks keeps the host waiting until the other one asks for it, too."""
    store, met = dist.FileStore(str(folder / f"met{world}"), world), set()

    def waiting(call: Callable) -> Callable:
        def connected(tensor: Tensor, other: int, group: dist.ProcessGroup) -> dist.Work:
            pair = f"{group.group_name} {min(rank, other)} {max(rank, other)}"
            if pair not in met:
                met.add(pair)
                store.set(f"{pair}: {rank}", "here")
                store.wait([f"{pair}: {other}"], timedelta(seconds=20))
            return call(tensor, other, group=group)

        return connected

    dist.isend, dist.irecv = waiting(dist.isend), waiting(dist.irecv)


def run(rank: int, world: int, folder: Path, video: Path) -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{world}", rank=rank, world_size=world)
    connect_as_nccl_does(rank, world, folder)
    for scenario in SCENARIOS[world]:
        own = folder / f"{scenario.__name__}{world}"
        own.mkdir(exist_ok=True)
        try:
            scenario(rank, world, own, video)
        except BaseException:
            print(f"--- {scenario.__name__}, rank {rank} of {world}\n{traceback.format_exc()}", flush=True)
            os._exit(1)
        dist.barrier()
    dist.destroy_process_group()


def command(rank: int, words: list[str], port: int, said: Path) -> None:
    """`video-ma2mba` with `words` as one of two processes of torchrun; what it prints goes to `said`."""
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": said.name,
    }  # fmt: skip
    with said.with_name(f"{said.name}{rank}").open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        from video_ma2mba.cli.main import app

        sys.exit(app(words, standalone_mode=True))


def run_together(words: list[str], said: Path) -> tuple[list[int | None], str]:
    """Exit codes of both processes, and all that they printed."""
    # As torchrun's agent keeps it: for the processes, and beyond them.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=command, args=(rank, words, store.port, said)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    return [p.exitcode for p in ranks], "".join(said.with_name(f"{said.name}{r}").read_text() for r in range(2))


def as_torchrun(folder: Path, video: Path, checkpoint: Path) -> None:
    """The command's file holds what one process reads, and what every process would complain of is said once."""
    words = ["read", str(video), "--model", str(checkpoint), "--fps", "4", "--device", "cpu"]
    out = ["--out", str(folder / "two.state")]
    codes, said = run_together([*words, *out], folder / "said")
    assert codes == [0, 0], said
    assert said.count("two.state: 24 frames") == 1, said
    broken = folder / "broken.mp4"
    broken.write_bytes(video.read_bytes()[:100])
    for wrong, complaint in ([*words, *out], "pass --overwrite"), (["read", str(broken), "--out", "x"], "broken.mp4"):
        codes, said = run_together(wrong, folder / complaint)
        assert codes == [2, 2] and said.count("error: ") == said.count("\n") == 1 and complaint in said, said

    from video_ma2mba.loading import load_pipeline  # only now: whoever has computed can no longer be forked

    pipe = load_pipeline(str(checkpoint), device="cpu")
    alone, together = pipe.read(video, fps=4.0), VideoState.load(folder / "two.state")
    assert_same(together, alone)
    assert pipe.ask(together, "What?", max_new_tokens=4) == pipe.ask(alone, "What?", max_new_tokens=4)


def main() -> None:
    folder, video, checkpoint = map(Path, sys.argv[1:])
    assert [list(block) for block in reading_blocks(5, 2)] == [[0], [1], [2], [3], [4]]
    assert [len(block) for block in reading_blocks(64, 2)] == [8] * 8
    assert [len(block) for block in reading_blocks(64, 8)] == [4] * 16
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=run, args=(rank, world, folder, video)) for world in SCENARIOS for rank in range(world)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
    codes = [process.exitcode for process in ranks]
    if any(codes):
        sys.exit(f"exit codes {codes}")
    as_torchrun(folder, video, checkpoint)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
