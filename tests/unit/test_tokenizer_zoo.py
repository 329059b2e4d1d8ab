"""Tokenizer folders of every kind against transformers' AutoTokenizer: ids, lengths, special tokens."""

import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.auto import tokenization_auto

from megatron_capgap.common.errors import UserError
from megatron_capgap.conversion.registry import FAMILIES
from megatron_capgap.conversion.tokenizer_check import AsTrained, settle
from megatron_capgap.conversion.tokenizer_files import Copied, Words
from megatron_capgap.data import tokenizer_folder
from megatron_capgap.data.tokenizer import open_tokenizer
from megatron_capgap.data.tokenizer_classes import class_of
from megatron_capgap.data.tokenizer_steps import SPECIAL
from tests.support import tokenizer_zoo

NAMES = [name for name, _ in tokenizer_zoo.kinds(b"", {})]
WORDS = [
    "hello world, the quick",
    " two  spaces ",
    "hi</s>hello <|im_start|>user\nhello<|im_end|>\n",
    "\u2581x <s> a",
    "<ctl>a<|im_end|> <|im_start|> b",
    "\ufb01 \u00bd e\u0301 \u65e5\u672c \U0001f600",
    "\tint main() {\n    return 0;\n}\n",
    "the cat sat on the mat " * 30,
    "<image>a <boi> <x> <y><z> <audio><video>",
    "They'LL don't 1234 x\u0301\u0300 5\u0966\u0967\u093e\r\n\n  y\r z",
    " ",
    "",
]
OF_FILES = [name for name in NAMES if "Tokenizer_" not in name or name.endswith(("_genuine", "_foreign"))]
EXPORTS = [  # each folder under one family, each family with many folders
    pytest.param(name, family, marks=[] if (i - j) % len(FAMILIES) == 0 else pytest.mark.matrix, id=f"{name}-{family}")
    for i, name in enumerate(NAMES)
    for j, family in enumerate(FAMILIES)
]
PIECES = st.sampled_from(
    ["<s>", "</s>", "<|im_start|>", "<|im_end|>", " ", "  ", "\n", "the", "cat", "1", "\u00e9", "\u2581"]
)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return tokenizer_zoo.build(tmp_path_factory.mktemp("zoo"))


@pytest.fixture(scope="module")
def pair(zoo: dict[str, Path]) -> Any:
    """Ours and theirs, opened once."""
    return tokenizer_zoo.opener(zoo)


@pytest.mark.parametrize("name", NAMES)
def test_ids_and_special_tokens_are_those_of_transformers(pair: Any, name: str) -> None:
    ours, theirs = pair(name)
    for text in WORDS:
        expected = theirs(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]
        assert ours.encode(text) == expected, text
        whole = theirs(text, truncation=False, padding=False)["input_ids"]
        assert [*ours.before, *expected, *ours.after] == whole, text
    assert ours.vocab_size == len(theirs)
    assert (ours.bos, ours.eos) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.special == theirs.special_tokens_map  # what chat templates are given
    assert ours.stops == ({ours.eos} if ours.eos is not None else set())


@pytest.mark.parametrize("name", OF_FILES)
@given(pieces=st.lists(PIECES, max_size=12))
def test_any_text_has_the_ids_of_transformers(pair: Any, name: str, pieces: list[str]) -> None:
    ours, theirs = pair(name)
    text = "".join(pieces)
    assert ours.encode(text) == theirs(text, add_special_tokens=False, truncation=False, padding=False)["input_ids"]


@pytest.mark.parametrize("name", OF_FILES)
def test_each_id_knows_its_place_in_the_text(pair: Any, name: str) -> None:
    ours, _ = pair(name)
    text = "the cat sat <|im_start|> on 日本 the mat"
    ids, places = ours.encode_with_places(text)
    assert ids == ours.encode(text) and len(ids) == len(places)
    starts = [start for start, _ in places]
    assert starts == sorted(starts) and 0 <= starts[0] and places[-1][1] == len(text)


def test_a_text_is_neither_cut_nor_padded(zoo: dict[str, Path], pair: Any) -> None:
    ours, _ = pair("cut_and_padded")
    whole, _ = pair("prepend")
    for text in ("hi", "the cat sat on the mat " * 30):
        assert ours.encode(text) == whole.encode(text)


def test_a_model_may_stop_at_several_ids(zoo: dict[str, Path], tmp_path: Path) -> None:
    """As in LLaMA 3's generation_config.json."""
    shutil.copytree(zoo["prepend"], tmp_path / "copy")
    (tmp_path / "copy" / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 9]}))
    found = open_tokenizer(str(tmp_path / "copy"))
    assert found.eos == 2 and found.stops == {2, 5, 9}


