"""The processor: text, videos and images in; token ids and pixels out."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from tokenizers import AddedToken
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .chat_format import (
    CHAT_TEMPLATE,
    DEFAULT_FRAME_SEPARATOR,
    DEFAULT_SYSTEM_PROMPT,
    IMAGE_MARK,
    ROLE_TAG_ENDS,
    ROLE_TAGS,
    Chat,
    assign_media,
    fill_placeholders,
    is_conversation,
    plain_spaces,
    render_chat,
    require_sources,
    restored,
    stand_ins,
)
from .frame_times import (
    NO_TIMES,
    SUBTITLE_TOKENS,
    TIME_TOKENS,
    TIMES_EVERY,
    TIMES_REQUEST,
    FrameText,
    TimedReader,
    as_clocks,
    check_frame_times,
    parse_span,
    spread_cues,
    time_tokens,
    within,
)
from .text_batches import IGNORED_LABEL, pad_batch
from .video_processing_video_ma2mba import FIXED_SETTINGS, SAMPLING_NAMES, drop_fixed_settings, list_rates
from .video_reader import FrameReader
from .video_subtitles import find_subtitles

_HALF_CHARACTERS = re.compile("[\ud800-\udfff]")  # of an emoji that was cut, say: no tokenizer takes them
SUBTITLE_NAMES = ("subtitles", "subtitle_tokens")
VIDEO_NAMES = (*SAMPLING_NAMES, *SUBTITLE_NAMES, "do_sample_frames", "video_metadata", "return_metadata", "device")
RETURN_NAMES = ("return_attention_mask", "return_mm_token_type_ids", "return_tensors")
NEUTRAL_TEXT: dict[str, tuple[Any, ...]] = {
    "return_token_type_ids": (False,),
    "return_offsets_mapping": (False,),
    "return_special_tokens_mask": (False,),
    "return_overflowing_tokens": (False,),
    "return_length": (False,),
    "return_text_replacement_offsets": (False,),
    "is_split_into_words": (False,),
    "stride": (0,),
    "verbose": (True, False),
    "tools": ([], ()),
    "documents": ([], ()),
}
"""Settings of transformers' tokenizers and templates that are not supported: what is accepted, besides None, as asking
for nothing."""
GROUPS = ("text_kwargs", "videos_kwargs", "images_kwargs", "common_kwargs", "tokenizer_kwargs", "audio_kwargs")
TEXT_SETTINGS = ("padding", "padding_side", "truncation", "max_length", "pad_to_multiple_of", "add_special_tokens")
_ABOUT_THE_MODEL = {
    *("dtype", "torch_dtype", "device_map", "max_memory", "low_cpu_mem_usage", "attn_implementation"),
    *("quantization_config", "offload_folder", "offload_state_dict", "offload_buffers", "tp_plan", "tp_size"),
    *("device_mesh", "distributed_config", "use_kernels", "kernel_config", "experts_implementation", "state_dict"),
}


class VideoMa2mbaProcessor(ProcessorMixin):
    """Tokenizer, frame processor and chat template of one model.

    Args:
        tokenizer: must know `video_token` as one token.
        video_processor: a `VideoMa2mbaVideoProcessor`.
        chat_template: Jinja template; None takes the paper's chat schema.
        tokens_per_frame: placeholder tokens a frame takes; must be the model's `config.tokens_per_frame`.
        video_token: stands for a video in text; repeated for every frame's features in token ids.
        system_prompt: text of the system turn when messages have none; empty leaves that turn out.
        frame_separator: what stands between the frames and the question of a turn.
        frame_times: "none"; or time stamps are read between frames, as "text", or as "learned" tokens; must be the
            model's `config.frame_times` (`set_frame_times` of a model changes both).
        frame_times_every: seconds between two of them.

    Raises:
        ValueError: the tokenizer does not know `video_token`, or a number is out of range.
    """

    image_token = IMAGE_MARK

    def __init__(
        self,
        tokenizer: Any = None,
        video_processor: Any = None,
        chat_template: str | None = None,
        tokens_per_frame: int = 144,
        video_token: str = "<video>",
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        frame_separator: str = DEFAULT_FRAME_SEPARATOR,
        frame_times: str = "none",
        frame_times_every: float = TIMES_EVERY,
    ):
        check_frame_times(frame_times, frame_times_every)
        if tokens_per_frame != int(tokens_per_frame) or tokens_per_frame < 1:
            raise ValueError(f"tokens_per_frame must be a whole number of at least 1, not {tokens_per_frame}")
        # A pipeline loads everything with the same arguments, and a tokenizer keeps those it does not know: a data
        # type or a quantisation among them could not be written by `save_pretrained`.
        for name in _ABOUT_THE_MODEL & tokenizer.init_kwargs.keys():
            del tokenizer.init_kwargs[name]
        super().__init__(tokenizer, video_processor, chat_template=chat_template or CHAT_TEMPLATE)
        self.tokens_per_frame = int(tokens_per_frame)
        self.video_token = video_token
        self.system_prompt = system_prompt
        self.frame_separator = frame_separator
        self.frame_times = frame_times
        self.frame_times_every = float(frame_times_every)
        if video_token not in tokenizer.get_vocab():
            raise ValueError(
                f"the tokenizer has no token {video_token!r}; add it with video_ma2mba.processing.byte_tokenizer."
                "add_video_tokens"
            )
        self.video_token_id = tokenizer.convert_tokens_to_ids(video_token)
        if frame_times == "learned" and not set(TIME_TOKENS) <= tokenizer.get_vocab().keys():
            raise ValueError(
                "frame_times='learned', but the tokenizer has no tokens for times: add them with "
                "model.set_frame_times(processor, 'learned')"
            )

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accept our video processor where transformers knows video processors only through torchvision."""
        if argument_name == "video_processor":
            from transformers.video_processing_utils import BaseVideoProcessor

            if not isinstance(argument, BaseVideoProcessor):
                raise TypeError(f"video_processor must be a video processor, not {type(argument).__name__}")
            return BaseVideoProcessor
        return super().check_argument_for_proper_class(argument_name, argument)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values_videos", "num_frames"]

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        videos: Any = None,
        images: Any = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tokenize prompts and read their videos completely.

        Args:
            text: one prompt or several. Each `<video>` (or `<image>`) in them takes the next of `videos` (`images`).
            videos: one video, a list of videos, or a list of lists (one for each prompt).
            images: one image, a list, or a list of lists; each becomes a video of one frame.
            return_tensors: "pt", "np" or None (token ids as lists).
            kwargs: for videos `fps`, `num_frames`, `start`, `end`, `max_frames`, `return_metadata`, `subtitles` and
                `subtitle_tokens` (see `timed`); for text
                `padding` (by default as far as tensors need it), `padding_side` (default: the tokenizer's),
                `truncation`, `max_length`, `pad_to_multiple_of`, `add_special_tokens` (default False),
                `return_attention_mask` (default True), `return_mm_token_type_ids` ("mm_token_type_ids": 1 for tokens
                of images, 2 for those of videos); all of them also in groups, `videos_kwargs`, `text_kwargs`, …;
                `do_sample_frames`, `video_metadata`, `device` as in the video processor. Settings of transformers'
                own processors that say what is done anyway are accepted.

        Returns:
            `input_ids`, `attention_mask` `(B, S)`; with videos also `pixel_values_videos` uint8
            `(sum F, 3, height, width)` and `num_frames` int64 `(number of videos,)`, in the order of the placeholders.

        Raises:
            TypeError: an unknown setting.
            ValueError: placeholders and videos do not match in number, and what reading a video raises.
        """
        text_settings, video_settings = self._settings(kwargs)
        if text is None:
            if images is not None:
                raise ValueError(
                    "images need a text with an <image> for each of them: processor(text=..., videos=..., images=...)"
                )
            if videos is None:
                raise ValueError("there is nothing to process: give a text, videos, or both")
            return self.video_processor(videos, return_tensors=return_tensors, **video_settings)
        texts = [text] if isinstance(text, str) else list(text)
        chats = [Chat(prompt, []) for prompt in texts]
        assign_media(chats, videos, self.video_token, "videos")
        assign_media(chats, images, self.image_token, "images")
        return self._encode_batch(chats, return_tensors, text_settings, video_settings)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        return_assistant_tokens_mask: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Render a conversation (or a batch of them) with its videos, and by request tokenize it.

        Args:
            conversation: role/content dicts; see `render_chat`. Or a list of such conversations.
            tokenize, return_dict: by default the rendered text is returned; with `tokenize` token ids, with both
                everything `__call__` returns.
            return_assistant_tokens_mask: add "assistant_masks", 1 for tokens the assistant wrote (the end of its turn
                included).
            processor_kwargs: settings of `__call__`; they may also be given directly.
            kwargs: the rest goes to the template.

        Raises:
            ValueError: an empty question where an answer is asked for (`add_generation_prompt`), a malformed message,
                a video or image without a source; and what reading a video raises.
        """
        names = {*TEXT_SETTINGS, *VIDEO_NAMES, *RETURN_NAMES, *FIXED_SETTINGS, *GROUPS}
        read = set(re.findall(r"\w+", chat_template or self.chat_template)) - names
        names |= NEUTRAL_TEXT.keys() - read
        for name in list(kwargs):
            if kwargs[name] is None or (kwargs[name] is False and name not in names):
                kwargs.pop(name)  # nothing is asked for
            elif name not in names and name not in read:
                raise TypeError(f"unknown setting {name}: neither the processor nor the chat template knows it")
        given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
        settings = {**given, **(processor_kwargs or {})}
        return_tensors = settings.pop("return_tensors", return_tensors)
        return_tensors = None if return_tensors == "auto" else return_tensors
        single = is_conversation(conversation)
        chats = [
            self._render(
                messages,
                chat_template,
                require_question=add_generation_prompt,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **kwargs,
            )
            for messages in ([conversation] if single else conversation)
        ]
        text_settings, video_settings = self._settings(settings)  # what makes no sense is told in any case
        if not tokenize:
            return chats[0].shown if single else [chat.shown for chat in chats]
        for chat in chats:
            require_sources(chat)
        batch = self._encode_batch(
            chats, return_tensors, text_settings, video_settings, return_masks=return_assistant_tokens_mask
        )
        return batch if return_dict else batch["input_ids"]

    def streaming_prompt(
        self, messages: Any, add_generation_prompt: bool = True, **video_settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor, list[FrameReader]]:
        """Prepare a conversation for reading its videos as a stream.

        Args:
            messages: one conversation; see `render_chat`.
            video_settings: `fps`, `num_frames`, `start`, `end`, `max_frames` for this call; `subtitles` and
                `subtitle_tokens` (see `timed`). Chunks of the readers carry what is read between frames.

        Returns:
            `(prefix, question, readers)`: int64 `(1, S)` token ids up to and including the last video, each video
            being ONE token; int64 `(1, Q)` token ids of what follows; and a reader of each video, in order. Without
            videos the prefix is empty.

        Raises:
            ValueError: an empty question, a malformed message, a video without a source.
        """
        chat = self._render(
            messages, None, require_question=add_generation_prompt, add_generation_prompt=add_generation_prompt
        )
        require_sources(chat)
        ids, _ = self._encode(chat)
        readers = self._open_media(chat, video_settings)
        places = [place for place, token in enumerate(ids) if token == self.video_token_id]
        cut = places[-1] + 1 if places else 0
        return torch.tensor([ids[:cut]], dtype=torch.long), torch.tensor([ids[cut:]], dtype=torch.long), readers

    def tokenize_conversation(
        self, messages: Any, videos: Any = None, images: Any = None, **video_settings: Any
    ) -> dict[str, torch.Tensor]:
        """Prepare one conversation for training, its videos read completely.

        Args:
            messages: one conversation; videos in it may be placeholders without a source.
            videos, images: the sources of those placeholders, in order.
            video_settings: `fps`, `num_frames`, `start`, `end`, `max_frames` for this call.

        Returns:
            `input_ids` int64 `(S,)`; `labels` int64 `(S,)`, -100 but for the assistant's answers and the end-of-text
            token of each; and with videos `pixel_values_videos` uint8 `(sum F, 3, height, width)` and `num_frames`
            int64 `(number of videos,)`.

        Raises:
            ValueError: there is no answer to learn, or placeholders and videos do not match.
        """
        chat = self._render(messages, None, require_question=False)
        chat.videos = fill_placeholders(chat.videos, videos, "videos")
        chat.images = fill_placeholders(chat.images, images, "images")
        batch = self._encode_batch([chat], None, {}, self._settings(video_settings)[1], return_masks=True)
        input_ids, mask = (torch.tensor(batch.pop(name)[0]) for name in ("input_ids", "assistant_masks"))
        if not mask.any():
            raise ValueError("the conversation has no answer of the assistant to learn from")
        del batch["attention_mask"]
        return {"input_ids": input_ids, "labels": torch.where(mask == 1, input_ids, IGNORED_LABEL), **batch}

    def conversation_tokens(
        self, messages: Any, chat_template: str | None = None, given_answers: int = 0
    ) -> tuple[list[int], list[int]]:
        """Token ids of one conversation, each video and image being ONE token, and 1 for what the assistant wrote, its
        first `given_answers` answers excepted.

        Nothing is opened: videos may lack a source. Raises what `render_chat` raises.
        """
        chat = self._render(messages, chat_template, require_question=False)
        chat.answers = chat.answers[given_answers:]
        return self._encode(chat)

    def timed(self, reader: Any, subtitles: Any = None, subtitle_tokens: int | None = None) -> Any:
        """A reader whose chunks carry what is read between frames: time stamps, where the model knows them, and
        subtitles. Where there is neither, the reader itself.

        Args:
            subtitles: None or "off", "auto", a file, or cues; see `find_subtitles`.
            subtitle_tokens: at most so many tokens of them are read (default: 32,768); of more, every so many-th cue.

        Raises:
            ValueError, FileNotFoundError: what is wrong with the subtitles.
        """
        found = find_subtitles(subtitles, reader)
        text = self.frame_text()
        if found is None and text.every is None:
            return reader
        text, facts = within(text, reader.sampling), None
        if found is not None:
            budget = SUBTITLE_TOKENS if subtitle_tokens is None else subtitle_tokens
            inside = text.part_of(found.cues)
            cues = spread_cues(inside, [len(self.words(cue.text)) + 2 for cue in inside], budget)
            if len(cues) < len(inside):
                reader.warnings.append(
                    f"{found.name}: {len(cues)} of {len(inside)} cues are read, as fit into subtitle_tokens={budget}"
                )
            text = replace(text, cues=tuple(cues))
            facts = {"name": found.name, "sha256": found.digest, "cues": len(cues)}
        return TimedReader(reader, text, facts)

    def frame_text(self) -> FrameText:
        """What makes this model's time stamps, without subtitles."""
        every = None if self.frame_times == "none" else self.frame_times_every
        return FrameText(self.words, every, stamp=self._time_ids if self.frame_times == "learned" else None)

    def set_frame_times(self, mode: str, every: float | None = None) -> dict[int, list[int]]:
        """Tell times as `mode` says, every so many seconds (None: as until now). A model's `set_frame_times` calls it.

        Returns:
            The id of each token that is new, with the ids of the digits that it stands for.

        Raises:
            ValueError: an unknown mode, or no more than 0 seconds.
        """
        every = self.frame_times_every if every is None else every
        check_frame_times(mode, every)
        known, new = self.tokenizer.get_vocab(), {}
        if mode == "learned":
            self.tokenizer.add_tokens([AddedToken(name, normalized=False, special=True) for name in TIME_TOKENS], True)
            digits = {name: self.words("".join(c for c in name if c.isdigit())) for name in TIME_TOKENS}
            new = {self.tokenizer.convert_tokens_to_ids(k): ids for k, ids in digits.items() if k not in known}
        self.frame_times, self.frame_times_every = mode, float(every)
        return new

    def _time_ids(self, moment: float) -> list[int]:
        return list(self.tokenizer.convert_tokens_to_ids(time_tokens(moment)))

    def words(self, text: str) -> list[int]:
        """Token ids of somebody's words, in which nothing is a special token."""
        typed = stand_ins(self._special_strings(), [text])
        for mark, string in typed.items():
            text = text.replace(string, mark)
        if typed:
            return self._encode_words(text, typed)
        return list(self.tokenizer(_HALF_CHARACTERS.sub("\ufffd", text), add_special_tokens=False)["input_ids"])

    def times_question(self, question: Any, wants_times: bool = True) -> Any:
        """A question (or a conversation whose last message is one) as the model is asked it: with plain spaces
        (`plain_spaces`); for a model that reads time stamps, moments in it are written as the stamps are, and with
        `wants_times` it asks for the span that shows the answer.

        Raises:
            ValueError: times are wanted of a model that reads none.
        """
        knows_times = self.frame_times != "none"
        if wants_times and not knows_times:
            raise ValueError(NO_TIMES)

        def asked(text: str, last: bool = True) -> str:
            text = as_clocks(text) if knows_times else text
            return f"{text.strip()} {TIMES_REQUEST}" if wants_times and last else text

        if isinstance(question, str):
            return asked(plain_spaces(question))
        *before, message = question
        if not isinstance(message, dict) or not message.get("content"):
            return question  # what is wrong with it is told where it is rendered
        content = message["content"]
        if isinstance(content, str):
            return [*before, {**message, "content": asked(plain_spaces(content))}]
        content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
        texts = [i for i, part in enumerate(content) if isinstance(part, dict) and isinstance(part.get("text"), str)]
        for place in texts:
            text = content[place]["text"] if len(texts) > 1 else plain_spaces(content[place]["text"])
            content[place] = {**content[place], "text": asked(text, place == texts[-1])}
        return [*before, {**message, "content": content}]

    def timed_answer(self, answer: str) -> dict[str, Any]:
        """What a model answered to `times_question`: `{"answer", "start", "end"}`, in seconds of the video. An answer
        that does not end in a span has None for both, and says so in "reason"."""
        found = parse_span(answer)
        if found is None:
            reason = f"the answer does not end in [start-end]: {answer[-60:]!r}"
            return {"answer": answer, "start": None, "end": None, "reason": reason}
        words, start, end = found
        return {"answer": words or answer.strip().strip("[]"), "start": start, "end": end}

    def _settings(self, given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sort the settings of a call into those for text and those for videos."""
        given = dict(given)
        for group in GROUPS:
            given = {**(given.pop(group, None) or {}), **given}
        given = drop_fixed_settings(given, self.video_processor.size)
        text = {name: given.pop(name) for name in (*TEXT_SETTINGS, *RETURN_NAMES) if name in given}
        video = {name: given.pop(name) for name in VIDEO_NAMES if name in given}
        for name in [name for name in given if name in NEUTRAL_TEXT]:
            value = given.pop(name)
            if value is not None and value not in NEUTRAL_TEXT[name]:
                raise ValueError(f"{name}={value!r:.60} is not supported by this processor: leave it out")
        if given:
            raise TypeError(f"unknown settings: {', '.join(sorted(given))}")
        return text, video

    def _render(self, messages: Any, chat_template: str | None, require_question: bool, **variables: Any) -> Chat:
        defaults = {
            "system_prompt": self.system_prompt,
            "frame_separator": self.frame_separator,
            "video_token": self.video_token,
            "eos_token": self.tokenizer.eos_token,
        }
        template = chat_template or self.chat_template
        return render_chat(messages, template, require_question, self._special_strings(), **{**defaults, **variables})

    def _special_strings(self) -> set[str]:
        """What a tokenizer takes for more than text, and what stands for media and roles."""
        added = (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special)
        return {*added, *self.tokenizer.all_special_tokens, self.video_token, self.image_token, *ROLE_TAGS}

    def _encode(self, chat: Chat, add_special_tokens: bool = False) -> tuple[list[int], list[int]]:
        """Token ids of rendered text, one token for each video and image, and the mask of what the assistant wrote."""
        text = _HALF_CHARACTERS.sub("\ufffd", chat.text)
        cuts = {0, len(text), *(match.start() for match in ROLE_TAG_ENDS.finditer(text))}
        for start, end in chat.answers:
            cuts |= {min(start, len(text)), min(end, len(text))}
        bounds = sorted(cuts)
        ids, mask = [], []
        for start, end in pairwise(bounds):
            piece = text[start:end].replace(self.image_token, self.video_token)
            if chat.typed and any(mark in piece for mark in chat.typed):
                tokens = self._encode_words(piece, chat.typed)
            else:
                tokens = self.tokenizer(piece, add_special_tokens=add_special_tokens and start == 0)["input_ids"]
            ids += tokens
            mask += [int(any(first <= start < last for first, last in chat.answers))] * len(tokens)
        return ids, mask

    def _encode_words(self, text: str, typed: dict[str, str]) -> list[int]:
        """Token ids of a text in which what looks like a special token is a word where `typed` stands for it."""
        strings = sorted(self._special_strings(), key=len, reverse=True)
        special = {
            self.tokenizer.convert_tokens_to_ids(token) for token in strings if token in self.tokenizer.get_vocab()
        }
        ids: list[int] = []
        for piece in re.split("(" + "|".join(map(re.escape, strings)) + ")", text):
            words = restored(piece, typed)
            tokens = self.tokenizer(words, add_special_tokens=False, split_special_tokens=words != piece)["input_ids"]
            if words != piece and special.intersection(tokens):  # a tokenizer that knows no better: cut them in two
                halves = {ord(mark): string[0] + mark + string[1:] for mark, string in typed.items()}
                cuts = re.split("[" + "".join(typed) + "]", piece.translate(halves))
                tokens = [
                    token for cut in cuts for token in self.tokenizer(cut, add_special_tokens=False)["input_ids"]
                ]
            ids += tokens
        return ids

    def video_row(self, reader: Any, times: Sequence[float]) -> list[int]:
        """Token ids that stand for a video of which frames shown at `times` were read: placeholders, and what its
        reader, if it is `timed`, reads between them."""
        text = getattr(reader, "text", None)
        if text is None:
            return [self.video_token_id] * (self.tokens_per_frame * len(times))
        return list(text.row(times, self.video_token_id, self.tokens_per_frame))

    def _marks(self, chat: Chat) -> list[str]:
        """The placeholders of a prompt, in order."""
        return re.findall(f"{re.escape(self.video_token)}|{re.escape(self.image_token)}", chat.text)

    def _open_media(
        self, chat: Chat, video_settings: dict[str, Any], rates: Iterator[Any] | None = None
    ) -> list[FrameReader]:
        """A reader for each placeholder of a prompt, in the order of the text; an image is a video of one frame.

        `rates`: gives the next video's metadata, if any are known.

        Raises:
            ValueError: more or fewer placeholders than videos or images.
        """
        marks = self._marks(chat)
        for mark, sources, noun in (
            (self.video_token, chat.videos, "videos"),
            (self.image_token, chat.images, "images"),
        ):
            if marks.count(mark) != len(sources):
                raise ValueError(
                    f"the text has {marks.count(mark)} {mark} placeholders for {len(sources)} {noun}; "
                    "there must be one for each"
                )
        videos, images, own = iter(chat.videos), iter(chat.images), iter(chat.subtitles)
        rates = iter(()) if rates is None else rates
        told = {name: video_settings[name] for name in SUBTITLE_NAMES if name in video_settings}
        video_settings = {name: value for name, value in video_settings.items() if name not in told}

        def open_next() -> Any:
            reader = self.video_processor.open(next(videos), video_metadata=next(rates, None), **video_settings)
            mine = next(own, None)
            return self.timed(reader, **(told if mine is None else {**told, "subtitles": mine}))

        return [
            open_next() if mark == self.video_token else self.video_processor.open(next(images), num_frames=1)
            for mark in marks
        ]

    def _encode_batch(
        self,
        chats: list[Chat],
        return_tensors: str | None,
        text_settings: dict[str, Any],
        video_settings: dict[str, Any],
        return_masks: bool = False,
    ) -> BatchFeature:
        video_settings = dict(video_settings)
        return_metadata = video_settings.pop("return_metadata", False)
        text_settings = dict(text_settings)
        return_tensors = text_settings.pop("return_tensors", return_tensors)
        add_special_tokens = text_settings.pop("add_special_tokens", False)
        wants_mask = text_settings.pop("return_attention_mask", None) is not False
        wants_types = text_settings.pop("return_mm_token_type_ids", False)
        device = video_settings.pop("device", None)
        rates = list_rates(video_settings.pop("video_metadata", None), sum(len(chat.videos) for chat in chats))
        readers = [
            self._open_media(chat, video_settings, rates) for chat in chats
        ]  # counts are checked before decoding
        flat = [reader for group in readers for reader in group]
        pixels = self.video_processor(flat, return_metadata=True, device=device) if flat else {}
        metadata = pixels.get("video_metadata", ())
        shown = iter([(reader, facts["timestamps"]) for reader, facts in zip(flat, metadata, strict=True)])
        if not return_metadata:
            pixels = {name: value for name, value in pixels.items() if name != "video_metadata"}
        rows, masks, types = [], [], []
        for chat in chats:
            row, row_mask, row_types = [], [], []
            kinds = iter([2 if mark == self.video_token else 1 for mark in self._marks(chat)])
            for token, written in zip(*self._encode(chat, add_special_tokens), strict=True):
                if token != self.video_token_id:
                    row.append(token)
                    row_mask.append(written)
                    row_types.append(0)
                    continue
                ids, kind = self.video_row(*next(shown)), next(kinds)
                row += ids
                row_mask += [written] * len(ids)
                row_types += [kind * (own == self.video_token_id) for own in ids]
            rows.append(row)
            masks.append(row_mask)
            types.append(row_types)
        batch = pad_batch(
            rows,
            ({"assistant_masks": masks} if return_masks else {})
            | ({"mm_token_type_ids": types} if wants_types else {}),
            pad_token_id=self.tokenizer.pad_token_id,
            whole_token_id=self.video_token_id,
            return_tensors=return_tensors,
            **{"padding_side": self.tokenizer.padding_side, **text_settings},
        )
        if not wants_mask:
            del batch["attention_mask"]
        if return_tensors == "np":
            pixels = {name: value.numpy() if torch.is_tensor(value) else value for name, value in pixels.items()}
        return BatchFeature({**batch, **pixels})


VideoMa2mbaProcessor.register_for_auto_class("AutoProcessor")
