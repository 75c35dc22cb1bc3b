"""`regraft verify DIR`: findings on stdout, the verdict in the exit code."""

from pathlib import Path

import pytest

from tests.running import ABF, done, regraft, write_recipe


@pytest.fixture
def output(workplace):
    done("apply", write_recipe(Path("r.toml"), "base", ABF, path="out"))
    return Path("out")


def test_in_order(output):
    assert done("verify", output).out == "out: 21 tensors, 27 digests agree, no faults\n"
    result = done("verify", output, "--json", "--deep").json
    assert result == {
        "schema": 1, "checkpoint": "out", "depth": "structure", "deep": True, "ok": True,
        "digests_that_agree": 27, "findings": [], "stock": {},
    }  # fmt: skip


def test_faults(output):
    shard = sorted(output.glob("*.safetensors"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 0x40
    shard.write_bytes(data)
    (output / "tokenizer_config.json").unlink()
    ran = regraft("verify", output)
    assert ran.code == 1
    faults = [line for line in ran.out.splitlines() if line.startswith("fault: ")]
    assert len(faults) == 2
    assert "out: tokenizer_config.json: a file is missing" in faults[0]
    assert "the tensor has changed (expected xxh3:" in faults[1]
    assert ran.err == "error: out: 2 faults\n  remedy: write the checkpoint again, or fetch it again\n"


def test_faults_as_json(output):
    (output / "config.json").write_text((output / "config.json").read_text() + " ")
    ran = regraft("verify", output, "--json")
    assert ran.code == 1
    assert ran.json["ok"] is False
    assert [finding["where"] for finding in ran.json["findings"]] == ["out: config.json"]
    assert ran.events[-1]["error"] == "VerificationError"


def test_a_checkpoint_of_others(workplace):
    ran = done("verify", "base")
    assert ran.out.startswith("note: base: there is no regraft.lock.json")


def test_what_cannot_be_read_at_all(output):
    (output / "config.json").unlink()
    ran = regraft("verify", output)
    assert (ran.code, ran.out) == (3, "")


def test_the_stock_loader_s_verdict_is_a_finding(output, monkeypatch):
    from regraft.core.errors import VerificationError

    def refuse(folder, depth, *, trust):
        assert (depth, trust) == ("load", True)
        raise VerificationError("stock transformers cannot load it", where=folder, found="ValueError")

    monkeypatch.setattr("regraft.core.verify.folder.verify_load", refuse)
    ran = regraft("verify", output, "--depth", "load", "--trust-remote-code")
    assert ran.code == 1
    assert "fault: out: stock transformers cannot load it (found ValueError)" in ran.out
