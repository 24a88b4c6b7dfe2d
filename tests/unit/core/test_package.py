from ctflow.core import package
from ctflow.core.package import digest_of_package


def test_a_digest_is_of_the_code_in_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(package, "files", lambda name: tmp_path)
    (tmp_path / "a.py").write_text("one = 1")
    (tmp_path / "below").mkdir()
    first = digest_of_package.__wrapped__("any")
    (tmp_path / "below" / "b.py").write_text("two = 2")
    assert digest_of_package.__wrapped__("any") == first
    (tmp_path / "a.py").write_text("one = 3")
    assert digest_of_package.__wrapped__("any") != first
    assert len(first) == 12


def test_packages_differ():
    assert digest_of_package("ctflow.kernels") != digest_of_package("ctflow.phantom")
