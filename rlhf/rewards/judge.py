"""A language model that judges, behind any OpenAI-compatible endpoint: `judge:URL`, such as
`judge:http://localhost:8000/v1`.

`mode: scored` asks for a number. `mode: pairwise` asks which of two responses is better, twice, with their
places swapped: 1 if the response wins both times, 0 if it loses both times, else 0.5. A reply that says
neither is a failure, and its response gets no score. Replies are kept on disk, so that a question is asked
once.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from rlhf.config import Complaint, ConfigError, Strict, validated
from rlhf.data.schema import PromptRow
from rlhf.digests import digest_of
from rlhf.rewards.http import RewardServerConfig, ask
from rlhf.rewards.reward import Prompts, RewardError, as_scores
from rlhf.tracking.redaction import ENVIRONMENT_NAME, redacted

if TYPE_CHECKING:
    from torch import Tensor

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
VERDICT = re.compile(r"\b[ABT]\b")
TIE = re.compile(r"\b(?:a )?tied?\b", re.IGNORECASE)
NOT_IN_KEY = frozenset({"rubric", "key_variable", "price_in", "price_out", "cache", "parallel"})
"""Arguments that do not decide a score; the rubric's content does, not its place."""


class JudgeArgs(Strict):
    """Arguments of `judge:URL`."""

    model: str
    """The model's name at the endpoint."""
    rubric: str
    """A text file that says how to judge. It is the system message."""
    mode: Literal["scored", "pairwise"] = "scored"
    """Ask for a number, or which of two responses is better."""
    lowest: float = 1.0
    """scored: the lowest number."""
    highest: float = 10.0
    """scored: the highest number."""
    baseline: str = "completion"
    """pairwise: the column of the prompts' file with the response to compare with."""
    max_tokens: PositiveInt = 16
    """Length of a reply."""
    key_variable: str = "JUDGE_API_KEY"
    """The environment variable that holds the API key, if it is set. Its name must contain KEY, TOKEN or
    SECRET, so that its value is never written down."""
    price_in: NonNegativeFloat = 0.0
    """Price of a million tokens that the judge reads."""
    price_out: NonNegativeFloat = 0.0
    """Price of a million tokens that it writes."""
    cache: str = "~/.cache/rlhf/judge.sqlite"
    """Where replies are kept."""
    parallel: PositiveInt = Field(default=8)
    """Questions that are asked at the same time, by each rank."""

    @model_validator(mode="after")
    def _sound(self) -> JudgeArgs:
        if self.highest <= self.lowest:
            raise ValueError(f"highest={self.highest:g} is not above lowest={self.lowest:g}")
        if not ENVIRONMENT_NAME.search(self.key_variable):
            raise ValueError(f"key_variable={self.key_variable}: use a name with KEY, TOKEN or SECRET")
        return self


class Reply(NamedTuple):
    """What the judge wrote, and its tokens."""

    text: str
    tokens_in: int
    tokens_out: int


