"""The command line: ``losslab COMMAND``, where ``losslab --help`` lists the commands.

Thin: it parses, calls the library and prints. A mistake of the user's is one sentence on standard error and
exit code 2; what the library warns of is one line there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from losslab.errors import LosslabError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0 when done, 2 after a mistake, 130 when interrupted."""
    from losslab.cli.arguments import parse
    from losslab.cli.terminal import notices

    command: Any = None
    try:
        with notices():
            command = parse(sys.argv[1:] if arguments is None else list(arguments))
            command.run()
    except LosslabError as error:
        print(f"losslab: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        place = f" {error.filename}" if error.filename else ""
        print(
            f"losslab: {error.strerror or error}{place}: check the path, its permissions and the free space",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        kept = hasattr(command, "resume") and command.out is not None
        told = "; what was finished is kept, add --resume to go on" if kept else ""
        print(f"losslab: stopped{told}", file=sys.stderr)
        sys.exit(130)
