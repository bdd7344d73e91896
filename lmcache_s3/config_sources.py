"""Where settings come from besides the code: the environment's variables and one YAML file.

What is wrong with one is `Invalid` (setting), one line that names the variable or the file. No I/O but reading it.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic_settings.exceptions import SettingsError

from lmcache_s3.errors import Invalid

ENV_PREFIX = "LMCACHE_S3_"
FILE_VARIABLE = "LMCACHE_S3_CONFIG"
_MAX_FILE_BYTES = 1 << 20


def check_environment(names: Collection[str]) -> None:
    """Refuse near misses of our variables; Kubernetes, for one, sets LMCACHE_S3_PORT beside a service of our name."""
    for variable in os.environ:
        if not variable.startswith(ENV_PREFIX) or variable == FILE_VARIABLE:
            continue
        name = variable.removeprefix(ENV_PREFIX).lower()
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.8)
        if near and near[0] != name:
            raise Invalid(
                f"{variable}: unknown setting; did you mean {ENV_PREFIX}{near[0].upper()}?", kind="setting", key=name
            )


def read_file(path: Path) -> dict[str, Any]:
    try:
        size = path.stat().st_size
        if size > _MAX_FILE_BYTES:
            raise Invalid(f"settings file {path}: {size} bytes are no settings", kind="setting", key="settings_file")
        document = yaml.safe_load(path.read_bytes())
    except OSError as e:
        raise Invalid(
            f"settings file {path}: cannot be read ({e.strerror}); mend settings_file or {FILE_VARIABLE}",
            kind="setting",
            key="settings_file",
        ) from e
    except (yaml.YAMLError, RecursionError) as e:
        mark = getattr(e, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        problem = getattr(e, "problem", None) or type(e).__name__
        raise Invalid(
            f"settings file {path}:{line} is not YAML ({problem})", kind="setting", key="settings_file"
        ) from e
    if document is None:
        return {}
    if not isinstance(document, Mapping) or not all(isinstance(k, str) for k in document):
        raise Invalid(
            f"settings file {path}: not a mapping; write lines such as `url: s3://bucket/prefix`",
            kind="setting",
            key="settings_file",
        )
    return dict(document)


def variable_of(error: SettingsError) -> str:
    found = re.search(r'field "(\w+)"', str(error))
    return ENV_PREFIX + found[1].upper() if found else "environment"
