"""Which video or image belongs to which placeholder of a prompt."""

from typing import Any

from .chat_format import Chat
from .picture_sources import split_videos


def assign_media(chats: list[Chat], media: Any, mark: str, kind: str) -> None:
    """Give each prompt its videos (images): as grouped by the caller, else in the order of the placeholders."""
    wanted = [chat.text.count(mark) for chat in chats]
    if media is None:
        groups: list[list[Any]] = [[] for _ in chats]
    elif len(chats) > 1 and isinstance(media, list | tuple) and all(isinstance(item, list | tuple) for item in media):
        if len(media) != len(chats):
            raise ValueError(f"{kind} are given for {len(media)} prompts, but there are {len(chats)} prompts")
        groups = [_split(group, kind) for group in media]
    else:
        flat = iter(found := _split(media, kind))
        if len(found) != sum(wanted):
            raise ValueError(
                f"the text has {sum(wanted)} {mark} placeholders for {len(found)} {kind}; there must be one for each"
            )
        groups = [[next(flat) for _ in range(count)] for count in wanted]
    for chat, group in zip(chats, groups, strict=True):
        setattr(chat, kind, group)


def _split(media: Any, kind: str) -> list[Any]:
    """List single videos, or single images (where a list of pictures is no video)."""
    if kind == "videos":
        return split_videos(media) if media is not None else []
    if isinstance(media, list | tuple):
        return [image for item in media for image in _split(item, kind)]
    return [media]


def fill_placeholders(sources: list[Any], given: Any, kind: str) -> list[Any]:
    """Fill the placeholders among `sources` with what is given, in order."""
    found = _split(given, kind) if given is not None else []
    if sum(source is None for source in sources) != len(found):
        raise ValueError(
            f"the conversation has {sum(source is None for source in sources)} placeholders for {len(found)} {kind}; "
            "there must be one for each"
        )
    rest = iter(found)
    return [next(rest) if source is None else source for source in sources]


def require_sources(chat: Chat) -> None:
    """ValueError where a video or image of the messages has no source."""
    if any(source is None for source in [*chat.videos, *chat.images]):
        raise ValueError('a video or image in the messages has no source; write {"type": "video", "video": path}')
