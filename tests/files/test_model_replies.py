"""Replies of language models: what is said, which dictionaries stand in it, what a server wants to be asked."""

import pytest

from video_ma2mba.files.model_replies import UnusableReply, dictionaries, fewer_settings, spoken, whole_sentences


def test_what_is_said_and_what_was_cut():
    assert spoken("<think>{Well}</think>\n\nA man.") == spoken("Well…</think>A man.") == spoken(" A man.") == "A man."
    assert whole_sentences('It is 3.5 m wide. He says "Stop!" And th') == 'It is 3.5 m wide. He says "Stop!"'
    for cut, words in ((spoken, "still thinking"), (whole_sentences, "cut off")):
        with pytest.raises(UnusableReply, match=words):
            cut("<think>Well, what")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('{"a": 1}', [{"a": 1}]),
        ('So {x}: {"a": null, "b": {"c": true}} and {\'d\': None, "e": \'}\'}!', [
            {"a": None, "b": {"c": True}}, {"d": None, "e": "}"},
        ]),
        ("```json\n[{'a': 1}, {'b': 2}]\n```", [{"a": 1}, {"b": 2}]),
        ("{1, 2} {a: 1} {", []),
        ("{" * 3000, []),
    ],
)  # fmt: skip
def test_dictionaries_in_a_text(text: str, found: list):
    assert list(dictionaries(text)) == found


def test_what_a_server_does_not_know_is_left_away():
    asked = {"max_tokens": 9, "temperature": 0, "top_p": 1}
    named = fewer_settings(asked, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
    assert named == {"max_completion_tokens": 9, "temperature": 0, "top_p": 1}
    assert fewer_settings(named, "'temperature' does not support 0") == {"max_completion_tokens": 9, "top_p": 1}
    assert fewer_settings(asked, "the prompt has too many tokens") is None
