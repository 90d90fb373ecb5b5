"""The model inside other people's training loops: Trainer, PEFT, autocast, DDP, torch.compile."""

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch.nn.parallel import DistributedDataParallel

from video_ma2mba import VideoMa2mbaForConditionalGeneration

VIDEO, PER_FRAME = 2, 4


def sample(frames: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(6, 262, (6,), generator=generator).tolist()
    ids = torch.tensor([[*text[:2], *[VIDEO] * (frames * PER_FRAME), *text[2:]]])
    labels = ids.clone()
    labels[:, : -3 - seed] = -100
    batch = {"input_ids": ids, "labels": labels}
    if frames:
        shape = (frames, 3, 16, 16)
        batch["pixel_values_videos"] = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return batch


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], **tolerance, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_checkpointing": True},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"segment_length": 3, "layers_per_block": 1, "use_reentrant": False},
        },
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"method": "multi_axis"}},
    ],
    ids=["plain", "on", "old spelling", "new spelling"],
)
def test_stock_trainer_counts_tokens_over_accumulation_steps(make_model, tmp_path, arguments):
    from transformers import Trainer, TrainingArguments

    if "activation_checkpointing" in arguments:
        pytest.importorskip("transformers", minversion="5.23")  # that brought the new spelling

    model = make_model(dtype=torch.float64)
    samples = [sample(3, 0), sample(0, 1), sample(1, 2), sample(2, 3)]
    expected = make_model(dtype=torch.float64).train()
    tokens = sum(int((s["labels"][:, 1:] != -100).sum()) for s in samples)
    for one in samples:
        expected(**one, num_items_in_batch=tokens).loss.backward()
    grads = gradients(expected)

    seen = {}

    class Recorder(Trainer):
        def _clip_grad_norm(self, model):
            seen.update(gradients(model))
            return super()._clip_grad_norm(model)

    recorder = Recorder(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=4,
            max_steps=1,
            learning_rate=0.0,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
            **arguments,
        ),
        train_dataset=samples,
        data_collator=lambda items: items[0],
    )
    recorder.train()
    assert model.is_gradient_checkpointing == bool(arguments)
    assert_same(seen, grads, rtol=1e-6, atol=1e-10)


def test_lora_with_dropout_under_checkpointing(make_model, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        r=2,
        lora_dropout=0.5,
        target_modules=r".*(mixer\.(in_proj|out_proj)|vision_tower\..*\.(q_proj|v_proj))",
        modules_to_save=["multi_modal_projector"],
    )
    model = make_model(dtype=torch.float64)
    adapted = peft.get_peft_model(model, config).train()
    adapted.gradient_checkpointing_enable({"segment_length": 3, "layers_per_block": 1})
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    batch = sample(3, 1)
    torch.manual_seed(0)
    loss = adapted(**batch).loss
    loss.backward()
    trained = {n for n, p in adapted.named_parameters() if p.requires_grad and ".layers.1.self_attn" not in n}
    found = gradients(adapted)
    assert found.keys() == trained, "every adapter in use needs a gradient"
    assert all(gradient.abs().sum() > 0 for gradient in found.values())

    # the same dropout in forward and recomputation: a finite difference along one weight agrees
    name, weight = next((n, p) for n, p in adapted.named_parameters() if "in_proj.lora_B" in n)
    losses = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight[0, 0] += step
        torch.manual_seed(0)
        losses.append(adapted(**batch).loss.item())  # with gradients on: the cells draw their dropout in this order
        with torch.no_grad():
            weight[0, 0] -= step
    assert (losses[0] - losses[1]) / 2e-6 == pytest.approx(found[name][0, 0].item(), rel=1e-3, abs=1e-8)

    adapted.eval()
    with torch.no_grad():
        before = adapted(**batch, logits_to_keep=0).logits
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(**batch, logits_to_keep=0).logits, before)
    merged.save_pretrained(tmp_path)
    loaded = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch, logits_to_keep=0).logits, before)


def test_frozen_parts_get_no_gradient(make_model):
    """Stage 1 of the paper: only the projector learns, through a frozen language model."""
    batch, found = sample(3, 1), []
    for checkpointing in (False, True):
        model = make_model(dtype=torch.float64).train()
        model.requires_grad_(False)
        model.model.multi_modal_projector.requires_grad_(True)
        if checkpointing:
            model.gradient_checkpointing_enable({"segment_length": 4, "layers_per_block": 1})
        model(**batch).loss.backward()
        found.append(gradients(model))
        assert all("multi_modal_projector" in name for name in found[-1])
        assert len(found[-1]) == 4
    assert_same(found[1], found[0], rtol=1e-9, atol=1e-12)


def test_autocast_on_fp32_weights(make_model):
    batch, found = sample(3, 1), []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable({"segment_length": 4, "layers_per_block": 1})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(**batch).loss
        assert loss.dtype == torch.float32
        loss.backward()
        found.append(gradients(model))
    assert all(g.dtype == torch.float32 for g in found[1].values())
    assert found[0].keys() == found[1].keys()
    # both compute in bf16, cut differently: they agree to its precision
    norm = torch.cat([g.flatten() for g in found[0].values()]).norm()
    difference = torch.cat([(found[0][n] - g).flatten() for n, g in found[1].items()]).norm()
    assert difference < 0.02 * norm


def test_compiled_training_step(make_model):
    batch = sample(2, 1)
    model = make_model().train()
    model(**batch).loss.backward()
    expected = gradients(model)
    model.zero_grad()
    torch.compile(model, backend="eager")(**batch).loss.backward()
    assert_same(gradients(model), expected, rtol=1e-3, atol=1e-6)


def _ddp_rank(rank: int, make_state, config, port: int, results) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = VideoMa2mbaForConditionalGeneration(config).double().train()
    model.load_state_dict(make_state)
    model.gradient_checkpointing_enable({"segment_length": 4, "layers_per_block": 1})
    wrapped = DistributedDataParallel(model)  # without find_unused_parameters
    for _ in range(2):  # the second step fails if the first left a gradient out
        model.zero_grad()
        batch = [sample(3, 1), sample(0, 2)][rank]  # rank 1 has text only
        wrapped(**batch, num_items_in_batch=torch.tensor(4)).loss.backward()
    if rank == 0:
        results.put({name: gradient.numpy() for name, gradient in gradients(model).items()})
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore")
def test_ddp_with_a_rank_that_has_no_video(make_model):
    import socket

    model = make_model(dtype=torch.float64).train()
    for batch in (sample(3, 1), sample(0, 2)):
        (model(**batch, num_items_in_batch=torch.tensor(4)).loss / 2).backward()
    expected = gradients(model)

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    arguments = (state, model.config, port, results)
    ranks = [context.Process(target=_ddp_rank, args=(rank, *arguments)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    found = {name: torch.from_numpy(gradient) for name, gradient in results.get(timeout=500).items()}
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert_same(found, expected, rtol=1e-9, atol=1e-12)
