"""Command line: `python -m megatron_capgap STAGE --config FILE [--section.key=value ...] [--check]`.

Heavy libraries are imported only after command line and configuration are validated.
"""

import gc
import importlib
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_capgap.common import log
from megatron_capgap.common.errors import INTERRUPTED, UserError
from megatron_capgap.config import derived, help
from megatron_capgap.config.fields import table
from megatron_capgap.config.loader import LoadedConfig, load, nearest
from megatron_capgap.config.schema import STAGES
from megatron_capgap.distributed import process_group, torchrun
from megatron_capgap.distributed.environment import Environment, read_environment
from megatron_capgap.runtime import third_party

if TYPE_CHECKING:
    from megatron_capgap.devices import Device

USER_ERROR = 2

_FLAGS = {"-h": "help", "--help": "help", "--version": "version", "--check": "check"}
_OPTIONS = (
    "--config",
    "--check-world",
    "--check-capability",
    "--gpu",
    "--utilisation",
    "--gpu-hour-price",
    "--plan",
)
# Launchers end all ranks as soon as one exits, so other ranks wait this long for rank 0 to print the error. A rank that
# is still alive then may be the only one with the error (for example on a node without the data) and prints it itself.
_GRACE_SECONDS = 2.0


@dataclass(frozen=True)
class Command:
    """Parsed command line."""

    stage: str | None
    flags: frozenset[str]
    """Subset of help, version, check."""
    options: dict[str, str]
    """Values of the options in `_OPTIONS` that are given."""
    overrides: tuple[str, ...]
    """`--section.key=value` each."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments after the program name; by default those of this process.

    Returns:
        Exit code: 0 or the stage's exit code; 2 after a user error, which rank 0 prints, one line per problem (another
        rank prints it if the error may be its alone); 130 after Ctrl-C, which training stages save at.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        if words[:1] == ["launch"]:
            return importlib.import_module("megatron_capgap.distributed.launch").main(words[1:])
        return _run_command(parse(words))
    except UserError as error:
        if _should_print_errors():
            _print_error(error)
        else:
            time.sleep(_GRACE_SECONDS)
            if not error.raised_on_all_ranks:
                _print_error(error, f"rank {read_environment().rank} on {socket.gethostname()}: ")
        return USER_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED


def _print_error(error: UserError, prefix: str = "") -> None:
    sys.stderr.write("".join(f"capgap: error: {prefix}{line}\n" for line in str(error).split("\n")))
    sys.stderr.flush()
    process_group.write_outcome("refused")


def parse(argv: Sequence[str]) -> Command:
    """Parses the command line; `--name value` and `--name=value` are equivalent.

    Raises:
        UserError: an unknown stage, option or key, or a missing value.
    """
    stage, flags, options, overrides = None, set(), {}, []
    args = list(argv)
    while args:
        arg = args.pop(0)
        name, equals, value = arg.partition("=")
        if name in _FLAGS:
            if equals:
                raise UserError(f"{arg}: {name} takes no value; use {name} alone")
            flags.add(_FLAGS[name])
        elif not name.startswith("-"):
            if stage is not None:
                file = name.endswith((".yaml", ".yml")) or Path(arg).is_file()
                way = f"did you mean --config {arg}?" if file else "use --KEY=VALUE to set a configuration key"
                raise UserError(f"{arg}: unexpected argument, the stage is {stage}; {way}")
            stage = arg
        else:
            _check_option_name(name)
            if not equals:
                if not args or args[0].startswith("--"):
                    raise UserError(f"{name}: no value given; use {name}=VALUE")
                value = args.pop(0)
            if name in _OPTIONS:
                options[name] = value
            else:
                overrides.append(f"{name}={value}")
    return Command(stage, frozenset(flags), options, tuple(overrides))


def _check_option_name(name: str) -> None:
    """Refuses a name that is neither an option with a value nor a top-level configuration key.

    Dotted names are checked by the loader, which reports all mistakes at once.
    """
    keys = [f"--{key}" for key in table()[""].children]
    if name not in _OPTIONS and name not in keys and "." not in name:
        near = nearest(name, [*_FLAGS, *_OPTIONS, *keys])
        raise UserError(f"{name}: unknown option or key; {f'did you mean {near}?' if near else 'see --help'}")


def _run_command(command: Command) -> int:
    if "version" in command.flags:
        sys.stdout.write(f"capgap {importlib.import_module('megatron_capgap').__version__}\n")
        return 0
    if command.stage is not None and command.stage not in STAGES:
        near = nearest(command.stage, STAGES)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(f"{command.stage}: unknown stage; {hint}valid values: {', '.join(STAGES)}")
    if "help" in command.flags:
        sys.stdout.write(help.stage_help(command.stage) if command.stage else help.overview())
        return 0
    if command.stage is None:
        raise UserError(f"no stage given; valid values: {', '.join(STAGES)}; see --help")
    if "--config" not in command.options:
        raise UserError(f"--config: missing; use {command.stage} --config FILE with the YAML file of the run")
    environment = read_environment()
    log.set_rank(environment.rank if environment.world > 1 else None)
    assumed_world_size, capability = _assumed_world_size(command.options), _assumed_capability(command.options)
    planning = importlib.import_module("megatron_capgap.planning.options").parse(command.options)
    if "check" in command.flags or assumed_world_size or capability or planning:
        checker = importlib.import_module("megatron_capgap.stages.check")
        loaded = load(command.options["--config"], command.overrides, command.stage, _read_folder, bool(planning))
        facts = (loaded, command.stage, assumed_world_size or environment.world, capability)
        report = checker.report(*facts, planning) if planning else checker.report(*facts)
        if environment.rank == 0:
            sys.stdout.write(f"{report.rstrip()}\n")
        return 0
    return run_stage(load(command.options["--config"], command.overrides, command.stage), command.stage, environment)


def run_stage(loaded: LoadedConfig, stage: str, environment: Environment) -> int:
    """Runs a stage on this rank; returns its exit code. Collective over all ranks.

    Args:
        loaded: the stage's configuration.
        stage: a name from `schema.STAGES`.
        environment: from `read_environment`.

    Raises:
        UserError: on every rank, unless only this one has the problem.
    """
    torchrun.drop_stale_agent_variables(environment)
    third_party.prepare()
    resolve = importlib.import_module("megatron_capgap.stages.resolve")
    plan = resolve.resolve(loaded, stage, environment.world)
    with _importing():
        device = _choose_device(loaded, environment)
        module = importlib.import_module(f"megatron_capgap.stages.{stage}")
    resolve.check_device(plan, device.capability)
    return module.run(plan, environment, device)


def _read_folder(folder: Path) -> dict[str, Any]:
    """Section `model` of the model in a Hugging Face folder; imports the conversion only if there is one."""
    return asdict(importlib.import_module("megatron_capgap.conversion.hf_config").read_shape(folder))


@contextmanager
def _importing() -> Iterator[None]:
    """Disables garbage collection during imports: objects that torch and Megatron-Core create stay alive, and scanning
    them takes a fifth of the import time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _choose_device(loaded: LoadedConfig, environment: Environment) -> "Device":
    """Selects the device; must run before the stages are imported, which import Megatron-Core."""
    devices = importlib.import_module("megatron_capgap.devices")
    precisions, place = derived.precisions(loaded.config), loaded.location("device")
    return devices.choose(loaded.config.device, environment.local_rank, precisions, place)


def _assumed_world_size(options: dict[str, str]) -> int | None:
    """World size given by --check-world; None if not given."""
    given = options.get("--check-world")
    if given is not None and not (given.isdecimal() and int(given) > 0):
        raise UserError(f"--check-world: {given} given; expected an integer > 0")
    return None if given is None else int(given)


def _assumed_capability(options: dict[str, str]) -> tuple[int, int] | None:
    """Compute capability given by --check-capability; None if not given."""
    given = options.get("--check-capability")
    if given is None:
        return None
    major, dot, minor = given.partition(".")
    if not (dot and major.isdecimal() and minor.isdecimal()):
        raise UserError(f"--check-capability: {given} given; valid values: 8.0 (A100), 9.0 (H100), 10.0 (B200)")
    return int(major), int(minor)


def _should_print_errors() -> bool:
    """Whether this rank prints errors: rank 0; every rank if the launcher's variables are invalid."""
    try:
        return read_environment().rank == 0
    except UserError:
        return True
