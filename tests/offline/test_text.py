import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest
import torch

from vllm_gqsa.offline.errors import InputError
from vllm_gqsa.offline.text import TextSource, choose_windows, read_documents, token_windows

DOCUMENTS = ["One two three.", "Vier fünf sechs.", "七 八 九"]


@pytest.fixture
def files(tmp_path):
    lines = "\n".join(json.dumps({"text": d, "id": i}) for i, d in enumerate(DOCUMENTS))
    (tmp_path / "a.jsonl").write_text(lines + "\n\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_text(DOCUMENTS[1], encoding="utf-8")
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset" / "train.jsonl").write_text(lines, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "b.jsonl.gz", "c.parquet", "dataset"])
def test_every_kind_of_text_gives_its_documents(files, name):
    assert list(read_documents(TextSource(str(files / name)))) == DOCUMENTS


def test_a_plain_file_is_cut_at_empty_lines(files):
    assert list(read_documents(TextSource(str(files / "d.txt")))) == DOCUMENTS[1:2]
    text = "\n\n".join(f"{number} " * 600 for number in range(30)) + "\n\n\n"
    (files / "d.txt").write_text(text, encoding="utf-8")
    documents = list(read_documents(TextSource(str(files / "d.txt"))))
    assert "\n\n".join(documents) == text
    assert 3 < len(documents) < 10


def test_texts_are_mixed_evenly_from_the_beginning_on(files):
    for name, documents in {"long": ["A" * 30] * 8, "short": ["b" * 10] * 9}.items():
        lines = "".join(json.dumps({"text": document}) + "\n" for document in documents)
        (files / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    source = TextSource(str(files / "long.jsonl"), more=(str(files / "short.jsonl"),))
    order = "".join(document[0] for document in read_documents(source))
    assert order == "AbbbAbbbAbbbAAAAA"
    with pytest.raises(InputError, match="no such file"):
        list(read_documents(TextSource(str(files / "long.jsonl"), more=("missing.txt",))))


@pytest.mark.parametrize(("name", "column", "says"), [
    ("a.jsonl", "body", "line 1 is not a JSON object with a key 'body'"),
    ("a.jsonl", "id", "line 1: the text column holds int"),
    ("c.parquet", "body", "has no column 'body'; it has text"),
    ("dataset", "body", "has no column 'body'; it has"),
    ("missing.txt", "text", "no such file"),
    ("d.pdf", "text", "end in .txt, .jsonl or .parquet"),
    ("broken.parquet", "text", "is not a Parquet file"),
    ("latin.txt", "text", "is not UTF-8"),
    ("no/such-dataset", "text", "cannot be loaded"),
])  # fmt: skip
def test_text_that_cannot_be_read_is_named(files, name, column, says, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (files / "d.pdf").write_text("x")
    (files / "broken.parquet").write_text("x")
    (files / "latin.txt").write_bytes(b"f\xfcnf")
    path = name if name == "no/such-dataset" else str(files / name)
    with pytest.raises(InputError, match=says):
        list(read_documents(TextSource(path, column=column)))


def test_windows_are_the_text_cut_without_overlap(text, tokenizer):
    tokens = tokenizer(text.read_text(), return_tensors="pt").input_ids[0]
    windows = token_windows(TextSource(str(text)), tokenizer, 50)
    assert torch.equal(windows.flatten(), tokens[: len(tokens) // 50 * 50])
    assert torch.equal(token_windows(TextSource(str(text)), tokenizer, 50, most=3), windows[:3])


def test_too_little_text_is_refused(files, tokenizer):
    with pytest.raises(InputError, match="tokens of text are less than one window of 5000"):
        token_windows(TextSource(str(files / "a.jsonl")), tokenizer, 5000)
    both = TextSource(str(files / "a.jsonl"), more=(str(files / "d.txt"),))
    with pytest.raises(InputError, match="a.jsonl, .*d.txt: .* less than one window of 5000"):
        token_windows(both, tokenizer, 5000)
    with pytest.raises(InputError, match="holds 2 windows of 8 tokens, 3 are asked for"):
        choose_windows(torch.zeros(2, 8), 3, 0, "x")


def test_the_choice_of_windows_follows_the_seed():
    windows = torch.arange(200).view(100, 2)
    one, two = choose_windows(windows, 10, 1, ""), choose_windows(windows, 10, 2, "")
    assert torch.equal(one, choose_windows(windows, 10, 1, ""))
    assert not torch.equal(one, two)
    assert one[:, 0].unique().numel() == 10
