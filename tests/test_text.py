"""Where text comes from, and which side of the split it falls on."""

import json
import sysconfig
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from saekit.activations.text import Document, read_documents, split_documents, stdlib_documents
from saekit.errors import DataError, FileError, SaekitError

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), min_size=1, max_size=40)


@pytest.fixture(scope="module")
def stdlib() -> list[Document]:
    return stdlib_documents()


def one_line(caught: pytest.ExceptionInfo[SaekitError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_stdlib_is_the_source_of_this_python(stdlib):
    by_name = {document.name: document.text for document in stdlib}
    assert by_name["json/decoder.py"] == (Path(sysconfig.get_path("stdlib")) / "json/decoder.py").read_text("utf-8")
    assert list(by_name) == sorted(by_name, key=Path)
    assert len(by_name) == len(stdlib) > 300
    assert all(text.strip() for text in by_name.values())


def test_stdlib_leaves_out_tests_tables_and_what_is_not_of_the_library(stdlib):
    folders = {part for document in stdlib for part in Path(document.name).parts[:-1]}
    assert not folders & {"test", "tests", "idle_test", "encodings", "pydoc_data", "site-packages", "dist-packages"}
    assert {"json", "asyncio", "email"} <= folders


def test_the_librarys_own_tests_come_when_asked_for(stdlib, tmp_path, monkeypatch):
    files = {"json/decoder.py": "a", "test/test_json.py": "b", "json/tests/x.py": "c", "empty.py": " \n"}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "test" / "bad_coding.py").write_bytes(b"# -*- coding: nonesuch -*-\n")
    (tmp_path / "test" / "bad_bytes.py").write_bytes(b"x = '\xff'\n")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert [document.name for document in stdlib_documents()] == ["json/decoder.py"]
    assert [document.text for document in stdlib_documents(tests=True)] == ["a", "c", "b"]


def test_read_documents_knows_the_word_stdlib_and_stops_at_the_limit(stdlib):
    assert read_documents("stdlib", limit=3) == stdlib[:3]


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "notes.txt").write_text("ein Wört\n\nund mehr", encoding="utf-8")
    assert read_documents(str(tmp_path / "notes.txt")) == [Document("notes.txt", "ein Wört\n\nund mehr")]


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("text")
    assert read_documents("~/notes.txt") == [Document("notes.txt", "text")]


def test_the_separator_splits_a_file_and_empty_pieces_vanish(tmp_path):
    (tmp_path / "stories.txt").write_text("<|endoftext|>\none\n<|endoftext|>\n\n<|endoftext|>\n  two\n<|endoftext|>\n")
    documents = read_documents(str(tmp_path / "stories.txt"))
    assert documents == [Document("stories.txt#0", "one"), Document("stories.txt#1", "  two")]
    assert read_documents(str(tmp_path / "stories.txt"), limit=1) == documents[:1]


def test_a_folder_is_read_recursively_in_order_and_other_files_are_left_alone(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "a.py").mkdir()  # a folder with the name of a text file is a folder
    files = {"b/z.txt": "1", "b/m.md": "2", "a.py/x.py": "3", "c.jsonl": '{"text": "4"}', "d.png": "no", "d.json": "{}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert [document.text for document in read_documents(str(tmp_path))] == ["3", "2", "1", "4"]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(ANY_TEXT, min_size=1, max_size=4), ascii_only=st.booleans())
@example(texts=["ends\nof\flines\x85for\u2028some"], ascii_only=False)
def test_jsonl_gives_back_every_text(tmp_path_factory, texts, ascii_only):
    path = tmp_path_factory.mktemp("jsonl") / "some.jsonl"
    lines = [json.dumps({"text": text, "other": 1}, ensure_ascii=ascii_only) for text in texts]
    path.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    documents = read_documents(str(path))
    assert [document.text for document in documents] == texts
    assert [document.name for document in documents] == [f"some.jsonl:{1 + 2 * i}" for i in range(len(texts))]


@pytest.mark.parametrize("line", ['{"content": "x"}', "not json", '["text"]', '"text"', '{"text": 3}', "null"])
def test_a_line_without_a_text_is_named(tmp_path, line):
    (tmp_path / "x.jsonl").write_text('{"text": "fine"}\n' + line)
    with pytest.raises(FileError, match=r'x\.jsonl, line 2: expected a JSON object with a "text" field') as caught:
        read_documents(str(tmp_path / "x.jsonl"))
    assert "take it out" in one_line(caught)


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "~no-such-user/x", "notes.txt", "data.jsonl"])
def test_what_looks_like_a_path_and_is_none_is_not_looked_for_on_the_hub(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileError, match=r"no text at .*; give a file or folder that exists, 'stdlib', or") as caught:
        read_documents(name)
    assert name in one_line(caught)


