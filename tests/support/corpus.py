"""Small real corpora, tokenizers and indexed datasets, made when a test asks for them."""

import functools
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import sentencepiece
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

SYLLABLES = ("ka", "lo", "mi", "ner", "tu", "sha", "ve", "or", "in", "das", "pel", "qui")


def texts(count: int, seed: int = 0, words: int = 40) -> list[str]:
    """Documents of made-up words, numbers, line breaks, and letters of more than one byte."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 4))) for _ in range(400)]
    lexicon += ["42", "caf\u00e9", "\u4f60\u597d", "\n", "  "]
    return [" ".join(draw.choices(lexicon, k=draw.randint(1, words))) for _ in range(count)]


def conversations(count: int, seed: int = 0) -> list[dict[str, list[dict[str, str]]]]:
    """Made-up conversations of one to three turns, some with a system message; the answer repeats what was asked."""
    draw = random.Random(seed)
    lexicon = ["".join(draw.choices(SYLLABLES, k=draw.randint(1, 3))) for _ in range(30)]
    found = []
    for _ in range(count):
        messages = [{"role": "system", "content": "mi lo"}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            words = " ".join(draw.choices(lexicon, k=draw.randint(1, 4)))
            messages += [{"role": "user", "content": words}, {"role": "assistant", "content": f"{words} {words}"}]
        found.append({"messages": messages})
    return found


@functools.lru_cache
def sentencepiece_model(vocab_size: int = 400) -> bytes:
    """A SentencePiece BPE model with byte fallback; unk, bos and eos are 0, 1 and 2."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts(400)),
        model_writer=model,
        vocab_size=vocab_size,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


def save_sentencepiece(path: Path, vocab_size: int = 400) -> str:
    path.write_bytes(sentencepiece_model(vocab_size))
    return str(path)


def byte_level(lines: list[str], vocab_size: int, special: list[str]) -> tokenizers.Tokenizer:
    """A byte-level BPE."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def save_byte_level(folder: Path, vocab_size: int = 400) -> str:
    """A byte-level BPE in a Hugging Face folder, with bos, eos, and an added token that is no special one."""
    tokenizer = byte_level(texts(200), vocab_size, ["<|begin|>", "<|end|>"])
    tokenizer.add_tokens(["\u00e9\u00e9\u00e9"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": {"content": "<|begin|>", "lstrip": False}, "eos_token": "<|end|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def save_sentencepiece_as_folder(folder: Path, vocab_size: int = 400) -> str:
    """The vocabulary of `sentencepiece_model` as tokenizer.json, the way LLaMA's is (without its merges)."""
    model = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model(vocab_size))
    ids = {model.id_to_piece(i): i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": [2]}))
    return str(folder)


def write_dataset(prefix: Path, documents: Sequence[Sequence[int]], dtype: type = np.uint16) -> str:
    """PREFIX.bin and PREFIX.idx by Megatron's own builder."""
    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype=dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_jsonl(path: Path, documents: Sequence[str]) -> str:
    return write_lines(path, [{"text": text} for text in documents])


def write_lines(path: Path, lines: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)
