"""The judge: what counts as a reply, and that neither silence nor nonsense costs an answer."""

import socket
from pathlib import Path

import pytest

pytest.importorskip("requests")

from fake_judge import fake_judge

from video_ma2mba.eval.answer_log import read_rows
from video_ma2mba.eval.judge import Judge, JudgeFailed, usable

ASKED = {
    "json": {"model": "m", "messages": [{"role": "user", "content": "as keys 'pred' and 'score'"}], "max_tokens": 9}
}


def post(**changed):
    import requests

    return requests.post("http://nowhere.invalid/v1/chat/completions", timeout=1, **(ASKED | changed)).json()


@pytest.mark.parametrize(
    ("said", "verdict", "kept"),
    [
        ("{'pred': 'yes', 'score': 4}", True, "{'pred': 'yes', 'score': 4}"),
        ("Sure! ```{'pred': 'No.', 'score': 4.8}``` Hope it helps.", True, "{'pred': 'no', 'score': 4.8}"),
        ('{"score": "3"}', False, "{'score': 3.0}"),
        ('{"pred": "yes", "score": 4, "why": null, "parts": {"a": 1}}', True, "{'pred': 'yes', 'score': 4}"),
        ("<think>{'score': 1}?</think>As in {'score': n}: {'score': 5}", False, "{'score': 5}"),
        ("<think>{'score': 1}", False, None),
        ("The score is 4.", False, None),
        ("{'score': 7}", False, None),
        ("{'score': True}", False, None),
        ("{'score': 'high'}", False, None),
        ("{'score': 4}", True, None),
        ("{'pred': 'yes or no', 'score': 4}", True, None),
        ("{score: 4}", False, None),
        ("", False, None),
    ],
)
def test_what_a_usable_reply_is(said: str, verdict: bool, kept: str | None):
    if kept is None:
        with pytest.raises(ValueError, match=r"no dictionary|score|verdict|could not convert|still thinking"):
            usable(said, verdict)
    else:
        assert usable(said, verdict) == kept


def test_replies_are_kept_and_not_asked_for_again(tmp_path: Path):
    log = tmp_path / "judge.jsonl"
    with fake_judge(lambda *_: "Well: {'pred': 'yes', 'score': 4}") as server:
        judge = Judge(server.url, "gpt", log=log)
        with judge.intercept():
            assert post()["choices"][0]["message"]["content"] == "{'pred': 'yes', 'score': 4}"
            post()
        with Judge(server.url, "gpt", log=log).intercept():
            post()
        assert len(server.asked) == 1
        with Judge(server.url, "another", log=log).intercept():
            post()
        assert len(server.asked) == 2
    first, second = read_rows(log)
    assert (first["judge"], second["judge"]) == ("gpt", "another") and first["said"].startswith("Well")


def test_nonsense_and_errors_are_asked_for_again():
    replies = iter(["I cannot", 500, 429, "{'pred': 'no', 'score': 0}"])
    with fake_judge(lambda *_: next(replies)) as server, Judge(server.url, "gpt", wait=0.01).intercept():
        assert post()["choices"][0]["message"]["content"] == "{'pred': 'no', 'score': 0}"
        assert len(server.asked) == 4


def as_a_task_does():
    try:
        post()
    except Exception:
        pytest.fail("a task would have gone on with a score of 0")


FAILURES = {
    "nonsense": (lambda *_: "I cannot tell.", 0.0, "no dictionary in 'I cannot tell.'", 3),
    "timeout": (lambda *_: "{'pred': 'yes', 'score': 4}", 0.6, "imed out", 3),
    "no access": (lambda *_: 401, 0.0, "401", 1),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_useless_judge_is_an_error(case: str):
    """It goes through a task's `except Exception`, which would make a score of 0 of it."""
    reply, delay, reason, times = FAILURES[case]
    with fake_judge(reply, delay) as server:
        judge = Judge(server.url, "gpt", tries=3, timeout=0.2 if delay else 60, wait=0.01)
        with pytest.raises(ConnectionError, match=f"gives no usable reply.*{reason}.*run the same"), judge.intercept():
            as_a_task_does()
        assert len(server.asked) == times
        with pytest.raises(ConnectionError, match=reason):
            judge.check()


def test_a_judge_that_thinks_and_wants_other_settings():
    """Newer models refuse max_tokens and temperature, and think before they judge; their words are told."""

    def reply(payload: dict) -> tuple[int, dict]:
        for name, hint in (("max_tokens", "use max_completion_tokens"), ("temperature", "not supported")):
            if name in payload:
                return 400, {"error": {"message": f"'{name}': {hint}"}}
        if payload["max_completion_tokens"] < 100:
            return 200, {"choices": [{"message": {"content": None}, "finish_reason": "length"}]}
        return 200, {"choices": [{"message": {"content": "{'score': 4}"}, "finish_reason": "stop"}]}

    messages = [{"role": "user", "content": "Correct Answer: a"}]
    with fake_judge(reply, whole=True) as server:
        judge = Judge(server.url, "gpt", tries=1)
        for number, count in ((1, 4), (2, 6)):  # what it refuses is learnt once
            chat = [*messages, {"role": "user", "content": str(number)}]
            asked = {"messages": chat, "max_tokens": 9, "temperature": 0}
            with judge.intercept():
                assert post(json=asked)["choices"][0]["message"]["content"] == "{'score': 4}"
            assert len(server.asked) == count
    full = fake_judge(lambda payload: (400, {"error": "context is full"}), whole=True)
    with full as server, pytest.raises(ConnectionError, match="context is full"):
        Judge(server.url, "gpt").check()


def test_no_judge_there_and_no_address():
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))
        judge = Judge(f"http://127.0.0.1:{port.getsockname()[1]}/v1", "gpt", wait=0.01)
        with pytest.raises(ConnectionError, match="no usable reply"):
            judge.check()
    with pytest.raises(ValueError, match="--judge localhost"):
        Judge("localhost", "gpt")


def test_a_full_disk_ends_judging_and_other_posts_pass(tmp_path: Path, monkeypatch):
    def full(file, line):
        raise OSError(28, "No space left on device")

    with fake_judge() as server:
        judge = Judge(server.url, "gpt", log=tmp_path / "judge.jsonl")
        judge.check()
        monkeypatch.setattr("video_ma2mba.eval.answer_log._write", full)
        with pytest.raises(ConnectionError, match="No space left"), judge.intercept():
            post(
                json={
                    **ASKED["json"],
                    "messages": [{"role": "user", "content": "Correct Answer: a\nPredicted Answer: a"}],
                }
            )
        with judge.intercept():
            import requests

            with pytest.raises(requests.exceptions.ConnectionError):
                requests.post("http://nowhere.invalid", json={"text": "no question to a judge"}, timeout=1)
    assert issubclass(JudgeFailed, BaseException) and not issubclass(JudgeFailed, Exception)
