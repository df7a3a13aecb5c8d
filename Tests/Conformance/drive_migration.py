"""Drives a live migration between two VMs with QEMU's own QMP client (the package qemu.qmp).

Usage: drive_migration.py SOURCE-SOCKET DESTINATION-SOCKET

Prints one JSON object: what was answered and the events of both VMs, in order. Ends with an error when anything takes longer
than its deadline.
"""

import asyncio
import contextlib
import json
import sys

from qemu.qmp import EventListener, QMPClient

DEADLINE_SECONDS = 30


class VM:
    """A client of one VM and the events it has seen."""

    def __init__(self, name: str) -> None:
        self.client = QMPClient(name)
        self.listener = EventListener()
        self.events: list[dict] = []

    async def connect(self, path: str) -> None:
        self.client.register_listener(self.listener)
        await self.client.connect(path)

    async def execute(self, command: str, **arguments: object) -> object:
        return await self.client.execute(command, {name.replace("_", "-"): value for name, value in arguments.items()})

    async def until(self, name: str, **data: object) -> None:
        """Reads events up to the one with this name and data."""
        async for event in self.listener:
            self.events.append({"event": event["event"], "data": event.get("data", {})})
            if event["event"] == name and all(event.get("data", {}).get(key) == value for key, value in data.items()):
                return


async def drive(source_path: str, destination_path: str) -> dict:
    source, destination = VM("source"), VM("destination")
    await source.connect(source_path)
    await destination.connect(destination_path)
    greeting = source.client.greeting
    version = await source.execute("query-version")
    commands = {entry["name"] for entry in await source.execute("query-commands")}

    for vm in (source, destination):
        await vm.execute("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
    await source.execute("migrate-set-parameters", downtime_limit=200, max_bandwidth=256 << 20)
    await destination.execute("migrate-incoming", uri="tcp:127.0.0.1:0")
    address = (await destination.execute("query-migrate"))["socket-address"][0]
    await source.execute("migrate", uri=f"tcp:{address['host']}:{address['port']}")
    await asyncio.gather(
        source.until("MIGRATION", status="completed"), destination.until("MIGRATION", status="completed")
    )
    answer = {
        "greeting-has-oob": "oob" in [str(name) for name in greeting.QMP.capabilities],
        "version": version["qemu"],
        "commands": sorted(commands),
        "source": {
            "status": await source.execute("query-status"),
            "migration": await source.execute("query-migrate"),
            "text": await source.execute("human-monitor-command", command_line="info migrate"),
            "events": source.events,
        },
        "destination": {
            "status": await destination.execute("query-status"),
            "migration": await destination.execute("query-migrate"),
            "cpus": await destination.execute("query-cpus-fast"),
            "check": await destination.execute("x-check-guest"),
            "events": destination.events,
        },
    }
    # A refusal arrives as the client's own exception.
    try:
        await source.execute("cont")
        answer["refusal"] = None
    except Exception as refusal:  # pylint: disable=broad-except
        answer["refusal"] = [type(refusal).__name__, str(refusal)]
    for vm in (destination, source):
        await vm.execute("quit")
        with contextlib.suppress(EOFError):  # The VM may be gone first.
            await vm.client.disconnect()
    return answer


if __name__ == "__main__":
    print(json.dumps(asyncio.run(asyncio.wait_for(drive(*sys.argv[1:]), DEADLINE_SECONDS))))
