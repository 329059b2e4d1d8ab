"""Two vocabularies in one: what old text keeps, what new text gains, and what cannot be merged."""

from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_capgap.data import sentencepiece_proto, vocab_merge
from megatron_capgap.data.sentencepiece_proto import NORMAL
from megatron_capgap.data.tokenizer import open_tokenizer
from tests.support import languages
from tests.support.languages import Merged

KINDS = ("bpe", "unigram")
Merge = Callable[[str], Merged]


@pytest.fixture(scope="module")
def merge(tmp_path_factory: pytest.TempPathFactory) -> Merge:
    """The English model of a kind with the pieces of the Chinese one, made once."""
    folder, made = tmp_path_factory.mktemp("vocabulary"), {}

    def merge(kind: str) -> Merged:
        if kind not in made:
            made[kind] = languages.merged(folder / kind, kind)
        return made[kind]

    return merge


def spans(processor: sentencepiece.SentencePieceProcessor, text: str) -> list[tuple[int, int, int]]:
    """(begin, end, id) of each token in the bytes of the text as the model has normalised it; its bytes of a character
    follow each other."""
    found, at = [], 0
    for token in processor.encode(text):
        size = 1 if processor.is_byte(token) else len(processor.id_to_piece(token).encode())
        found.append((at, at + size, token))
        at += size
    return found


# Old words, new ones, both in one word, and any characters at all.
WORDS = st.sampled_from(
    [*languages.english()[:200], *languages.chinese()[:200], "\u00e9t\u00e9", "\U0001f600", "12345", "     "]
)
TEXTS = st.lists(st.one_of(WORDS, st.text(max_size=6)), max_size=8).map("".join)
ANY_TEXT = TEXTS.filter(lambda text: "\u2581" not in text)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=150)
@given(text=ANY_TEXT)
def test_between_common_cuts_old_ids_stay_or_a_new_piece_is_there(kind: str, merge: Merge, text: str) -> None:
    merged = merge(kind)
    old, new = spans(merged.before, text), spans(merged.after, text)
    assert merged.after.decode([token for *_, token in new]) == text
    common = {end for _, end, _ in old} & {end for _, end, _ in new}
    for begin, end in zip([0, *sorted(common)], sorted(common), strict=False):
        mine, theirs = ([token for b, e, token in part if begin <= b and e <= end] for part in (new, old))
        assert mine == theirs or max(mine) >= merged.known
        # Every new cut is an old one, and tokens get no more.
        assert len(mine) <= len(theirs)


@settings(max_examples=150)
@given(text=ANY_TEXT)
def test_bpe_merges_neighbours_and_does_nothing_else(merge: Merge, text: str) -> None:
    """Every cut of the new encoding is one of the old; without a new piece among neighbours, nothing changes."""
    merged = merge("bpe")
    old, new = spans(merged.before, text), spans(merged.after, text)
    cuts = {end for _, end, _ in old}
    assert {end for _, end, _ in new} <= cuts
    assert all(token < merged.known for b, e, token in new if (b, e, token) in old)
    if not any(token >= merged.known for *_, token in new):
        assert new == old


def test_unigram_takes_new_pieces_where_the_old_model_would_cut(merge: Merge) -> None:
    """Cut back into old pieces, the new encoding is as good as the old one, but for what its saved tokens are worth."""
    merged = merge("unigram")
    base = sentencepiece_proto.read(merged.first)
    score = {piece.text: piece.score for piece in base.pieces if piece.kind == NORMAL}
    before = base.processor_of_pieces()
    after = sentencepiece_proto.read(merged.out).processor_of_pieces()

    def worth(ids: list[int]) -> float:
        return sum(score.get(before.id_to_piece(i), 0.0) for i in ids)

    saved_in_all = 0
    for text in [word for line in languages.english() for word in line.split()] + languages.chinese()[:300]:
        old, new = (processor.encode(f"\u2581{text}") for processor in (before, after))
        parts = [[token] if token < merged.known else merged.splits[token - merged.known] for token in new]
        saved = len(old) - len(new)
        assert saved >= 0, text
        assert worth([i for part in parts for i in part]) >= worth(old) - 0.25 * saved - 1e-3, text
        saved_in_all += saved
    assert saved_in_all > 1000


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_scores_and_specials_of_the_first_stay(kind: str, merge: Merge) -> None:
    merged = merge(kind)
    before, after = sentencepiece_proto.read(merged.first), sentencepiece_proto.read(merged.out)
    assert after.pieces[: merged.known] == before.pieces
    assert after.content.startswith(before.content)
    assert len(after.pieces) == merged.after.get_piece_size() == merged.known + len(merged.splits)
    other = sentencepiece_proto.read(merged.second)
    added = {piece.text for piece in after.pieces[merged.known :]}
    there = {piece.text for piece in before.pieces}
    assert added == {piece.text for piece in other.pieces if piece.kind == NORMAL} - there
    assert all(piece.kind == NORMAL for piece in after.pieces[merged.known :])
    for name in ("unk_id", "bos_id", "eos_id", "pad_id"):
        assert getattr(merged.after, name)() == getattr(merged.before, name)()
    lowest = min(piece.score for piece in before.pieces)
    scores = [piece.score for piece in after.pieces[merged.known :]]
    if kind == "bpe":
        assert max(scores) < lowest and scores == sorted(set(scores), reverse=True)
        order = {piece.text: piece.score for piece in other.pieces}
        theirs = [order[piece.text] for piece in after.pieces[merged.known :]]
        assert theirs == sorted(theirs, reverse=True)


