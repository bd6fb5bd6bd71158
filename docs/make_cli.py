"""Write docs/cli.md from the declared settings: python docs/make_cli.py"""

from __future__ import annotations

import inspect
import typing
from pathlib import Path

from cyclopts import Parameter

from tutelage.cli import COMMANDS, function_of
from tutelage.settings import flag

HEAD = """# The command

Made by `python docs/make_cli.py` from the declared settings; a test holds it to them.
The same names are arguments in Python (`tutelage.run(teacher_size=112)`) and keys in a TOML file (`teacher-size = 112`, given
by `--config FILE.toml`; a flag beats the file). Exit codes: 0 done, 2 an error that the user can fix
(what is wrong, then a hint what to do), 130 Ctrl-C. `--quiet` with any command prints warnings and errors only.
"""


def allowed(hint: object) -> str:
    """The values of a setting, as a person writes them."""
    base, *notes = typing.get_args(hint)
    if typing.get_origin(base) is typing.Literal:
        return " / ".join(typing.get_args(base))
    if base == int | str | None:
        return "N or HxW, 16 to 2048"
    kinds = [k for k in (typing.get_args(base) or (base,)) if k is not type(None)]
    name = {"list[str]": "TEXT ...", "bool": "", "str": "TEXT", "int": "N", "float": "X"}[
        "list[str]" if str(base).startswith("list") else kinds[0].__name__
    ]
    bounds = []
    for note in notes:
        for limit in getattr(note, "metadata", ()):
            for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
                value = getattr(limit, attribute, None)
                if value is not None:
                    bounds.append(
                        f"{sign} {'2^63' if value == 2**63 else f'{value:,}' if isinstance(value, int) else f'{value:g}'}"
                    )
    return f"{name} {', '.join(bounds)}".strip()


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for command in COMMANDS:
        function = function_of(command)
        hints = typing.get_type_hints(function, include_extras=True)
        summary = (inspect.getdoc(function) or "").split("\n\n")[0].replace("\n", " ")
        parts.append(
            f"## tutelage {command}\n\n{summary}\n\n| flag | value | default | meaning |\n| --- | --- | --- | --- |"
        )
        rows = []
        for name, parameter in inspect.signature(function).parameters.items():
            help_text = next(note.help for note in typing.get_args(hints[name]) if isinstance(note, Parameter))
            default = (
                ""
                if parameter.default is None or parameter.default is False or parameter.default in ("", [])
                else f"`{parameter.default}`"
            )
            rows.append(f"| `{flag(name)}` | {allowed(hints[name])} | {default} | {help_text} |")
        parts[-1] += "\n" + "\n".join(rows) + "\n"
    return "\n".join(parts)


if __name__ == "__main__":
    Path(__file__).with_name("cli.md").write_text(page(), encoding="utf-8")