def test_bytes_that_are_not_utf8_are_refused_with_their_place(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 au lait")
    with pytest.raises(FileError, match=r"latin\.txt is not UTF-8 text \(byte 3\); convert it") as caught:
        read_documents(str(tmp_path / "latin.txt"))
    one_line(caught)


@pytest.mark.parametrize("text", ["", " \n\n", "<|endoftext|>\n<|endoftext|>"])
def test_text_without_text_is_refused(tmp_path, text):
    (tmp_path / "empty.txt").write_text(text)
    for name in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(DataError, match=r"holds no text; expected \.txt, .* or \.jsonl") as caught:
            read_documents(str(name))
        one_line(caught)


def test_a_data_set_out_of_reach_is_one_line_of_advice():
    with pytest.raises(DataError, match=r"cannot read data set 'nobody/nothing': .*check the name and the") as caught:
        read_documents("nobody/nothing")
    one_line(caught)


@pytest.mark.parametrize("wrong", [None, 3, ["a", "b"]], ids=str)
def test_a_row_without_a_text_is_named(monkeypatch, wrong):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: [{"text": "a"}, {"text": wrong}])
    with pytest.raises(DataError, match=r"row 1 of data set owner/name has .* for a text; save the texts as JSONL"):
        read_documents("owner/name")


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_that_leaves_nothing_is_refused(limit):
    with pytest.raises(DataError, match=rf"max_documents={limit} leaves nothing to read; give at least 1"):
        read_documents("stdlib", limit=limit)


@pytest.mark.parametrize("column", ["text", "body"])
def test_a_data_set_is_streamed_up_to_the_limit(monkeypatch, column):
    datasets = pytest.importorskip("datasets")
    rows = [{column: "a"}, {column: "b"}, {column: "c"}]
    seen = []

    def load_dataset(name, *, split, streaming):
        assert (name, split, streaming) == ("owner/name", "train", True)
        return (seen.append(row) or row for row in rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    if column == "body":
        with pytest.raises(DataError, match="owner/name has no 'text' column; save the column you want as JSONL"):
            read_documents("owner/name", limit=2)
    else:
        assert read_documents("owner/name", is_enough=lambda document: document.text == "b")[-1].text == "b"
        assert len(seen) == 2
        seen.clear()
        assert read_documents("owner/name", limit=2) == [Document("owner/name#0", "a"), Document("owner/name#1", "b")]
        assert len(seen) == 2


def test_the_split_is_disjoint_complete_and_about_as_large_as_asked(stdlib):
    train, held_out = split_documents(stdlib, held_out=0.2)
    names = {document.name for document in train}, {document.name for document in held_out}
    assert not names[0] & names[1]
    assert names[0] | names[1] == {document.name for document in stdlib}
    assert 0.08 < len(held_out) / len(stdlib) < 0.35
    assert split_documents(stdlib, held_out=0.0) == (stdlib, [])
    assert split_documents(stdlib, held_out=1.0) == ([], stdlib)


def test_a_module_its_package_its_twin_and_its_tests_fall_on_one_side():
    members = ("X.py", "_X.py", "_pyX.py", "X/__init__.py", "X/deep/er.py", "X/tests/test_other.py", "test/test_X.py")
    modules = ("json", "decimal", "io", "datetime", "asyncio", "email", "re", "zoneinfo", "enum", "ast", "csv")
    families = [[name.replace("X", module) for name in (*members, "test/test_X/deep/er.py")] for module in modules]
    documents = [Document(name, "x") for family in families for name in family]
    held_out = {document.name for document in split_documents(documents, held_out=0.5)[1]}
    assert {len(held_out & set(family)) for family in families} == {0, len(families[0])}


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_a_split_does_not_depend_on_what_else_is_there(stdlib, data):
    chosen = data.draw(st.lists(st.sampled_from(stdlib), min_size=1, max_size=20, unique=True))
    _, held_out = split_documents(stdlib, held_out=0.3)
    assert split_documents(chosen, held_out=0.3)[1] == [document for document in chosen if document in held_out]


def test_the_split_stays_the_one_that_the_bundled_model_was_trained_with():
    # another checksum would put text that it was trained on among what evaluation takes for unseen
    names = ["argparse.py", "asyncio/tasks.py", "json/decoder.py", "tarfile.py", "turtle.py", "typing.py"]
    documents = [Document(name, "x") for name in names]
    assert [document.name for document in split_documents(documents)[1]] == ["json/decoder.py"]
    of_a_third = split_documents(documents, held_out=0.3)[1]
    assert [document.name for document in of_a_third] == ["argparse.py", "json/decoder.py", "turtle.py", "typing.py"]
