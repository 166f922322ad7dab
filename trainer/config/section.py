"""What all sections of a YAML file share: unknown fields and control characters are refused."""

import contextlib
import unicodedata
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from controlbooth.data.errors import UserError
from controlbooth.data.secrets import CREDENTIALS, without_secrets

MAY_HAVE_LINES = ("prompts", "instance_prompt", "class_prompt", "setup")
"""Fields that are text for people, encoders or a shell. All others name things, and end up in scripts and messages."""


def control_character(text: str, allowed: str = "") -> str | None:
    """Returns a phrase that names the first control character of a text, or None where there is none.

    Such a character would end a line or steer a terminal (Unicode categories Cc, Zl and Zp), or is half of a surrogate
    pair (Cs). Those in `allowed` do not count.
    """
    found = (one for one in text if unicodedata.category(one) in ("Cc", "Cs", "Zl", "Zp") and one not in allowed)
    return next((f"the control character {one!r}" for one in found), None)


def _refuse_control_characters(value: Any, allowed: str) -> None:
    """Raises ValueError for a text, or a list with one, that has a control character other than those allowed."""
    if isinstance(value, str | Path) and (control := control_character(str(value), allowed)) is not None:
        raise UserError(f"{control} is not taken here. Leave it out")
    for one in value if isinstance(value, list | tuple) else ():
        if isinstance(one, str | Path):
            _refuse_control_characters(one, allowed)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _as_yaml_means_it(cls, value: Any, info: ValidationInfo) -> Any:
        """Turns a value as YAML reads it into the one that was meant, before pydantic checks it.

        An empty section becomes a section with its defaults. Where a whole number is wanted, 1e5, which YAML 1.1 reads
        as text, becomes one. Raises ValueError for yes or no where no bool is wanted, for control characters, and for a
        password, token or signature.
        """
        name = info.field_name or ""
        wanted = cls.model_fields[name].annotation
        _refuse_control_characters(value, allowed="\n\r\t" if name in MAY_HAVE_LINES else "")
        if isinstance(value, str) and name not in (*MAY_HAVE_LINES, "uri") and without_secrets(value) != value:
            scheme = value.partition("://")[0]
            remedy = f": {CREDENTIALS[scheme]}" if scheme in CREDENTIALS else ""
            raise UserError(f"a password, token or signature was given in it, not shown here. Leave it out{remedy}")
        if value is None and isinstance(wanted, type) and issubclass(wanted, Section):
            return {}
        if isinstance(value, bool) and bool not in (wanted, *get_args(wanted)):
            raise UserError("yes and no are not taken here; where a value may be left out, write null")
        if isinstance(value, str) and wanted in (int, int | None):
            with contextlib.suppress(ValueError):
                return float(value)
        return value


class ConfigError(UserError):
    """A run file or an override that cannot be used; the message names the key, the value and the remedy."""
