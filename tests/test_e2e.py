"""The E2E converter on small CSVs: names, split, refusal to overwrite, one line for bad input."""
import itertools
import json

import pytest

import data
from data import e2e
from data.e2e import delexicalise, main

FOODS = ("Chinese", "English", "Fast food", "French", "Indian", "Italian", "Japanese")
PRICES = ("cheap", "moderate", "high", "less than £20", "£20-25", "more than £30")
RATINGS = ("low", "average", "high", "1 out of 5", "3 out of 5", "5 out of 5")
AREAS = ("riverside", "city centre")


@pytest.fixture
def csv_file(tmp_path):
    """504 representations of two restaurants each: delexicalised, each has two references."""
    lines = ["mr,ref"]
    for food, price, rating, area in itertools.product(FOODS, PRICES, RATINGS, AREAS):
        slots = f"food[{food}], priceRange[{price}], customer rating[{rating}], area[{area}]"
        lines += [
            f'"name[The Mill], {slots}, near[Café Rouge]",'
            f'"The Mill,  near cafe rouge, serves {food}."',
            f'"near[Avalon], {slots}, name[Cotto]","At {area}, by AVALON: {food} at the Cotto"']
    lines.append('"name[Cotto], near[Avalon]","Something else altogether"')
    path = tmp_path / "pairs.csv"
    path.write_text("\n".join(lines) + "\n", "utf-8-sig")
    return path


def records(folder, part):
    lines = (folder / f"{part}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_records_split_and_report(csv_file, tmp_path, capsys):
    out = tmp_path / "deep" / "e2e"
    main([str(csv_file), "--out", str(out)])
    parts = {part: records(out, part) for part in data.SPLITS}
    sizes = {part: len(rows) for part, rows in parts.items()}
    assert sizes == {"train": 154, "val": 150, "test": 200}
    sources = [row["source"] for rows in parts.values() for row in rows]
    assert len(set(sources)) == 504  # no representation in two parts
    row = next(row for row in parts["train"]
               if "food[Indian]" in row["source"] and "riverside" in row["source"])
    assert row["source"].startswith("name[xname], food[Indian], ")
    assert row["source"].endswith(", near[xnear]")
    assert row["references"] == ["xname, near xnear, serves Indian.",
                                 "At riverside, by xnear: Indian at xname"]
    assert row["names"] == {"xname": "The Mill", "xnear": "Café Rouge"}
    said = capsys.readouterr().out
    assert "1009 lines read; 1 dropped" in said and "pairs.csv:1010" in said
    assert "test: 200 representations" in said
    assert data.flags_of(str(out)) == e2e.FLAGS
    assert len(data.load_dataset(str(out))["train"]) == 154


def test_same_again_succeeds_and_other_data_is_refused(csv_file, tmp_path, capsys):
    out = tmp_path / "e2e"
    main([str(csv_file), "--out", str(out)])
    main([str(csv_file), "--out", str(out)])
    assert "nothing was written" in capsys.readouterr().out
    (out / "val.jsonl").write_text("mine\n", "utf-8")
    with pytest.raises(SystemExit) as stop:
        main([str(csv_file), "--out", str(out)])
    assert stop.value.code == 2
    assert "val.jsonl: holds other data" in capsys.readouterr().err
    assert (out / "val.jsonl").read_text("utf-8") == "mine\n"


def test_the_split_does_not_depend_on_the_order_of_lines(csv_file, tmp_path):
    lines = csv_file.read_text("utf-8-sig").splitlines()
    turned = tmp_path / "turned.csv"
    turned.write_text("\n".join([lines[0]] + lines[:0:-1]) + "\n", "utf-8")
    main([str(csv_file), "--out", str(tmp_path / "a")])
    main([str(turned), "--out", str(tmp_path / "b")])
    first, second = ([row["source"] for row in records(tmp_path / name, "test")] for name in "ab")
    assert first == second


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


@pytest.mark.parametrize("content, says", [
    (None, "pairs.csv: expected a readable CSV"),
    ("", "pairs.csv:1: expected a CSV with the columns mr and ref"),
    ("mr,text\na,b\n", "pairs.csv:1: expected a CSV with the columns mr and ref"),
    ("mr,ref\n", "pairs.csv:2: expected at least one line"),
    ("mr,ref\nname[Cotto],Cotto.\nplace: Oslo,Rain.\n", "pairs.csv:3: expected slots such as"),
    ("mr,ref\nname[Cotto],Cotto.\n", "expected more than 350 different representations"),
    (b"mr,ref\n\xff,\xff\n", "pairs.csv: expected a readable CSV in UTF-8"),
])
def test_bad_input_gets_one_line(tmp_path, capsys, content, says):
    path = tmp_path / "pairs.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(SystemExit) as stop:
        main([str(path), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and says in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written_and_no_csv(csv_file, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way", "utf-8")
    with pytest.raises(SystemExit) as stop:
        main([str(csv_file), "--out", str(tmp_path / "file")])
    assert stop.value.code == 2
    assert "expected a directory that can be written" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main(["--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "expected CSV files, or --download" in capsys.readouterr().err
