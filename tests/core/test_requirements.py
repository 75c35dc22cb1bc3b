"""What the machine still has: the system's word, and the control group's."""

from dataclasses import replace

import pytest

from regraft.core import requirements
from regraft.core.errors import ResourceError
from regraft.core.execute import ApplyOptions, _on_this_machine, prepare
from regraft.core.patch import Outline
from regraft.core.per_process import per_process
from regraft.core.processes import Processes
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


def planned_with(kind, workplace):
    host = host_with(kind)
    path = write_recipe(workplace / "recipe.toml", "base", {"use": "trainer"}, {"use": "trainer", "id": "again"})
    return prepare(load_recipe(path, (), host.transformations()), host, ApplyOptions())[0]


def test_what_steps_keep_on_the_disk_counts(workplace):
    class Greedy(Trainer):
        def plan(self, checkpoint, params):
            return Outline(specs=super().plan(checkpoint, params).specs, scratch_bytes=7)

    plan = planned_with(Trainer, workplace)
    assert disk_bytes(planned_with(Greedy, workplace), link=False) - disk_bytes(plan, link=False) == 14
    huge = replace(plan.steps[0].outline, scratch_bytes=1 << 62)
    plan = replace(plan, steps=(replace(plan.steps[0], outline=huge),))
    with pytest.raises(ResourceError, match="not enough disk"):
        check_resources(plan, workplace / "out", link=False)


def test_processes_of_one_machine_share_its_memory(workplace, monkeypatch):
    class Sharing(Trainer):
        def plan(self, checkpoint, params):
            specs = super().plan(checkpoint, params).specs
            return Outline(specs=specs, workspace_bytes=5 << 30, shared_bytes=4 << 30)

    plan = planned_with(Sharing, workplace)
    needed = 2 * per_process(plan, 4).memory_bytes
    assert needed < 2 * plan.memory_bytes - (5 << 30), "each process has a quarter of what is shared out"
    monkeypatch.setattr(requirements, "available_memory", lambda: needed)
    check_resources(plan, workplace / "out", link=False, world=4, here=2)
    monkeypatch.setattr(requirements, "available_memory", lambda: needed - 1)
    with pytest.raises(ResourceError, match="fewer processes") as caught:
        check_resources(plan, workplace / "out", link=False, world=4, here=2)
    assert caught.value.expected == f"{needed} bytes for 2 processes"
    monkeypatch.setattr("regraft.core.per_process.torch_shares_out", lambda: False)
    assert set(per_process(plan, 4).step_bytes.values()) == {5 << 30}, "with an older torch each has all of it"


@pytest.mark.parametrize(("device", "count"), [("cpu", 2), ("cuda:1", 1)])
def test_what_stands_on_devices_is_not_the_machine_s(device, count, workplace, monkeypatch):
    plan = planned_with(Trainer, workplace)
    monkeypatch.setattr("regraft.core.execute.resolve_device", lambda wish, own: device)
    assert _on_this_machine(plan, ApplyOptions(), Processes(1, 4, 1, 2)) == count
