"""`regraft plugins`: what is installed, what it brings, and what is broken."""

from __future__ import annotations

from regraft.cli.console import print_json, table
from regraft.cli.options import Json


def plugins(as_json: Json = False) -> None:
    """List plugins and their transformations."""
    from regraft.core.host import host

    found = host()
    transformations = found.transformations()
    owners = found.owners
    brings = {info.name: [name for name, owner in owners.items() if owner == info.name] for info in found.plugins}
    if as_json:
        print_json(
            {
                "plugins": [{**vars(info), "transformations": brings[info.name]} for info in found.plugins],
                "transformations": [
                    {
                        "name": name,
                        "summary": kind.summary,
                        "paper": kind.paper,
                        "loads_with": kind.loads_with,
                        "version": kind.version,
                    }
                    for name, kind in transformations.items()
                ],
            }
        )
        return
    rows = [("plugin", "package", "status", "transformations")]
    for info in found.plugins:
        status = info.status if not info.reason else f"{info.status}: {info.reason}"
        rows.append(
            (info.name, f"{info.distribution} {info.version}".strip(), status, ", ".join(brings[info.name]) or "-")
        )
    print(table(rows))
