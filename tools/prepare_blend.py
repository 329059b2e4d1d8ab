"""Tokenizes several corpora, each up to a number of tokens, and writes the configuration that mixes them.

    python tools/prepare_blend.py --blend blend.yaml --tokenizer data/tokenizer.model --out data/mix

blend.yaml names the corpora; all keys but input are optional and are those of prepare_data:

    web: {input: [web/*.parquet], tokens: 2B}
    code: {input: [code/], text_key: content, tokens: 500M}
    books: {input: [books/], documents: file}

Each becomes OUT_NAME.bin and .idx (with --split OUT_NAME_train, OUT_NAME_valid), and OUT.yaml holds data.train and
data.train_weights, in proportion to the tokens that are there.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run from a clone, without installation

from megatron_capgap.common.errors import UserError
from megatron_capgap.runtime import third_party
from tools import prepare_data
from tools.command import run_tool

KEYS = {"input": "--input", "text_key": "--text-key", "documents": "--documents", "tokens": "--max-tokens"}
"""Key of a corpus -> option of prepare_data."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code: 0; 2, with one line on stderr, on a user error; 130 after Ctrl-C."""
    args, rest = parse_arguments(argv)
    third_party.prepare()
    return run_tool("prepare_blend", lambda: prepare(args, rest), place=args.out)


def parse_arguments(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """The own options, and those that every corpus's prepare_data gets."""
    parser = argparse.ArgumentParser(
        prog="prepare_blend",
        description=__doc__,
        epilog="Other options (--split, --bos, --no-eos, --strict, --force, --workers) are those of prepare_data.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--blend", required=True, metavar="FILE", help="YAML file that names the corpora")
    parser.add_argument("--tokenizer", required=True, metavar="PATH", help="SentencePiece model or tokenizer folder")
    parser.add_argument(
        "--out", required=True, metavar="PREFIX", help="write PREFIX_NAME.bin and .idx, and PREFIX.yaml"
    )
    return parser.parse_known_args(argv)


def prepare(args: argparse.Namespace, rest: list[str]) -> int:
    """Tokenizes every corpus. All are checked before the first is read."""
    corpora = read_blend(args.blend)
    work = {}
    for name, corpus in corpora.items():
        words = [word for key, value in corpus.items() for word in (KEYS[key], *_words(value))]
        words += ["--tokenizer", args.tokenizer, "--out", f"{args.out}_{name}", *rest]
        each = prepare_data.parse_arguments(words)
        if each.train_tokenizer:
            raise UserError("--train-tokenizer trains on one corpus: train the tokenizer with prepare_data first")
        work[name] = each, prepare_data.check_paths(each)
    file = Path(f"{args.out}.yaml")
    if file.exists() and "--force" not in rest:
        raise UserError(f"{file} exists already: choose another name, or replace it with --force")
    tokens = {}
    for name, (each, targets) in work.items():
        print(f"== {name}", flush=True)
        found = prepare_data.prepare(each, targets)
        print(found.text(), flush=True)
        tokens[name] = found.tokens
    section = section_of({name: targets for name, (_, targets) in work.items()}, tokens)
    file.write_text(section)
    print(f"wrote {file}:\n{section}", end="")
    return 0


def section_of(targets: dict[str, list[str]], tokens: dict[str, int]) -> str:
    """The data section, in YAML: the first prefix of each corpus for training, the second for validation."""
    import yaml

    total = sum(tokens.values())
    data: dict[str, Any] = {
        "train": [prefixes[0] for prefixes in targets.values()],
        "train_weights": [round(count / total, 6) for count in tokens.values()],
    }
    if all(len(prefixes) > 1 for prefixes in targets.values()):
        data["valid"] = [prefixes[1] for prefixes in targets.values()]
    return yaml.safe_dump({"data": data}, sort_keys=False)


def read_blend(file: str) -> dict[str, dict[str, Any]]:
    """The corpora by name.

    Raises:
        UserError: the file is missing, is not YAML, or has an unknown key.
    """
    import yaml

    try:
        content = yaml.safe_load(Path(file).read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"--blend {file} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"--blend {file}: write one corpus a line, as in web: {{input: [web/*.parquet], tokens: 2B}}")
    for name, corpus in content.items():
        if not isinstance(corpus, dict) or "input" not in corpus:
            raise UserError(f"--blend {file}: {name} has no input: write {name}: {{input: [FILE]}}")
        if unknown := [key for key in corpus if key not in KEYS]:
            raise UserError(f"--blend {file}: {name}.{unknown[0]} is not a key: valid keys: {', '.join(KEYS)}")
    return content


def _words(value: Any) -> list[str]:
    return [str(word) for word in value] if isinstance(value, list) else [str(value)]


if __name__ == "__main__":
    sys.exit(main())