def test_the_class_is_the_one_that_transformers_chooses() -> None:
    """For every type of model and every class that it knows, alone; and where both name another."""
    kept = transformers.tokenization_utils_tokenizers.TokenizersBackend

    def known(name: str | None) -> str | None:  # what is refused goes by several names
        return name if name is None or name in SPECIAL else "refused"

    def anew(name: str | None) -> str | None:
        found = tokenization_auto.tokenizer_class_from_name(name) if name else None
        if found is None or found is kept or (issubclass(found, kept) and "__init__" not in found.__dict__):
            return None
        return known(found.__name__.removesuffix("Fast")) if "Backend" not in found.__name__ else None

    of_model = dict(tokenization_auto.TOKENIZER_MAPPING_NAMES)
    of_model.pop("rag")  # two tokenizers in one
    for model, name in of_model.items():
        assert known(class_of({}, {"model_type": model}, lambda: False)) == anew(name), model
    names = {name for name in dir(transformers) if name.endswith(("Tokenizer", "TokenizerFast"))}
    of_words = ("Auto", "Basic", "Character", "Mecab", "Wordpiece", "FastSpeech2Conformer", "Rag")
    for name in sorted(names | {name for name in of_model.values() if name}):
        if not name.startswith(of_words):
            assert known(class_of({"tokenizer_class": name}, {}, lambda: False)) == anew(name), name
    wrong = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    for model in wrong:
        found = class_of({"tokenizer_class": "LlamaTokenizer"}, {"model_type": model}, lambda: False)
        assert known(found) == anew(of_model[model]), model


