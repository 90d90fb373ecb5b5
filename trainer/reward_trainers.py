"""Learning from rewards: TRL's `GRPOTrainer` and `RLOOTrainer` for prompts with videos and pictures in them.

Both ask each prompt G times. Here a video is read once for all its answers, in generation, from whose state they fork,
and again once in every forward pass of training, through which their gradients come together in the same state.

TRL passes prompts on as token ids and knows nothing of videos. So what it gets is a number: each prompt is kept here,
and its ids begin with a code, of tokens that no text shows, by which model and trainer find it again. Everything else
(rewards, advantages, losses, reference model) is TRL's own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..modeling_video_ma2mba.modeling_video_ma2mba import VideoMa2mbaForConditionalGeneration
from ..processing.processing_video_ma2mba import VideoMa2mbaProcessor
from .answer_scores import replaced_function, score_answers
from .data.row_formats import chat_messages
from .training_inputs import undecoded_rows

_BITS = 31
_MEDIA = ("video", "videos", "image", "images")


@dataclass
class KeptPrompt:
    """One prompt as the model takes it: `input_ids` (1, P), and with media also `pixel_values_videos` (F, 3, h, w)
    uint8 and `num_frames`."""

    inputs: dict[str, Tensor]


class PromptCoder:
    """Stands between TRL and a processor: keeps prompts and gives their codes for ids.

    Args:
        processor: a `VideoMa2mbaProcessor`. Whatever else is asked of this object goes to it.
        model: in training or evaluation; prompts of the latest batch of each are kept.
        video_settings: `fps`, `num_frames`, `max_frames`.
    """

    def __init__(self, processor: Any, model: nn.Module, video_settings: Mapping[str, Any]) -> None:
        self.processor, self.model, self.video_settings = processor, model, dict(video_settings)
        self.kept: dict[bool, dict[int, KeptPrompt]] = {True: {}, False: {}}
        self._next = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)

    def __call__(self, text: Sequence[str], **_: Any) -> dict[str, list[list[int]]]:
        """Prompts that are plain texts."""
        return self._coded(list(text), lambda prompt: self.processor(text=[prompt], return_tensors="pt"))

    def apply_chat_template(
        self, conversation: Any, chat_template: str | None = None, tokenize: bool = False, **settings: Any
    ) -> Any:
        """As the processor's, but batches of token ids come coded."""
        if not tokenize:
            return self.processor.apply_chat_template(conversation, chat_template, tokenize=False, **settings)
        settings = {name: value for name, value in settings.items() if name not in ("return_dict", "tools", "padding")}

        def encoded(messages: Any) -> Any:
            settings_now = {**self.video_settings, **settings}
            messages = [self._windowed(message) for message in messages]
            return self.processor.apply_chat_template(
                [messages], chat_template, tokenize=True, return_dict=True, return_tensors="pt", **settings_now
            )

        return self._coded(list(conversation), encoded)

    def _windowed(self, message: dict[str, Any]) -> dict[str, Any]:
        """The message with videos opened of which only a part is meant."""
        if not isinstance(message["content"], list):
            return message
        parts = []
        for part in message["content"]:
            window = {name: part[name] for name in ("start", "end") if part.get(name) is not None}
            if window and part.get("video_url") is not None:
                rate = {k: v for k, v in self.video_settings.items() if v is not None}
                part = {
                    "type": "video",
                    "video": self.processor.video_processor.open(part["video_url"], **rate, **window),
                }
            parts.append(part)
        return {**message, "content": parts}

    def _coded(self, prompts: list[Any], encode: Any) -> dict[str, list[list[int]]]:
        kept = self.kept[self.model.training] = {}
        rows: list[list[int]] = []
        for place, prompt in enumerate(prompts):
            if place and _same(prompt, prompts[place - 1]):  # TRL repeats a prompt for each of its answers
                rows.append(rows[-1])
                continue
            batch = encode(prompt)
            names = ("input_ids", "pixel_values_videos", "num_frames")
            kept[self._next] = KeptPrompt({name: batch[name] for name in names if name in batch})
            words = [token for token in batch["input_ids"][0].tolist() if token != self.processor.video_token_id]
            rows.append([*self._code(self._next), *words])
            self._next = (self._next + 1) % 2**_BITS
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    def _code(self, number: int) -> list[int]:
        """The number's bits, as tokens that are left out where ids are shown as text."""
        zero, one = self.processor.tokenizer.eos_token_id, self.processor.video_token_id
        return [one, *(one if number >> bit & 1 else zero for bit in range(_BITS))]

    def find(self, ids: Tensor) -> tuple[int, KeptPrompt]:
        """The number and the prompt of a row (S,) of ids without padding.

        Raises:
            ValueError: the row has no code of a prompt that is kept.
        """
        bits = (ids[1 : 1 + _BITS] == self.processor.video_token_id).tolist()
        number = sum(bit << place for place, bit in enumerate(bits))
        for kept in self.kept.values():
            if len(bits) == _BITS and int(ids[0]) == self.processor.video_token_id and number in kept:
                return number, kept[number]
        raise ValueError("these token ids were not made by this trainer's own prompts: let it tokenize them")

    def groups(self, input_ids: Tensor, attention_mask: Tensor | None) -> list[tuple[KeptPrompt, list[int]]]:
        """Each prompt of a batch of coded rows (B, S), padded on the left, with the rows that are its answers."""
        found: dict[int, tuple[KeptPrompt, list[int]]] = {}
        for place, row in enumerate(input_ids):
            real = row if attention_mask is None else row[attention_mask[place].bool()]
            number, prompt = self.find(real)
            found.setdefault(number, (prompt, []))[1].append(place)
        return list(found.values())


