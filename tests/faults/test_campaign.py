"""The campaign itself: what it would overlook, it could not find."""

import errno
import json
import random

import pytest

from regraft.core.errors import ResourceError
from regraft.core.plan import blaming
from tests.faults import disk_calls
from tests.faults.disk import failing
from tests.faults.scene import Scene, Violation, said_plainly


@pytest.fixture
def scene(tmp_path):
    return Scene(tmp_path, random.Random(0), 0.5, lambda: True)


def test_every_call_is_counted_and_the_chosen_one_fails(scene):
    arguments = ["apply", str(scene.recipe), "-o", str(scene.target)]
    whole = disk_calls.run(arguments)
    assert whole.code == 0, whole.errors
    assert {"mkdir", "pwrite", "open", "write", "fsync", "rename"} <= set(whole.calls)
    scene.clear()
    at = whole.calls.index("rename")
    stopped = disk_calls.run(arguments, at, failing(errno.ENOSPC))
    assert stopped.code == 4
    assert "No space left" in stopped.errors
    assert not scene.target.exists()


def test_strays_changed_targets_and_tracebacks_are_noticed(scene):
    scene.finish()
    (scene.root / "stray").touch()
    with pytest.raises(Violation, match="stray"):
        scene.check("now")
    (scene.root / "stray").unlink()
    config = json.loads((scene.target / "config.json").read_text())
    (scene.target / "config.json").write_text(json.dumps({**config, "rope_theta": 1.0}))
    with pytest.raises(Violation, match="not complete"):
        scene.check("now")
    scene.clear()
    with pytest.raises(Violation, match="is missing"):
        scene.check("now", must_exist=True)
    with pytest.raises(Violation, match="a traceback"):
        said_plainly("error: x\nTraceback (most recent call last):", "now")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", [None, "scratch/config.json"])
def test_a_full_disk_in_a_step_is_no_plugins_fault(code, name):
    with pytest.raises(ResourceError, match="disk is full") as caught, blaming("tune"):
        raise OSError(code, "full", name)
    assert caught.value.where == "step tune"
