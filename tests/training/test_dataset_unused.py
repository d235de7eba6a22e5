"""What of a cache is unused: whole shards, older than so many days, of which no list from those days has a record."""

import os
import time

import pytest

from tidetable.tests.training.test_dataset_store import fill, record, same
from tidetable.training.dataset.store import Store
from tidetable.training.dataset.unused import (
    DAY,
    LISTS,
    SILENT,
    UnreadableListError,
    at_work,
    find_unused,
    note_use,
    remove_unused,
)


def age(path, days):
    then = time.time() - days * DAY
    os.utime(path, (then, then))


@pytest.fixture
def cache(tmp_path):
    """Four shards of three records, 40 days old: key 0 to 2, 3 to 5, 6 to 8, 9 to 11."""
    shards = [fill(tmp_path, 3, start=3 * number)[0] for number in range(4)]
    for shard in shards:
        age(shard, 40)
    return tmp_path, shards


def keys(*numbers):
    return [f"key {number}" for number in numbers]


def test_shards_of_which_some_data_set_uses_a_record_stay(cache):
    folder, shards = cache
    note_use(folder, keys(0, 1, 2))
    note_use(folder, keys(4, 10))
    found = find_unused(Store(folder), 30)
    assert found.files == (shards[2],) and found.bytes == shards[2].stat().st_size
    places = Store(folder).places
    assert found.partly == sum(places[key].nbytes for key in keys(3, 5, 9, 11))
    assert found.total == sum(shard.stat().st_size for shard in shards)
    assert remove_unused(Store(folder), 30) == found
    store = Store(folder)
    assert sorted(store.places) == sorted(keys(0, 1, 2, 3, 4, 5, 9, 10, 11)) and store.damaged == []
    assert all(same(store.read(key), record(int(key.split()[1]))) for key in store.places)
    assert find_unused(store, 30).files == ()


def test_a_list_counts_for_so_many_days_and_the_same_data_set_renews_its_own(cache):
    folder, shards = cache
    note_use(folder, keys(0, 3, 6))
    (own,) = folder.glob(LISTS)
    note_use(folder, keys(9))
    age(own, 31)
    assert set(find_unused(Store(folder), 30).files) == {*shards[:3], own}
    assert find_unused(Store(folder), 32).files == ()
    note_use(folder, keys(6, 3, 0, 0))
    assert len(list(folder.glob(LISTS))) == 2 and find_unused(Store(folder), 30).files == ()


def test_young_shards_are_left_and_old_remains_are_not(cache):
    """A process that still encodes has no list yet; what was set aside or cut short is read by nobody."""
    folder, shards = cache
    note_use(folder, keys(0))
    age(shards[1], 29)
    for name, days in (("a.damaged", 40), ("b.tmp", 40), ("c.tmp", 1), ("d.txt", 40)):
        (folder / name).write_bytes(b"x")
        age(folder / name, days)
    found = {path.name for path in find_unused(Store(folder), 30).files}
    assert found == {shards[2].name, shards[3].name, "a.damaged", "b.tmp"}


def test_a_shard_all_of_whose_records_were_written_anew_is_unused(cache):
    folder, shards = cache
    (newer,) = fill(folder, 3, start=3)
    note_use(folder, keys(*range(12)))
    assert find_unused(Store(folder), 30).files == (shards[1],)
    remove_unused(Store(folder), 30)
    assert newer.exists() and len(Store(folder).places) == 12


def test_shards_that_came_after_the_store_was_opened_are_left(cache):
    folder, _ = cache
    note_use(folder, keys(0, 3, 6, 9))
    store = Store(folder)
    (newer,) = fill(folder, 1, start=50)
    age(newer, 40)
    assert find_unused(store, 30).files == () and find_unused(Store(folder), 30).files == (newer,)


def test_nothing_is_removed_while_another_process_encodes(cache):
    folder, shards = cache
    note_use(folder, keys(0))
    with at_work(folder) as mine, at_work(folder) as others:
        assert remove_unused(Store(folder), 30) is None and all(shard.exists() for shard in shards)
        age(others.path, 2 * SILENT / DAY)
        found = remove_unused(Store(folder), 30)
        assert found is not None and found.files == tuple(shards[1:]), "its process has ended long ago"
        assert mine.path.exists()
    assert not list(folder.glob("*.tmp")) and shards[0].exists()


def test_what_cannot_be_read_removes_nothing(cache):
    folder, shards = cache
    note_use(folder, keys(0))
    (path,) = folder.glob(LISTS)
    path.write_text("{dam")
    with pytest.raises(UnreadableListError, match=f"{path.name} cannot be read .*: delete it"):
        remove_unused(Store(folder), 30)
    assert all(shard.exists() for shard in shards)


def test_a_file_that_cannot_be_deleted_stays_and_is_not_counted(cache, monkeypatch):
    folder, shards = cache
    note_use(folder, keys(0))
    delete = type(folder).unlink

    def refuse(self, *args, **kwargs):
        if self == shards[1]:
            raise PermissionError("open in another program")
        delete(self, *args, **kwargs)

    monkeypatch.setattr(type(folder), "unlink", refuse)
    sizes = [shard.stat().st_size for shard in shards]
    found = remove_unused(Store(folder), 30)
    assert found is not None and found.files == (shards[2], shards[3]) and found.bytes == sum(sizes[2:])