def _same(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except (ValueError, RuntimeError):  # arrays: read twice, then
        return False


def install_coded_prompts(model: nn.Module, coder: PromptCoder, temperature: float) -> None:
    """Let `model.generate` and `model(..., labels=..., fused_lm_head=True)`, TRL's way to ask for the scores of
    completions, take coded prompts. `model` is the Video-Ma2mba model itself, not a wrapper of it."""
    plain_forward, plain_generate = replaced_function(model, "forward"), replaced_function(model, "generate")

    def generate(self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **settings: Any) -> Tensor:
        """Coded prompts (B, P) and their completions (B, P + C), padded on the right."""
        answers: list[Tensor] = [input_ids] * len(input_ids)
        for prompt, rows in coder.groups(input_ids, attention_mask):
            inputs = {name: value.to(input_ids.device) for name, value in prompt.inputs.items()}
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            found = plain_generate(self, **inputs, num_return_sequences=len(rows), **settings)
            for place, row in zip(rows, found[:, inputs["input_ids"].shape[1] :], strict=True):
                answers[place] = row
        fill = settings["generation_config"].pad_token_id
        completions = nn.utils.rnn.pad_sequence(answers, batch_first=True, padding_value=fill)
        return torch.cat([input_ids, completions], dim=1)

    @functools.wraps(type(model).forward)  # generation reads the signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:
            return plain_forward(self, *args, **inputs)
        return _completion_scores(
            self, coder, inputs["input_ids"], inputs.get("attention_mask"), inputs["labels"], temperature
        )

    forward.same_tokens = True  # to a decoder, it is the plain one
    model.forward, model.generate = MethodType(forward, model), MethodType(generate, model)


def _completion_scores(
    model: Any,
    coder: PromptCoder,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    temperature: float,
) -> FusedCausalLMOutput:
    """Scores of the completions, the last C columns of (B, S), in which `labels` are not -100; (B, C) each."""
    columns = (labels != -100).any(dim=0).nonzero()
    width = labels.shape[1] - int(columns[0]) if len(columns) else 1
    completions, wanted = input_ids[:, -width:], labels[:, -width:]
    hidden: list[Tensor] = [input_ids] * len(input_ids)
    for prompt, rows in coder.groups(
        input_ids[:, :-width], None if attention_mask is None else attention_mask[:, :-width]
    ):
        index = torch.tensor(rows, device=input_ids.device)
        found = _hidden_states(model.model, prompt, completions[index], wanted[index] != -100)
        for place, row in zip(rows, found, strict=True):
            hidden[place] = row
    chosen = wanted != -100
    log_probs, entropy, is_top1 = score_answers(
        model.get_output_embeddings(), torch.stack(hidden)[chosen], wanted[chosen], temperature
    )
    count = int(chosen.sum())
    tables = [
        torch.zeros(wanted.shape, dtype=values.dtype, device=values.device).masked_scatter(
            chosen.to(values.device), values[:count]
        )
        for values in (log_probs, entropy, is_top1)
    ]
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / max(count, 1),
        log_probs=tables[0] if count else tables[0] + 0 * log_probs.sum(),
        entropy=tables[1],
        is_top1=tables[2],
        label_mask=chosen,
    )


def _hidden_states(model: Any, prompt: KeptPrompt, completions: Tensor, mask: Tensor) -> Tensor:
    """Hidden states (n, C, D) that predict the completions (n, C) of one prompt, which is read once."""
    embeddings, language_model = model.get_input_embeddings(), model.language_model
    ids = prompt.inputs["input_ids"].to(completions.device)
    if "pixel_values_videos" in prompt.inputs:
        embedded = model.embed_inputs(ids, prompt.inputs["pixel_values_videos"], prompt.inputs["num_frames"])
    else:
        embedded = model._touch_vision(embeddings(ids))
    last = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
    last[:, -1] = True
    first, state = language_model.scan(embedded, output_positions=last)
    first = first.expand(len(completions), 1, -1)
    if completions.shape[1] == 1:
        return first
    state.batch_repeat_interleave(len(completions))
    rest, _ = language_model.scan(embeddings(completions[:, :-1]), state, attention_mask=mask[:, :-1].long())
    return torch.cat([first, rest.to(first)], dim=1)


