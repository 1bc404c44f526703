"""A folder stands for its texts, and for nothing that we put there; no text is read twice by mistake."""

import pytest

from sedd_megatron.data.input_files import input_files
from sedd_megatron.errors import UserError
from tests.data.test_input_files import prepared, texts_in, written


def test_a_folder_that_is_hidden_or_has_a_description_is_taken_by_its_name(tmp_path):
    written(tmp_path, ".hidden/texts/a.txt", "1")
    written(tmp_path, ".hidden/texts/description.json", '{"what": "texts",\n"by": "someone"}')
    assert texts_in(tmp_path / ".hidden") == ["1"]


def test_a_folder_leaves_out_what_a_preparation_puts_there(tmp_path, gpt2_files, capsys):
    written(tmp_path, "a.txt", "low")
    flags = ("--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", gpt2_files[0], "--merge-file", gpt2_files[1])
    assert prepared(tmp_path, "--input", str(tmp_path), *map(str, flags)) == ["low"]
    written(tmp_path, ".p.parts/p_text_document.json", '{"text": "how far the last finished part goes"}\n')
    assert texts_in(tmp_path) == ["low"]
    assert capsys.readouterr().err == (
        f"warning: --input {tmp_path}: left out 4 hidden files or files of tokenizers: .p.parts/p_text_document.json, "
        "p_text_document_tokenizer/description.json, p_text_document_tokenizer/merges.txt, ...\n"
        f"warning: --input {tmp_path}: left out 4 files of other kinds: p_text_document.bin, p_text_document.idx, "
        "p_text_document_digests.json, ...\n"
    )


@pytest.mark.parametrize(
    ("first", "second", "file"),
    [("a.txt", "a.txt", "a.txt"), ("a.txt", "../d/a.txt", "../d/a.txt"), ("a.txt", "b.txt", "b.txt"),
     ("", "a.txt", "a.txt"), ("a.txt", "", "a.txt"), ("deep", "", "deep/c.txt"), ("", "", "a.txt")],
)  # fmt: skip
def test_what_would_be_read_twice_is_refused(tmp_path, first, second, file):
    written(tmp_path, "d/a.txt", "1")
    written(tmp_path, "d/deep/c.txt", "2")
    (tmp_path / "d" / "b.txt").symlink_to("a.txt")
    first, second = (f"{tmp_path}/d/{name}".rstrip("/") for name in (first, second))
    with pytest.raises(UserError) as error:
        input_files([first, second])
    assert str(error.value) == (
        f"--input {tmp_path}/d/{file}: is named twice, by {first} and by {second}, and would be read twice; name it "
        "once"
    )
    assert len(input_files([f"{tmp_path}/d"])) == 3, "links inside of one folder are as they were made"
