"""What the machine still has: the system's word, and the control group's."""

from dataclasses import replace

import pytest

from regraft.core import requirements
from regraft.core.errors import ResourceError
from regraft.core.execute import ApplyOptions, prepare
from regraft.core.patch import Outline
from regraft.core.recipe.load import load_recipe
from regraft.core.requirements import available_memory, check_resources, disk_bytes, worker_count
from tests.plugin_host import host_with
from tests.running import write_recipe
from tests.trainer import Trainer


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A control group of 1000 bytes, of which 600 are used, 100 of them by files that are not in use."""
    monkeypatch.setattr(requirements, "_CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    return tmp_path


def test_a_container_s_limit_counts(group):
    assert available_memory() == 500
    (group / "memory.current").write_text("1200\n")
    assert available_memory() == 0


@pytest.mark.parametrize("name", ["memory.max", "memory.current", "memory.stat"])
def test_without_a_group_the_system_s_word(name, group, monkeypatch):
    monkeypatch.setattr(requirements, "_of_the_system", lambda: 12345)
    (group / name).unlink()
    assert available_memory() == 12345


def test_no_limit_is_none(group, monkeypatch):
    (group / "memory.max").write_text("max\n")
    monkeypatch.setattr(requirements, "_of_the_system", lambda: None)
    assert available_memory() is None


def test_the_system_tells():
    assert requirements._of_the_system() > 1 << 20


def test_workers(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    assert [worker_count(count) for count in (0, 1, 7)] == [4, 1, 7]


def test_what_steps_keep_on_the_disk_counts(workplace):
    class Greedy(Trainer):
        def plan(self, checkpoint, params):
            return Outline(specs=super().plan(checkpoint, params).specs, scratch_bytes=7)

    def planned(kind):
        host = host_with(kind)
        path = write_recipe(workplace / "recipe.toml", "base", {"use": "trainer"}, {"use": "trainer", "id": "again"})
        return prepare(load_recipe(path, (), host.transformations()), host, ApplyOptions())[0]

    assert disk_bytes(planned(Greedy), link=False) - disk_bytes(planned(Trainer), link=False) == 14
    huge = replace(planned(Trainer).steps[0].outline, scratch_bytes=1 << 62)
    plan = planned(Trainer)
    plan = replace(plan, steps=(replace(plan.steps[0], outline=huge),))
    with pytest.raises(ResourceError, match="not enough disk"):
        check_resources(plan, workplace / "out", link=False)