def written(merged: Merged, split: tuple[int, ...]) -> str:
    """Old pieces one after the other."""
    pieces = [merged.before.id_to_piece(part) for part in split]
    return b"".join(
        bytes([int(piece[3:5], 16)]) if merged.before.is_byte(part) else piece.encode()
        for part, piece in zip(split, pieces, strict=True)
    ).decode()


@pytest.mark.parametrize("kind", KINDS)
def test_a_piece_splits_into_what_the_old_model_makes_of_it(kind: str, merge: Merge) -> None:
    merged, space = merge(kind), merge(kind).before.piece_to_id("\u2581")
    compared = 0
    for token, split in enumerate(merged.splits, start=merged.known):
        piece = merged.after.id_to_piece(token)
        assert written(merged, split) == piece and max(split) < merged.known
        # The old model puts a space in front of every text.
        first, *rest = merged.before.encode(piece.removeprefix("\u2581").replace("\u2581", " "))
        if piece.startswith("\u2581"):
            assert (first, *rest) == split
        elif first == space:
            assert tuple(rest) == split
        else:
            continue
        compared += 1
    assert compared > 0.8 * len(merged.splits)


def test_pieces_are_not_normalised(tmp_path: Path) -> None:
    """The first model reads a full-width comma as a plain one, and would leave out spaces at the end."""
    rules = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    first = languages.train(tmp_path / "first.model", languages.english(), "bpe", 600, **rules)
    texts = [text.replace("\u3002", "\uff0c") for text in languages.chinese()]
    second = languages.train(tmp_path / "second.model", texts, "bpe", 1200)
    merged = languages.merge(first, second, tmp_path / "both.model")
    commas = [split for split in merged.splits if "\uff0c" in written(merged, split)]
    assert commas and merged.before.piece_to_id(",") not in {part for split in commas for part in split}
    pieces = sentencepiece_proto.read(second).pieces
    assert {written(merged, split) for split in merged.splits} <= {piece.text for piece in pieces}
    assert merged.after.encode("\uff0c  ") == merged.before.encode(",")


@pytest.mark.slow("trains tokenizers on two novels")
@pytest.mark.parametrize("kind", KINDS)
def test_a_novel(kind: str, tmp_path: Path) -> None:
    """Real Chinese on top of real English, on chapters that no vocabulary has seen. Downloads 1.9 MB."""
    english, chinese = languages.english(), languages.novel()
    first = languages.train(tmp_path / "en.model", english[:1600], kind, 2000)
    second = languages.train(tmp_path / "zh.model", chinese[:-400], kind, 6000, character_coverage=0.9995)
    merged = languages.merge(first, second, tmp_path / "both.model")
    counts = {}
    for name, texts in (("zh", chinese[-400:]), ("en", english[-400:])):
        old, new = ([processor.encode(text) for text in texts] for processor in (merged.before, merged.after))
        assert [merged.after.decode(ids) for ids in new] == texts
        counts[name] = [sum(map(len, found)) / sum(map(len, texts)) for found in (old, new)]
        if name == "en":
            changed = [ids for ids, before in zip(new, old, strict=True) if ids != before]
            assert all(max(ids) >= merged.known for ids in changed) and len(changed) < 20, len(changed)
    assert counts["zh"][0] > 2.5 and counts["zh"][1] < 0.9, counts


@pytest.mark.parametrize("kind", KINDS)
def test_new_text_takes_fewer_tokens_and_old_text_no_more(kind: str, merge: Merge, tmp_path: Path) -> None:
    merged = merge(kind)
    before, after = (open_tokenizer(str(file)) for file in (merged.first, merged.out))
    for name, texts, least in (("zh", languages.chinese(), 0.4), ("en", languages.english(), 0.0)):
        file = tmp_path / f"{name}.txt"
        file.write_text("\n".join(texts[-300:]), encoding="utf-8")
        found = vocab_merge.count(str(file), before, after)
        assert found.characters == sum(map(len, texts[-300:]))
        assert found.before == sum(len(before.encode(text)) for text in texts[-300:])
        assert found.after <= (1 - least) * found.before
        for text in texts[-300:]:
            assert after.decode(after.encode(text)) == text
    assert before.fingerprint != after.fingerprint
