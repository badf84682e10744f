"""One token per character of arithmetic: a real tiktoken.Encoding, built here from our own ranks (nothing is fetched).

EOS ends a response and is one of its tokens; PAD fills what comes after. They are two different tokens: where they are
one, masking the padding also masks the EOS, and the student never learns to stop.
"""

from collections.abc import Iterable

import tiktoken

ALPHABET = "0123456789+-*=# @_"  # @ marks an answer that was copied from a reference, _ an empty reference
EOS = len(ALPHABET)
PAD = EOS + 1
VOCAB_SIZE = PAD + 1

ENCODING = tiktoken.Encoding(
    name="nano_opd_arithmetic",
    pat_str=r"[\s\S]",  # every character is a piece of its own, so no merges are ever looked for
    mergeable_ranks={character.encode(): rank for rank, character in enumerate(ALPHABET)},
    special_tokens={"<|eos|>": EOS, "<|pad|>": PAD},
    explicit_n_vocab=VOCAB_SIZE,
)


def encode(text: str) -> list[int]:
    """Return the token ids of `text`.

    Raises ValueError naming the first character outside the alphabet and its position.
    """
    for position, character in enumerate(text):  # tiktoken itself would panic, past every `except Exception`
        if character not in ALPHABET:
            raise ValueError(f"character {character!r} at position {position} is not in the alphabet {ALPHABET!r}")
    return ENCODING.encode_ordinary(text)


def decode(tokens: Iterable[int]) -> str:
    """Return the text up to the first EOS; a sampled PAD shows. Raises ValueError for an id outside the vocabulary."""
    before_eos = []
    for token in map(int, tokens):
        if not 0 <= token < VOCAB_SIZE:
            raise ValueError(f"token {token} is not in the vocabulary 0 … {VOCAB_SIZE - 1}")
        if token == EOS:
            break
        before_eos.append(token)
    return ENCODING.decode(before_eos)
