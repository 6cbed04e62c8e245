"""A language model as a judge, behind any OpenAI-compatible endpoint: `judge:URL`, such as
`judge:http://localhost:8000/v1`.

`mode: scored` asks for a number. `mode: pairwise` asks which of two responses is better, twice, with their
places swapped. The score is 1 if the response wins both times, 0 if it loses both times, else 0.5. A reply
without a number or a verdict is a failure, and its response gets no score. Replies are cached on disk, so
each question is asked once.
"""

from __future__ import annotations

import json
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
from rlhf.rewards.http import RewardServerConfig, ask_chat
from rlhf.rewards.reward import Prompts, as_scores
from rlhf.tracking.redaction import ENVIRONMENT_NAME, redacted

if TYPE_CHECKING:
    from torch import Tensor

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
VERDICT = re.compile(r"\b[ABT]\b")
TIE = re.compile(r"\b(?:a )?tied?\b", re.IGNORECASE)
NOT_IN_KEY = frozenset({"rubric", "key_variable", "price_in", "price_out", "cache", "parallel"})
"""Arguments that do not change a score. The rubric's content changes it, its path does not."""


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
    """Longest reply, in tokens."""
    key_variable: str = "JUDGE_API_KEY"
    """Name of the environment variable with the API key; it may be unset. The name must contain KEY, TOKEN or
    SECRET, so that the value is redacted wherever the run writes it."""
    price_in: NonNegativeFloat = 0.0
    """Price of a million input tokens."""
    price_out: NonNegativeFloat = 0.0
    """Price of a million output tokens."""
    cache: str = "~/.cache/rlhf/judge.sqlite"
    """File of the cached replies."""
    parallel: PositiveInt = Field(default=8)
    """Questions that each rank asks at the same time."""

    @model_validator(mode="after")
    def _check_values(self) -> JudgeArgs:
        if self.highest <= self.lowest:
            raise ValueError(f"highest={self.highest:g} is not above lowest={self.lowest:g}")
        if not ENVIRONMENT_NAME.search(self.key_variable):
            raise ValueError(f"key_variable={self.key_variable}: use a name with KEY, TOKEN or SECRET")
        return self


class Reply(NamedTuple):
    """The judge's text, and its tokens."""

    text: str
    tokens_in: int
    tokens_out: int


