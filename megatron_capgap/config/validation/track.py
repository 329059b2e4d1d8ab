"""Constraints on the section `track`."""

import importlib.util
from collections.abc import Callable, Iterator

from megatron_capgap.common.errors import not_installed
from megatron_capgap.config.validation.context import ValidationContext


def trackers_are_installed(ctx: ValidationContext) -> Iterator[str]:
    """Trackers are optional packages."""
    for name, key in (("wandb", "project"), ("mlflow", "experiment")):
        if getattr(ctx.config.track, name, None) and not _is_installed(name):
            text = f"{not_installed(name, 'track')}, or remove the section track.{name}"
            yield ctx.error(f"track.{name}.{key}", text)


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


CHECKS: tuple[Callable[[ValidationContext], Iterator[str]], ...] = (trackers_are_installed,)
