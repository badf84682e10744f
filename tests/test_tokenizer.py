"""Round trips, and the errors that tiktoken itself would answer with a panic."""

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

from nano_opd import tokenizer


@given(st.text(tokenizer.ALPHABET, max_size=80))
def test_round_trip(text):
    tokens = tokenizer.encode(text)
    assert len(tokens) == len(text) and all(0 <= t < tokenizer.EOS for t in tokens)
    assert tokenizer.decode(tokens) == text
    assert tokenizer.decode([*tokens, tokenizer.EOS, 3, tokenizer.PAD]) == text


@given(st.text(max_size=40))
def test_anything_outside_the_alphabet_is_named_with_its_position(text):
    outside = [i for i, c in enumerate(text) if c not in tokenizer.ALPHABET]
    if outside:
        with pytest.raises(ValueError) as error:
            tokenizer.encode(text)
        assert f"{text[outside[0]]!r} at position {outside[0]} " in str(error.value)
    else:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_cannot_be_smuggled_in_as_text():
    with pytest.raises(ValueError, match="'<' at position 1"):
        tokenizer.encode("1<|eos|>")


def test_it_is_a_real_tiktoken_encoding_with_distinct_specials():
    assert isinstance(tokenizer.ENCODING, tiktoken.Encoding)
    assert tokenizer.ENCODING.n_vocab == tokenizer.VOCAB_SIZE
    assert len({tokenizer.EOS, tokenizer.PAD, *range(len(tokenizer.ALPHABET))}) == tokenizer.VOCAB_SIZE
    assert tokenizer.encode("1+2=") == [tokenizer.ALPHABET.index(character) for character in "1+2="]


@pytest.mark.parametrize("token", [-1, tokenizer.VOCAB_SIZE])
def test_decode_refuses_ids_outside_the_vocabulary(token):
    with pytest.raises(ValueError, match=str(token)):
        tokenizer.decode([1, token])
