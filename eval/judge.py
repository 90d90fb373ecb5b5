"""The language model that scores open answers: asked before the run whether it is fit, and during it never in vain.

The harness's tasks post to the judge themselves, and what goes wrong there costs answers: a dead judge ends the run or
scores 0, a reply with a word too many scores 0. In `intercept()` their posts go through here: every usable reply is
kept in a file and never asked for again, nonsense is asked for anew, and a judge that stays useless ends the scoring.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files.model_replies import dictionaries, fewer_settings, spoken
from ..processing.video_source_names import shown_name, without_secrets
from .answer_log import AnswerLog

_LOCAL_TOKENS = 64
_THINKING_TOKENS = 4096  # of a judge that thinks aloud before it judges
_LIMITS, _ODD_SETTINGS = ("max_tokens", "max_completion_tokens"), (400, 422)
_HOPELESS = (400, 401, 403, 404, 405)  # what will not change by asking again
_PROBE = (
    "Question: Is the lamp on?\nCorrect Answer: yes\nPredicted Answer: yes\n\n"
    "Please generate the response in the form of a Python dictionary string with keys 'pred' and 'score', where value "
    "of 'pred' is a string of 'yes' or 'no' and value of 'score' is in INTEGER, between 0 and 5. Only provide the "
    "Python dictionary string."
)


class JudgeFailed(BaseException):
    """The judge gives no usable reply. No `Exception`: the harness's tasks catch those and go on with a score of 0."""


