"""Tokens to text while they arrive, and stop strings: the pieces add up to the whole, wherever the cuts fall."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Core

from hexgen.coordinator.detokenizer import Detokenizer
from hexgen.coordinator.stops import StopMatcher
from hexgen.coordinator.tokenizer import Tokenizer, load_tokenizer
from hexgen.errors import CheckpointError, RequestError

BUNDLED = Path(__file__).parent.parent / "hexgen" / "bundled" / "demo"
FEW = settings(deadline=None, max_examples=60)


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    tokenizer = load_tokenizer(BUNDLED)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def sentence_piece() -> Tokenizer:
    """A Llama-2-like tokenizer: metaspace, byte fallback, the first space stripped."""
    from transformers import PreTrainedTokenizerFast

    words = ["▁", "▁the", "▁cat", "s", "▁sat", "!", "▁日", "本", "é", "▁a", "b"]
    vocabulary = {
        t: i for i, t in enumerate(["<unk>", "<s>", "</s>", *[f"<0x{b:02X}>" for b in range(256)], *words])
    }
    core = Core(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>"), "test")


def stream(tokenizer: Tokenizer, prompt: list[int], output: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer, prompt)
    return [*(detokenizer.push(token) for token in output), detokenizer.flush()]


@FEW
@given(text=st.text(max_size=60), prompt=st.text(max_size=10))
def test_byte_level_pieces_add_up_to_the_text(byte_level: Tokenizer, text: str, prompt: str) -> None:
    text = "".join(c for c in text if not 0xD800 <= ord(c) < 0xE000).replace("\ufffd", "?")
    prompt = "".join(c for c in prompt if not 0xD800 <= ord(c) < 0xE000)
    pieces = stream(byte_level, list(byte_level.encode(prompt)), list(byte_level.encode(text)))
    assert "".join(pieces) == byte_level.decode(byte_level.encode(text))
    assert not any("\ufffd" in piece for piece in pieces)


@FEW
@given(ids=st.lists(st.integers(0, 4095), max_size=150), prompt=st.lists(st.integers(0, 4095), max_size=8))
def test_any_tokens_add_up_to_the_whole(byte_level: Tokenizer, ids: list[int], prompt: list[int]) -> None:
    before = byte_level.decode(prompt)
    whole = byte_level.decode(prompt + ids)
    if not before.endswith("\ufffd"):
        assert "".join(stream(byte_level, prompt, ids)) == whole[len(before) :]


def test_invalid_bytes_do_not_pile_up(byte_level: Tokenizer) -> None:
    lone = byte_level.encode("é")[0]  # the first byte of two
    alone = next(t for t in byte_level.encode("日本é") if "\ufffd" in byte_level.token_text(t))
    pieces = stream(byte_level, [], [lone, alone] * 200)
    assert "".join(pieces) == byte_level.decode([lone, alone] * 200)
    assert max(map(len, pieces)) < 140  # text goes out as it settles, not at the very end


def test_spaces_as_in_the_whole(sentence_piece: Tokenizer) -> None:
    vocabulary = sentence_piece._inner.get_vocab()
    ids = [vocabulary[t] for t in ["▁the", "▁cat", "s", "▁sat", "!", "▁日", "本", "<0xC3>", "<0xA9>", "▁a", "b"]]
    for cut in range(len(ids)):
        prompt, output = ids[:cut], ids[cut:]
        text = "".join(stream(sentence_piece, prompt, output))
        assert sentence_piece.decode(prompt).rstrip("\ufffd") + text == "the cats sat! 日本é ab"
    assert stream(sentence_piece, ids[:2], ids[2:])[5:7] == ["", "é"]


def test_special_tokens_are_skipped_and_keep_the_spaces(sentence_piece: Tokenizer) -> None:
    vocabulary = sentence_piece._inner.get_vocab()
    the, cat, end = vocabulary["▁the"], vocabulary["▁cat"], vocabulary["</s>"]
    assert "".join(stream(sentence_piece, [the], [end, end, cat])) == " cat"


@FEW
@given(
    text=st.text(alphabet="ab\n", max_size=40),
    stops=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 40), max_size=12),
)
def test_stop_strings_do_not_see_the_cuts(text: str, stops: list[str], cuts: list[int]) -> None:
    edges = sorted({0, len(text), *(min(c, len(text)) for c in cuts)})
    matcher, out = StopMatcher(stops), ""
    for a, b in itertools.pairwise(edges):
        out += matcher.push(text[a:b])
        if matcher.matched is not None:
            break
        # What went out can never turn out to belong to a stop string.
        assert text.startswith(out)
    else:
        out += matcher.flush()
    ends = [(i, -len(s), s) for s in stops for i in range(len(s), len(text) + 1) if text[:i].endswith(s)]
    if ends:
        end, length, stop = min(ends)
        assert (out, matcher.matched) == (text[: end + length], stop)
    else:
        assert (out, matcher.matched) == (text, None)


def test_held_text_is_only_what_must_be() -> None:
    matcher = StopMatcher(["\n\nclass"])
    assert matcher.push("x\n") == "x"
    assert matcher.push("\ncl") == ""
    assert matcher.push("ear") == "\n\nclear"


def test_a_checkpoint_without_tokenizer(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None


def test_a_broken_tokenizer_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(tmp_path)


def test_code_of_a_checkpoint_never_runs(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((BUNDLED / name).read_bytes())
    config = (tmp_path / "tokenizer_config.json").read_text()
    extra = '{"auto_map": {"AutoTokenizer": ["evil.Tok", null]},'
    (tmp_path / "tokenizer_config.json").write_text(config.replace("{", extra, 1))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Tok: pass\n")
    with contextlib.suppress(CheckpointError):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_half_a_surrogate_pair_is_refused(byte_level: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        byte_level.encode("a\ud800b")


def test_chat_template(byte_level: Tokenizer) -> None:
    text = byte_level.render_chat([{"role": "user", "content": "hi"}])
    assert text == "<|user|>hi<|end|><|assistant|>"
    assert len(byte_level.encode(text, add_special_tokens=False)) < 8


def test_no_chat_template(sentence_piece: Tokenizer) -> None:
    with pytest.raises(RequestError, match="no chat template"):
        sentence_piece.render_chat([{"role": "user", "content": "hi"}])
