"""Settings: what they are, and the check of a call.

Each setting is declared once, in `shared_flags` or, where only one command has it, in `command_flags`: its name, type, default, help
text and range.
"""

from tutelage.settings.checking import command, flag, identity, resolve
from tutelage.settings.shared_flags import declared

__all__ = ["command", "declared", "flag", "identity", "resolve"]
