"""Settings: what they are, and the check of a call.

Each setting is declared once, in `flags` or, where only one command has it, in `commands`: its name, type, default, help text and range.
"""

from tutelage.settings.checking import command, flag, identity, resolve
from tutelage.settings.flags import declared

__all__ = ["command", "declared", "flag", "identity", "resolve"]
