"""Where the settings of `duopool serve` come from: flag > environment > YAML file > default.

Owns the reading of the file and the origin of every value; the order of precedence is typer's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import typer
import yaml

ENVIRONMENT_PREFIX = "DUOPOOL"
"""`--max-num-seqs` is `DUOPOOL_MAX_NUM_SEQS` in the environment."""
CONTEXT_SETTINGS = {"auto_envvar_prefix": ENVIRONMENT_PREFIX}
_NO_SETTING = ("config", "help")


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One value and who gave it."""

    name: str
    """As in the file and, behind two dashes, on the command line."""
    value: Any
    origin: str


def read_file(context: typer.Context, path: Path | None) -> Path | None:
    """Callback of `--config`: the file's values become the defaults of the command's options.

    Raises typer.BadParameter, naming the key, for what is no YAML mapping of the command's settings.
    """
    if path is None:
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise typer.BadParameter(f"{path}: {error}") from error
    if not isinstance(content or {}, dict):
        raise typer.BadParameter(f"{path}: expected 'name: value' lines, got a {type(content).__name__}")
    known = {parameter.name for parameter in context.command.params} - set(_NO_SETTING)
    values = {str(name).replace("-", "_"): value for name, value in (content or {}).items()}
    for name in values:
        if name not in known:
            raise typer.BadParameter(f"{path}: {name.replace('_', '-')!r} is no setting of 'duopool serve'")
    context.default_map = {**(context.default_map or {}), **values}
    return path


def settings_of(context: Any) -> list[Setting]:
    """All settings of a parsed command (its click context) with their origin, in the order of its help."""
    found = []
    for parameter in context.command.params:
        name = parameter.name
        if name is None or name in _NO_SETTING:
            continue
        value = context.params.get(name)
        found.append(
            Setting(
                name=name.replace("_", "-"),
                value=value.value if isinstance(value, Enum) else value,
                origin=_origin(context, parameter, name),
            )
        )
    return found


def _origin(context: Any, parameter: Any, name: str) -> str:
    # By name: typer may carry a click of its own, whose types are not importable.
    match source.name if (source := context.get_parameter_source(name)) else "DEFAULT":
        case "COMMANDLINE":
            return "flag"
        case "ENVIRONMENT":
            return f"environment ({parameter.envvar or f'{ENVIRONMENT_PREFIX}_{name.upper()}'})"
        case "DEFAULT_MAP":
            return f"file ({context.params['config'].name})"
        case _:
            return "default"
