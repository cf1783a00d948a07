"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

UrlOption = Annotated[
    str | None,
    typer.Option(
        help="The deployment's router; needed where several of yours run, or another's.",
        envvar="PDLAUNCH_URL",
    ),
]
ApiKeyOption = Annotated[
    str | None,
    typer.Option(
        "--api-key",
        help="The clients' key; not needed for your own launch on this machine.",
        envvar="PDLAUNCH_API_KEY",
        metavar="KEY",
    ),
]
KeyOption = Annotated[
    str | None,
    typer.Option(
        "--admin-api-key",
        help="Its admin_api_key; not needed for your own on this machine.",
        envvar="PDLAUNCH_ADMIN_API_KEY",
        metavar="KEY",
    ),
]
PrefillOption = Annotated[
    list[str] | None, typer.Option("--prefill", metavar="URL", help="A prefill engine. Repeats.")
]
DecodeOption = Annotated[
    list[str] | None, typer.Option("--decode", metavar="URL", help="A decode engine. Repeats.")
]
BothOption = Annotated[
    list[str] | None, typer.Option("--both", metavar="URL", help="Engine of both roles. Repeats.")
]
KeyEnvOption = Annotated[
    str | None,
    typer.Option(
        "--engine-key-env",
        metavar="NAME",
        help="Variable with the key of the engines that --prefill, --decode and --both name.",
    ),
]
StopOption = Annotated[
    bool,
    typer.Option(
        "--stop-on-stdin-eof",
        help="Stop when standard input ends, for programs that must not leave it behind.",
    ),
]
