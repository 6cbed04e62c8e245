"""What counts as a secret, and what is left alone beside it."""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import pytest

from rlhf.cli.keys import sections
from rlhf.tracking.redaction import RedactingConsole, is_secret_name, redacted, redacted_output, redacted_text

PLANTED = "correct-horse/battery"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", PLANTED)


@pytest.mark.parametrize(
    ("value", "clean"),
    [
        (f"a {PLANTED} b", "a <redacted> b"),
        (f"x={PLANTED}{PLANTED}", "x=<redacted><redacted>"),
        ([f"{PLANTED}", 3], ["<redacted>", 3]),
        ({"knobs": {f"model:{PLANTED}": 1.5}}, {"knobs": {"model:<redacted>": 1.5}}),
        ("%2F".join(PLANTED.split("/")), "<redacted>"),
        (None, None),
        (True, True),
        (0.25, 0.25),
    ],
)
def test_an_environments_secret_is_found_anywhere(value: Any, clean: Any) -> None:
    assert redacted(value) == clean


@pytest.mark.parametrize(
    "name",
    [
        "WANDB_API_KEY",
        "hf_token",
        "MY_SECRET",
        "DB_PASSWORD",
        "PGPASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "REGISTRY_CRED",
        "GITHUB_PAT",
        "DB_PASS",
        "SMTPPASS",
        "DB_PWD",
    ],
)
def test_the_name_decides(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "another-one")
    assert redacted("see another-one") == "see <redacted>"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PATH_PREFIX", "/opt/elsewhere"),  # no such word in the name
        ("TOKENIZERS_PARALLELISM", "false"),
        ("MAX_TOKENS", "8192"),
        ("KEY_COUNT", "1"),
        ("OLDPWD", "/gone/for/good"),
        ("COMPASS_POINTS", "north-east"),
        ("KEY_SCALE", "0.12345"),
        ("SSH_KEY_FILE", __file__),  # where it is, is no secret
        ("API_KEY", ""),
        ("API_KEY", "       "),
    ],
)
def test_boring_values_are_left_alone(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    text = f"metrics 8192 0.12345 1 false true, {value}."
    assert redacted(text) == text


def test_a_long_number_is_a_secret_but_numbers_stay_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "83917264")
    assert redacted({"pin": "83917264", "loss": 83917264.0}) == {"pin": "<redacted>", "loss": 83917264.0}


def test_a_secret_inside_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHORT_KEY", PLANTED[:7])
    assert redacted(f"<{PLANTED}> <{PLANTED[:7]}>") == "<<redacted>> <<redacted>>"


