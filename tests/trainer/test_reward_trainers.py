"""GRPO and RLOO with videos in their prompts: exact scores and gradients, one reading for all answers of a prompt."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from tensor_chats import tiny_model, tiny_processor
from torch.nn import functional as F
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from video_ma2mba.trainer.reward_trainers import PromptCoder, VideoMa2mbaGRPOTrainer, VideoMa2mbaRLOOTrainer

KINDS = {
    "grpo": (VideoMa2mbaGRPOTrainer, GRPOTrainer, GRPOConfig),
    "rloo": (VideoMa2mbaRLOOTrainer, RLOOTrainer, RLOOConfig),
}
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def picture(shade):
    return Image.fromarray(np.full((16, 16, 3), shade, np.uint8))


@pytest.fixture
def clips(tmp_path):
    """Folders of pictures: videos of 2 and 3 frames."""
    for number, frames in enumerate((2, 3)):
        (tmp_path / f"clip{number}").mkdir()
        for frame in range(frames):
            picture(60 * number + 30 * frame).save(tmp_path / f"clip{number}" / f"{frame}.png")
    return [str(tmp_path / f"clip{number}") for number in range(2)]


def rows_of(kind, clips):
    asked = [[{"role": "user", "content": question}] for question in ("How many?", "Which colour is it?")]
    if kind == "plain":
        return [{"prompt": "How many?"}, {"prompt": "Which colour is it?"}]
    if kind == "images":
        return [{"prompt": q, "images": [picture(10 + n), picture(99)]} for n, q in enumerate(asked)]
    if kind == "image":
        return [{"prompt": q, "image": picture(10 + n)} for n, q in enumerate(asked)]
    if kind == "column":
        return [{"prompt": q, "video": clip} for q, clip in zip(asked, clips, strict=True)]
    if kind == "parts":
        parts = [
            [{"type": "video", "video": c}, {"type": "text", "text": q[0]["content"]}]
            for q, c in zip(asked, clips, strict=True)
        ]
        return [{"prompt": [{"role": "user", "content": part}]} for part in parts]
    return [{"prompt": q} for q in asked]


def vowels(completions, **_):
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(len(set(text))) + index % 2 for index, text in enumerate(texts)]


def model_of():
    model = tiny_model()
    model.resize_token_embeddings(272)
    return model


def make(out, kind, rows, own=True, model=None, **options):
    ours, theirs, config = KINDS[kind]
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 5,
        "report_to": [],
        "logging_steps": 1,
        "save_strategy": "no",
        "learning_rate": 1e-2,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "beta": 0.0,
    }
    extra = {name: options.pop(name) for name in ("peft_config",) if name in options}
    kinds = {"max_frames": 4} if own else {}
    return (ours if own else theirs)(
        model_of() if model is None else model,
        vowels,
        config(str(out), **(settings | options)),
        train_dataset=Dataset.from_list(rows),
        processing_class=tiny_processor(),
        **kinds,
        **extra,
    )


def run(trainer):
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2 and all(np.isfinite(entry["loss"]) and entry["grad_norm"] > 0 for entry in logs)
    return {n for n, p in trainer.model.named_parameters() if p.requires_grad and not torch.equal(before[n], p)}


@pytest.mark.parametrize("trainer", KINDS)
@pytest.mark.parametrize("kind", ["parts", "column", "images", "image", "text", "plain"])
def test_two_steps(tmp_path, clips, trainer, kind):
    changed = run(make(tmp_path / "out", trainer, rows_of(kind, clips)))
    assert any("language_model.layers" in name for name in changed)
    seen = any("vision_tower" in name for name in changed) and any("projector" in name for name in changed)
    assert seen == (kind not in ("text", "plain"))


@pytest.mark.parametrize("trainer", KINDS)
def test_text_with_trls_own(tmp_path, trainer):
    assert any(
        "language_model.layers" in name for name in run(make(tmp_path, trainer, rows_of("text", []), own=False))
    )


@pytest.mark.parametrize("trainer", KINDS)
@pytest.mark.parametrize(
    "options", [{"gradient_checkpointing": True}, {"steps_per_generation": 2}, {"temperature": 2.0}]
)
def test_settings(tmp_path, clips, trainer, options):
    run(make(tmp_path / "out", trainer, rows_of("parts", clips) * 2, **options))


@pytest.mark.parametrize("trainer", KINDS)
def test_with_a_reference_model(tmp_path, clips, trainer):
    """TRL loads it anew from where the model came; before the first step the two say the same."""
    model_of().save_pretrained(tmp_path / "model")
    tiny_processor().save_pretrained(tmp_path / "model")
    from video_ma2mba import VideoMa2mbaForConditionalGeneration

    model = VideoMa2mbaForConditionalGeneration.from_pretrained(tmp_path / "model", attn_implementation="eager")
    made = make(tmp_path / "out", trainer, rows_of("parts", clips), model=model, beta=0.1)
    assert made.ref_model is not None
    run(made)
    kl = [entry["kl"] for entry in made.state.log_history if "kl" in entry]
    assert abs(kl[0]) < 1e-5 < abs(kl[1])


def test_with_adapters(tmp_path, clips):
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=r".*language_model.*\.(in_proj|out_proj)")
    changed = run(make(tmp_path / "out", "grpo", rows_of("parts", clips), peft_config=config, beta=0.1))
    assert changed and all("lora" in name for name in changed)


@pytest.fixture
def scored(tmp_path, clips):
    """A trainer, coded prompts with completions of several lengths, and the same written out for a plain forward."""
    trainer = make(tmp_path / "out", "grpo", rows_of("parts", clips), temperature=1.7)
    coder = trainer.processing_class
    prompts = [row["prompt"] for row in trainer.data_collator([dict(row) for row in trainer.train_dataset])]
    ids = coder.apply_chat_template(
        [prompts[0], prompts[0], prompts[1], prompts[1]], tokenize=True, return_dict=True, add_generation_prompt=True
    )["input_ids"]
    completions = [[70, 71, 72, 0], [80, 0], [90, 91, 0], [75]]
    wide, deep = max(map(len, ids)), max(map(len, completions))
    pad = 1
    coded = torch.tensor(
        [[pad] * (wide - len(i)) + i + c + [pad] * (deep - len(c)) for i, c in zip(ids, completions, strict=True)]
    )
    mask = torch.tensor(
        [
            [0] * (wide - len(i)) + [1] * len(i + c) + [0] * (deep - len(c))
            for i, c in zip(ids, completions, strict=True)
        ]
    )
    labels = coded.masked_fill(mask == 0, -100)
    labels[:, :-deep] = -100
    return trainer, prompts, completions, {"input_ids": coded, "attention_mask": mask, "labels": labels}


def test_scores_and_gradients_are_those_of_a_plain_forward_pass(scored):
    trainer, prompts, completions, batch = scored
    model, processor = trainer.model, tiny_processor()
    model.train()
    found = model(**batch, fused_lm_head=True)
    weights = torch.arange(1.0, 17).view(4, 4)
    (found.log_probs * weights).sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total = 0
    for row, completion in enumerate(completions):
        whole = processor.apply_chat_template(
            prompts[row // 2], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        asked = whole["input_ids"].shape[1]
        ids = torch.cat([whole["input_ids"], torch.tensor([completion])], dim=1)
        logits = model(input_ids=ids, pixel_values_videos=whole["pixel_values_videos"]).logits[0, asked - 1 : -1] / 1.7
        spread = logits.log_softmax(-1)
        scores = spread[torch.arange(len(completion)), torch.tensor(completion)]
        entropy = -(spread.exp() * spread).sum(-1)
        padded = F.pad(scores, (0, 4 - len(completion)))
        torch.testing.assert_close(found.log_probs[row], padded, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.entropy[row], F.pad(entropy, (0, 4 - len(completion))), rtol=1e-4, atol=1e-5)
        total = total + (padded * weights[row]).sum()
    total.backward()
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5, msg=name)


def test_a_video_is_read_once_for_all_its_answers(scored, monkeypatch):
    trainer, _, _, batch = scored
    model, frames = trainer.model, []
    tower = model.model.vision_tower.embeddings
    tower.register_forward_hook(lambda module, inputs, output: frames.append(len(inputs[0])))
    model(**batch, fused_lm_head=True)
    assert sum(frames) == 2 + 3
    frames.clear()
    prompt = {name: batch[name][:, :-4] for name in ("input_ids", "attention_mask")}
    out = model.generate(**prompt, generation_config=trainer.generation_config)
    assert sum(frames) == 2 + 3
    assert (
        torch.equal(out[:, : prompt["input_ids"].shape[1]], prompt["input_ids"])
        and out.shape[1] > prompt["input_ids"].shape[1]
    )


def test_codes(scored):
    trainer, _, _, batch = scored
    coder = trainer.processing_class
    assert isinstance(coder, PromptCoder)
    shown = coder.batch_decode(batch["input_ids"][:, :-4], skip_special_tokens=True)
    assert [text.splitlines()[-1] for text in shown[::2]] == ["How many?", "Which colour is it?"]
    groups = coder.groups(batch["input_ids"], batch["attention_mask"])
    assert [rows for _, rows in groups] == [[0, 1], [2, 3]]
    assert [prompt.inputs["num_frames"].tolist() for prompt, _ in groups] == [[2], [3]]
    with pytest.raises(ValueError, match="not made by this trainer"):
        coder.find(torch.tensor([70, 71, 72]))


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_vllm": True}, "use_vllm"), ({"tools": [print]}, "tools"), ({"rollout_func": print}, "rollout_func")],
)
def test_what_does_not_work_is_refused(tmp_path, options, reason):
    config = {name: value for name, value in options.items() if name == "use_vllm"}
    other = {name: value for name, value in options.items() if name != "use_vllm"}
    args = GRPOConfig(str(tmp_path), use_cpu=True, bf16=False, report_to=[])
    for name, value in config.items():
        setattr(args, name, value)
    with pytest.raises(ValueError, match=f"{reason}.* does not work here"):
        VideoMa2mbaGRPOTrainer(model_of(), vowels, args, processing_class=tiny_processor(), **other)
