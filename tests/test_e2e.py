"""The E2E converter on small CSVs: names, split, refusal to overwrite, one line for bad input."""
import json

import pytest

import data
from data import e2e
from data.e2e import delexicalise, main

@pytest.fixture
def csv_file(tmp_path):
    """504 representations of two restaurants each: delexicalised, each has two references."""
    lines = ["mr,ref"]
    for i in range(504):
        slots = f"food[{i}], area[riverside]"
        lines += [f'"name[The Mill], {slots}, near[Café Rouge]",'
                  f'"The Mill,  near cafe rouge, serves {i}."',
                  f'"near[Avalon], {slots}, name[Cotto]","By the river by AVALON: {i}, the Cotto"']
    lines.append('"name[Cotto], near[Avalon]","Something else altogether"')
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8-sig")
    return path


def refused(capsys, *words) -> str:
    """The one line that a command prints to stderr before it exits with 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(map(str, words)))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1
    return said


def test_records_split_and_report(csv_file, tmp_path, capsys):
    out = tmp_path / "deep" / "e2e"
    main([str(csv_file), "--out", str(out)])
    lines = {part: (out / f"{part}.jsonl").read_text("utf-8").splitlines() for part in data.SPLITS}
    parts = {part: list(map(json.loads, rows)) for part, rows in lines.items()}
    assert {part: len(rows) for part, rows in parts.items()} == {
        "train": 154, "val": 150, "test": 200}
    assert len({row["source"] for rows in parts.values() for row in rows}) == 504
    assert {"source": "name[xname], food[7], area[riverside], near[xnear]",
            "references": ["xname, near xnear, serves 7.", "By the river by xnear: 7, xname"],
            "names": {"xname": "The Mill", "xnear": "Café Rouge"}} in sum(parts.values(), [])
    said = capsys.readouterr().out
    assert "1009 lines read; 1 dropped" in said
    assert "test: 200 representations" in said
    assert data.flags_of(str(out)) == e2e.FLAGS
    assert len(data.load_dataset(str(out))["train"]) == 154


def test_the_same_again_succeeds_in_any_order_of_lines_and_other_data_are_kept(csv_file, tmp_path,
                                                                               capsys):
    out, lines = tmp_path / "e2e", csv_file.read_text("utf-8-sig").splitlines()
    main([str(csv_file), "--out", str(out)])
    before = {path: path.read_bytes() for path in out.iterdir()}
    sources = [r.source for r in data.load_records(f"{out}/test.jsonl")]
    (out / "flags.json").write_text("{}", "utf-8")  # the user's own
    main([str(csv_file), "--out", str(out)])
    assert {**before, out / "flags.json": b"{}"} == {path: path.read_bytes() for path in before}
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join([lines[0]] + lines[:0:-1]) + "\n", "utf-8")
    capsys.readouterr()
    assert "holds other data" in refused(capsys, turned, "--out", out)  # the names of first lines
    main([str(turned), "--out", str(tmp_path / "b")])
    assert sources == [r.source for r in data.load_records(f"{tmp_path}/b/test.jsonl")]
    capsys.readouterr()
    (out / "val.jsonl").write_text("mine\n", "utf-8")
    assert "val.jsonl:1: expected" in refused(capsys, csv_file, "--out", out)
    assert (out / "val.jsonl").read_text("utf-8") == "mine\n"


@pytest.mark.parametrize("ref, expected", [
    ("The Mill is near Crowne Plaza Hotel.", "xname is near xnear."),
    ("Near the Crowne Plaza Hotel: THE MILL's pub", "Near xnear: xname's pub"),
    ("Mill, near the Crown Plaza Hotel", "xname, near xnear"),
    ("the Mill near Crowne Plaza", "xname near xnear"),
    ("The Miller near Crowne Plaza Hotel", "xname near xnear"),  # taken for a misspelling
    ("The Mill is near Burger King", None),  # the reference is dropped
    ("", None),
])
def test_names_are_found(ref, expected):
    source, text, names = delexicalise("near[Crowne Plaza Hotel], name[The Mill]", ref)
    assert source == "name[xname], near[xnear]"
    assert names == {"xname": "The Mill", "xnear": "Crowne Plaza Hotel"}
    assert text == expected


ROW = 'mr,ref\n"name[Cotto], near[Avalon]","Cotto, by Avalon."\n'


@pytest.mark.parametrize("content, says", [
    (None, "data.e2e: [Errno 2] No such file or directory: '"),
    ("", "pairs.csv:1: expected a CSV with the columns mr and ref"),
    ("mr,text\na,b\n", "pairs.csv:1: expected a CSV with the columns mr and ref"),
    ("mr,ref,ref\na,b,c\n", "pairs.csv:1: expected a CSV with the columns mr and ref"),
    ("mr,ref\n", "expected more than 350 different representations to hold out 200"),
    (ROW + "place: Oslo,Rain.\n", "pairs.csv:3: expected slots such as"),
    (ROW + '"name[Cotto], name[Mill]",Cotto.\n', "pairs.csv:3: expected slots such as"),
    (ROW + "name[Cotto],Cotto, by the river.\n", "pairs.csv:3: expected 2 fields as in the header"),
    (ROW + '"name[Cotto], near[Avalon]"\n', "pairs.csv:3: expected 2 fields as in the header"),
    (ROW + 'name[Cotto],"Cotto.\nname[Mill],Mill.\n', "pairs.csv:2: expected a readable CSV"),
    (ROW, "expected more than 350 different representations"),
    (b"mr,ref\n\xff,\xff\n", "pairs.csv: expected a readable CSV in UTF-8"),
])
def test_bad_input_gets_one_line(tmp_path, capsys, content, says):
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert says in refused(capsys, path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written_and_no_csv(csv_file, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way", "utf-8")
    said = refused(capsys, csv_file, "--out", tmp_path / "file")
    assert said.startswith("data.e2e: [Errno ") and str(tmp_path / "file") in said
    assert "required: CSV" in refused(capsys, "--out", tmp_path / "out")
