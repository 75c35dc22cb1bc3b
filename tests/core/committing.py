"""A run into a target folder, for the tests of the work folder."""

from regraft.core.workspace import workspace
from tests.helpers import fill

NEW, OLD = {"new.txt": "new", "sub/new.txt": "new"}, {"old.txt": "old"}


def write(target, *, durable=False, new=NEW):
    with workspace(target, force=True) as space:
        fill(space.output, new)
        space.commit(durable=durable)
