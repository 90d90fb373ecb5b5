"""Tokenizers: one over bytes for small models, and the additions a text model's own tokenizer needs for videos."""

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END_TOKEN = "<|endoftext|>"
PAD_TOKEN = "<pad>"
VIDEO_TOKEN = "<video>"
ROLE_TOKENS = ("<|system|>", "<|user|>", "<|assistant|>")


def byte_alphabet() -> list[str]:
    """The printable character by which byte-level tokenizers write each byte, in the order of the bytes 0..255.

    The mapping of GPT-2: printable Latin-1 characters stand for themselves, the others for 256, 257, ...
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)}
    rest = iter(range(256, 512))
    return [chr(byte if byte in printable else next(rest)) for byte in range(256)]


def build_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte: 262 tokens, any text encodes and decodes without loss.

    Ids: 0 `<|endoftext|>` (begin and end of text), 1 `<pad>`, 2 `<video>`, 3 to 5 the role tags `<|system|>`,
    `<|user|>`, `<|assistant|>`, and `6 + b` for byte b. Pads on the left, as generation needs.
    """
    special = [END_TOKEN, PAD_TOKEN, VIDEO_TOKEN, *ROLE_TOKENS]
    vocabulary = {token: index for index, token in enumerate([*special, *byte_alphabet()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    return as_chat_tokenizer(tokenizer)


def as_chat_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with our special tokens, for transformers. Pads on the left, as generation needs."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def add_video_tokens(tokenizer: PreTrainedTokenizerBase, embedding_rows: int | None = None) -> int:
    """Add `<video>` and a `<pad>` of its own to a text tokenizer, in place.

    The GPT-NeoX tokenizer of the Mamba-2 checkpoints has 50,277 tokens and no padding but `<|endoftext|>`, which must
    stay a token to learn; their embeddings have 50,288 rows, so the new tokens fit without resizing.

    Args:
        embedding_rows: rows of the model's embedding; None skips the check.

    Returns:
        The id of `<video>`.

    Raises:
        ValueError: the new tokens do not fit into `embedding_rows`.
    """
    vocabulary = tokenizer.get_vocab()
    new = [token for token in (VIDEO_TOKEN, PAD_TOKEN) if token not in vocabulary]
    if embedding_rows is not None and len(tokenizer) + len(new) > embedding_rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens; {len(new)} more do not fit into {embedding_rows} embedding "
            "rows: resize the embeddings of the model first"
        )
    tokenizer.add_tokens([AddedToken(VIDEO_TOKEN, normalized=False, special=True)], special_tokens=True)
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.add_special_tokens({"pad_token": AddedToken(PAD_TOKEN, normalized=False, special=True)})
    tokenizer.padding_side = "left"
    return tokenizer.convert_tokens_to_ids(VIDEO_TOKEN)
