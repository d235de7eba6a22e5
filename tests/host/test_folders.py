"""The folders that the page offers: named with their pictures, whatever else lies in the input folder."""

import pytest

from tidetable.runtime import folders


@pytest.fixture
def base(tmp_path):
    for name in ("cats/a.png", "cats/10_siam/b.JPG", "cats/10_siam/b.txt", "notes/x.txt", ".hidden/c.png", "d.webp"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    return tmp_path


def test_folders_with_pictures_are_offered_and_every_name_is_taken(base):
    found = folders.offered(base)
    assert found["folders"] == [{"name": "cats", "pictures": 2}, {"name": "cats/10_siam", "pictures": 1}]
    assert found["taken"] == [".hidden", "cats", "d.webp", "notes"]


def test_links_are_not_followed_and_a_folder_that_is_gone_is_empty(base):
    (base / "cats" / "again").symlink_to(base, target_is_directory=True)
    assert [one["name"] for one in folders.offered(base)["folders"]] == ["cats", "cats/10_siam"]
    assert folders.offered(base / "gone") == {"folders": [], "taken": []}


def test_an_answer_looks_at_so_many_files_and_no_more(base, monkeypatch):
    monkeypatch.setattr(folders, "MAX_FILES", 4)
    assert sum(one["pictures"] for one in folders.offered(base)["folders"]) < 3


def test_the_server_answers(client):
    assert set(client.get("/tidetable/folders")) == {"folders", "taken"}