@pytest.mark.parametrize(
    "files, expected",
    [
        (
            {"tokenizer_config.json": {"tokenizer_class": "XGLMTokenizerFast"}},
            "transformers opens it as XGLMTokenizer (tokenizer_class XGLMTokenizerFast), whose tokenization steps are "
            "not supported; save it with transformers, AutoTokenizer.from_pretrained(FOLDER).save_pretrained(OTHER), ",
        ),
        ({"config.json": {"model_type": "bert"}}, "as BertTokenizer (model_type bert of its config.json)"),
        ({"tokenizer_config.json": {"tokenizer_class": "CodeLlamaTokenizer"}}, "as CodeLlamaTokenizer"),
        (
            {"tokenizer_config.json": {"tokenizer_class": "GemmaTokenizer", "unk_token": "<none>"}},
            "GemmaTokenizer needs its unk_token <none> in the vocabulary",
        ),
    ],
)
def test_a_class_that_is_not_known_is_refused(
    zoo: dict[str, Path], tmp_path: Path, files: dict[str, Any], expected: str
) -> None:
    shutil.copytree(zoo["no_config"], tmp_path / "copy")
    for file, content in files.items():
        (tmp_path / "copy" / file).write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        open_tokenizer(str(tmp_path / "copy"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, family", EXPORTS)
def test_an_export_of_any_family_is_read_with_the_ids_of_training(
    zoo: dict[str, Path], pair: Any, tmp_path: Path, name: str, family: str
) -> None:
    ours, _ = pair(name)
    theirs, note = exported(zoo[name], family, tmp_path)
    for text in WORDS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text), text
        assert theirs(text)["input_ids"] == [*ours.before, *ours.encode(text), *ours.after], text
    assert (len(theirs), theirs.bos_token_id, theirs.eos_token_id) == (ours.vocab_size, ours.bos, ours.eos)
    assert note is None or (note.startswith("AutoTokenizer of transformers 5 opens every qwen2") and "\n" not in note)


@pytest.mark.parametrize(
    "source, family, kind",
    [
        ("GPT2Tokenizer_genuine", "gpt2", Copied),
        ("Qwen2Tokenizer_genuine", "qwen2", Copied),
        ("prepend_llama_legacy_False", "llama", Copied),
        ("prepend_llama_legacy_False", "mistral", AsTrained),
        ("prepend_mistral", "llama", AsTrained),
        ("prepend_llama_legacy_False", "qwen3", Copied),
        ("byte_level", "qwen3", Copied),
        ("byte_level", "qwen2", AsTrained),
        ("cut_and_padded", "llama", Copied),
    ],
)
def test_files_go_out_as_they_came_where_they_are_read_so(
    zoo: dict[str, Path], source: str, family: str, kind: type[Words]
) -> None:
    words = Copied(tokenizer_folder.read(zoo[source]), frozenset(), zoo[source])
    found, note = settle({"config.json": {"model_type": family}}, words, None)
    assert type(found) is kind
    assert (note is None) == (not isinstance(found, AsTrained) or not found.program)


def test_a_program_keeps_the_steps_for_whoever_trusts_it_too(
    zoo: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs, note = exported(zoo["byte_level"], "qwen2", tmp_path)
    assert note is not None and "tokenization_as_trained.py" in note
    trusted = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    for text in WORDS:
        assert trusted(text)["input_ids"] == theirs(text)["input_ids"]


def test_what_cannot_be_read_so_is_refused_in_one_line(zoo: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> None:
        raise ValueError("no such\nclass")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", fails)
    words = Copied(tokenizer_folder.read(zoo["byte_level"]), frozenset(), zoo["byte_level"])
    with pytest.raises(UserError, match="would not give the ids that this llama was trained with") as caught:
        settle({"config.json": {"model_type": "llama"}}, words, None)
    assert "\n" not in str(caught.value)


def exported(folder: Path, family: str, out: Path) -> tuple[Any, str | None]:
    """A tokenizer as it is exported beside a model of a family, opened by transformers; and what is said of it."""
    files = {"config.json": {"model_type": family}}
    words, note = settle(files, Copied(tokenizer_folder.read(folder), frozenset(), folder), None)
    words.write(out)
    (out / "config.json").write_text(json.dumps(files["config.json"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return transformers.AutoTokenizer.from_pretrained(out), note


@pytest.mark.parametrize(
    "files",
    [
        {"vocab.txt": "[PAD]"},
        {"spiece.model": ""},
    ],
)
def test_other_forms_are_refused_with_what_makes_them_readable(tmp_path: Path, files: dict[str, Any]) -> None:
    for file, content in files.items():
        (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    expected = (
        f"has {', '.join(files)}, which are not supported, and neither tokenizer.json nor tokenizer.model: save it"
    )
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        open_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"vocab.json": "{}"}, "has vocab.json without merges.txt: copy that file there too, or save it with"),
        ({"merges.txt": ""}, "has merges.txt without vocab.json: copy that file there too, or save it with"),
        ({}, "and no class is named that reads them; set tokenizer_class in tokenizer_config.json to"),
        ({"tokenizer_config.json": '{"tokenizer_class": "PreTrainedTokenizerFast"}'}, "and no class is named"),
        (
            {"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'},
            "and LlamaTokenizer of transformers does not",
        ),
        ({"config.json": '{"model_type": "qwen3_5"}'}, "and Qwen3_5Tokenizer of transformers does not read them"),
        ({"config.json": '{"model_type": "mistral"}'}, "and no class is named that reads them"),
        ({"tokenizer_config.json": '{"tokenizer_class": "RobertaTokenizer"}'}, "opens it as RobertaTokenizer"),
        (
            {"merges.txt": "a b c"},
            "vocab.json cannot be read (Error while reading vocab & merges files: Merges text file invalid",
        ),
        ({"vocab.json": "["}, "vocab.json cannot be read ("),
    ],
)
def test_parts_that_cannot_be_read(zoo: dict[str, Path], tmp_path: Path, files: dict[str, str], expected: str) -> None:
    if " without " not in expected:
        for name in ("vocab.json", "merges.txt"):
            shutil.copy(zoo["GPT2Tokenizer_parts"] / name, tmp_path)
    if "cannot be read" in expected:
        files = {"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}', **files}
    for file, content in files.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(expected)) as caught:
        open_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["CodeLlamaTokenizer", "T5Tokenizer", "BertTokenizer"])
def test_the_advice_keeps_the_ids(zoo: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Of a class that is not known, and of forms that are not read."""
    folder, other = tmp_path / "folder", tmp_path / "other"
    folder.mkdir()
    if name == "CodeLlamaTokenizer":
        shutil.copy(zoo["no_config"] / "tokenizer.json", folder)
    elif name == "BertTokenizer":
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "hel", "##lo", "a", "b", ",", "##s"]
        (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    else:
        shutil.copy(zoo["unigram"] / "tokenizer.model", folder / "spiece.model")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    with pytest.raises(UserError, match="save it with transformers"):
        open_tokenizer(str(folder))
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    theirs.save_pretrained(other)
    settings = json.loads((other / "tokenizer_config.json").read_text())
    (other / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "PreTrainedTokenizerFast"}))
    ours = open_tokenizer(str(other))
    for text in WORDS:
        assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text


def test_a_model_without_merges_is_not_made_anew(zoo: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(open_tokenizer(str(zoo["unigram"]))._tokenizer.to_str())  # type: ignore[attr-defined]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    with pytest.raises(UserError, match="its model is not BPE, but transformers' Qwen2Tokenizer reads it as BPE; set"):
        open_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "file, content, expected",
    [
        ("tokenizer_config.json", {"eos_token": 3}, "eos_token 3 is not a string: save the tokenizer again"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": "x", "8": 7}}, "a token is 7"),
        ("tokenizer_config.json", {"extra_special_tokens": "<x>"}, "extra_special_tokens '<x>' is not a list of"),
        ("generation_config.json", {"eos_token_id": ["</s>"]}, "eos_token_id ['</s>'] is not an integer"),
        ("added_tokens.json", "[", "is not valid JSON"),
    ],
)
def test_a_damaged_file_is_one_line(
    zoo: dict[str, Path], tmp_path: Path, file: str, content: Any, expected: str
) -> None:
    shutil.copytree(zoo["no_config"], tmp_path / "copy")
    (tmp_path / "copy" / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError) as caught:
        open_tokenizer(str(tmp_path / "copy"))
    assert expected in str(caught.value) and "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def many(zoo: dict[str, Path]) -> dict[str, Any]:
    """A tokenizer.json with so many tokens that transformers looks whether it is one of Mistral's."""
    recipe = json.loads((zoo["byte_level"] / "tokenizer.json").read_text())
    vocabulary = recipe["model"]["vocab"]
    more = {f"<w{i}>": len(vocabulary) + i for i in range(100_001 - len(vocabulary))}
    return {**recipe, "model": {**recipe["model"], "vocab": vocabulary | more}}


_SEQUENCE = {"type": "Sequence", "pretokenizers": [tokenizer_zoo._SPLIT, {**tokenizer_zoo._BYTES}]}
_METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}


@pytest.mark.parametrize(
    "config, fix, mended, told",
    [
        ({"model_type": "mistral"}, True, True, False),
        ({"model_type": "mistral"}, None, False, True),
        ({"model_type": "mistral"}, False, False, True),
        ({"model_type": "mistral", "transformers_version": "4.57.1"}, True, True, False),
        ({"model_type": "mistral", "transformers_version": "5.0.0.dev0"}, "yes", True, False),
        ({"model_type": "mistral", "transformers_version": "5.0.0"}, True, False, False),
        ({"model_type": "mistral", "transformers_version": "5.1"}, True, False, False),
        ({"model_type": "llama"}, True, False, False),
        ({}, True, True, False),
        (None, True, False, False),
    ],
)
def test_the_pattern_of_mistral_is_mended_where_transformers_does(
    many: dict[str, Any], tmp_path: Path, config: dict[str, Any] | None, fix: Any, mended: bool, told: bool
) -> None:
    settings = {**tokenizer_zoo.FAST, "unk_token": None} | ({} if fix is None else {"fix_mistral_regex": fix})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    steps = [many["pre_tokenizer"], _SEQUENCE, _METASPACE] if config == {"model_type": "mistral"} and mended else []
    for step in steps or [_SEQUENCE]:
        (tmp_path / "tokenizer.json").write_text(json.dumps({**many, "pre_tokenizer": step}))
        ours, theirs = open_tokenizer(str(tmp_path)), transformers.AutoTokenizer.from_pretrained(tmp_path)
        found = json.loads(ours._tokenizer.to_str())["pre_tokenizer"]  # type: ignore[attr-defined]
        assert found == json.loads(theirs.backend_tokenizer.to_str())["pre_tokenizer"]
        assert (r"\p{Lu}" in json.dumps(found).replace("\\\\", "\\")) == mended
        for text in WORDS:
            assert ours.encode(text) == theirs(text, add_special_tokens=False)["input_ids"], text
        assert [remark.partition('"')[2][:17] for remark in ours.remarks] == ["fix_mistral_regex"] * told


@pytest.mark.parametrize("class_name", ["WiseTokenizer", "PreTrainedTokenizerFast", "GPT2Tokenizer"])
def test_a_program_of_the_folder_is_told_of_and_stays_behind(
    zoo: dict[str, Path], pair: Any, tmp_path: Path, class_name: str
) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(zoo["byte_level"], folder)
    settings = {**tokenizer_zoo.FAST, "unk_token": None, "tokenizer_class": class_name}
    programs = {"AutoTokenizer": ["wise.WiseTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "auto_map": programs}))
    ours = open_tokenizer(str(folder))
    (remark,) = ours.remarks
    assert remark.startswith(f"tokenizer {folder}: auto_map in tokenizer_config.json names custom code, wise.WiseToken")
    assert "\n" not in remark
    (tmp_path / "out").mkdir()
    theirs, note = exported(folder, "llama", tmp_path / "out")
    assert note is None and "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    for text in WORDS:
        assert theirs(text)["input_ids"] == ours.encode(text), text
    assert not open_tokenizer(str(tmp_path / "out")).remarks
