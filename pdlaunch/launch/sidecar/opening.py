"""Opens an engine to the other hosts of its launch: its door, and statements about KV blocks."""

from __future__ import annotations

from pathlib import Path

from pdlaunch.http.watch.engine_api import EngineApi
from pdlaunch.launch.sidecar.connector import statements_folder, statements_socket
from pdlaunch.launch.sidecar.door import Door
from pdlaunch.launch.sidecar.statements import StatementDesk, statement_route
from pdlaunch.protocol.certificates import client_context
from pdlaunch.protocol.control import Registry
from pdlaunch.protocol.process.bootstrap import Bootstrap, DoorSpec


class Opening:
    """Is the engine's part of what joins hosts; made and used inside a running event loop."""

    def __init__(
        self, bootstrap: Bootstrap, spec: DoorSpec, engine_url: str, *, is_verified: bool
    ) -> None:
        """``is_verified``: the engine has pdlaunch's connector."""
        keys, run_dir = bootstrap.keys, Path(bootstrap.run_dir)
        assert keys.certificate is not None, "launches on several hosts have one"
        self._token = keys.http_token
        self._tls = client_context(keys.certificate)
        self._doors: dict[str, str] = {}
        """Doors of engines by their side channels."""
        self._door = Door(
            bootstrap.name,
            spec,
            keys,
            engine_url,
            bootstrap.engine_api_key,
            [statement_route(statements_folder(run_dir))] if is_verified else [],
        )
        self._desk = (
            StatementDesk(
                statements_socket(run_dir, bootstrap.name),
                self._token,
                self._tls,
                lambda: self._doors,
            )
            if is_verified
            else None
        )

    async def open(self) -> str:
        """Listen; return the URL that other hosts are told. Raises StartupError."""
        if self._desk is not None:
            await self._desk.open()
        return await self._door.open()

    async def close(self) -> None:
        await self._door.close()
        if self._desk is not None:
            await self._desk.close()

    def learn(self, registry: Registry) -> None:
        """Note where the engines of the launch are."""
        self._doors = {
            entry.address.side_channel: entry.address.http
            for entry in registry.entries
            if entry.kind == "server" and entry.address.http
        }

    def api_of(self, url: str) -> EngineApi:
        """Return what asks the engine behind another door."""
        return EngineApi(url, self._token, self._tls)
