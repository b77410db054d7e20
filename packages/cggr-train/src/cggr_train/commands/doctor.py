"""``cggr doctor``."""

from __future__ import annotations

from cggr_train.commands.errors import plain_errors


def doctor() -> None:
    """Show versions, devices, attention backends, the kernel behind each operation, and what else to install."""
    with plain_errors(interrupted="stopped"):
        from rich.console import Console

        from cggr_train.doctor import show_report

        show_report(Console())
