"""`regraft plugins`."""

from tests.plugin_host import host_with
from tests.running import done


def test_our_own():
    lines = done("plugins").out.splitlines()
    assert lines[0].split() == ["plugin", "package", "status", "transformations"]
    assert any(line.split()[0] == "lora-merge" and "loaded" in line for line in lines)
    result = done("plugins", "--json").json
    assert result["schema"] == 1
    names = {item["name"] for item in result["transformations"]}
    assert {"context-extension", "lora-merge", "patch"} <= names
    for item in result["transformations"]:
        assert item["summary"]
        assert item["loads_with"]
    assert all(plugin["status"] == "loaded" for plugin in result["plugins"])


def test_a_broken_one_is_listed_with_its_reason(monkeypatch):
    def broken():
        raise ImportError("no module named flash_attn")

    monkeypatch.setattr("regraft.core.host.host", lambda: host_with(regraft_transformations=broken))
    out = done("plugins").out
    assert "broken: regraft_transformations raised ImportError: no module named flash_attn" in out
    plugin = next(item for item in done("plugins", "--json").json["plugins"] if item["name"] == "toy")
    assert plugin["status"] == "broken"
    assert plugin["transformations"] == []
