"""Copies of custom code that lies in several repositories."""

import pytest

from mpoe_convert.source import custom_code


@pytest.fixture
def gather(tmp_path, monkeypatch):
    """Gives the folder of copies of a model's module and of one in another repository; the cache is new."""
    monkeypatch.setattr("huggingface_hub.constants.HF_ASSETS_CACHE", str(tmp_path / "cache"))
    model, other = tmp_path / "model", tmp_path / "other"
    for folder, name in ((model, "configuration.py"), (other, "modeling.py")):
        folder.mkdir()
        (folder / name).write_text(f"NAME = {name!r}\n")
    monkeypatch.setattr(custom_code.hub, "download_code", lambda repo, token=None: other)
    names = [("", "configuration"), ("them/other", "modeling")]
    return lambda: custom_code._gather(model, names, None)


def test_a_copy_that_was_half_written_is_written_again(gather):
    copies = gather()
    assert (copies / "modeling.py").read_text() == "NAME = 'modeling.py'\n"
    (copies / "modeling.py").write_text("NAME = ")
    assert gather() == copies
    assert (copies / "modeling.py").read_text() == "NAME = 'modeling.py'\n"
