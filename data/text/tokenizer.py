"""Tokenizers, saved or trained on the training text (byte-level BPE), and the bytes of text of each token."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

END = "<|endoftext|>"
CLS, SEP, PAD = "[CLS]", "[SEP]", "[PAD]"
CACHE_VARIABLE = "LACONIC_CACHE"
# Enough text for a vocabulary; training on more takes longer for little gain.
TRAINING_CHARACTERS = 100_000_000


def cache_folder() -> Path:
    """Folder of trained tokenizers: ``$LACONIC_CACHE``, else ``laconic`` in the user's cache folder."""
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "laconic"


def load_tokenizer(name: str, revision: str | None = None, ends: bool = True) -> Any:
    """A saved tokenizer.

    Args:
        name: a folder, a ``tokenizer.json`` or a hub name.
        revision: revision of a hub tokenizer.
        ends: require an end-of-text token.

    Raises:
        ValueError: the tokenizer cannot be loaded, or has no end-of-text token although ``ends`` is True.
    """
    try:
        if name.endswith(".json"):
            tokenizer: Any = PreTrainedTokenizerFast(tokenizer_file=name)
        else:
            tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=False)
    except Exception as error:
        # Tokenizer files raise many types of exception, plain Exception among them.
        raise ValueError(f"data.tokenizer = {name!r} cannot be loaded: {str(error).splitlines()[0]}") from None
    if not ends:
        return tokenizer
    if tokenizer.eos_token_id is None and END in tokenizer.get_vocab():
        tokenizer.eos_token = END
    if tokenizer.eos_token_id is None:
        raise ValueError(f"data.tokenizer = {name!r} has no token for the end of a text (eos_token): save it with one")
    return tokenizer


def with_template(tokenizer: Any, given: str) -> Any:
    """The tokenizer with another chat template, in place.

    Args:
        tokenizer: tokenizer of the texts.
        given: value of ``data.chat_template``: a file, or the text of a template.

    Raises:
        ValueError: the file does not exist, or the template is not Jinja.
    """
    from jinja2 import TemplateSyntaxError

    text = given
    if "{" not in given:
        path = Path(given)
        if not path.is_file():
            raise ValueError(f"data.chat_template = {given!r} does not exist: set it to a file with a Jinja template, or to its text")
        text = path.read_text("utf-8-sig")
    tokenizer.chat_template = text
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
    except TemplateSyntaxError as error:
        raise ValueError(f"data.chat_template is not a Jinja template: line {error.lineno}: {error.message}") from None
    except Exception as error:
        # Templates raise exceptions of any type for chats that they refuse; each row is checked later.
        logging.getLogger(__name__).debug("data.chat_template refuses a chat of one message: %s", error)
    return tokenizer


def trained_tokenizer(texts: Iterable[str], size: int, framed: bool = False) -> Any:
    """A byte-level BPE of ``size`` entries trained on texts, from the cache if the same texts were trained on before.

    Args:
        texts: texts of the training split; iterated twice if the cache has no entry.
        size: number of entries, with ``<|endoftext|>`` and the 256 bytes.
        framed: put each text between [CLS] and [SEP], as encoders require; a pair has one [SEP] after each text.

    Raises:
        ValueError: ``size`` is too small for merged tokens.
    """
    if size < 300:
        raise ValueError(f"model.config.vocab_size = {size} must be at least 300 to train a tokenizer: 256 entries are single bytes")
    digest = hashlib.sha256(f"byte-level bpe {size}{' framed' if framed else ''}".encode())
    for text in _first(texts):
        digest.update(text.encode("utf-8", "surrogatepass"))
    path = cache_folder() / f"tokenizer-{digest.hexdigest()[:24]}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Several processes may write at once: the rename is atomic, so each reads a complete file.
        partial = path.with_suffix(f".{os.getpid()}.partial")
        _train(_first(texts), size, framed).save(str(partial))
        partial.replace(path)
    frame = {"cls_token": CLS, "sep_token": SEP, "pad_token": PAD} if framed else {"pad_token": END}
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token=END, **frame)


def _first(texts: Iterable[str]) -> Iterator[str]:
    characters = 0
    for text in texts:
        if characters >= TRAINING_CHARACTERS:
            return
        characters += len(text)
        yield text


def _train(texts: Iterator[str], size: int, framed: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = [END, *((CLS, SEP, PAD) if framed else ())]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    if framed:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{CLS} $A {SEP}",
            pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
            special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)],
        )
    return tokenizer


def token_bytes(tokenizer: Any) -> np.ndarray:
    """(entries,) int64 bytes of UTF-8 text of each token; 0 for special tokens."""
    count = len(tokenizer)
    tokens = tokenizer.convert_ids_to_tokens(list(range(count)))
    if _byte_level(tokenizer):
        # Each character of a byte-level token is one byte of text.
        sizes = [len(token) if token is not None else 0 for token in tokens]
    else:
        sizes = [_text_bytes(token) if token is not None else 0 for token in tokens]
    found = np.asarray(sizes, np.int64)
    special = [number for number in tokenizer.all_special_ids if number < count]
    found[special] = 0
    return found


def _byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return backend is not None and '"ByteLevel"' in json.dumps(json.loads(backend.to_str()).get("decoder"))


def _text_bytes(token: str) -> int:
    """Bytes of a token of SentencePiece (``▁`` for a space, ``<0x0A>`` for a byte) or WordPiece (``##`` inside a word)."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.removeprefix("##").replace("▁", " ").encode("utf-8", "surrogatepass"))