class _CodedPrompts:
    """What both trainers add to TRL's."""

    _config: type

    def __init__(
        self,
        model: str | nn.Module,
        reward_funcs: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        fps: float | None = None,
        num_frames: int | None = None,
        max_frames: int | None = None,
        **other: Any,
    ) -> None:
        args = self._config("video-ma2mba-rewards") if args is None else args
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(args, name, False):
                raise ValueError(f"{name}=True does not work here: answers fork from the state after their video")
        for name in ("tools", "environment_factory", "rollout_func"):
            if other.get(name) is not None:
                raise ValueError(f"{name} does not work here: prompts are read by the trainer itself")
        if isinstance(model, str):
            options = {"dtype": torch.float32, **(args.model_init_kwargs or {})}
            model, args.model_init_kwargs = VideoMa2mbaForConditionalGeneration.from_pretrained(model, **options), None
        if processing_class is None:
            processing_class = VideoMa2mbaProcessor.from_pretrained(model.config.name_or_path)
        if args.ddp_find_unused_parameters is None:
            args.ddp_find_unused_parameters = False  # every rank touches every part in every step
        args.remove_unused_columns = False  # TRL would leave videos out
        super().__init__(
            model=model,
            reward_funcs=reward_funcs,
            args=args,
            train_dataset=undecoded_rows(train_dataset),
            eval_dataset=undecoded_rows(eval_dataset),
            processing_class=processing_class,
            **other,
        )
        self.data_collator = _with_media_in_prompts
        video_model = self.accelerator.unwrap_model(self.model)
        video_model = video_model.get_base_model() if hasattr(video_model, "get_base_model") else video_model
        video_model.model.freeze_unused_parameters()  # adapters may have come into layers that never run
        settings = {"fps": fps, "num_frames": num_frames, "max_frames": max_frames}
        self.processing_class = PromptCoder(processing_class, self.model, settings)
        for one in (video_model, self.ref_model):
            if one is not None:
                install_coded_prompts(self.accelerator.unwrap_model(one), self.processing_class, self.temperature)


def _with_media_in_prompts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with their videos and images as parts of their prompts, spelled so that TRL passes them on as they are."""
    found = []
    for row in rows:
        held = {name: row[name] for name in (*_MEDIA, "start", "end") if row.get(name) is not None}
        rest = {name: value for name, value in row.items() if name not in held and name not in _MEDIA}
        prompt = row["prompt"]
        if isinstance(prompt, str) and any(name in held for name in _MEDIA):
            prompt = [{"role": "user", "content": prompt}]
        if not isinstance(prompt, str):
            messages = chat_messages({**held, "messages": prompt}, None)
            prompt = [{**message, "content": [_spelled(part) for part in message["content"]]} for message in messages]
        found.append({**rest, "prompt": prompt})
    return found


def _spelled(part: dict[str, Any]) -> dict[str, Any]:
    kind = part["type"]
    if kind == "text":
        return part
    source = part["frames"] if "frames" in part else part[kind]
    window = {name: part[name] for name in ("start", "end") if name in part}
    return {"type": f"{kind}_url", f"{kind}_url": source, **window}


class VideoMa2mbaGRPOTrainer(_CodedPrompts, GRPOTrainer):
    """TRL's `GRPOTrainer` for prompts with videos and pictures.

    Args:
        model: a model, a PEFT model, or a directory or Hub id to load (in fp32 unless `args.model_init_kwargs` say
            otherwise).
        reward_funcs, args, peft_config, …: as in TRL.
        train_dataset, eval_dataset: rows with `prompt`, messages with videos and images in their parts, or such in
            columns `video`, `videos`, `image`, `images` beside it; `start`, `end` in seconds.
        processing_class: default: the processor saved beside the model.
        fps, num_frames, max_frames: frames to look at; None takes the processor's settings.

    Raises:
        ValueError: vLLM, tools or a rollout function are asked for.
    """

    _config = GRPOConfig
    _tag_names = ["trl", "grpo", "video-ma2mba"]
    _name = "Video-Ma2mba GRPO"


class VideoMa2mbaRLOOTrainer(_CodedPrompts, RLOOTrainer):
    """TRL's `RLOOTrainer` for prompts with videos and pictures; arguments as in `VideoMa2mbaGRPOTrainer`."""

    _config = RLOOConfig
    _tag_names = ["trl", "rloo", "video-ma2mba"]
    _name = "Video-Ma2mba RLOO"