class Judge:
    """The reward of `judge:URL`. It counts its usage: see `take_usage`."""

    def __init__(self, source: str, args: Mapping[str, Any], server: RewardServerConfig) -> None:
        self.args, self.server, self.source = JudgeArgs.model_validate(args), server, source
        self.url = source.removeprefix("judge:").rstrip("/") + "/chat/completions"
        self.rubric = read_rubric(source, self.args)
        self.counts: Counter[str] = Counter()

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        pairs = [*zip(prompts, completions, strict=True)]
        asked = [self.questions(row, completion) for row, completion in pairs]
        replies = self.replies({question for questions in asked for question in questions})
        scores = [
            self.score([replies[question].text for question in questions]) if questions else None
            for questions in asked
        ]
        return as_scores(scores, len(scores), redacted(self.source))

    def questions(self, row: PromptRow, completion: str) -> list[str]:
        """One question, or two with the places swapped. Empty if there is no response to compare with."""
        turns = "\n".join(f"{message['role']}: {message['content']}" for message in row.prompt)
        conversation = f"[Conversation]\n{turns}\n\n"
        args = self.args
        if args.mode == "scored":
            end = (
                f"Score the response from {args.lowest:g} to {args.highest:g}. Answer with the number alone."
            )
            return [f"{conversation}[Response]\n{completion}\n\n{end}"]
        other = row.columns.get(args.baseline)
        if other is None:
            return []
        end = "Which response is better? Answer with one letter alone: A, B, or T for a tie."
        return [
            f"{conversation}[Response A]\n{first}\n\n[Response B]\n{second}\n\n{end}"
            for first, second in ((completion, str(other)), (str(other), completion))
        ]

    def score(self, replies: Sequence[str]) -> float | None:
        """The score in the replies to one response's questions; None if a reply has no number or verdict."""
        if self.args.mode == "scored":
            numbers = NUMBER.findall(replies[0])
            number = float(numbers[-1]) if numbers else None
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
        """Question -> reply, from the cache or from the judge."""
        replies: dict[str, Reply] = {}
        with self.cache() as cache, ThreadPoolExecutor(self.args.parallel) as pool:
            waiting = {}
            for question in sorted(questions):
                cached = cache.execute(
                    "SELECT reply FROM replies WHERE key = ?", (self.key(question),)
                ).fetchone()
                if cached is not None:
                    replies[question] = Reply(*json.loads(cached[0]))
                    self.counts["cached"] += 1
                else:
                    waiting[pool.submit(self.ask, question)] = question
            for done in as_completed(waiting):
                question, reply = waiting[done], done.result()
                replies[question] = reply
                values = (self.key(question), json.dumps(reply))
                with cache:
                    cache.execute("INSERT OR REPLACE INTO replies VALUES (?, ?)", values)
                self.counts["asked"] += 1
                self.counts["tokens_in"] += reply.tokens_in
                self.counts["tokens_out"] += reply.tokens_out
        return replies

    @contextmanager
    def cache(self) -> Iterator[sqlite3.Connection]:
        """The database of cached replies."""
        path = Path(self.args.cache).expanduser()
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=60.0)) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS replies (key TEXT PRIMARY KEY, reply TEXT)")
            yield connection

    def key(self, question: str) -> str:
        """Cache key of a question: a digest of endpoint, model, rubric, question and reply length."""
        return digest_of([self.url, self.args.model, self.rubric, question, self.args.max_tokens])

    def ask(self, question: str) -> Reply:
        """Ask the judge.

        Raises:
            RewardError: the judge does not answer, or the answer has another format.
        """
        body = {
            "model": self.args.model, "temperature": 0.0, "max_tokens": self.args.max_tokens,
            "messages": [
                {"role": "system", "content": self.rubric}, {"role": "user", "content": question},
            ],
        }  # fmt: skip
        endpoint = self.source.removeprefix("judge:")
        reply = ask_chat(
            endpoint, body, self.args.key_variable, self.server, self.source, "judge:http://localhost:8000/v1"
        )
        return Reply(reply.text, reply.tokens_in, reply.tokens_out)

    def take_usage(self) -> dict[str, float]:
        """Usage since the last call, as metrics without the judge's name."""
        counts, self.counts = self.counts, Counter()
        prices = self.args.price_in * counts["tokens_in"] + self.args.price_out * counts["tokens_out"]
        names = ("asked", "cached", "failures", "disagreements", "tokens_in", "tokens_out")
        return {f"judge_{name}": float(counts[name]) for name in names} | {"judge_cost": prices / 1e6}


def verdict(reply: str) -> str | None:
    """The only one of A, B and T in the last line; T if all three are there. Else None."""
    last = reply.strip().rpartition("\n")[2]
    named = {*VERDICT.findall(TIE.sub("T", last))}
    return named.pop() if len(named) == 1 else "T" if len(named) == 3 else None


def read_rubric(source: str, args: JudgeArgs) -> str:
    """The rubric's text.

    Raises:
        ConfigError: the file is missing, unreadable or empty.
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
    """Refuse arguments that the judge does not take.

    Raises:
        ValueError: with the arguments that are wrong.
    """
    try:
        validated(JudgeArgs, args, "args")
    except ConfigError as error:
        raise ValueError(str(error).replace("\n", " ")) from None


def is_judge(source: str) -> bool:
    """Whether the source holds the URL of an endpoint."""
    parts = urlsplit(source.removeprefix("judge:"))
    return parts.scheme in ("http", "https") and bool(parts.netloc)


def judge_digest(source: str, args: Mapping[str, Any]) -> dict[str, str]:
    """Digest of the rubric's content."""
    digest = digest_of(read_rubric(source, JudgeArgs.model_validate(args)))
    return {f"judge's rubric ({digest[:8]})": digest}


def judge_needs(args: Mapping[str, Any]) -> frozenset[str]:
    """The column of the response to compare with."""
    judge = JudgeArgs.model_validate(args)
    return frozenset({judge.baseline} if judge.mode == "pairwise" else ())
