"""Options that several commands share."""

from typing import Annotated

import typer

UrlOption = Annotated[
    str | None,
    typer.Option(
        help="The deployment's router; needed unless exactly one launch of yours runs here.",
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
        help="Its admin_api_key; not needed for your own launch on this machine.",
        envvar="PDLAUNCH_ADMIN_API_KEY",
        metavar="KEY",
    ),
]
PrefillOption = Annotated[
    list[str] | None, typer.Option("--prefill", metavar="URL", help="Prefill engine, repeatable")
]
DecodeOption = Annotated[
    list[str] | None, typer.Option("--decode", metavar="URL", help="Decode engine, repeatable")
]
BothOption = Annotated[
    list[str] | None, typer.Option("--both", metavar="URL", help="Engine of both, repeatable")
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
        help="Stop when standard input ends, so that no deployment outlives its caller.",
    ),
]