@pytest.mark.parametrize(
    "secret", ['it\'s "quoted" \\ and\ttabbed', "-----BEGIN KEY-----\nline two\n-----END KEY-----"]
)
def test_however_it_is_written(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("PRIVATE_KEY", secret)
    for text in (secret, repr(secret), json.dumps(secret), repr({"a": [secret]}), secret.splitlines()[-1]):
        clean = redacted(f"before {text} after")
        assert "quoted" not in clean and "line two" not in clean and "END" not in clean
        assert clean.startswith("before ") and clean.endswith(" after")


@pytest.mark.parametrize(
    "key",
    [
        "password",
        "api_key",
        "apikey",
        "token",
        "secret",
        "hub.access_token",
        "client_secret",
        "API-KEY",
        "pwd",
        "db.pass",
        "registry_cred",
        "github_pat",
        "GITHUBPAT",
        "wandb_key",
        "MYKEY",
        "ssh-key",
        "accessToken",
        "clientSecret",
        "userPassword",
    ],
)
def test_a_config_key_that_says_so(key: str) -> None:
    assert redacted({"a": {key: "anything"}}) == {"a": {key: "<redacted>"}}
    assert redacted({key: ["one", "two"], "b": 1}) == {key: "<redacted>", "b": 1}
    assert redacted({key: None}) == {key: None}
    assert redacted(f"tracker.{key}=anything is wrong") == f"tracker.{key}=<redacted> is wrong"


@pytest.mark.parametrize(
    "key",
    ["max_tokens", "micro_batch_tokens", "max_new_tokens", "pad_token", "eos_token", "key", "tokenizer",
     "secretary", "kl_per_token", "tokens", "monkey", "padToken", "maxTokens", "compat",
     "bypass", "compass", "passes"],
)  # fmt: skip
def test_a_config_key_that_only_sounds_like_it(key: str) -> None:
    assert redacted({key: "anything"}) == {key: "anything"}
    assert redacted(f"sft.{key}=anything") == f"sft.{key}=anything"


@pytest.mark.parametrize(
    ("url", "clean"),
    [
        ("http://user:pass@host/x?a=1", "http://<redacted>@host/x?a=1"),
        ("https://t0ken@host", "https://<redacted>@host"),
        ("postgres://u:p@ss@host:5432/db", "postgres://<redacted>@host:5432/db"),
        ("ppo.reward='http://user:pass@host': why", "ppo.reward='http://<redacted>@host': why"),
        ("https://h/x?token=abc&b=2", "https://h/x?token=<redacted>&b=2"),
        ("https://h/x?b=2&api_key=abc#top", "https://h/x?b=2&api_key=<redacted>#top"),
        ("https://h/x?key=abc", "https://h/x?key=<redacted>"),
        (
            "https://h/x?X-Amz-Signature=abc&X-Amz-Date=1",
            "https://h/x?X-Amz-Signature=<redacted>&X-Amz-Date=1",
        ),
        ("https://h/x?page=2", "https://h/x?page=2"),
        ("https://h/x?code=abc&api-version=1", "https://h/x?code=<redacted>&api-version=1"),
        ("see https://h/x?pw=abc", "see https://h/x?pw=<redacted>"),
        ("https://h/x?a=1&whatever=abc#top", "https://h/x?a=1&whatever=<redacted>#top"),
        ("https://h/x?accessToken=abc", "https://h/x?accessToken=<redacted>"),
        ("a.b='https://h/x?token=abc'", "a.b='https://h/x?token=<redacted>'"),
        ("a.b=https://h/x?token\\=abc", "a.b=https://h/x?token\\=<redacted>"),
        ("https://host/path@version", "https://host/path@version"),
        ("write to me@host", "write to me@host"),
    ],
)
def test_only_the_credential_of_a_url_goes(url: str, clean: str) -> None:
    assert redacted(url) == clean


@pytest.mark.parametrize(
    ("header", "clean"),
    [
        ("Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.e30.abc", "Authorization: Bearer <redacted>"),
        ("{'Authorization': 'Bearer hunter2!'}", "{'Authorization': 'Bearer <redacted>!'}"),
        ("a bearer abcdefghijklmnopqrstuvwxyz here", "a bearer <redacted> here"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic <redacted>"),
        ("the bearer of bad news", "the bearer of bad news"),
        ("a bearer certificate", "a bearer certificate"),
        ("Basic understanding", "Basic understanding"),
    ],
)
def test_a_headers_credential_goes(header: str, clean: str) -> None:
    assert redacted(header) == clean


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("X-Api-Key: v", "X-Api-Key: <redacted>"),
        ("Host: h\nx-auth-token: a.b-c\nAge: 3", "Host: h\nx-auth-token: <redacted>\nAge: 3"),
        ('{"api_key": "v", "model": "m"}', '{"api_key": "<redacted>", "model": "m"}'),
        ("{'apiKey':'v w', 'n': 1}", "{'apiKey':'<redacted>', 'n': 1}"),
        (
            r'{"error": "got {\"password\": \"v\", \"n\": 1}"}',
            r'{"error": "got {\"password\": \"<redacted>\", \"n\": 1}"}',
        ),
        (r'{"secret": "v\"w", "n": 1}', '{"secret": "<redacted>", "n": 1}'),
        ("Error: wandb_api_key: v", "Error: wandb_api_key: <redacted>"),
        ('{"api_key": 12345}', '{"api_key": <redacted>}'),
        ('{"api_key": null, "max_tokens": 5, "pad_token": "</s>"}',) * 2,
        ("ppo.reward=python:my_token:score: no such key: x",) * 2,
        ("tokens: 5, key: a, sft.data: b",) * 2,
    ],
)
def test_fields_of_json_and_headers_go(text: str, clean: str) -> None:
    assert redacted(text) == clean
    assert redacted(clean) == clean


def test_a_place_is_no_name_of_a_secret() -> None:
    """Digests of what scores stand under its place, and decide an artifact's key."""
    for place in ("model:my_Secret", "model:dir/token", "python:my.module:password", "runs/api_key"):
        assert redacted({place: "a digest"}) == {place: "a digest"}


def test_no_key_of_the_config_says_that_its_value_is_a_secret() -> None:
    keys = [key.name for section in sections({}) for key in section.keys]
    assert len(keys) > 200
    assert [key for key in keys if is_secret_name(key)] == []


def test_whatever_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with redacted_output():
        print("out", PLANTED)
        print("err", PLANTED, file=sys.stderr)
        sys.stderr.writelines([PLANTED, "\n"])
    print("outside", PLANTED)
    out, err = capsys.readouterr()
    assert out == f"out <redacted>\noutside {PLANTED}\n"
    assert err == "err <redacted>\n<redacted>\n"


def test_a_folded_line_cannot_hide_a_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JWT_SECRET", "abcdefghij" * 5)
    out = io.StringIO()
    RedactingConsole(file=out, width=20).print(f"see [bold]{'abcdefghij' * 5}[/] there")
    assert "abc" not in out.getvalue()
    assert "<redacted>" in out.getvalue()


@pytest.mark.parametrize("part", ["a", "a.b-", "token", "key=", "a=", '"key":', "Bearer ", "a://", "&a"])
def test_a_long_text_is_read_in_one_pass(part: str) -> None:
    """With a pattern that looks back at each letter this took minutes, or ended in a RecursionError."""
    text = part * (200_000 // len(part))
    assert len(redacted_text(text)) <= 2 * len(text)