class Judge:
    """A judge behind an address of the OpenAI kind.

    Args:
        url: of its chat completions (`…/v1` will do). model: as the server calls it. key: for the server, if any.
        log: file of replies, one a line. tries, timeout, wait: per question; seconds; before the second try, doubling.
    """

    def __init__(
        self,
        url: str,
        model: str,
        key: str = "",
        log: Path | None = None,
        tries: int = 5,
        timeout: float = 60.0,
        wait: float = 2.0,
    ):
        if not re.match(r"https?://", url):
            raise ValueError(
                f"--judge {shown_name(url)}: give an address such as http://localhost:8000/v1, or the folder or Hub "
                "id of a language model"
            )
        self.url = url if url.rstrip("/").endswith("completions") else url.rstrip("/") + "/chat/completions"
        self.model, self.key, self.tries, self.timeout, self.wait = model, key, tries, timeout, wait
        self.log = AnswerLog(log)
        self.asked = self.known = 0
        self._complaints: list[str] = []  # of the server, about settings that it does not know
        self._lock = threading.Lock()

    def check(self) -> None:
        """Ask something easy.

        Raises:
            ConnectionError: no usable reply, with the reason.
        """
        try:
            self._reply([{"role": "user", "content": _PROBE}], {"max_tokens": 64, "temperature": 0}, tries=2)
        except JudgeFailed as error:
            raise ConnectionError(str(error)) from error

    @contextmanager
    def intercept(self) -> Iterator[None]:
        """What tasks post to a judge is asked here meanwhile.

        Raises:
            ConnectionError: the judge failed; all replies so far are kept.
        """
        import requests

        real = requests.post
        requests.post = lambda url, **given: self._post(real, url, **given)
        try:
            yield
        except JudgeFailed as error:
            raise ConnectionError(
                f"{error}. All answers and {len(self.log.answers)} replies of the judge are kept: run the same "
                "command again"
            ) from error
        finally:
            requests.post = real

    def _post(self, real: Any, url: str, **given: Any) -> Any:
        payload = given.get("json") or {}
        if "messages" not in payload:
            return real(url, **given)
        settings = {name: value for name, value in payload.items() if name not in ("messages", "model")}
        return _Reply(self._reply(payload["messages"], settings), self.model)

    def _reply(self, messages: list[dict[str, Any]], settings: dict[str, Any], tries: int | None = None) -> str:
        key = hashlib.sha256(json.dumps([self.model, messages, settings], sort_keys=True).encode()).hexdigest()[:32]
        if key in self.log.answers:
            self.known += 1
            return self.log.answers[key]["reply"]
        needs_verdict = any("'pred'" in str(message["content"]) for message in messages)
        reason, attempts = "", tries or self.tries
        for attempt in range(attempts):
            if attempt:
                time.sleep(self.wait * 2 ** (attempt - 1))
            try:
                said = self._ask(messages, settings)
                reply = usable(said, needs_verdict)
            except (ValueError, KeyError, IndexError, TypeError, OSError) as error:  # requests' errors are OSErrors
                answer = getattr(error, "response", None)
                reason = f"{type(error).__name__}: {error}" + (f": {answer.text:.300}" if answer is not None else "")
                status = getattr(answer, "status_code", None)
                if status in _HOPELESS:
                    break
                continue
            with self._lock:
                self.asked += 1
                try:
                    self.log.add({"key": key, "judge": self.model, "reply": reply, "said": said})
                except OSError as error:
                    raise JudgeFailed(str(error)) from error
            return reply
        where = shown_name(self.url)
        raise JudgeFailed(f"the judge {self.model} at {where} gives no usable reply ({without_secrets(reason)})")

    def _ask(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> str:
        import requests

        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        for complaint in self._complaints:
            settings = fewer_settings(settings, complaint) or settings
        while True:
            payload = {"model": self.model, "messages": messages, **settings}
            # Not requests.post, which is ours while a judge serves.
            answer = requests.request("POST", self.url, headers=headers, json=payload, timeout=self.timeout)
            fewer = fewer_settings(settings, answer.text) if answer.status_code in _ODD_SETTINGS else None
            if fewer is not None:
                self._complaints.append(answer.text)
                settings = fewer
                continue
            answer.raise_for_status()
            choice = answer.json()["choices"][0]
            said = choice["message"]["content"] or ""
            tight = [name for name in _LIMITS if settings.get(name, _THINKING_TOKENS) < _THINKING_TOKENS]
            if not tight or choice.get("finish_reason") != "length" or any(dictionaries(said)):
                return said
            settings = settings | dict.fromkeys(tight, _THINKING_TOKENS)  # it thinks before it judges


class LocalJudge(Judge):
    """A language model in this process as judge.

    Args:
        generate: from a request and the most tokens to what the model says. name: of the model; its settings are those
            of `Judge`.
    """

    def __init__(self, generate: Callable[[str, int], str], name: str, log: Path | None = None):
        super().__init__("http://localhost", name, log=log, tries=1)  # it would say the same again
        self.url, self.generate = "this process", generate
        self._turn = threading.Lock()

    def _ask(self, messages: list[dict[str, Any]], settings: dict[str, Any]) -> str:
        request = "\n\n".join(str(message["content"]) for message in messages)
        with self._turn:
            return self.generate(request, int(settings.get("max_tokens") or _LOCAL_TOKENS))


class _Reply:
    """As much of a `requests` response as the tasks look at."""

    def __init__(self, content: str, model: str):
        self.text = json.dumps({"choices": [{"message": {"content": content}}], "model": model})
        self.status_code = 200

    def raise_for_status(self) -> None:
        return None

    def json(self) -> dict[str, Any]:
        return json.loads(self.text)


def usable(said: str, needs_verdict: bool) -> str:
    """The dictionary in a reply, as both tasks read it, without what else was said.

    Raises:
        ValueError: there is none, its score is no number within 0..5, or its verdict neither yes nor no.
    """
    reason = f"no dictionary in {said!r:.120}"
    for values in dictionaries(spoken(said)):
        try:
            return repr(_scored(values, needs_verdict))
        except ValueError as error:
            reason = f"{error} in {said!r:.120}"
    raise ValueError(reason)


def _scored(values: dict[Any, Any], needs_verdict: bool) -> dict[str, Any]:
    """Score, and verdict, of a dictionary that a judge has written."""
    score = values.get("score")
    if isinstance(score, str):
        score = float(score)
    if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 5:
        raise ValueError("the score is no number within 0..5")
    if not needs_verdict:
        return {"score": score}
    verdict = re.findall(r"\b(yes|no)\b", str(values.get("pred")).lower())
    if len(verdict) != 1:
        raise ValueError("the verdict is neither yes nor no")
    return {"pred": verdict[0], "score": score}