class Judge:
    """The reward of `judge:URL`. `take_usage` says what it did since the last time."""

    def __init__(self, source: str, args: Mapping[str, Any], server: RewardServerConfig) -> None:
        self.args, self.server, self.source = JudgeArgs.model_validate(args), server, source
        self.url = source.removeprefix("judge:").rstrip("/") + "/chat/completions"
        self.rubric = read_rubric(source, self.args)
        self.counts: Counter[str] = Counter()

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        pairs = [*zip(prompts, completions, strict=True)]
        questions = [self.questions(row, said) for row, said in pairs]
        replies = self.replies({each for some in questions for each in some})
        scores = [self.score([replies[each].text for each in some]) if some else None for some in questions]
        return as_scores(scores, len(scores), redacted(self.source))

    def questions(self, row: PromptRow, said: str) -> list[str]:
        """One question, or two with the places swapped; none without a response to compare with."""
        turns = "\n".join(f"{message['role']}: {message['content']}" for message in row.prompt)
        asked = f"[Conversation]\n{turns}\n\n"
        args = self.args
        if args.mode == "scored":
            end = (
                f"Score the response from {args.lowest:g} to {args.highest:g}. Answer with the number alone."
            )
            return [f"{asked}[Response]\n{said}\n\n{end}"]
        other = row.columns.get(args.baseline)
        if other is None:
            return []
        end = "Which response is better? Answer with one letter alone: A, B, or T for a tie."
        return [
            f"{asked}[Response A]\n{first}\n\n[Response B]\n{second}\n\n{end}"
            for first, second in ((said, str(other)), (str(other), said))
        ]

    def score(self, replies: Sequence[str]) -> float | None:
        """What the replies to one response's questions say; None if one of them says nothing."""
        if self.args.mode == "scored":
            found = NUMBER.findall(replies[0])
            number = float(found[-1]) if found else None
            if number is None or not self.args.lowest <= number <= self.args.highest:
                self.counts["failures"] += 1
                return None
            return number
        first, second = (verdict(reply) for reply in replies)
        if first is None or second is None:
            self.counts["failures"] += 1
            return None
        wins = {"A": 1.0, "B": 0.0, "T": 0.5}[first], {"A": 0.0, "B": 1.0, "T": 0.5}[second]
        self.counts["disagreements"] += wins[0] != wins[1]
        return wins[0] if wins[0] == wins[1] else 0.5

    def replies(self, questions: Iterable[str]) -> dict[str, Reply]:
        """The reply to each question: from the disk, or from the judge."""
        found: dict[str, Reply] = {}
        with self.cache() as cache, ThreadPoolExecutor(self.args.parallel) as pool:
            waiting = {}
            for question in sorted(questions):
                kept = cache.execute(
                    "SELECT reply FROM replies WHERE key = ?", (self.key(question),)
                ).fetchone()
                if kept is not None:
                    found[question] = Reply(*json.loads(kept[0]))
                    self.counts["cached"] += 1
                else:
                    waiting[pool.submit(self.ask, question)] = question
            for done in as_completed(waiting):
                question, reply = waiting[done], done.result()
                found[question] = reply
                values = (self.key(question), json.dumps(reply))
                with cache:
                    cache.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", values)
                self.counts["asked"] += 1
                self.counts["tokens_in"] += reply.tokens_in
                self.counts["tokens_out"] += reply.tokens_out
        return found

    @contextmanager
    def cache(self) -> Iterator[sqlite3.Connection]:
        """The file of replies."""
        path = Path(self.args.cache).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60.0)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")
            yield connection

    def key(self, question: str) -> str:
        """Of a question in the cache: the endpoint, the model, the rubric, and what is asked."""
        return digest_of([self.url, self.args.model, self.rubric, question, self.args.max_tokens])

    def ask(self, question: str) -> Reply:
        """Ask the judge.

        Raises:
            RewardError: it does not answer, or in another form.
        """
        body = {
            "model": self.args.model, "temperature": 0.0, "max_tokens": self.args.max_tokens,
            "messages": [
                {"role": "system", "content": self.rubric}, {"role": "user", "content": question},
            ],
        }  # fmt: skip
        key = os.environ.get(self.args.key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        answer = ask(self.url, json.dumps(body).encode(), self.server, headers, self.source)
        try:
            text = answer["choices"][0]["message"]["content"] or ""  # type: ignore[index]  # checked here
            usage = answer.get("usage") or {}  # type: ignore[attr-defined]
            return Reply(
                str(text), int(usage.get("prompt_tokens", 0)), int(usage.get("completion_tokens", 0))
            )
        except (AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError):
            raise RewardError(
                Complaint(
                    redacted(self.source),
                    f"it answered {str(answer)[:300]!r}, which is no chat completion.",
                    "Give the URL of an OpenAI-compatible endpoint, such as judge:http://localhost:8000/v1.",
                )
            ) from None

    def take_usage(self) -> dict[str, float]:
        """What it did since the last call, as metrics without its name."""
        counts, self.counts = self.counts, Counter()
        prices = self.args.price_in * counts["tokens_in"] + self.args.price_out * counts["tokens_out"]
        names = ("asked", "cached", "failures", "disagreements", "tokens_in", "tokens_out")
        return {f"judge_{name}": float(counts[name]) for name in names} | {"judge_cost": prices / 1e6}


def verdict(reply: str) -> str | None:
    """A, B or T: the one that the last line names; None if it names none, or both responses without a tie."""
    last = reply.strip().rpartition("\n")[2]
    named = {*VERDICT.findall(TIE.sub("T", last))}
    return named.pop() if len(named) == 1 else "T" if len(named) == 3 else None


def read_rubric(source: str, args: JudgeArgs) -> str:
    """The rubric's text.

    Raises:
        ConfigError: there is none.
    """
    try:
        text = Path(args.rubric).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why, fix = f"args.rubric={args.rubric}: {error}.", "Give a text file that says how to judge."
        raise ConfigError(Complaint(redacted(source), why, fix)) from None
    if not text:
        why = f"args.rubric={args.rubric} is empty."
        raise ConfigError(Complaint(redacted(source), why, "Say in it how to judge."))
    return text


def check_judge(source: str, args: Mapping[str, Any]) -> None:
    """Refuse arguments that it does not take.

    Raises:
        ValueError: which.
    """
    try:
        validated(JudgeArgs, args, "args")
    except ConfigError as error:
        raise ValueError(str(error).replace("\n", " ")) from None


def is_judge(source: str) -> bool:
    """Whether it names an endpoint."""
    parts = urlsplit(source.removeprefix("judge:"))
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def judge_digest(source: str, args: Mapping[str, Any]) -> dict[str, str]:
    """The rubric's content."""
    found = digest_of(read_rubric(source, JudgeArgs.model_validate(args)))
    return {f"judge's rubric ({found[:8]})": found}


def judge_needs(args: Mapping[str, Any]) -> frozenset[str]:
    """The column of the response to compare with."""
    found = JudgeArgs.model_validate(args)
    return frozenset({found.baseline} if found.mode == "pairwise" else ())
